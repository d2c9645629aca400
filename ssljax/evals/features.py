"""Features of a labelled or unlabelled split, as NumPy arrays on the host."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Features(NamedTuple):
  """Frozen features of a split: pooled [n d] float32; label [n], index [n] (stable ids) or None."""

  pooled: np.ndarray
  label: np.ndarray | None = None
  # mypy: tuple has a method of this name, which nothing here needs.
  index: np.ndarray | None = None  # type: ignore[assignment]


def extract(
  encode: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]], batches: Iterable[Mapping]
) -> Features:
  """Pooled features of every valid row, in order: batches of [b h w c] -> [n d].

  Args:
    encode: batch -> {"pooled": [b d], ...}; compiled and placed by the caller. If it gives
      `valid`, `label` or `index` too, they replace the batch's, which then may hold fewer rows.
    batches: one pass; rows whose `valid` is False (padding, unreadable images) are dropped.

  Raises:
    ValueError: there is no valid example, or a feature is not finite.
  """
  rows, waiting = [], None
  for batch in batches:
    # Dispatch before the previous result is copied: host and device overlap.
    found = encode(batch)
    if waiting is not None:
      rows.append(_valid_rows(*waiting))
    waiting = ({**batch, **found}, found["pooled"])
  if waiting is not None:
    rows.append(_valid_rows(*waiting))
  return _joined(rows)


def pixels(batches: Iterable[Mapping[str, np.ndarray]], *, max_width: int = 4096) -> Features:
  """Raw pixels as features, the baseline without any encoder: images [b h w c] -> [n h*w*c].

  Integers are divided by their type's maximum, floats stay as they are. Only where h*w*c is above
  `max_width`, cells of f x f pixels are averaged, f the smallest that fits (see `pixel_cell`).
  """
  rows = []
  for batch in batches:
    image = np.asarray(batch["image"])
    scale = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1
    cell = pixel_cell(image.shape[1:], max_width)
    image = _cell_means(image.astype(np.float32) / np.float32(scale), cell)
    rows.append(_valid_rows(batch, image.reshape(image.shape[0], -1)))
  return _joined(rows)


def pixel_cell(shape: tuple[int, ...], max_width: int = 4096) -> int:
  """Side of the cells that `pixels` averages for images of shape (h, w, c); 1 = unchanged."""
  height, width, channels = shape
  cell = 1
  while -(-height // cell) * -(-width // cell) * channels > max_width and cell < max(height, width):
    cell += 1
  return cell


def class_ids(
  train: Features, test: Features, evaluation: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Checks what a label-based evaluation needs -> classes [c], train ids [n], test ids [m].

  Ids count the classes of train; a test class that train does not have gets -1 (always wrong).

  Raises:
    ValueError: labels are missing, of another length, of one class only, or have nothing in common.
  """
  for name, split in (("train", train), ("test", test)):
    size = len(split.pooled)
    if split.label is None:
      raise ValueError(f"{evaluation} needs labels, but the {name} split has none")
    if np.shape(split.label) != (size,):
      shape = np.shape(split.label)
      raise ValueError(f"{evaluation}: {size} {name} examples but labels of shape {shape}")
    if size == 0:
      raise ValueError(f"{evaluation}: the {name} split has no readable example")
  check_features(train, test, evaluation)
  labels, test_labels = np.asarray(train.label), np.asarray(test.label)
  classes, train_ids = np.unique(labels, return_inverse=True)
  if len(classes) < 2:
    raise ValueError(f"{evaluation}: all train examples have the same label ({classes[0]})")
  places = np.searchsorted(classes, test_labels).clip(max=len(classes) - 1)
  test_ids = np.where(classes[places] == test_labels, places, -1)
  if (test_ids < 0).all():
    raise ValueError(f"{evaluation}: the train and the test split have no label in common")
  return classes, train_ids, test_ids


def check_features(train: Features, test: Features, evaluation: str) -> None:
  """Raises ValueError unless both are finite [n d] tables of the same width."""
  for name, split in (("train", train), ("test", test)):
    if np.ndim(split.pooled) != 2:
      shape = np.shape(split.pooled)
      raise ValueError(f"{evaluation}: {name} features must be [n d], they are {shape}")
    # A sum is non-finite if any entry is, and needs no mask of the table's size.
    if not np.isfinite(np.sum(split.pooled, dtype=np.float64)):
      raise ValueError(f"{evaluation}: {name} features are not finite (NaN or infinity)")
  if train.pooled.shape[1] != test.pooled.shape[1]:
    widths = f"{train.pooled.shape[1]} and {test.pooled.shape[1]}"
    raise ValueError(f"{evaluation}: train and test features differ in width ({widths})")


def _valid_rows(batch: Mapping[str, np.ndarray], pooled: Any) -> Features:
  pooled = np.asarray(pooled).astype(np.float32, copy=False)
  keep = np.asarray(batch.get("valid", np.ones(len(pooled), bool)), bool)
  label, index = batch.get("label"), batch.get("index")
  return Features(
    pooled[keep],
    None if label is None else np.asarray(label)[keep],
    None if index is None else np.asarray(index)[keep],
  )


def _joined(rows: list[Features]) -> Features:
  if not sum(len(row.pooled) for row in rows):
    raise ValueError("no readable example to extract features from")
  pooled = np.concatenate([row.pooled for row in rows])
  columns: list[np.ndarray | None] = []
  for name in ("label", "index"):
    parts = [getattr(row, name) for row in rows]
    if any(part is None for part in parts):
      columns.append(None)
    else:
      columns.append(np.concatenate(parts))
  label, index = columns
  finite = np.isfinite(pooled).all(1)
  if not finite.all():
    which = np.flatnonzero(~finite) if index is None else index[~finite]
    examples = ", ".join(str(i) for i in which[:5])
    raise ValueError(f"features of {len(which)} examples are not finite (examples {examples} …)")
  return Features(pooled, label, index)


def _cell_means(image: np.ndarray, cell: int) -> np.ndarray:
  """Means of cell x cell pixels (fewer at the edge): [b h w c] -> [b h/cell w/cell c]."""
  if cell == 1:
    return image
  for axis in (1, 2):
    starts = np.arange(0, image.shape[axis], cell)
    count = np.diff(np.append(starts, image.shape[axis])).astype(np.float32)
    shape = [1] * image.ndim
    shape[axis] = len(starts)
    image = np.add.reduceat(image, starts, axis=axis) / count.reshape(shape)
  return image
