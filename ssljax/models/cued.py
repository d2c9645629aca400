"""A decoder of self- and cross-attention whose queries begin with what lies around them."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import layers as layers_lib
from ssljax.models import positions as positions_lib
from ssljax.models import tokens as tokens_lib
from ssljax.models.predictors import CrossBlock


class MixedBlock(nn.Module):
  """Pre-norm block that sees its neighbours, then a context: [b n d], [b k d] -> [b n d]."""

  heads: int
  eps: float = 1e-6
  start: str = "xavier"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    norm = functools.partial(layers_lib.layer_norm, eps=self.eps, dtype=self.dtype)
    kernel = layers_lib.KERNELS[self.start]
    attn = layers_lib.Attention(self.heads, kernel=kernel, dtype=self.dtype, name="attn")
    x = x + attn(norm("norm")(x)).astype(x.dtype)
    cross = CrossBlock(self.heads, eps=self.eps, start=self.start, dtype=self.dtype, name="cross")
    return cross(x, norm("norm_context")(context))


class CuedPredictor(nn.Module):
  """Latent MIM's decoder (Wei et al. 2024, 2407.15837): a class token and a query at each place
  that is asked for look at each other, then at the context, `depth` times. Each list of places is
  predicted by itself.

  A query is a learnt vector, its position and its cue: the mean of the embedded context, before it
  has positions, by the softmax of the products of their positions with its own, over sqrt(width).
  """

  width: int
  depth: int
  heads: int
  out: int
  prefix: int = 0
  eps: float = 1e-6
  start: str = "xavier"
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    grid: tuple[int, ...],
    context: jax.Array,
    targets: jax.Array,
    noise: None = None,
  ) -> jax.Array:
    """tokens [b p+k d], context int32 [b k], targets int32 [b m t] -> [b m t out].

    p prefix tokens have no position and give no cue.
    """
    (b, m, t), p = targets.shape, self.prefix
    dense = functools.partial(
      nn.Dense, kernel_init=layers_lib.KERNELS[self.start], dtype=self.dtype
    )
    table = jnp.asarray(positions_lib.sincos(grid, self.width))
    seen = dense(self.width, name="embed")(tokens)
    there, asked = (tokens_lib.take(table, a.reshape(b, -1)) for a in (context, targets))
    token = self.param("mask_token", nn.initializers.zeros, (self.width,))
    x = token.astype(self.dtype) + cues(asked, there, seen[:, p:]) + asked.astype(self.dtype)
    first = self.param("cls_token", layers_lib.TOKENS[self.start], (self.width,))
    first = jnp.broadcast_to(first.astype(self.dtype), (b * m, 1, self.width))
    x = jnp.concatenate([first, x.reshape(b * m, t, self.width)], axis=1)
    seen = jnp.concatenate([seen[:, :p], seen[:, p:] + there.astype(self.dtype)], axis=1)
    seen = layers_lib.batch_sharded(jnp.repeat(seen, m, axis=0))
    block = MixedBlock if self.remat == "none" else nn.remat(MixedBlock)
    for i in range(self.depth):
      one = block(self.heads, self.eps, self.start, self.dtype, name=f"block_{i}")
      x = layers_lib.batch_sharded(one(x, seen))
    x = layers_lib.layer_norm("norm", self.eps, self.dtype)(x[:, 1:])
    return dense(self.out, name="head")(x).reshape(b, m, t, self.out)


def cues(asked: jax.Array, there: jax.Array, seen: jax.Array) -> jax.Array:
  """What lies around places, by positions alone: positions [b t w] of the places and [b k w] of
  what was seen, [b k d] -> [b t d]."""
  # Of width 512 a place scores 11 with itself, which bfloat16 would put off by some hundredths.
  exact = jax.lax.Precision.HIGHEST
  scores = jnp.einsum("btw,bkw->btk", asked, there, precision=exact) * asked.shape[-1] ** -0.5
  weights = jax.nn.softmax(scores).astype(seen.dtype)
  return jnp.einsum("btk,bkd->btd", weights, seen)
