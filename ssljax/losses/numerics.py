"""Arithmetic that losses share: finite in value and gradient where formulas are not."""

import jax
import jax.numpy as jnp

# Accelerators round products to 8 or 10 bits unless told; whitening and spectra amplify that.
EXACT = jax.lax.Precision.HIGHEST


def normalise(x: jax.Array, axis: int = -1, eps: float = 1e-8) -> jax.Array:
  """x / max(‖x‖, eps): [… d] -> [… d]; a zero vector stays zero, with a finite gradient."""
  square = jnp.square(x).sum(axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, eps**2))


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """Cosine row by row: [… d], [… d] -> […]."""
  return (normalise(a) * normalise(b)).sum(-1)


def mean(
  values: jax.Array, weights: jax.Array | None = None, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
  """Mean of `values` with `weights` (numbers or bool) of their shape; 0 where all weights are 0."""
  if weights is None:
    return values.mean(axis)
  weights = weights.astype(values.dtype)
  total = weights.sum(axis)
  # where, not times 0: values that do not count may be infinite.
  summed = jnp.where(weights != 0, values, 0.0) * weights
  return summed.sum(axis) / jnp.where(total == 0, 1.0, total)


def logsumexp(x: jax.Array, where: jax.Array | None = None, axis: int = -1) -> jax.Array:
  """log Σ exp over the places in `where`; a large negative number, gradient 0, where there is none.

  The number is the type's lowest quarter, not -inf: differences and products of it stay finite.
  """
  if where is None:
    return jax.nn.logsumexp(x, axis=axis)
  low = jnp.finfo(x.dtype).min / 4
  some = where.any(axis)
  total = jax.nn.logsumexp(jnp.where(where, x, low), axis=axis)
  return jnp.where(some, total, low)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-Σ targets · log softmax(logits): [… k], [… k] -> […]."""
  return -(targets * jax.nn.log_softmax(logits)).sum(-1)


def square_root(x: jax.Array) -> jax.Array:
  """sqrt(max(x, 0)) with gradient 0, not infinity, at 0."""
  some = x > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, x, 1.0)), 0.0)


def entropy(p: jax.Array, floor: float) -> jax.Array:
  """-Σ p ln p with p at least `floor`: [k] -> scalar."""
  p = jnp.maximum(p, floor)
  return -(p * jnp.log(p)).sum()
