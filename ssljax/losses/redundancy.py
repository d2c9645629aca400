"""Losses without negatives: decorrelation of a batch's features."""

from typing import Any

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics

__all__ = (
  "barlow_twins",
  "batch_barlow",
  "covariance_term",
  "tico",
  "variance_term",
  "vibcreg",
  "vicreg",
)

Parts = dict[str, jax.Array]


def barlow_twins(
  z1: jax.Array,
  z2: jax.Array,
  redundancy_weight: float = 0.0051,
  eps: float = 1e-5,
  scale: float = 1.0,
  unbiased: bool = False,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Cross-correlation of two views towards the identity: [b d], [b d] -> [].

  Formula: scale · (Σ_i (1 - C_ii)² + redundancy_weight · Σ_{i≠j} C_ij²), C = ẑ1ᵀ ẑ2 / b, ẑ the
    features standardised over the batch by sqrt(variance + eps).
  Source: Barlow Twins, Zbontar et al. 2021, 2103.03230.
  Tested: NumPy; lightly BarlowTwinsLoss; golden value.

  The sum over d² entries dominates at the start; some recipes scale the loss by 0.024 to 0.1.
  `unbiased` is stable-pretraining's form: it divides by the deviation over b - 1, plus eps, so that
  C_ii ends at (b - 1) / b. A row counts `weights` times, 0 for padding; a constant feature gives
  C_ii = 0.

  >>> z = jnp.asarray([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
  >>> bool(losses.barlow_twins(z, z) < 1e-6)
  True
  """
  z1, z2, weights = _read_two(z1, z2, weights)
  (c1, count), (c2, _) = centre(z1, weights), centre(z2, weights)
  whole = jnp.maximum(count, 1)

  def standardised(c: jax.Array) -> jax.Array:
    square = jnp.square(c).sum(0)
    if unbiased:
      return c / (numerics.square_root(square / jnp.maximum(count - 1, 1)) + eps)
    return c * jax.lax.rsqrt(square / whole + eps)

  correlation = standardised(c1).T @ standardised(c2) / whole
  return _if_any(count, scale * _to_identity(correlation, redundancy_weight))


def batch_barlow(p: jax.Array, z: jax.Array, redundancy_weight: float = 0.01) -> jax.Array:
  """Barlow Twins over the examples instead of the features: [b d], [b d] -> [].

  Formula: Σ_i (C_ii - 1)² + redundancy_weight · Σ_{i≠j} C_ij², C_ij = cos(p_i, z_j), no gradient
    into z.
  Source: LFR, Sui et al. 2024, 2310.07756.
  Tested: NumPy.

  LFR takes the mean over its random projectors. C is b × b.

  >>> losses.batch_barlow(jnp.eye(3), jnp.eye(3))
  Array(0., dtype=float32)
  """
  p, z = arguments.read(p=(p, "b d"), z=(z, "b d"))
  p, z = numerics.normalise(p), numerics.normalise(jax.lax.stop_gradient(z))
  return _to_identity(p @ z.T, redundancy_weight)


def variance_term(z: jax.Array, eps: float = 1e-4, weights: jax.Array | None = None) -> jax.Array:
  """Hinge that keeps each feature's deviation over the batch at 1 or more: [b d] -> [].

  Formula: mean over features of max(0, 1 - sqrt(variance + eps)), variance over b - 1.
  Source: VICReg, Bardes et al. 2022, 2105.04906.
  Tested: NumPy; lightly variance_loss.

  eps stands inside the root; a constant feature gives 0.99 and no gradient. A row counts `weights`
  times, 0 for padding.

  >>> print(f"{losses.variance_term(jnp.ones((4, 3))):.4f}")
  0.9900
  """
  z, weights = arguments.read(z=(z, "b d"), weights=(arguments.numbers(weights), "?b"))
  arguments.at_least(2, z=z)
  centred, count = centre(z, weights)
  return _if_any(count, _hinge(centred, count, eps))


def covariance_term(z: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Squared covariances of different features: [b d] -> [].

  Formula: Σ_{i≠j} C_ij² / d, C the covariance over b - 1.
  Source: VICReg, Bardes et al. 2022, 2105.04906.
  Tested: NumPy; lightly covariance_loss.

  A row counts `weights` times, 0 for padding.

  >>> losses.covariance_term(jnp.ones((4, 3)))
  Array(0., dtype=float32)
  """
  z, weights = arguments.read(z=(z, "b d"), weights=(arguments.numbers(weights), "?b"))
  arguments.at_least(2, z=z)
  return _redundancy(*centre(z, weights))


def vicreg(
  z1: jax.Array,
  z2: jax.Array,
  similarity_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 1.0,
  variance_scale: float = 0.5,
  covariance_scale: float = 1.0,
  eps: float = 1e-4,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, Parts]:
  """Variance, invariance, covariance: [b d], [b d] -> [], parts.

  Formula: similarity_weight · mean (z1 - z2)² + variance_weight · variance_scale · (v1 + v2) +
    covariance_weight · covariance_scale · (c1 + c2), v the variance and c the covariance term.
  Source: VICReg, Bardes et al. 2022, 2105.04906.
  Tested: NumPy; lightly VICRegLoss; golden values of three scalings.

  The vectors are not normalised. Scalings differ: the authors use 0.5 and 1 (the default),
  solo-learn 1 and 1, VICRegL's global part 0.5 and 0.5. The parts `invariance`, `variance` and
  `covariance` are scaled and not weighted. A row counts `weights` times, 0 for padding.

  >>> loss, parts = losses.vicreg(jnp.ones((4, 3)), jnp.ones((4, 3)))
  >>> loss, sorted(parts)
  (Array(24.75, dtype=float32), ['covariance', 'invariance', 'variance'])
  """
  z1, z2, weights = _read_two(z1, z2, weights)
  parts = vicreg_parts(z1, z2, variance_scale, covariance_scale, eps, weights)
  return weigh(parts, similarity_weight, variance_weight, covariance_weight), parts


def vibcreg(
  z1: jax.Array,
  z2: jax.Array,
  similarity_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 200.0,
  eps: float = 1e-4,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, Parts]:
  """VICReg with a covariance term that knows no scale: [b d], [b d] -> [], parts.

  Formula: similarity_weight · mean (z1 - z2)² + variance_weight · (v1 + v2) + covariance_weight ·
    (r1 + r2), v the variance term, r = Σ_{i≠j} R_ij² / d², R the correlation of the features.
  Source: VIbCReg, Lee and Aune 2021, 2109.00783.
  Tested: NumPy; golden value.

  Its heads end in iterative normalisation (`iter_norm`), which is not part of this function. The
  parts are not weighted. A row counts `weights` times, 0 for padding.

  >>> z = jnp.arange(4.0)[:, None] * jnp.ones((4, 5))  # five equal columns
  >>> print(f"{losses.vibcreg(z, z)[1]['covariance']:.4f}")  # twice 4/5
  1.6000
  """
  z1, z2, weights = _read_two(z1, z2, weights)
  parts = vicreg_parts(z1, z2, 1.0, 0.0, eps, weights)
  u1, u2 = (numerics.normalise(centre(z, weights)[0], axis=0) for z in (z1, z2))
  redundancy = _off_diagonal(u1.T @ u1) + _off_diagonal(u2.T @ u2)
  parts["covariance"] = redundancy / z1.shape[1] ** 2
  return weigh(parts, similarity_weight, variance_weight, covariance_weight), parts


def tico(
  z1: jax.Array,
  z2: jax.Array,
  memory: jax.Array,
  momentum: float = 0.9,
  covariance_weight: float = 8.0,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Agreement against a running second moment: [b d], [b d], [d d] -> [b], [d d].

  Formula: 1 - cos(z1, z2) + covariance_weight · z1ᵀ C z1 of unit vectors, C = momentum · memory +
    (1 - momentum) · mean z1 z1ᵀ; C is the new memory. No gradient into C and z2.
  Source: TiCo, Zhu et al. 2022, 2206.10698.
  Tested: NumPy; lightly TiCoLoss; golden value.

  z1 is the online side, z2 the teacher's; the memory starts at zeros and is kept in float32. Rows
  of weight 0 do not enter the memory; their own values are still returned.

  >>> loss, memory = losses.tico(jnp.eye(3), jnp.eye(3), jnp.zeros((3, 3)))
  >>> print(loss.shape, f"{loss[0]:.4f} {jnp.trace(memory):.4f}")  # 8 · 0.1 / 3, 1 - 0.9
  (3,) 0.2667 0.1000
  """
  z1, z2, memory, weights = arguments.read(
    z1=(z1, "b d"),
    z2=(z2, "b d"),
    memory=(memory, "d d"),
    weights=(arguments.numbers(weights), "?b"),
  )
  z1, z2 = numerics.normalise(z1), numerics.normalise(jax.lax.stop_gradient(z2))
  rows = counted(z1, weights)
  total = z1.shape[0] if weights is None else weights.sum()
  weighted = rows if weights is None else rows * weights[:, None]
  moment = weighted.T @ rows / jnp.where(total == 0, 1, total)
  # A batch in which no row counts leaves the memory as it was.
  new = jnp.where(total == 0, memory, momentum * memory + (1 - momentum) * moment)
  new = jax.lax.stop_gradient(new)
  return 1 - (z1 * z2).sum(1) + covariance_weight * (z1 @ new * z1).sum(1), new


def _read_two(z1: Any, z2: Any, weights: Any) -> tuple[Any, ...]:
  read = arguments.read(z1=(z1, "b d"), z2=(z2, "b d"), weights=(arguments.numbers(weights), "?b"))
  arguments.at_least(2, z1=read[0])
  return read


def counted(z: jax.Array, weights: jax.Array | None) -> jax.Array:
  """Zeros for the rows of weight 0; where, not times 0: padding may hold anything."""
  if weights is None:
    return z
  return jnp.where(weights.reshape(-1, *[1] * (z.ndim - 1)) != 0, z, 0.0)


def centre(z: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, Any]:
  """Rows minus their mean, each times the root of its weight, and the sum of weights."""
  if weights is None:
    return z - z.mean(0), z.shape[0]
  z, count = counted(z, weights), weights.sum()
  weights = jax.lax.stop_gradient(weights).reshape(-1, *[1] * (z.ndim - 1))
  mean = (weights * z).sum(0) / jnp.where(count == 0, 1.0, count)
  return jnp.sqrt(weights) * (z - mean), count


def _if_any(count: Any, value: jax.Array) -> jax.Array:
  return jnp.where(count > 0, value, 0.0)


def _off_diagonal(matrix: jax.Array) -> jax.Array:
  """Σ_{i≠j} m_ij²: [… d d] -> […]."""
  same = jnp.eye(matrix.shape[-1], dtype=bool)
  return jnp.square(jnp.where(same, 0.0, matrix)).sum((-2, -1))


def _to_identity(correlation: jax.Array, redundancy_weight: float) -> jax.Array:
  diagonal = jnp.square(1 - jnp.diagonal(correlation)).sum()
  return diagonal + redundancy_weight * _off_diagonal(correlation)


def _hinge(centred: jax.Array, count: Any, eps: float) -> jax.Array:
  variance = jnp.square(centred).sum(0) / jnp.maximum(count - 1, 1)
  return jax.nn.relu(1 - jnp.sqrt(variance + eps)).mean()


def _redundancy(centred: jax.Array, count: Any) -> jax.Array:
  """The covariance term: [b … d] -> [], the mean over what stands between b and d."""
  covariance = jnp.einsum("b...c,b...d->...cd", centred, centred) / jnp.maximum(count - 1, 1)
  return (_off_diagonal(covariance) / centred.shape[-1]).mean()


def vicreg_parts(
  z1: jax.Array,
  z2: jax.Array,
  variance_scale: float,
  covariance_scale: float,
  eps: float,
  weights: jax.Array | None = None,
) -> Parts:
  """The three terms of [b … d]: scaled, not weighted."""
  (c1, count), (c2, _) = centre(z1, weights), centre(z2, weights)
  variance = _if_any(count, _hinge(c1, count, eps) + _hinge(c2, count, eps))
  rows = jnp.square(counted(z1, weights) - counted(z2, weights)).reshape(len(z1), -1).mean(1)
  return {
    "invariance": numerics.mean(rows, weights),
    "variance": variance_scale * variance,
    "covariance": covariance_scale * (_redundancy(c1, count) + _redundancy(c2, count)),
  }


def weigh(parts: Parts, similarity: float, variance: float, covariance: float) -> jax.Array:
  return (
    similarity * parts["invariance"]
    + variance * parts["variance"]
    + covariance * parts["covariance"]
  )
