"""What the table needs to know of one loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, Any]


class Case(NamedTuple):
  """One loss with fixed scalars.

  name: as exported by `ssljax.losses` or `ssljax.targets`; a variant after a slash ("supcon/in").
  make: (rng, b) -> float64, integer and bool NumPy arrays by argument name, for a batch of b.
  call: the loss, a function of those arrays by name; scalars are in its closure.
  numpy: the published formula again, independently, in float64: same arrays -> same output(s).
  whole: names of arrays that do not have the batch as first axis (prototypes, queues, scalars).
  fixed: names of float arrays that get no gradient by the definition of the loss (teachers' side).
  rows: whether permuting the batch permutes a [b …] output and leaves a scalar as it is.
  rtol, low: relative tolerance in float32, and in bfloat16 (None: bfloat16 makes no sense, say why
    in a comment).
  gradient: whether it has one (an assignment under stop_gradient has not).
  stopped: only where a part of the loss is under stop_gradient though its arrays are not: `numpy`
    again as (at, **arrays), that part computed from the arrays `at`; finite differences are of it.
  """

  name: str
  make: Callable[[np.random.Generator, int], Arrays]
  call: Callable[..., Any]
  numpy: Callable[..., Any]
  whole: tuple[str, ...] = ()
  fixed: tuple[str, ...] = ()
  rows: bool = True
  rtol: float = 1e-5
  low: float | None = 0.05
  gradient: bool = True
  stopped: Callable[..., Any] | None = None
