"""Gaussian blur as two matrix products."""

import jax
import jax.numpy as jnp

from ssljax.views.crop import separable


def blur(
  image: jax.Array, sigma: jax.Array, wanted: jax.Array, taps: int
) -> jax.Array:
  """Separable Gaussian of `sigma` pixels where `wanted`, else unchanged: [h w c] -> [h w c]."""
  matrices = (jnp.where(wanted, blur_weights(n, sigma, taps), jnp.eye(n)) for n in image.shape[:2])
  return separable(*matrices, image)


def blur_weights(size: int, sigma: jax.Array, taps: int) -> jax.Array:
  """Gaussian of `taps` (odd) places, mirrored at the borders without repeating them: [size size].

  In closed form: a place beyond a border counts for its mirror image.
  """
  radius = min(taps // 2, size - 1)

  def gauss(distance):
    return jnp.where(jnp.abs(distance) <= radius, jnp.exp(-0.5 * (distance / sigma) ** 2), 0.0)

  total = gauss(jnp.arange(-radius, radius + 1)).sum()
  to, of = jnp.arange(size)[:, None], jnp.arange(size)[None]
  before = jnp.where(of > 0, gauss(to + of), 0.0)
  after = jnp.where(of < size - 1, gauss(2 * (size - 1) - to - of), 0.0)
  return (gauss(to - of) + before + after) / total
