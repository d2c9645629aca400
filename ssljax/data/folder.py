"""`folder:DIR`: a folder of image files, labelled by their parent folders if there are two."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ssljax.data.files import THREADS, in_parallel, text_digest
from ssljax.data.images import EXTENSIONS, picture, read_npy
from ssljax.data.sources import Source, check_split, take

SPLITS = ("train", "val", "valid", "validation", "test")


def open_folder(rest: str, split: str, channels: int, cache_dir: str | None = None) -> Source:
  """All images below DIR, sorted by path. Subfolders train, val, test are splits; else all is
  "train"."""
  root = os.path.expanduser(rest)
  if not os.path.isdir(root):
    raise FileNotFoundError(f"folder:{rest}: there is no such folder")
  names = [s for s in SPLITS if os.path.isdir(os.path.join(root, s))]
  if "train" not in names:
    names = []
  found = {name: _list(os.path.join(root, name)) for name in names} or {"train": _list(root)}
  classes = sorted({os.path.dirname(path) for paths, _ in found.values() for path in paths})
  wanted = check_split(split, tuple(found), f"folder:{rest}")
  paths, sizes = found[wanted]
  base = os.path.join(root, wanted) if wanted in names else root
  if not paths:
    raise ValueError(_empty(base, "no image was found"))
  source = _files(f"folder:{rest}", base, paths, sizes, channels)
  if len(classes) >= 2:
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[os.path.dirname(p)] for p in paths], np.int32)
    source = source._replace(labels=labels)
  return take(source, split, tuple(found))


def _list(root: str) -> tuple[list[str], list[int]]:
  """Relative paths (with /) and sizes of the images below `root`, sorted, none hidden."""
  found, seen = [], set()
  for place, folders, files in os.walk(root, followlinks=True):
    real = os.path.realpath(place)
    if real in seen:  # a link to a folder above would never end
      folders.clear()
      continue
    seen.add(real)
    folders[:] = [f for f in folders if not f.startswith(".")]
    for file in files:
      if not file.startswith(".") and file.lower().endswith((*EXTENSIONS, ".npy")):
        full = os.path.join(place, file)
        if os.path.isfile(full):
          path = os.path.relpath(full, root).replace(os.sep, "/")
          found.append((path, os.path.getsize(full)))
  found.sort()
  return [path for path, _ in found], [size for _, size in found]


def _empty(root: str, why: str) -> str:
  return f"folder:{root}: {why} (looked for *{', *'.join((*EXTENSIONS, '.npy'))} in it and below)"


def _files(name: str, root: str, paths: list[str], sizes: list[int], channels: int) -> Source:
  arrays = [path.lower().endswith(".npy") for path in paths]
  if any(arrays) and not all(arrays):
    raise ValueError(f"{name} holds both .npy files and pictures: put them in two folders")
  form = "npy" if any(arrays) else "picture"
  if form == "picture" and channels not in (1, 3):
    raise ValueError(
      f"{name} holds pictures, which have 1 or 3 channels, not {channels}: use .npy files"
    )
  pool = ThreadPoolExecutor(THREADS)

  def one(index):
    try:
      with open(os.path.join(root, paths[index]), "rb", buffering=0) as file:
        return file.read()
    except OSError:
      return b""

  dtype = first_readable(map(one, range(len(paths))), form, channels) if paths else "uint8"
  if dtype is None:
    raise ValueError(_empty(root, f"none of the {len(paths)} images can be read"))
  return Source(
    name=name,
    size=len(paths),
    labels=None,
    encoded=True,
    fetch=lambda index: in_parallel(pool, one, index),
    example_name=lambda index: paths[int(index)],
    fingerprint={
      "kind": "folder",
      "size": len(paths),
      "digest": text_digest(f"{p}\t{s}" for p, s in zip(paths, sizes)),
    },
    form=form,
    dtype=dtype,
    channels=channels,
    close=pool.shutdown,
  )


def first_readable(records, form: str, channels: int) -> str | None:
  """Dtype of the first record that decodes; None if there is none."""
  for data in records:
    try:
      if form == "picture":
        picture(data, channels).load()
        return "uint8"
      read_npy(data, 2**40, channels, None)
      return str(npy_dtype(data))
    except (
      Exception
    ):  # Pillow raises a dozen kinds on damaged files; each file is judged again when it is met
      continue
  return None


def npy_dtype(data: bytes) -> np.dtype:
  """Dtype of a .npy file, in native order."""
  import io

  return np.load(io.BytesIO(data), allow_pickle=False).dtype.newbyteorder("=")
