"""A small data set read into one array, for those who keep it on the accelerator."""

import math

import numpy as np

from ssljax.data.pipeline import examples, recipe_of
from ssljax.data.sources import Source
from ssljax.data.views import View, Views

BATCH = 256


def in_memory(
  source: Source,
  views: View | Views | None = None,
  *,
  limit: int,
  channels: int = 3,
  workers: int = 0,
  max_pixels: int = 100_000_000,
) -> Source:
  """The source with all its examples in memory, as a fixed view leaves them: `fetch` gives
  [k h w c] of one shape. Sources that are arrays already stay as they are.

  Raises:
    ValueError: the images differ in size, cannot be read, or take more than `limit` bytes.
  """
  unchanged = recipe_of(views) == recipe_of(None)
  if unchanged and source.shape is not None and not source.encoded:
    fits(source, source.shape, limit)
    return source
  stream = examples(
    source, batch_size=min(BATCH, source.size), views=views,
    channels=channels, workers=workers, max_pixels=max_pixels,
  )  # fmt: skip
  try:
    with stream as batches:
      image, label = _collect(batches, source, limit)
      damaged = dict(batches.damaged)
  except ValueError as error:
    if "differ in size" not in str(error):
      raise
    raise ValueError(
      f"data.cache='device': images of {source.name} differ in size; with"
      " data.views_on='device' the host brings them to one, e.g. data.canvas=(64, 64)"
    ) from None
  if damaged:
    name, reason = next(iter(damaged.items()))
    raise ValueError(
      f"data.cache='device': {len(damaged)} images of {source.name} cannot be read, {name} first:"
      f" {reason}"
    )
  return source._replace(
    fetch=lambda index: image[np.asarray(index)], labels=label, encoded=False, form="array",
    shape=(*image.shape[1:3], image.shape[3]), read=None,
  )  # fmt: skip


def _collect(batches, source: Source, limit: int) -> tuple[np.ndarray, np.ndarray | None]:
  """All images [N h w c] and labels [N] of one pass."""
  image, label = np.empty(0), np.empty(source.size, np.int32)
  for number, batch in enumerate(batches):
    if not number:
      fits(source, batch["image"].shape[1:], limit)
      image = np.empty((source.size, *batch["image"].shape[1:]), source.dtype)
    rows = slice(number * BATCH, min((number + 1) * BATCH, source.size))
    count = rows.stop - rows.start  # the last batch is padded
    image[rows] = batch["image"][:count]
    label[rows] = batch.get("label", label[rows])[:count]
  return image, label if source.labelled else None


def fits(source: Source, shape: tuple[int, ...], limit: int) -> None:
  """Raises ValueError where a source of such images takes more than `limit` bytes."""
  size = source.size * math.prod(shape) * np.dtype(source.dtype).itemsize
  if size > limit:
    raise ValueError(
      f"data.cache='device': the {source.size:,} examples of {source.name} take"
      f" {size / 1e9:.3g} GB, more than half of the {2 * limit / 1e9:.3g} GB of a device"
    )
