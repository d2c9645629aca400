"""Regression at hidden places. `b` examples, `m` hidden places, `t` values a place."""

import jax
import jax.numpy as jnp


def _widen(*arrays: jax.Array) -> list[jax.Array]:
  """At least float32: bfloat16 becomes float32, float64 stays."""
  return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]


def _per_example(errors: jax.Array, weights: jax.Array | None) -> jax.Array:
  """Mean over the values of a place, then over the places: [b m t] -> [b]."""
  place = errors.mean(-1)
  if weights is None:
    return place.mean(-1)
  weights = weights.astype(place.dtype)
  return (place * weights).sum(-1) / jnp.maximum(weights.sum(-1), 1e-6)


def masked_l2(pred: jax.Array, target: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Squared error at hidden places: [b m t], [b m t], weights [b m] -> [b].

  With the same number of hidden places in every example its mean over the batch is the loss of MAE
  (He et al. 2021, 2111.06377): a mean over values, then over all hidden places of the batch.
  """
  pred, target = _widen(pred, target)
  return _per_example(jnp.square(pred - target), weights)


def masked_l1(pred: jax.Array, target: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Absolute error at hidden places: [b m t], [b m t], weights [b m] -> [b].

  SimMIM (Xie et al. 2021, 2111.09886) divides the sum over hidden pixels by their number plus 1e-5
  and by the channels; with exact counts the mean over the batch is that, to a relative 1e-5/count.
  """
  pred, target = _widen(pred, target)
  return _per_example(jnp.abs(pred - target), weights)


def masked_smooth_l1(
  pred: jax.Array, target: jax.Array, beta: float = 1.0, weights: jax.Array | None = None
) -> jax.Array:
  """Smooth L1 at hidden places: [b m t], [b m t], weights [b m] -> [b].

  0.5·e²/beta below |e| = beta, |e| - 0.5·beta above; data2vec (Baevski et al. 2022, 2202.03555)
  uses beta 2 for images.
  """
  pred, target = _widen(pred, target)
  error = jnp.abs(pred - target)
  errors = jnp.where(error < beta, 0.5 * jnp.square(error) / beta, error - 0.5 * beta)
  return _per_example(errors, weights)
