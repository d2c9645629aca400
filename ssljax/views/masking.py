"""Hidden places drawn inside the step, with the host's exact counts: `draw(key) -> bool [n]`."""

import math
from collections.abc import Callable, Sequence

import jax

__all__ = ["random", "units"]


def random(
  grid: Sequence[int], count: int, *, ratio: float = 0.75, rounding: str = "keep_floor"
) -> Callable:
  """Uniform random places, `count` of them; ratio and rounding made the count on the host."""
  places = math.prod(grid)

  def draw(key):
    # By rank, not by threshold: equal uniforms must not change the count.
    return jax.random.permutation(key, places) < count

  return draw


def units(
  grid: Sequence[int], count: int, *, unit: int | tuple[int, ...] = 2, ratio: float = 0.6
) -> Callable:
  """Random units of `unit` places a side, `count` places together."""
  sides = (unit,) * len(grid) if isinstance(unit, int) else tuple(unit)
  coarse = [size // side for size, side in zip(grid, sides)]
  few = random(coarse, count // math.prod(sides))

  def draw(key):
    hidden = few(key).reshape(coarse)
    for axis, side in enumerate(sides):
      hidden = hidden.repeat(side, axis=axis)
    return hidden.reshape(-1)

  return draw
