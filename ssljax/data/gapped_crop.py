"""Patches with gaps between them, put together to one picture (Latent MIM, Wei et al. 2024,
2407.15837): what is at the edge of a patch says little of its neighbour's."""

import math
from collections.abc import Sequence

import numpy as np

from ssljax.data.tensorflow import load
from ssljax.data.views import View, applied, crop_flip

# Keys of offsets lie beside those of several views of an example, which are far fewer.
OFFSETS = 1 << 16


def gapped_crop(
  *,
  size: Sequence[int] = (224, 224),
  patch: Sequence[int] = (16, 16),
  gap: int = 4,
  scale: Sequence[float] = (0.2, 1.0),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
  method: str = "bicubic",
  flip: bool = True,
) -> View:
  """`crop_flip` to a larger picture of cells, of each of which one patch is kept: image [size c].

  A cell is `patch` + `gap` pixels a side; the patch starts 0 to gap - 1 pixels below the cell's top
  and right of its left, drawn for each cell and axis by itself, as the released code does (so that
  the cell's last row and column are never seen, and gap 1 moves nothing). 224 pixels in patches of
  16 with gaps of 4 are cut from 280. Gap 0 is `crop_flip`.

  Args:
    size: (height, width) of what is left, which the encoder cuts into the same patches.
    patch: (height, width), those of the encoder, which a run checks.
    gap: pixels.
    scale, ratio, method, flip: of `data.views.crop_flip`.

  Raises:
    ValueError: a negative gap, or a size that is no multiple of the patch.
  """
  (height, width), patch = size, tuple(map(int, patch))
  if len(patch) != 2 or min(patch) < 1 or height % patch[0] or width % patch[1]:
    raise ValueError(f"data.views.size {tuple(size)} is not divisible by patches of {patch}")
  if gap < 0:
    raise ValueError(f"data.views.gap {gap}: 0 pixels or more are needed")
  grid = height // patch[0], width // patch[1]
  large = tuple(count * (side + gap) for count, side in zip(grid, patch))
  whole = crop_flip(size=large, scale=scale, ratio=ratio, method=method, flip=flip)
  first = corners(grid, patch, gap)

  def draw(key):
    tf = load()
    u = tf.random.stateless_uniform([2, *grid], key + [OFFSETS << 32, 0], alg="philox")
    return whole.draw(key) | {"offset": tf.cast(u * gap, tf.int32)}

  def finish(part, drawn):
    tf = load()
    image = whole.finish(part, drawn)
    moved = drawn["offset"][0] * large[1] + drawn["offset"][1]
    at = first + tf.repeat(tf.repeat(moved, patch[0], axis=0), patch[1], axis=1)
    return tf.gather(tf.reshape(image, [math.prod(large), image.shape[-1]]), at)

  def direct(part, drawn, out):
    image = np.empty((*large, out.shape[-1]), out.dtype)
    whole.direct(part, drawn, image)
    moved = drawn["offset"][0] * large[1] + drawn["offset"][1]
    at = first + moved.repeat(patch[0], axis=0).repeat(patch[1], axis=1)
    # mode: the default checks each place and copies once more.
    np.take(image.reshape(-1, out.shape[-1]), at, axis=0, out=out, mode="clip")

  return View(
    draw, applied(whole.window, finish), (height, width), None, whole.window, finish,
    direct if whole.direct else None, patch,
  )  # fmt: skip


def corners(grid: Sequence[int], patch: Sequence[int], gap: int) -> np.ndarray:
  """Where each pixel of a picture without gaps comes from in that with gaps, flat, if all patches
  lie in the first corner of their cells: int32 [h w]."""
  along = [
    (np.arange(count)[:, None] * (side + gap) + np.arange(side)).reshape(-1)
    for count, side in zip(grid, patch)
  ]
  return (along[0][:, None] * grid[1] * (patch[1] + gap) + along[1]).astype(np.int32)
