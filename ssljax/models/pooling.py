"""Pooling of tokens by a learnt query."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import layers as layers_lib


class AttentionPool(nn.Module):
  """One query attends to all tokens, then an MLP with its own norm: [b n d] -> [b d] float32.

  The head of SigLIP's image encoder (Zhai et al. 2023, 2303.15343; Lee et al. 2018, 1810.00825).
  """

  heads: int
  mlp_ratio: float
  eps: float
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, n, d = x.shape
    kernel = layers_lib.KERNELS["xavier"]

    def parts(x, count, name):
      x = nn.Dense(count * d, kernel_init=kernel, dtype=self.dtype, name=name)(x)
      return jnp.moveaxis(x.reshape(b, -1, count, self.heads, d // self.heads), 2, 0)

    query = self.param("query", kernel_of_vector, (d,)).astype(self.dtype)
    (q,) = parts(jnp.broadcast_to(query, (b, 1, d)), 1, "q")
    k, v = parts(x, 2, "kv")
    # Plain: fused kernels want as many queries as keys.
    weights = jnp.einsum("bthe,bshe->bhts", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(weights * (d // self.heads) ** -0.5).astype(v.dtype)
    y = jnp.einsum("bhts,bshe->bthe", weights, v).reshape(b, d)
    y = nn.Dense(d, kernel_init=kernel, dtype=self.dtype, name="proj")(y)
    mlp = layers_lib.Mlp(int(d * self.mlp_ratio), kernel, self.dtype, self.activation, name="mlp")
    z = layers_lib.layer_norm("norm", self.eps, self.dtype)(y)
    return (y + mlp(z[:, None])[:, 0]).astype(jnp.float32)


def kernel_of_vector(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Xavier-uniform of a [1 d] matrix."""
  bound = (6.0 / (1 + shape[0])) ** 0.5
  return jax.random.uniform(rng, shape, dtype, -bound, bound)
