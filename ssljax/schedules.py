"""Values that move with training: step -> value. Pure; they work on Python numbers and in jit."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Schedule = Callable[[Any], jax.Array]


def warmup_cosine(
  total_steps: int,
  batch_size: int,
  *,
  base: float = 1.5e-4,
  per: int = 256,
  warmup_steps: int = 0,
  warmup_start: float = 0.0,
  end: float = 0.0,
  stretch: float = 1.0,
) -> Schedule:
  """Linear warm-up, then half a cosine.

  Args:
    base: the peak for a batch of `per` examples; the peak is base·batch_size/per (linear scaling).
      MAE divides by 256, SimMIM by 512; per=0 means that `base` is the peak itself.
    warmup_start, end: first and last value, absolute.
    stretch: the cosine is that of a run so many times as long, which ends before `end` (MSN: 1.25).

  Raises:
    ValueError: a warm-up that is not shorter than the run, a stretch below 1.
  """
  if stretch < 1:
    raise ValueError(f"schedule.stretch {stretch} must be at least 1")
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"schedule.warmup_steps {warmup_steps} must be less than total_steps {total_steps}"
    )
  peak = base * batch_size / per if per else base

  def value(step):
    step = jnp.asarray(step, jnp.float32)
    warm = warmup_start + (peak - warmup_start) * step / max(warmup_steps, 1)
    done = (step - warmup_steps) / (stretch * total_steps - warmup_steps)
    cosine = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
    return jnp.where(step < warmup_steps, warm, cosine)

  return value


def warmup_multistep(
  total_steps: int,
  batch_size: int,
  *,
  base: float = 1e-4,
  per: int = 512,
  warmup_steps: int = 0,
  warmup_start: float = 0.0,
  milestones: tuple[int, ...] = (),
  factor: float = 0.1,
) -> Schedule:
  """Linear warm-up, then steps down by `factor` at each milestone (SimMIM's 800-epoch runs).

  base, per: as in `warmup_cosine`. warmup_start: absolute.
  """
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"schedule.warmup_steps {warmup_steps} must be less than total_steps {total_steps}"
    )
  peak = base * batch_size / per if per else base

  def value(step):
    step = jnp.asarray(step, jnp.float32)
    warm = warmup_start + (peak - warmup_start) * step / max(warmup_steps, 1)
    passed = sum((step >= m).astype(jnp.float32) for m in milestones) if milestones else 0.0
    return jnp.where(step < warmup_steps, warm, peak * factor**passed)

  return value


def constant(
  total_steps: int, batch_size: int, *, base: float = 1.5e-4, per: int = 256
) -> Schedule:
  """The same value at every step: base·batch_size/per, or `base` if per is 0."""
  peak = base * batch_size / per if per else base
  return lambda step: jnp.full((), peak, jnp.float32)


_SHAPES = {
  "constant": lambda x: jnp.zeros_like(x),
  "linear": lambda x: x,
  "cosine": lambda x: 0.5 * (1 - jnp.cos(jnp.pi * x)),
}


def moving(spec: float | Mapping[str, Any], total_steps: int = 0) -> Schedule:
  """A number, or dict(schedule="cosine", start=.996, end=1.), as a function of the step.

  Shapes: "constant" (stays at start), "linear", "cosine" (half a period). `steps` says over how
  many steps; without it, the whole run. `every` holds the value for so many steps, as schedules by
  epoch do: DINO's warm-up of 30 epochs of e steps is steps=29*e, every=e.
  """
  if callable(spec):
    return spec
  if not isinstance(spec, Mapping):
    return lambda step: jnp.full((), spec, jnp.float32)
  known = {"schedule", "start", "end", "steps", "every"}
  if set(spec) - known or spec.get("schedule") not in _SHAPES:
    raise ValueError(f"schedule {dict(spec)} must name one of {', '.join(_SHAPES)}, start and end")
  shape, start, end = _SHAPES[spec["schedule"]], spec["start"], spec.get("end", spec["start"])
  steps = spec.get("steps", 0) or total_steps
  if steps <= 0:
    raise ValueError(f"schedule {dict(spec)} needs the number of steps")

  every = spec.get("every", 1)
  if type(every) is not int or every < 1:
    raise ValueError(f"schedule {dict(spec)}: every must be a positive whole number of steps")

  def value(step):
    held = jnp.asarray(step) // every * every
    return start + (end - start) * shape(jnp.clip(held.astype(jnp.float32) / steps, 0, 1))

  return value
