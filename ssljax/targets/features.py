"""A teacher's features as targets."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def layer_normalise(x: jax.Array, eps: float = 1e-5) -> jax.Array:
  """Layer norm without parameters over the last axis: [… d] -> float32 [… d]."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean = x.mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)


def average_layers(layers: Sequence[jax.Array], eps: float = 1e-5) -> jax.Array:
  """The target of data2vec for images (Baevski et al. 2022, 2202.03555): k × [b n d] -> [b n d].

  Each layer is normalised over its channels, the k layers are averaged, and the average is
  normalised once more, as in the published command. eps is the 1e-5 of the original's functional
  layer norm, not the encoder's 1e-6.
  """
  mean = jnp.stack([layer_normalise(x, eps) for x in layers]).mean(0)
  return layer_normalise(mean, eps)
