"""Sources of examples: one string (or arrays in memory) and a split become a `Source` with random
access."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("digits", "digits_photo", "npz", "folder", "tfds", "tar")


class Source(NamedTuple):
  """Examples by index 0..size-1 of the opened split.

  `fetch(index [k])` gives arrays `[k h w c]` if not `encoded`, else a list of k byte strings
  (files). `read(index [k])`, where labels lie beside the images in the records, gives (list of
  bytes, labels [k]); otherwise `labels` is int32 [size], or None. `form`: "array", "picture"
  (JPEG, PNG, BMP, WebP) or "npy". `shape` is that of one example if all are equal, else None.
  `captions(index [k])`, where there are texts, gives k tuples of one or more of them.
  """

  name: str
  size: int
  labels: np.ndarray | None
  encoded: bool
  fetch: Callable
  example_name: Callable
  fingerprint: dict
  form: str = "array"
  dtype: str = "uint8"
  channels: int = 3
  shape: tuple[int, int, int] | None = None
  read: Callable | None = None
  captions: Callable | None = None
  close: Callable = lambda: None

  @property
  def labelled(self) -> bool:
    """Whether batches of this source carry `label`."""
    return self.labels is not None or self.read is not None


def open_source(
  source: str | Mapping,
  split: str = "train",
  *,
  channels: int = 3,
  cache_dir: str | None = None,
) -> Source:
  """Open `digits`, `digits_photo`, `npz:FILE`, `folder:DIR`, `tfds:NAME`, `tar:SHARDS` or arrays
  in memory.

  split: "train", "test[:90%]", "train[100:500]"; "{split}" in the string stands for the split's
  name. channels: grey images are replicated to 3, alpha is dropped. cache_dir keeps indexes of tar
  and TFRecord files. Raises ValueError or FileNotFoundError in the user's words.
  """
  if channels < 1:
    raise ValueError(f"channels is {channels}: an image has at least one")
  if isinstance(source, Mapping):
    from ssljax.data.arrays import open_mapping

    return take(open_mapping(source, "arrays in memory", channels), split, ("train",))
  if "{split}" in source:
    base = split_parts(split)[0]
    source, split = source.replace("{split}", base), split.replace(base, "train", 1)
  kind, _, rest = source.partition(":")
  if kind not in KINDS:
    raise ValueError(unknown("source", kind, KINDS, "as in folder:/path/to/images"))
  if kind in ("digits", "digits_photo"):
    from ssljax.data.arrays import open_digits

    return open_digits(kind, split, channels)
  if not rest:
    raise ValueError(f"source {source!r} says no place: write {kind}:/path, or tfds:name")
  if kind == "npz":
    from ssljax.data.arrays import open_npz as opened
  elif kind == "folder":
    from ssljax.data.folder import open_folder as opened
  elif kind == "tar":
    from ssljax.data.tar import open_tar as opened
  else:
    from ssljax.data.tfds import open_tfds as opened
  return opened(rest, split, channels, cache_dir)


def split_parts(split: str) -> tuple[str, str, str]:
  """Name, from and to of "name[from:to]"; the last two are "" where open."""
  match = re.fullmatch(r"\s*([\w./-]+)\s*(?:\[\s*(-?\d*%?)\s*:\s*(-?\d*%?)\s*\])?\s*", split)
  if not match:
    raise ValueError(f"split {split!r} is not of the form train, train[:90%] or train[100:500]")
  return match[1], match[2] or "", match[3] or ""


def split_bounds(split: str, size: int) -> tuple[int, int]:
  """First and last-plus-one example of a split of `size` examples; percents are rounded to the
  nearest."""
  _, start, stop = split_parts(split)

  def place(text, default):
    if text in ("", "-", "%"):
      return default
    if text.endswith("%"):
      value = round(size * int(text[:-1]) / 100)
    else:
      value = int(text)
    return min(max(value + size if value < 0 else value, 0), size)

  first, last = place(start, 0), place(stop, size)
  if first >= last:
    raise ValueError(f"split {split!r} is empty: there are {size} examples")
  return first, last


def check_split(split: str, names, where: str) -> str:
  """The name of the split, which must be one of `names`."""
  name = split_parts(split)[0]
  if name not in names:
    raise ValueError(unknown("split", name, names, f"in {where}"))
  return name


def unknown(what: str, given: str, known, hint: str = "") -> str:
  """Message for a misspelt name, with the nearest right ones first."""
  near = difflib.get_close_matches(given, list(known), 1)
  guess = f" Did you mean {near[0]!r}?" if near else ""
  return (
    f"unknown {what} {given!r} {hint}: there are {', '.join(map(repr, known))}.{guess}".replace(
      " :", ":"
    )
  )


def take(source: Source, split: str, names) -> Source:
  """The part of a whole source that a split string names; indices then count from 0."""
  check_split(split, names, source.name)
  first, last = split_bounds(split, source.size)
  if (first, last) == (0, source.size):
    return source
  fetch, read, name = source.fetch, source.read, source.example_name
  captions = source.captions
  return source._replace(
    name=f"{source.name} {split}",
    size=last - first,
    labels=None if source.labels is None else source.labels[first:last],
    fetch=lambda index: fetch(np.asarray(index) + first),
    read=None if read is None else (lambda index: read(np.asarray(index) + first)),
    captions=None if captions is None else (lambda index: captions(np.asarray(index) + first)),
    example_name=lambda index: name(int(index) + first),
    fingerprint=source.fingerprint | {"first": first, "last": last},
  )


def check_labels(labels, size: int, where: str) -> np.ndarray | None:
  """Labels as int32 [size], or None; a wrong length or type is an error."""
  if labels is None:
    return None
  labels = np.asarray(labels)
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.shape != (size,):
    raise ValueError(f"labels of {where} have shape {labels.shape}, but there are {size} images")
  if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != bool:
    raise ValueError(f"labels of {where} are {labels.dtype}, not integers")
  return labels.astype(np.int32)


def source_change(before: Mapping, after: Mapping) -> str | None:
  """How a source differs from the fingerprint stored with a checkpoint; None if it does not."""
  keys = [k for k in dict(before) | dict(after) if before.get(k) != after.get(k)]
  if not keys:
    return None
  told = [f"{k} was {before.get(k)!r}, is {after.get(k)!r}" for k in keys if k != "digest"]
  return "; ".join(told) or "the same number of examples, but their content differs"
