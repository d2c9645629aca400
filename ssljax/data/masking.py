"""Hidden places, drawn on the host with an exact count: bool [b n] over an r-dimensional grid.

Each component returns a `Hidden`; its draws are a function of (seed, epoch, index) for each
example.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ssljax.data import order


class Hidden(NamedTuple):
  """`draw(seed, epoch, index [b]) -> bool [b n]`, with `count` hidden places in each row; with
  `views` it is [b views n], each row with at most `count`.

  Where a method needs more than one set of places, `leaves` names them with the shape of one
  example, and `draw` returns them by name, int32: {"context": [b c k], "targets": [b c m t]} has c
  contexts of k visible places each, and m lists of t places that each of them is to predict.
  """

  draw: Callable
  count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
  grid: tuple[int, ...]
  views: int = 0
  leaves: Mapping[str, tuple[int, ...]] | None = None

  def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of one example's leaves of the batch."""
    if self.leaves is None:
      places = math.prod(self.grid)
      return {"hidden": ((self.views, places) if self.views else (places,), "bool")}
    return {name: (tuple(shape), "int32") for name, shape in self.leaves.items()}

  def batch(self, seed: int, epoch, index) -> dict[str, np.ndarray]:
    """The leaves of a batch by name."""
    drawn = self.draw(seed, epoch, index)
    return {"hidden": drawn} if self.leaves is None else drawn

  def shown(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the encoder does not see of each example, of several contexts the first: bool [b n]."""
    if self.leaves is None:
      return batch["hidden"]
    context = np.asarray(batch["context"])[:, 0]
    hidden = np.ones((len(context), math.prod(self.grid)), bool)
    np.put_along_axis(hidden, context, False, axis=1)
    return hidden


def generators(seed: int, epoch, index, name: str = "hidden") -> list[np.random.Generator]:
  """One generator for each example: keyed by (seed, epoch, index, name)."""
  keys = order.keys(seed, epoch, np.atleast_1d(index), name)
  return [np.random.Generator(np.random.Philox(key=key)) for key in keys]


def hidden_count(places: int, ratio: float, rounding: str = "keep_floor") -> int:
  """How many of `places` are hidden at `ratio`, in float64 as the released codes do it.

  keep_floor: keep int(n (1 - r)) (MAE; int(100 * (1 - .9)) is 9). hide_ceil: hide ceil(n r)
  (SimMIM; ceil(100 * .55) is 56). keep_round: keep round(n (1 - r)) (SparK).
  """
  if not 0 < ratio < 1:
    raise ValueError(f"hidden ratio {ratio} is not between 0 and 1")
  rules = {
    "keep_floor": lambda: places - int(places * (1 - ratio)),
    "hide_ceil": lambda: math.ceil(places * ratio),
    "keep_round": lambda: places - round(places * (1 - ratio)),
  }
  if rounding not in rules:
    raise ValueError(
      f"unknown rounding {rounding!r} of the hidden count: there are {sorted(rules)}"
    )
  count = rules[rounding]()
  if not 0 < count < places:
    raise ValueError(
      f"hidden ratio {ratio} hides {count} of {places} places: nothing would be left to learn"
    )
  return count


def hide_by_noise(noise: np.ndarray, count: int) -> np.ndarray:
  """The `count` places of largest noise: float [b n] -> bool [b n] (MAE's arg-sort; noise may be
  injected)."""
  kept = np.argsort(noise, axis=1, kind="stable")[:, : noise.shape[1] - count]
  hidden = np.ones(noise.shape, bool)
  np.put_along_axis(hidden, kept, False, axis=1)
  return hidden


def random(grid: Sequence[int], *, ratio: float = 0.75, rounding: str = "keep_floor") -> Hidden:
  """Uniform random places, exact count (He et al. 2021, 2111.06377)."""
  grid = _checked(grid)
  places = math.prod(grid)
  count = hidden_count(places, ratio, rounding)

  def draw(seed, epoch, index):
    noise = np.stack([g.random(places) for g in generators(seed, epoch, index)])
    return hide_by_noise(noise, count)

  return Hidden(draw, count, grid)


def units(grid: Sequence[int], *, unit: int | tuple[int, ...] = 2, ratio: float = 0.6) -> Hidden:
  """Random units of `unit` patches a side, ceil(ratio * units) of them (SimMIM: Xie et al. 2021,
  2111.09886)."""
  grid = _checked(grid)
  sides = (unit,) * len(grid) if isinstance(unit, int) else tuple(unit)
  if len(sides) != len(grid):
    raise ValueError(f"unit {unit} has {len(sides)} axes, the grid {grid} has {len(grid)}")
  for axis, (size, side) in enumerate(zip(grid, sides)):
    if side < 1 or size % side:
      raise ValueError(f"axis {axis} of the grid {grid} is not divisible by the unit {side}")
  coarse = random([g // s for g, s in zip(grid, sides)], ratio=ratio, rounding="hide_ceil")

  def draw(seed, epoch, index):
    hidden = coarse.draw(seed, epoch, index)
    hidden = hidden.reshape(len(hidden), *coarse.grid)
    for axis, side in enumerate(sides):
      hidden = hidden.repeat(side, axis=axis + 1)
    return hidden.reshape(len(hidden), -1)

  return Hidden(draw, coarse.count * math.prod(sides), grid)


def block(
  grid: Sequence[int],
  *,
  count: int = 0,
  ratio: float = 0.4,
  min_area: int = 16,
  aspect: float = 0.3,
) -> Hidden:
  """Union of random boxes, then single random places until `count` are hidden.

  The boxes are BEiT's (Bao et al. 2021, 2106.08254), the completion is BEiT v2's (Peng et al. 2022,
  2208.06366): `count` 75, 14x14. With `count` 0 it is int(n * ratio). On 3 axes and more the sides
  get independent aspects; on one axis boxes are runs.
  """
  grid = _checked(grid)
  places = math.prod(grid)
  count = count or int(places * ratio)
  if not 0 < count < places:
    raise ValueError(
      f"block count {count} is not between 1 and {places - 1}, the grid being {grid}"
    )
  if not 0 < aspect <= 1:
    raise ValueError(f"block aspect {aspect} is not in (0, 1]")

  def draw(seed, epoch, index):
    streams = generators(seed, epoch, index)
    counts = np.full(len(streams), count)
    return _completed(streams, _boxes(streams, grid, counts, min_area, aspect), counts)

  return Hidden(draw, count, grid)


def view_blocks(
  grid: Sequence[int],
  *,
  views: int = 2,
  ratio: Sequence[float] = (0.1, 0.5),
  probability: float = 0.5,
  min_area: int = 0,
  aspect: float = 0.3,
  exact: bool = False,
) -> Hidden:
  """Boxes in some of several views of each image, [b views n]: a view hides nothing, or with
  `probability` at most a share of its places that is drawn from `ratio`.

  iBOT's sampler (Zhou et al. 2021, 2111.07832), with min_area 0 for (shortest side // 3)². DINOv2's
  (2304.07193) is min_area 4; it hides places in exactly half of a batch's views and draws their
  shares from strata, here each view draws for itself, so that it does not depend on its neighbours.
  exact: single random places complete the boxes to the share, as in DINOv3.
  """
  grid = _checked(grid)
  places, min_area = math.prod(grid), min_area or (min(grid) // 3) ** 2
  if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < 1:
    raise ValueError(f"view_blocks ratio {tuple(ratio)}: (low, high) with 0 < low <= high < 1")
  if not 0 < probability <= 1:
    raise ValueError(f"view_blocks probability {probability} is not in (0, 1]")
  if not 0 < aspect <= 1 or views < 1:
    raise ValueError(f"view_blocks aspect {aspect} is not in (0, 1], or views {views} below 1")
  most = int(places * ratio[1])
  if not 0 < most:
    raise ValueError(f"view_blocks ratio {tuple(ratio)} hides no place of the grid {grid}")

  def view(seed, epoch, index, number):
    streams = generators(seed, epoch, index, f"hidden {number}" if number else "hidden")
    u = np.stack([g.random(2) for g in streams])
    share = ratio[0] + (ratio[1] - ratio[0]) * u[:, 1]
    counts = np.where(u[:, 0] < probability, (places * share).astype(int), 0)
    hidden = _boxes(streams, grid, counts, min_area, aspect)
    return _completed(streams, hidden, counts if exact else np.zeros_like(counts))

  def draw(seed, epoch, index):
    return np.stack([view(seed, epoch, index, number) for number in range(views)], axis=1)

  return Hidden(draw, most, grid, views)


def _completed(streams, hidden, counts) -> np.ndarray:
  """Single random places until each row has `counts` [b] of them: bool [b g1..gr] -> [b n]."""
  hidden = hidden.reshape(len(hidden), -1)
  noise = np.stack([g.random(hidden.shape[1]) for g in streams])
  rank = np.argsort(np.argsort(noise + hidden, axis=1), axis=1)
  return hidden | (rank < (counts - hidden.sum(1))[:, None])


def _boxes(streams, grid, counts, min_area, aspect, rounds=32, tries=10) -> np.ndarray:
  """BEiT's boxes for the whole batch at once: bool [b g1..gr], at most `counts` [b] hidden."""
  coordinates = np.meshgrid(*map(np.arange, grid), indexing="ij")
  hidden = np.zeros((len(streams), *grid), bool)
  left = np.broadcast_to(counts, len(streams)).copy()
  failed = np.zeros(len(streams), int)
  active = np.flatnonzero(left > 0)
  while len(active):
    draws = np.stack([streams[i].random((rounds, 2 * len(grid))) for i in active], axis=1)
    for u in draws:
      u = u[
        np.isin(np.arange(len(u)), np.flatnonzero((left[active] > 0) & (failed[active] < tries)))
      ]
      here = active[(left[active] > 0) & (failed[active] < tries)]
      if not len(here):
        break
      inside, fits = _inside(u, left[here], coordinates, grid, min_area, aspect)
      new = inside & ~hidden[here]
      gain = new.reshape(len(here), -1).sum(1)
      good = fits & (gain > 0) & (gain <= left[here])
      hidden[here[good]] |= new[good]
      left[here[good]] -= gain[good]
      failed[here] = np.where(good, 0, failed[here] + 1)
    active = active[(left[active] > 0) & (failed[active] < tries)]
  return hidden


def _inside(u, left, coordinates, grid, min_area, aspect) -> tuple[np.ndarray, np.ndarray]:
  """One candidate box each: bool [b g1..gr], and whether it is smaller than the grid on all axes:
  bool [b]."""
  axes = len(grid)
  area = min_area + (left - min_area) * u[:, 0]
  skew = math.log(aspect) * (1 - 2 * u[:, 1:axes])
  skew = np.concatenate([skew, -skew.sum(1, keepdims=True)], axis=1) / 2
  side = np.round(area[:, None] ** (1 / axes) * np.exp(skew)).astype(int)
  room = np.array(grid) - side
  fits = (side > 0).all(1) & (room > 0).all(1)
  corner = np.floor(u[:, axes:] * (np.maximum(room, 0) + 1)).astype(int)
  inside = np.ones((len(u), *grid), bool)
  for axis, place in enumerate(coordinates):
    low = corner[:, axis].reshape(-1, *[1] * axes)
    inside &= (place >= low) & (place < low + side[:, axis].reshape(low.shape))
  return inside, fits


def _checked(grid) -> tuple[int, ...]:
  grid = tuple(int(g) for g in grid)
  if not grid or min(grid) < 1:
    raise ValueError(f"the grid {grid} of patches has an empty axis")
  return grid
