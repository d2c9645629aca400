"""Losses towards a standard Gaussian, along random directions."""

from typing import Any

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics

__all__ = (
  "lejepa",
  "sigreg",
)


def sigreg(
  z: jax.Array,
  key: jax.Array,
  directions: int = 1024,
  knots: int = 17,
  t_max: float = 3.0,
  weights: jax.Array | None = None,
) -> jax.Array:
  """How far a batch is from N(0, I), along random directions: [b … d], key -> [].

  Formula: mean over directions a of b Σ_k w_k [(mean_i cos t_k x_i - exp(-t_k²/2))² +
    (mean_i sin t_k x_i)²], x_i = a·z_i, t from 0 to t_max, w the doubled trapezoid's weights times
    exp(-t_k²/2).
  Source: LeJEPA, Balestriero and LeCun 2025, 2511.08544.
  Tested: NumPy; lightly SIGReg.

  Axes between b and d are views: the same directions, and the mean of their values. Around 1.05
  for N(0, I), whatever b is; 0.402 b for a batch of zeros, where the gradient is exactly 0. Give
  each step its own key. A row counts `weights` [b] times, 0 for padding, and b is their sum.

  >>> losses.sigreg(jnp.zeros((256, 4)), jax.random.key(0)).round(1)
  Array(102.9, dtype=float32)
  """
  (z,) = arguments.read(z=(z, "* b d"))
  (weights,) = arguments.read(weights=(arguments.numbers(weights), f"?{len(z)}"))
  if knots < 2 or directions < 1:
    raise ValueError(f"knots must be 2 or more and directions 1 or more, not {knots}, {directions}")
  arguments.positive(t_max=t_max)
  if weights is not None:
    weights = weights.reshape(-1, *[1] * (z.ndim - 1))
    z = jnp.where(weights != 0, z, 0.0)
  x = jnp.matmul(
    z, _unit_directions(key, z.shape[-1], directions, z.dtype), precision=numerics.EXACT
  )
  count = len(z) if weights is None else weights.sum()

  def mean(y: jax.Array) -> jax.Array:
    return (y if weights is None else weights * y).sum(0) / jnp.where(count == 0, 1, count)

  @jax.checkpoint  # one [b directions] at a time, not one for each knot
  def error(t: jax.Array) -> jax.Array:
    return jnp.square(mean(jnp.cos(t * x)) - jnp.exp(-t * t / 2)) + jnp.square(mean(jnp.sin(t * x)))

  t = jnp.linspace(0.0, t_max, knots, dtype=z.dtype)
  step = jnp.full(knots, 2 * t_max / (knots - 1), z.dtype).at[jnp.asarray([0, -1])].multiply(0.5)
  errors = jax.lax.map(error, t).reshape(knots, -1).mean(1)
  return count * (step * jnp.exp(-t * t / 2) * errors).sum()


def _unit_directions(key: jax.Array, d: int, number: int, dtype: Any) -> jax.Array:
  """Columns on the sphere: [d number]; the same for every type of the features."""
  normal = jax.random.normal(key, (d, number), jnp.float32).astype(dtype)
  return normal / jnp.linalg.norm(normal, axis=0)


def lejepa(
  z: jax.Array,
  key: jax.Array,
  weight: float = 0.05,
  global_views: int | None = None,
  directions: int = 1024,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Views towards their mean, and the batch towards N(0, I): [b v d], key -> [], parts.

  Formula: weight · SIGReg(z) + (1 - weight) · mean (c - z)², c the mean of an example's first
    `global_views` views (all of them where None).
  Source: LeJEPA, Balestriero and LeCun 2025, 2511.08544.
  Tested: NumPy; lightly LeJEPALoss.

  No teacher and no stop of gradients. The authors' minimal recipe has weight 0.02 and the mean of
  all views. SIGReg grows with b, so that `weight` depends on the batch. The parts `sigreg` and
  `invariance` are not weighted.

  >>> loss, parts = losses.lejepa(jnp.zeros((8, 2, 4)), jax.random.key(0))
  >>> sorted(parts)
  ['invariance', 'sigreg']
  """
  (z,) = arguments.read(z=(z, "b v d"))
  number = z.shape[1] if global_views is None else global_views
  if not 1 <= number <= z.shape[1]:
    raise ValueError(f"global_views must be 1 to {z.shape[1]}, not {number}")
  centre = z[:, :number].mean(1, keepdims=True)
  parts = {
    "sigreg": sigreg(z, key, directions),
    "invariance": jnp.square(centre - z).mean(),
  }
  return weight * parts["sigreg"] + (1 - weight) * parts["invariance"], parts
