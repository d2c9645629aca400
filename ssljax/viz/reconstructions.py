"""Inputs, what the encoder saw of them, and what came back."""

from pathlib import Path

import numpy as np

from ssljax.viz.style import as_rgb, cover, image_rows, save


def reconstruction_figure(
  path: str | Path,
  image: np.ndarray,
  hidden: np.ndarray,
  grid: tuple[int, ...],
  reconstruction: np.ndarray | None = None,
  *,
  title: str = "Reconstructions of held-out images",
  count: int = 8,
) -> Path:
  """Writes a PNG with rows input, visible, reconstruction: [b h w c] 0..1, [b n], [b h w c] 0..1.

  Without a reconstruction (the target is not pixels) there are two rows. A reconstruction keeps
  the visible places of the input; values outside 0..1 are clipped.

  Raises:
    ValueError: shapes do not fit each other.
  """
  if reconstruction is not None and np.shape(reconstruction) != np.shape(image):
    shapes = f"{np.shape(image)} and {np.shape(reconstruction)}"
    raise ValueError(f"images and reconstructions differ in shape: {shapes}")
  shown = as_rgb(image[:count])
  rows = [("input", shown), ("visible", cover(shown, hidden[:count], grid))]
  share = np.mean(np.asarray(hidden, bool))
  note = f"{share:.0%} of {hidden.shape[1]} places are hidden"
  if reconstruction is not None:
    # Clipped before as_rgb, which would stretch what overshoots and shift all colours.
    rows.append(("reconstruction", as_rgb(np.clip(reconstruction[:count], 0, 1))))
    note += "; there the picture is the model's"
  return save(image_rows(rows, title, note), path)
