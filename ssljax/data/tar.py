"""`tar:SHARDS`: tar files in WebDataset layout, read at random places through an index of
offsets."""

import glob
import os
import re
import tarfile

import numpy as np

from ssljax.data.files import Shards, cached_index, text_digest
from ssljax.data.folder import first_readable
from ssljax.data.images import EXTENSIONS
from ssljax.data.sources import Source, check_labels, take
from ssljax.data.text import caption_of

COLUMNS = ("start", "length", "label", "npy", "key", "text_start", "text_length", "text_json")


def open_tar(rest: str, split: str, channels: int, cache_dir: str | None = None) -> Source:
  """Shards by a pattern (`/shards/*.tar`, `/shards/{000..012}.tar`); members KEY.jpg (png, bmp,
  webp, npy), KEY.cls, and KEY.txt or KEY.json with a caption.

  Members are read in place, never unpacked. The index is built once for each shard and cached.
  """
  name = f"tar:{rest}"
  paths = expand(rest)
  parts = [cached_index(path, "tar_text", index_tar, cache_dir) for path in paths]
  shard = np.repeat(np.arange(len(paths)), [len(p["start"]) for p in parts])
  start, length, label, npy, key, text_start, text_length, text_json = (
    np.concatenate([p[k] for p in parts]) for k in COLUMNS
  )
  if not len(start):
    raise ValueError(
      f"{name}: no image in {len(paths)} shards (looked for *{', *'.join(EXTENSIONS)}, *.npy)"
    )
  if npy.any() and not npy.all():
    raise ValueError(f"{name} holds both .npy members and pictures: put them in two sets")
  form = "npy" if npy.any() else "picture"
  if form == "picture" and channels not in (1, 3):
    raise ValueError(
      f"{name} holds pictures, which have 1 or 3 channels, not {channels}: use .npy members"
    )
  with_label = label >= 0
  if with_label.any() and not with_label.all():
    raise ValueError(f"{name}: {np.sum(~with_label)} of {len(label)} images have no .cls member")
  shards = Shards(paths, shard, start, length)
  dtype = first_readable((shards.read([i])[0] for i in range(len(start))), form, channels)
  if dtype is None:
    raise ValueError(f"{name}: none of the {len(start)} images can be read")
  texts = Shards(paths, shard, text_start, text_length)

  def example_name(i):
    return f"{os.path.basename(paths[shard[int(i)]])}/{key[int(i)].decode()}"

  def captions(index):
    lacking = np.flatnonzero(text_length <= 0)
    if len(lacking):
      raise ValueError(
        f"{name}: {len(lacking)} of {len(text_length)} images have no .txt or .json member, or an"
        f" empty one, {example_name(lacking[0])} first"
      )
    told = zip(texts.read(index), index)
    return [caption_of(record, text_json[i], example_name(i)) for record, i in told]

  sizes = (f"{os.path.basename(p)}\t{os.path.getsize(p)}" for p in paths)
  source = Source(
    name=name,
    size=len(start),
    labels=check_labels(label, len(label), name) if with_label.any() else None,
    encoded=True,
    fetch=shards.read,
    example_name=example_name,
    fingerprint={
      "kind": "tar",
      "size": len(start),
      "shards": len(paths),
      "digest": text_digest([*sizes, *map(repr, (start.tolist(), length.tolist()))]),
    },
    form=form,
    dtype=dtype,
    channels=channels,
    captions=captions if (text_length > 0).any() else None,
    close=lambda: (shards.close(), texts.close()),
  )
  return take(source, split, ("train",))


def expand(pattern: str) -> list[str]:
  """Shards of a pattern with * and ? or one {first..last} range, sorted."""
  pattern = os.path.expanduser(pattern)
  span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
  if span:
    width = len(span[1])
    numbers = range(int(span[1]), int(span[2]) + 1)
    paths = [pattern[: span.start()] + f"{n:0{width}d}" + pattern[span.end() :] for n in numbers]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
      raise FileNotFoundError(
        f"tar:{pattern}: {len(missing)} of {len(paths)} shards are missing, {missing[0]} first"
      )
    return paths
  paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
  if not paths:
    raise FileNotFoundError(f"tar:{pattern}: no file matches")
  return paths


def index_tar(path: str) -> dict[str, np.ndarray]:
  """Place and length of every image of a shard, its .cls label and the place of its .txt or .json
  member (-1 if none), in the order of the file."""
  images, labels, texts = [], {}, {}
  try:
    with tarfile.open(path, "r:") as shard:
      for member in shard:
        if not member.isreg() or os.path.basename(member.name).startswith("."):
          continue
        folder, file = os.path.split(member.name)
        stem, _, extension = file.partition(".")
        key, extension = os.path.join(folder, stem), "." + extension.lower()
        if extension.endswith(EXTENSIONS) or extension.endswith(".npy"):
          images.append((member.name, key, member.offset_data, member.size))
        elif extension == ".cls":
          labels[key] = _content(shard, member)
        elif extension == ".txt" or (extension == ".json" and key not in texts):
          texts[key] = (member.offset_data, member.size, extension == ".json")
      ended = member.offset_data + member.size if images else 0
  except tarfile.ReadError as error:
    raise ValueError(
      f"tar shard {path} cannot be indexed ({error}): it must be a whole, uncompressed tar"
    ) from error
  if ended > os.path.getsize(path):
    raise ValueError(f"tar shard {path} is cut off: its last member ends at byte {ended}")
  names = [name for name, *_ in images]
  told = [texts.get(key, (-1, -1, False)) for _, key, *_ in images]
  return {
    "key": np.array([name.encode() for name in names] or [b""])[: len(names)],
    "npy": np.array([name.lower().endswith(".npy") for name in names], bool),
    "start": np.array([start for *_, start, _ in images], np.int64),
    "length": np.array([length for *_, length in images], np.int64),
    "label": np.array([_label(labels.get(key), key, path) for _, key, *_ in images], np.int64),
    "text_start": np.array([start for start, _, _ in told], np.int64),
    "text_length": np.array([length for _, length, _ in told], np.int64),
    "text_json": np.array([is_json for *_, is_json in told], bool),
  }


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
  file = shard.extractfile(member)
  return file.read() if file else b""


def _label(text: bytes | None, key: str, path: str) -> int:
  if text is None:
    return -1
  try:
    return int(text)
  except ValueError:
    raise ValueError(
      f"tar shard {path}: {key}.cls holds {text[:20]!r}, not a class number"
    ) from None
