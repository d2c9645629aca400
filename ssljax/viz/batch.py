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
    batch: image [b h w c], or several views of each: views, global, local [b v h w c]; hidden bool
      [b n], or [b v n] of the first v views, and label [b] where there are any.
    grid: rows and columns of places; n = rows x columns.

  Raises:
    ValueError: the batch has no image, or hidden does not fit the grid.
  """
  leaves = [key for key in ("image", "views", "global", "local") if key in batch]
  if not leaves:
    raise ValueError(f"a batch without image cannot be drawn; it has {', '.join(sorted(batch))}")
  rows = [row for leaf in leaves for row in view_rows(leaf, batch[leaf][:count])]
  image = rows[0][1]
  note = " · ".join(told(leaf, np.shape(batch[leaf])) for leaf in leaves)
  if batch.get("hidden") is not None:
    if grid is None or len(grid) != 2:
      raise ValueError(f"hidden places need a grid of (rows, columns) to be drawn, got {grid}")
    hidden = np.asarray(batch["hidden"], bool)
    if hidden.ndim == 2:
      rows.append(("visible", cover(image, hidden[:count], grid)))
    else:  # of several views: those that come first
      for v in range(hidden.shape[1]):
        rows.append((f"visible {v + 1}", cover(rows[v][1], hidden[:count, v], grid)))
    places = f"{hidden.sum(-1).mean():.4g} of {hidden.shape[-1]} places hidden"
    note += f" · grid {grid[0]} × {grid[1]} · {places}"
  return save(image_rows(rows, "One training batch", note), path)


def view_rows(leaf: str, images: np.ndarray) -> list[tuple[str, np.ndarray]]:
  """A row of pictures for each view: image [b h w c] is one, others [b v h w c] are v."""
  if leaf == "image":
    return [("view", as_rgb(images))]
  name = "view" if leaf == "views" else leaf
  return [(f"{name} {v + 1}", as_rgb(images[:, v])) for v in range(images.shape[1])]


def told(leaf: str, shape: tuple[int, ...]) -> str:
  """Count and size of the views of a leaf, in words."""
  height, width, channels = shape[-3:]
  count = f"{shape[0]}" if leaf == "image" else f"{shape[0]} × {shape[1]}"
  kind = f"{leaf} " if leaf in ("global", "local") else ""
  plural = "" if count == "1" else "s"
  return f"{count} {kind}view{plural} of {height} × {width} × {channels}"
