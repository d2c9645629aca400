"""What contrastive losses share: similarities over a temperature, and the mass of the negatives."""

from typing import Any

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics


def check_temperature(**named: Any) -> None:
  """Positive Python numbers, or learnt ones: arrays without axes.

  Raises:
    TypeError: neither a number nor a floating array.
    ValueError: a number that is not positive, an array with axes.
  """
  for name, value in named.items():
    if isinstance(value, (int, float)):
      arguments.positive(**{name: value})
    else:
      arguments.read(**{name: (value, "")})


def kind(weights: Any) -> str:
  """Weights are numbers or bool: their kind for `arguments.read`."""
  dtype = getattr(weights, "dtype", None)
  if dtype is not None and dtype == jnp.bool_:
    return "bool"
  return "int" if dtype is not None and jnp.issubdtype(dtype, jnp.integer) else "float"


def read(temperature: Any, weights: Any, **views: Any) -> tuple[Any, ...]:
  """Two views [b d] as unit rows, and weights [b] as numbers or None; rows of weight 0 are zero."""
  check_temperature(temperature=temperature)
  named = {name: (view, "b d") for name, view in views.items()}
  *arrays, weights = arguments.read(**named, weights=(weights, f"?b:{kind(weights)}"))
  if weights is not None:
    weights = arguments.widen(weights.astype(arrays[0].dtype))
    # where, before anything else: padding may hold anything, NaN too.
    arrays = [jnp.where(weights[:, None] > 0, x, 0.0) for x in arrays]
  return *(numerics.normalise(x) for x in arrays), weights


def capped(scale: Any, dtype: Any) -> jax.Array:
  """A scale of cosines as an array, at most 1/eps of the type (8e6 in float32); see `scaled`."""
  return jnp.minimum(jnp.asarray(scale, dtype), 1.0 / float(jnp.finfo(dtype).eps))


def scaled(x: jax.Array, temperature: Any) -> jax.Array:
  """x / temperature; a temperature below eps of the type (1.2e-7 in float32) counts as eps.

  Cosines are rounded to eps, so a smaller one tells no more of them apart. And XLA may compute
  logits twice, for their maximum and for exp(logit - maximum), with other rounding: from 1e9 on
  that difference alone overflows exp.
  """
  floor = float(jnp.finfo(x.dtype).eps)
  return x / jnp.maximum(jnp.asarray(temperature, x.dtype), floor)


def products(a: jax.Array, b: jax.Array) -> jax.Array:
  """Inner products of all rows, in full precision: [b d], [m d] or [b m d] -> [b m]."""
  letters = "id,jd->ij" if b.ndim == 2 else "id,ijd->ij"
  return jnp.einsum(letters, a, b, precision=numerics.EXACT)  # else a logit of 10 is off by 0.03


def similarities(
  a: jax.Array, b: jax.Array, temperature: Any, gamma: Any = None, eps: float = 1e-6
) -> jax.Array:
  """Log of the kernel for all pairs: [b d], [m d] or [b m d] -> [b m]."""
  cosines = products(a, b)
  if gamma is None:
    return scaled(cosines, temperature)
  square = jnp.square(a).sum(-1)[:, None] + jnp.square(b).sum(-1) - 2.0 * cosines
  return _kernel(square, temperature, gamma, eps)


def matches(
  a: jax.Array, b: jax.Array, temperature: Any, gamma: Any = None, eps: float = 1e-6
) -> jax.Array:
  """Log of the kernel row by row: [b d], [b d] -> [b]; exact for rows that are nearly equal."""
  if gamma is None:
    return scaled((a * b).sum(-1), temperature)
  return _kernel(jnp.square(a - b).sum(-1), temperature, gamma, eps)


def _kernel(square: jax.Array, temperature: Any, gamma: Any, eps: float) -> jax.Array:
  """-distance^gamma / temperature of squared distances; clamped, or the slope at 0 is infinite."""
  return scaled(-(jnp.maximum(square, eps**2) ** (gamma / 2)), temperature)


def mass(
  logits: jax.Array, where: jax.Array, weights: jax.Array | None = None, axis: int = -1
) -> jax.Array:
  """log Σ weights · exp(logits) over `where`; very low where nothing is summed, see `exists`."""
  where = jnp.broadcast_to(where, logits.shape)
  if weights is None:
    return numerics.logsumexp(logits, where, axis)
  return numerics.logsumexp(logits + log(weights), where & (weights > 0), axis)


def log(weights: jax.Array) -> jax.Array:
  """log of weights; very low, with gradient 0, where they are not above 0."""
  some = weights > 0
  low = jnp.finfo(weights.dtype).min / 4
  return jnp.where(some, jnp.log(jnp.where(some, weights, 1.0)), low)


def exists(mass: jax.Array) -> jax.Array:
  """Whether anything was summed."""
  return mass > jnp.finfo(mass.dtype).min / 8


def others(b: int) -> jax.Array:
  """All pairs but the diagonal: [b b]."""
  return ~jnp.eye(b, dtype=bool)


Blocks = tuple[jax.Array, jax.Array, jax.Array]


def blocks(
  z1: jax.Array, z2: jax.Array, temperature: Any, gamma: Any = None, eps: float = 1e-6
) -> Blocks:
  """Logits 1-2, 1-1 and 2-2 of two views. No [2b d] array: its rows would move between devices."""
  pairs = (z1, z2), (z1, z1), (z2, z2)
  across, first, second = (similarities(a, b, temperature, gamma, eps) for a, b in pairs)
  return across, first, second


def negatives(blocks: Blocks, weights: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Mass of the 2b - 2 other views, for the anchors of view 1 and of view 2: [b], [b]."""
  across, first, second = blocks
  there = others(len(across))
  down = None if weights is None else weights[:, None]
  one = jnp.logaddexp(mass(across, there, weights), mass(first, there, weights))
  two = jnp.logaddexp(mass(across, there, down, axis=0), mass(second, there, weights))
  return one, two


def keep(loss: jax.Array, weights: jax.Array | None) -> jax.Array:
  """The loss; 0 for examples of weight 0."""
  return loss if weights is None else jnp.where(weights > 0, loss, 0.0)


def memory(
  anchors: jax.Array,
  queue: jax.Array | None,
  own: jax.Array | None,
  queue_weights: Any,
  temperature: Any,
  gamma: Any = None,
) -> jax.Array:
  """Mass of a queue [q d] and of each anchor's own negatives [b s d] for unit anchors: [b]."""
  total = jnp.full(anchors.shape[:1], jnp.finfo(anchors.dtype).min / 4, anchors.dtype)
  if queue_weights is not None and queue is None:
    raise ValueError("queue_weights need a queue")
  if queue is not None:
    letters = "?q" if getattr(queue_weights, "ndim", 1) == 1 else "?b q"
    _, _, queue_weights = arguments.read(
      anchors=(anchors, "b d"),
      queue=(queue, "q d"),
      queue_weights=(queue_weights, f"{letters}:{kind(queue_weights)}"),
    )
    if queue_weights is not None:
      queue_weights = queue_weights.astype(anchors.dtype)
    logits = similarities(anchors, numerics.normalise(queue), temperature, gamma)
    total = mass(logits, jnp.ones((), bool), queue_weights)
  if own is not None:
    logits = similarities(anchors, numerics.normalise(own), temperature, gamma)
    total = jnp.logaddexp(total, mass(logits, jnp.ones((), bool)))
  return total
