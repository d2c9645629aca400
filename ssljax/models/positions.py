"""Where a token is: fixed tables, resizing of learned ones, relative buckets. All over r axes."""

import math
from collections.abc import Sequence

import numpy as np


def _sincos(places: np.ndarray, width: int) -> np.ndarray:
  """[n] places -> [n width]: sines, then cosines, of frequencies 10000^(-k/(width/2))."""
  if width % 2:
    raise ValueError(f"sin-cos positions need an even number of channels per axis, got {width}")
  frequency = 10000.0 ** (-np.arange(width // 2) / (width / 2))
  angle = places[:, None] * frequency[None]
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos(grid: Sequence[int], width: int) -> np.ndarray:
  """Fixed positions over a grid: -> float32 [n width], computed in float64.

  The last axis comes first: for images the first half of the channels encodes the column and the
  second half the row, as in MAE (He et al. 2021, 2111.06377); MoCo v3 has them the other way round.
  Each of the r axes gets 2·ceil(width/2r) channels; what exceeds `width` is cut off the end.
  """
  r = len(grid)
  per_axis = 2 * math.ceil(width / (2 * r))
  places = np.stack(np.meshgrid(*(np.arange(g) for g in grid), indexing="ij"), -1).reshape(-1, r)
  parts = [_sincos(places[:, axis].astype(np.float64), per_axis) for axis in reversed(range(r))]
  return np.concatenate(parts, axis=1)[:, :width].astype(np.float32)


def rotary(grid: Sequence[int], width: int, base: float = 100.0) -> np.ndarray:
  """Angles of rotary positions over a grid, for heads of `width`: -> float32 [n width/2].

  DINOv3's (Siméoni et al. 2025, 2508.10104): along each axis of g places the coordinate of place i
  is 2·(i + ½)/g - 1, whatever the size of the picture; axes in order, each with w = width/2r
  pairs, rounded down, of angles 2π·coordinate / base^(k/w). Pairs left over are not turned.

  Raises:
    ValueError: the width is odd or has no pair for every axis.
  """
  r = len(grid)
  pairs = width // (2 * r)
  if width % 2 or not pairs:
    raise ValueError(
      f"rotary positions over {r} axes need an even head width of {2 * r} or more, not {width}"
    )
  axes = [2 * (np.arange(g) + 0.5) / g - 1 for g in grid]
  places = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, r)
  frequency = 2 * np.pi * base ** -(np.arange(pairs) / pairs)
  angle = (places[..., None] * frequency).reshape(len(places), -1)
  return np.pad(angle, ((0, 0), (0, width // 2 - r * pairs))).astype(np.float32)


def causal_bias(n: int) -> np.ndarray:
  """Added to attention, lets a token see itself and those before it: float32 [1 n n]."""
  # Not -inf, of which fused kernels make NaN; it fits float16, and exp(-3e4) is 0 in float32.
  return np.where(np.tril(np.ones((n, n), bool)), 0.0, -3e4).astype(np.float32)[None]


def relative_index(grid: Sequence[int], prefix: int) -> np.ndarray:
  """Bucket of each pair of tokens in a relative-position table: -> int [m+n m+n].

  The table of BEiT (Bao et al. 2021, 2106.08254) over r axes: Π(2g-1) rows for the offsets between
  grid places, then three more: prefix to token, token to prefix, prefix to prefix.
  """
  r = len(grid)
  places = np.stack(np.meshgrid(*(np.arange(g) for g in grid), indexing="ij"), -1).reshape(-1, r)
  offset = places[:, None] - places[None] + np.array(grid) - 1
  bucket = np.ravel_multi_index(tuple(np.moveaxis(offset, -1, 0)), [2 * g - 1 for g in grid])
  rows = relative_rows(grid)
  index = np.full((prefix + len(places),) * 2, rows - 1)
  index[:prefix, prefix:] = rows - 3
  index[prefix:, :prefix] = rows - 2
  index[prefix:, prefix:] = bucket
  return index


def relative_rows(grid: Sequence[int]) -> int:
  """Rows of the table that `relative_index` points into."""
  return math.prod(2 * g - 1 for g in grid) + 3


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _resize_matrix(old: int, new: int, antialias: bool, offset: float = 0.0) -> np.ndarray:
  """[new old] weights of bicubic interpolation with half-pixel centres.

  Without antialias: kernel parameter a = -0.75 and edge values repeated; with it: a = -0.5, the
  kernel widened when shrinking, and weights outside the picture dropped. `jax.image.resize` has
  only the second kernel. offset: places are taken as if there were new + offset of them.
  """
  scale = old / (new + offset)
  centre = (np.arange(new) + 0.5) * scale - 0.5
  if antialias:
    width = max(scale, 1.0)
    weights = _cubic((centre[:, None] - np.arange(old)[None]) / width, a=-0.5)
    return weights / weights.sum(1, keepdims=True)
  matrix = np.zeros((new, old))
  for shift in range(-1, 3):
    tap = np.floor(centre).astype(int) + shift
    weight = _cubic(centre - tap, a=-0.75)
    np.add.at(matrix, (np.arange(new), np.clip(tap, 0, old - 1)), weight)
  return matrix


def resize_table(
  table: np.ndarray, old: Sequence[int], new: Sequence[int], antialias: bool = False
) -> np.ndarray:
  """Learned positions on another grid, bicubic along each axis: [n_old d] -> [n_new d]."""
  if tuple(old) == tuple(new):
    return table
  x = np.asarray(table, np.float64).reshape(*old, -1)
  for axis, (a, b) in enumerate(zip(old, new)):
    x = np.moveaxis(np.tensordot(_resize_matrix(a, b, antialias), x, (1, axis)), 0, axis)
  return x.reshape(math.prod(new), -1).astype(np.asarray(table).dtype)


def interpolation(old: Sequence[int], new: Sequence[int], how: str) -> list[np.ndarray]:
  """Weights [new_i old_i] float32 of each axis, to read a learned grid at another size.

  how: "size" (bicubic to the new size, as Transformers' Dinov2), "offset" (scaled by
  (new + .1)/old, as DINO and DINOv2 do in training: the .1 shifts the places a little) or
  "antialias" (as DINOv2 with registers).
  """
  offset = 0.1 if how == "offset" else 0.0
  pairs = zip(old, new)
  return [_resize_matrix(a, b, how == "antialias", offset).astype(np.float32) for a, b in pairs]
