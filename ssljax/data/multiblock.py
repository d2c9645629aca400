"""Contexts and the blocks that are predicted from them, drawn on the host with exact counts.

I-JEPA (Assran et al. 2023, 2301.08243): a few target blocks and one context without them.
data2vec 2.0 (Baevski et al. 2022, 2212.07525): several small contexts, each predicts the rest.
CAPI (Darcet et al. 2025, 2502.08769): a rectangle, shifted round the edges, predicts a few places.
"""

import math
from collections.abc import Sequence

import numpy as np

from ssljax.data.masking import Hidden, generators

TRIES = 8  # of 16x16 places 1 % of draws leave fewer than 69 for the context
STEPS = 256  # of scale and of aspect, in the table of block sizes


def multiblock(
  grid: Sequence[int],
  *,
  targets: int = 4,
  target_scale: tuple[float, float] = (0.15, 0.2),
  target_aspect: tuple[float, float] = (0.75, 1.5),
  context_scale: tuple[float, float] = (0.85, 1.0),
  context: int = 0,
  released: bool = False,
) -> Hidden:
  """Target blocks, and one large block without them as context: leaves `context` int32 [b 1 k],
  `targets` int32 [b 1 m t], sorted places. On more than two axes blocks lie in the last two and
  reach over all of the others.

  The released sampler cuts the lists of a loader batch to its shortest, from the bottom up: 110
  context places of 256 in a batch of 1, 69 of 128. Here every example keeps `context` places, drawn
  at random; 0 is 27 % of the grid, 69 of 256. A target keeps as many as the smallest block has (35
  of 256, where blocks have 35 to 54). An example whose context would be too small draws again.

  Args:
    target_scale, context_scale: area of a block over that of the grid; target_aspect: height over
      width (a context block is as square as the grid). The blocks of an example are equally large.
    released: as the released sampler, scale and aspect come from one uniform number and the last
      row and the last column are never drawn.

  Raises:
    ValueError: fewer than two axes, a grid too small for the blocks, or a context that they cannot
      always leave.
  """
  if len(grid) < 2 or min(*grid, targets) < 1:
    raise ValueError(
      f"multiblock needs a grid of two axes or more and a target, not {tuple(grid)} and {targets}"
    )
  *across, rows, columns = map(int, grid)
  plane, copies = (rows, columns), math.prod(across)
  small = _sizes(plane, target_scale, target_aspect, released)
  large = _sizes(plane, context_scale, (1.0, 1.0), released)
  area = int(small.prod(1).min())
  count = context or int(0.27 * rows * columns)
  most = int(large.prod(1).min() - small.prod(1).max())
  if not 0 < area or not 0 < count <= most:
    raise ValueError(
      f"multiblock context {count} of {rows}x{columns} places is not between 1 and {most}, what a"
      " context block less one target always leaves"
    )

  def draw(seed, epoch, index):
    streams = generators(seed, epoch, index)
    u = np.stack([g.random((TRIES, targets + 1, 2)) for g in streams])
    size = np.stack([g.random((TRIES, 2)) for g in streams])
    noise = np.stack([g.random((targets + 1, rows * columns)) for g in streams])
    seen, blocks = _draw(u, size, small, large, plane, released)
    enough = seen.sum(-1) >= count
    # Should no try leave enough, all targets fall on the first, which always does.
    alone = ~enough.any(1)
    first = np.arange(len(u)), enough.argmax(1)
    seen, blocks = seen[first], blocks[first]
    if alone.any():
      again = u[alone].copy()
      again[:, 0, :targets] = again[:, 0, :1]
      tried = _draw(again, size[alone], small, large, plane, released)
      seen[alone], blocks[alone] = tried[0][:, 0], tried[1][:, 0]
    return {
      "context": _places(seen[:, None], noise[:, :1], count, copies),
      "targets": _places(blocks, noise[:, 1:], area, copies)[:, None],
    }

  shapes = {"context": (1, count * copies), "targets": (1, targets, area * copies)}
  return Hidden(draw, (rows * columns - count) * copies, (*across, *plane), leaves=shapes)


def contexts(
  grid: Sequence[int],
  *,
  clones: int = 16,
  keep: float = 0.2,
  adjust: float = 0.07,
  block: int = 3,
) -> Hidden:
  """`clones` contexts of data2vec 2.0, unions of blocks, each with all other places as its target:
  leaves `context` int32 [b c k], `targets` int32 [b c 1 n-k], sorted places.

  int(n·(keep + adjust) / block²) centres, drawn with replacement, become blocks of `block` places a
  side; then random places join or leave until int(n·keep) stay: 39 of 196 (ViT-B; ViT-L has keep
  0.25 and adjust 0.1).

  Raises:
    ValueError: an even block, or shares that leave nothing to see or to predict.
  """
  grid = tuple(map(int, grid))
  n = math.prod(grid)
  count, centres = int(n * keep), int(n * (keep + adjust) / block ** len(grid))
  if block % 2 == 0:
    raise ValueError(f"contexts: block {block} is even, and a block has a centre")
  if not 0 < count < n or centres < 1 or clones < 1:
    raise ValueError(
      f"contexts: keep {keep}, adjust {adjust} of {n} places are {count} in {centres} blocks of"
      f" {block}: at least one of each is needed, and one place left to predict"
    )
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(n, -1)
  apart = np.abs(places[:, None] - places[None]).max(-1)
  near = apart <= block // 2

  def draw(seed, epoch, index):
    streams = generators(seed, epoch, index)
    middle = np.stack([g.integers(n, size=(clones, centres)) for g in streams])
    noise = np.stack([g.random((clones, n)) for g in streams])
    union = near[middle].any(2)
    order = np.argsort(noise + ~union, axis=-1)
    kept = np.sort(order[..., :count], axis=-1).astype(np.int32)
    rest = np.sort(order[..., count:], axis=-1).astype(np.int32)
    return {"context": kept, "targets": rest[:, :, None]}

  shapes = {"context": (clones, count), "targets": (clones, 1, n - count)}
  return Hidden(draw, n - count, grid, leaves=shapes)


def rolled(
  grid: Sequence[int],
  *,
  ratio: float = 0.65,
  predict: float = 0.05,
  aspect: tuple[float, float] = (0.5, 2.0),
) -> Hidden:
  """CAPI's context, a rectangle shifted round the edges of the grid, and a few places outside of it
  to predict: leaves `context` int32 [b 1 k], `targets` int32 [b 1 1 t], sorted places.

  int(n·ratio) places are hidden and int(hidden·predict) of them predicted: 90 seen, 8 predicted of
  256. The sides are rounded up, and the rectangle's last places are cut off to the exact count.

  Raises:
    ValueError: a grid without two axes, or ratios that leave nothing to see or to predict.
  """
  if len(grid) != 2:
    raise ValueError(f"rolled: a rectangle needs a grid of two axes, not {tuple(grid)}")
  rows, columns = map(int, grid)
  n = rows * columns
  hidden = int(n * ratio)
  count, asked = n - hidden, int(hidden * predict)
  if not 0 < hidden < n or asked < 1:
    raise ValueError(
      f"rolled: ratio {ratio} hides {hidden} of {n} places, of which predict {predict} are {asked}"
    )
  low = max(math.log(aspect[0]), math.log(count / columns**2))
  high = min(math.log(aspect[1]), math.log(rows**2 / count))

  def draw(seed, epoch, index):
    streams = generators(seed, epoch, index)
    u = np.stack([g.random(3) for g in streams])
    noise = np.stack([g.random(n) for g in streams])
    width = np.ceil(np.sqrt(count / np.exp(low + (high - low) * u[:, :1]))).astype(int)
    width = np.minimum(width, columns)
    down, right = (
      np.floor(u[:, i : i + 1] * size).astype(int) for i, size in ((1, rows), (2, columns))
    )
    place = np.arange(count)
    row, column = (place // width + down) % rows, (place % width + right) % columns
    seen = np.zeros((len(u), n), bool)
    np.put_along_axis(seen, row * columns + column, True, axis=1)
    context = np.flatnonzero(seen).reshape(len(u), count) % n
    return {
      "context": context[:, None].astype(np.int32),
      "targets": _places(~seen, noise, asked, 1)[:, None, None],
    }

  return Hidden(
    draw, hidden, (rows, columns), leaves={"context": (1, count), "targets": (1, 1, asked)}
  )


def _sizes(plane, scale, aspect, released: bool) -> np.ndarray:
  """Heights and widths that a block may have, each as often as the rule gives it: int [s 2]."""
  u = (np.arange(STEPS) + 0.5) / STEPS
  a, b = (u, u) if released else (x.reshape(-1) for x in np.meshgrid(u, u))
  area = np.floor(math.prod(plane) * (scale[0] + a * (scale[1] - scale[0])))
  ratio = aspect[0] + b * (aspect[1] - aspect[0])
  sides = np.round(np.sqrt(np.stack([area * ratio, area / ratio], 1))).astype(int)
  return np.clip(sides, 1, np.array(plane) - int(released))


def _draw(u, size, small, large, plane, released: bool) -> tuple[np.ndarray, np.ndarray]:
  """Places of the context, bool […, n], and of the targets, bool […, m, n], from uniforms: of
  corners […, m+1, 2], the context's last, and of sizes […, 2]."""
  pick = lambda table, v: table[(v * len(table)).astype(int)]  # noqa: E731
  side = np.repeat(pick(small, size[..., 0])[..., None, :], u.shape[-2], axis=-2)
  side[..., -1, :] = pick(large, size[..., 1])
  room = np.array(plane) - side + (0 if released else 1)
  low = np.floor(u * room).astype(int)
  inside = [
    (np.arange(n) >= low[..., i, None]) & (np.arange(n) < (low + side)[..., i, None])
    for i, n in enumerate(plane)
  ]
  blocks = (inside[0][..., :, None] & inside[1][..., None, :]).reshape(*u.shape[:-1], -1)
  targets = blocks[..., :-1, :]
  return blocks[..., -1, :] & ~targets.any(-2), targets


def _places(inside: np.ndarray, noise: np.ndarray, count: int, copies: int) -> np.ndarray:
  """`count` random places of each set, sorted, in every copy of the plane: [… n] -> [… count·c]."""
  order = np.argsort(noise + ~inside, axis=-1)[..., :count]
  order = np.sort(order, axis=-1)
  shift = np.arange(copies) * inside.shape[-1]
  return (shift[:, None] + order[..., None, :]).reshape(*order.shape[:-1], -1).astype(np.int32)
