"""Histograms of oriented gradients as targets."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ("hog", "hog_tokens")


def _gradients(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sobel differences along columns and rows, borders reflected: [… h w c] -> twice [… h w c]."""
  pad = [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)]
  x = jnp.pad(x, pad, mode="reflect")
  rows = x[..., :-2, :, :] + 2 * x[..., 1:-1, :, :] + x[..., 2:, :, :]
  columns = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
  across = rows[..., :-2, :] - rows[..., 2:, :]
  down = columns[..., :-2, :, :] - columns[..., 2:, :, :]
  return across, down


def _window(width: int, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
  """Gaussian of `width` pixels, deviation width // 2, sum 1, repeated over an image: [h w 1]."""
  if any(size % width for size in shape):
    raise ValueError(f"image size {tuple(shape)} is not divisible by the window of {width}")
  line = jnp.exp(
    -0.5 * jnp.square((jnp.arange(width, dtype=dtype) - (width - 1) / 2) / (width // 2))
  )
  tile = jnp.outer(line, line) / jnp.square(line.sum())
  return jnp.tile(tile, [size // width for size in shape])[..., None]


def hog(x: jax.Array, *, bins: int = 9, cell: int = 8, window: int = 0) -> jax.Array:
  """Histograms of gradient directions by cell and channel: [… h w c] -> [… h/cell w/cell c bins].

  Formula: in each cell Σ |g| at bin ⌊angle·bins/π⌋, angle = atan2(g_x, g_y) mod π; then over its
    length ‖·‖₂ over the bins.
  Source: MaskFeat, Wei et al. 2021, 2112.09133; HOG, Dalal and Triggs 2005.
  Tested: NumPy; torch statement of the published layer; golden values.

  Not the HOG of scikit-image: a pixel votes for one bin and one cell, colours stay apart, there are
  no blocks, and the angle is that of (x, y), so that a ramp along x lies in the middle bin.
  MaskFeat takes it from normalised images. A flat cell is 0. window > 0 weighs the votes by
  Gaussians of that width, repeated over the image (mmpretrain has 16, MaskFeat none). Nothing flows
  back into x.

  >>> ramp = jnp.broadcast_to(jnp.arange(16.0)[:, None], (1, 16, 16, 1))
  >>> targets.hog(ramp)[0, 0, 0, 0].tolist()
  [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]

  Raises:
    ValueError: the image is no multiple of the cell or window, or smaller than 2 by 2.
  """
  x = jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
  *lead, h, w, c = x.shape
  if h % cell or w % cell or min(h, w) < 2:
    raise ValueError(f"image size {(h, w)} is not divisible by the cell of {cell} pixels")
  across, down = _gradients(x)
  # Opposite gradients are one direction: turned to angles from 0 up to π, without π.
  turn = (across < 0) | ((across == 0) & (down < 0))
  across, down = jnp.where(turn, -across, across), jnp.where(turn, -down, down)
  # The bin is the number of bounds at or below the angle. An arctangent, divided and rounded down,
  # misses bounds that borders hit exactly: there the reflection makes one difference 0.
  angles = [k * math.pi / bins for k in range(1, bins)]
  cosines = jnp.array([round(math.cos(angle), 15) for angle in angles], x.dtype)
  sines = jnp.array([math.sin(angle) for angle in angles], x.dtype)
  beyond = across[..., None] * cosines - down[..., None] * sines
  place = (beyond >= 0).sum(-1)
  votes = jnp.sqrt(jnp.square(across) + jnp.square(down))
  if window:
    votes = votes * _window(window, (h, w), x.dtype)
  votes = jnp.where(place[..., None] == jnp.arange(bins), votes[..., None], 0.0)
  votes = votes.reshape(*lead, h // cell, cell, w // cell, cell, c, bins).sum((-5, -3))
  return votes / jnp.maximum(jnp.sqrt(jnp.square(votes).sum(-1, keepdims=True)), 1e-12)


def hog_tokens(
  x: jax.Array, patch: Sequence[int], *, bins: int = 9, cell: int = 8, window: int = 0
) -> jax.Array:
  """`hog` cut into patches: [… h w c] -> [… n t], t = c·bins·(patch/cell)².

  Formula: the cells of a patch side by side, ordered (channel, bin, cell row, cell column).
  Source: MaskFeat, Wei et al. 2021, 2112.09133.
  Tested: NumPy; torch statement of the published layer.

  108 values for patches of 16 pixels. The loss of MaskFeat is
  losses.masked_l2(pred, target, hidden, over="batch"). Frames of a video are leading axes.

  >>> targets.hog_tokens(jnp.ones((2, 32, 32, 3)), (16, 16)).shape
  (2, 4, 108)

  Raises:
    ValueError: patches are no multiple of cells, or images no multiple of patches.
  """
  *lead, h, w, c = x.shape
  if any(side % cell for side in patch) or h % patch[0] or w % patch[1]:
    raise ValueError(f"image size {(h, w)}, patch {tuple(patch)} and cell {cell} do not divide")
  rows, columns = (side // cell for side in patch)
  cells = hog(x, bins=bins, cell=cell, window=window)
  cells = cells.reshape(*lead, h // patch[0], rows, w // patch[1], columns, c, bins)
  first = len(lead)
  order = (first, first + 2, first + 4, first + 5, first + 1, first + 3)
  cells = cells.transpose(*range(first), *order)
  return cells.reshape(*lead, (h // patch[0]) * (w // patch[1]), -1)
