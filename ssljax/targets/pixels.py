"""Pixels as targets, from examples already cut into patches [b n p]."""

import jax
import jax.numpy as jnp


def _statistics(patches: jax.Array, eps: float, ddof: int) -> tuple[jax.Array, jax.Array]:
  mean = patches.mean(-1, keepdims=True)
  return mean, jnp.sqrt(patches.var(-1, keepdims=True, ddof=ddof) + eps)


def normalised_pixels(patches: jax.Array, *, unbiased: bool = True, eps: float = 1e-6) -> jax.Array:
  """Each patch minus its mean, over sqrt(variance + eps): [b n p] -> [b n p], at least float32.

  MAE's target (He et al. 2021, 2111.06377). Its variance is the unbiased one, p-1 in the divisor,
  which `jnp.var` is not unless told: the targets would grow by sqrt(p/(p-1)).
  """
  patches = patches.astype(jnp.promote_types(patches.dtype, jnp.float32))
  mean, deviation = _statistics(patches, eps, int(unbiased))
  return (patches - mean) / deviation


def unnormalise(pred: jax.Array, patches: jax.Array, *, eps: float = 1e-6) -> jax.Array:
  """Predicted normalised pixels on the scale of the true patches: [b n p], [b n p] -> [b n p].

  Mean and deviation come from the truth: for pictures only, never for a metric.
  """
  mean, deviation = _statistics(patches.astype(jnp.float32), eps, 1)
  return pred.astype(jnp.float32) * deviation + mean
