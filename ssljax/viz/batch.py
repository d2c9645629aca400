"""What a batch looks like: the views, and what is hidden from the encoder."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ssljax.viz.style import as_rgb, cover, image_rows, save


def batch_figure(
  path: str | Path,
  batch: Mapping[str, np.ndarray],
  grid: tuple[int, ...] | None = None,
  *,
  count: int = 8,
) -> Path:
  """Writes a PNG of the first views of a batch and of their hidden places.

  Args:
    batch: image [b h w c]; hidden bool [b n] and label [b] where there are any.
    grid: rows and columns of places; n = rows x columns.

  Raises:
    ValueError: the batch has no image, or hidden does not fit the grid.
  """
  if "image" not in batch:
    raise ValueError(f"a batch without image cannot be drawn; it has {', '.join(sorted(batch))}")
  image = as_rgb(batch["image"][:count])
  height, width, channels = np.shape(batch["image"])[1:]
  rows = [("view", image)]
  size, views = len(batch["image"]), "view" if len(batch["image"]) == 1 else "views"
  note = f"{size} {views} of {height} × {width} × {channels}"
  if batch.get("hidden") is not None:
    if grid is None or len(grid) != 2:
      raise ValueError(f"hidden places need a grid of (rows, columns) to be drawn, got {grid}")
    hidden = np.asarray(batch["hidden"], bool)
    rows.append(("visible", cover(image, hidden[:count], grid)))
    places = f"{hidden.sum(1).mean():.4g} of {hidden.shape[1]} places hidden"
    note += f" · grid {grid[0]} × {grid[1]} · {places}"
  return save(image_rows(rows, "One training batch", note), path)
