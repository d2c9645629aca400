"""JPEG decode, inception crop to 224, flip: the project's pipeline beside a torchvision DataLoader.

  python experiments/bench_input.py                              all sets, tar: and folder:
  python experiments/bench_input.py --sets=original --passes=7
  python experiments/bench_input.py --torch=bicubic,bilinear --memory_passes=20

Sets, all of them natural photographs from $SSLJAX_TEST_DATA (default ../shared/data):
  original   the 1,700 pictures of imagenette224_train.tar, 224×224, the files' bytes
  varied     the 58 pictures of jpeg_varied.tar, sides of 40 to 2,400, the files' bytes, repeated
  imagenet   the first 1,000 of `original` enlarged to a shorter side of 375 in a 500×375 or 375×500
             frame and encoded anew (quality 90, 4:2:0): the size of an ImageNet picture, about
             its number of bytes, but smoother than one

ssljax: `batches` of a `tar:` or `folder:` source, tf.data threads for all cores; decoding is cut to
the crop. torchvision: ImageFolder, RandomResizedCrop and RandomHorizontalFlip on PIL pictures, a
DataLoader with as many worker processes as there are cores, uint8 tensors, batches alike. Both crop
20–100 % of the area, resize bicubically with antialiasing, and shuffle.

Contestants take turns, when the buffers of all are full; the table shows medians. A turn begins
with `--lead` batches that are not timed, more than either can hold ready. Without
them the pipelines look up to ten times as fast as they are. A turn lasts about a second.
CPU time per image (all processes and threads, the lead included) is shown
beside it: it does not depend on what else runs.

Memory: resident size of this process at the quarters of one long epoch.
"""

import argparse
import collections
import io
import os
import pathlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import psutil
import side_by_side

from ssljax.data import pipeline, sources, views

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get("SSLJAX_TEST_DATA", ROOT / ".." / "shared" / "data"))
PACKAGES = ("ssljax", "tensorflow-cpu", "tensorflow", "torch", "torchvision", "pillow", "numpy")


def pictures(name: str) -> list[tuple[str, bytes, int]]:
  """(name, bytes, label) of the JPEGs of a set."""
  file = "jpeg_varied.tar" if name == "varied" else "imagenette224_train.tar"
  with tarfile.open(DATA / file) as tar:
    members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
  found = []
  for path, data in sorted(members.items()):
    if path.endswith(".jpg"):
      found.append((path, data, int(members.get(path[:-4] + ".cls", b"0"))))
  if name == "varied":
    return [(f"{turn:02d}_{path}", data, 0) for turn in range(10) for path, data, _ in found]
  if name == "imagenet":
    return [(p, enlarged(data, i), label) for i, (p, data, label) in enumerate(found[:1000])]
  return found


def enlarged(data: bytes, number: int) -> bytes:
  """A picture as 500×375 (every fourth 375×500), quality 90."""
  from PIL import Image

  size = (375, 500) if number % 4 == 0 else (500, 375)
  out = io.BytesIO()
  picture = Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.LANCZOS)
  picture.save(out, "JPEG", quality=90)
  return out.getvalue()


def write(place: pathlib.Path, found: list[tuple[str, bytes, int]]) -> None:
  """The same files twice: place/set.tar in WebDataset layout and place/folder/LABEL/NAME."""
  with tarfile.open(place / "set.tar", "w") as tar:
    for name, data, label in found:
      for member, body in ((name, data), (name[:-4] + ".cls", str(label).encode())):
        info = tarfile.TarInfo(member)
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
      folder = place / "folder" / f"{label:03d}"
      folder.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(data)


def ours(place: str, batch: int, workers: int) -> Iterator[Any]:
  """Endless batches of the project's pipeline."""
  source = sources.open_source(place, "train", cache_dir=tempfile.mkdtemp())
  view = views.crop_flip(size=(224, 224), scale=(0.2, 1.0))
  return pipeline.batches(source, batch_size=batch, views=view, workers=workers)


def theirs(place: pathlib.Path, batch: int, workers: int, method: str) -> Iterator[Any]:
  """Endless batches of a DataLoader; its workers persist from epoch to epoch."""
  torch = side_by_side.import_torch(1)
  from torchvision import datasets, transforms

  how = transforms.InterpolationMode(method)
  view = transforms.Compose([
    transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=how),
    transforms.RandomHorizontalFlip(),
    transforms.PILToTensor(),
  ])  # fmt: skip
  loader = torch.utils.data.DataLoader(
    datasets.ImageFolder(str(place), view), batch_size=batch, shuffle=True, drop_last=True,
    num_workers=workers, persistent_workers=True, prefetch_factor=2,
  )  # fmt: skip
  while True:
    yield from loader


def draw(stream: Iterator[Any], count: int) -> None:
  """Draws `count` batches."""
  collections.deque((next(stream) for _ in range(count)), maxlen=0)


def cpu_seconds() -> float:
  """CPU time of this process and of its children so far."""
  me = psutil.Process()
  return sum(sum(p.cpu_times()[:2]) for p in (me, *me.children(recursive=True)))


def settle() -> None:
  """Waits until all buffers are full: else the work of one contestant is counted as the next's."""
  before = -1.0
  while (now := cpu_seconds()) > before + 0.02:
    before = now
    time.sleep(0.3)


def turns(streams: dict[str, Iterator[Any]], args: argparse.Namespace) -> dict[str, np.ndarray]:
  """Wall and CPU milliseconds per image: {name: [passes 2]}. The others' buffers fill during the
  untimed lead, and then they are idle; the first round is not kept."""
  took = {name: np.zeros((args.passes, 2)) for name in streams}
  for turn in range(-1, args.passes):
    for name, stream in streams.items():
      settle()
      draw(stream, args.lead)
      start = time.perf_counter(), cpu_seconds()
      draw(stream, args.count)
      if turn >= 0:
        end = time.perf_counter(), cpu_seconds()
        took[name][turn] = 1e3 * np.subtract(end, start) / (args.count * args.batch)
  return took


def speeds(place: pathlib.Path, args: argparse.Namespace) -> list[list[str]]:
  """Images/s and CPU time of each contestant on one set."""
  # torchvision first: it forks its workers, and TensorFlow's threads do not survive a fork.
  methods = [m for m in args.torch.split(",") if m]
  streams = {
    f"torchvision {m}": theirs(place / "folder", args.batch, args.workers, m) for m in methods
  }
  for stream in streams.values():
    next(stream)
  for kind, where in (("tar", "set.tar"), ("folder", "folder")):
    streams[f"ssljax {kind}:"] = ours(f"{kind}:{place / where}", args.batch, args.workers)
  took = {name: np.median(times, axis=0) for name, times in turns(streams, args).items()}
  for stream in streams.values():
    stream.close()
  rows = []
  for name, (wall, cpu) in took.items():
    against = [took[f"torchvision {m}"] / (wall, cpu) for m in methods]
    notes = [" / ".join(f"{ratio[i]:.2f}×" for ratio in against) for i in range(2)]
    notes = notes if name.startswith("ssljax") else ["", ""]
    rows.append([name, f"{1e3 / wall:.0f}", notes[0], f"{cpu:.2f}", notes[1]])
  return rows


def memory(place: pathlib.Path, size: int, args: argparse.Namespace) -> list[list[str]]:
  """Resident MiB of this process at the quarters of `memory_passes` passes."""
  me, rows = psutil.Process(), []
  for kind, where in (("tar", "set.tar"), ("folder", "folder")):
    with ours(f"{kind}:{place / where}", args.batch, args.workers) as stream:
      draw(stream, args.lead)
      marks = [me.memory_info().rss / 2**20]
      for _ in range(4):
        draw(stream, max(1, args.memory_passes * size // args.batch // 4))
        marks.append(me.memory_info().rss / 2**20)
    rows.append([f"ssljax {kind}:", *(f"{mark:.0f}" for mark in marks)])
  return rows


def run() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--sets", default="original,varied,imagenet")
  parser.add_argument("--torch", default="bicubic", help="interpolations of torchvision, by comma")
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--lead", type=int, default=12, help="untimed batches before each turn")
  parser.add_argument("--count", type=int, default=48, help="timed batches of a turn")
  parser.add_argument("--passes", type=int, default=7, help="turns of each")
  parser.add_argument("--workers", type=int, default=side_by_side.cores())
  parser.add_argument(
    "--memory_passes", type=int, default=8, help="passes over `original`; 0: none"
  )
  parser.add_argument("--json", default="", help="write the tables here, too")
  args = parser.parse_args()
  where = side_by_side.machine(PACKAGES)
  rows, marks = [], []
  for name in args.sets.split(","):
    with tempfile.TemporaryDirectory() as folder:
      found = pictures(name)
      write(pathlib.Path(folder), found)
      mean = np.mean([len(data) for _, data, _ in found]) / 1024
      label = f"{name}: {len(found)} files, {mean:.0f} KiB"
      rows += [[label, *row] for row in speeds(pathlib.Path(folder), args)]
      if name == "original" and args.memory_passes:
        marks = memory(pathlib.Path(folder), len(found), args)
  title = f"JPEG -> inception crop 224, bicubic -> flip, batch {args.batch}, {args.workers} workers"
  header = [
    "set",
    "pipeline",
    "images/s",
    f"× torchvision {args.torch}",
    "CPU ms/image",
    "× by CPU",
  ]
  side_by_side.report(title, header, rows, where, args.json)
  if marks:
    header = ["pipeline", *(f"at {quarter}/4" for quarter in range(5))]
    path = args.json and args.json.replace(".json", "_memory.json")
    title = f"Resident MiB over {args.memory_passes} passes of `original`"
    side_by_side.report(title, header, marks, where, path)


if __name__ == "__main__":
  sys.exit(run())
