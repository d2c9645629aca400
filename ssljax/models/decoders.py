"""From encoded tokens to predictions at the hidden places."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import layers as layers_lib
from ssljax.models import positions as positions_lib
from ssljax.models import tokens as tokens_lib


class TransformerDecoder(nn.Module):
  """MAE's decoder: project, put mask tokens at the hidden places, add positions, attend, predict.

  Only the hidden places go through the last linear layer; what it would say of visible ones is
  never used.
  """

  width: int
  depth: int
  heads: int
  out: int
  prefix: int
  eps: float = 1e-6
  scan: bool = False
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    grid: tuple[int, ...],
    hidden: jax.Array,
    keep: jax.Array,
    places: jax.Array,
  ) -> jax.Array:
    """tokens [b m+k d], hidden bool [b n], keep int32 [b k], places int32 [b h] -> [b h out]."""
    kernel = layers_lib.KERNELS["xavier"]
    x = layers_lib.linear(self.width, kernel_init=kernel, dtype=self.dtype, name="embed")(tokens)
    mask_token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,))
    m = self.prefix
    full = tokens_lib.fill(x[:, m:], hidden, keep, mask_token)
    full += jnp.asarray(positions_lib.sincos(grid, self.width), full.dtype)
    x = layers_lib.batch_sharded(jnp.concatenate([x[:, :m], full], axis=1))
    block = layers_lib.Block(self.heads, eps=self.eps, kernel=kernel, dtype=self.dtype, parent=None)
    stack = layers_lib.Transformer(self.depth, block, self.scan, self.remat, name="blocks")
    x, _ = stack(x)
    x = tokens_lib.take(x[:, m:], places)
    x = layers_lib.layer_norm("norm", self.eps, self.dtype)(x)
    return layers_lib.linear(self.out, kernel_init=kernel, dtype=self.dtype, name="head")(x)


class LinearHead(nn.Module):
  """One linear layer at the hidden places: [b m+n d] -> [b h out].

  SimMIM's 1×1 convolution followed by PixelShuffle orders a place's values (c, row, col); here they
  are (row, col, c), the order of `patchify`. The loss does not see the difference.
  """

  out: int
  prefix: int
  start: str = "torch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array, places: jax.Array) -> jax.Array:
    x = tokens_lib.take(tokens[:, self.prefix :], places)
    bias = layers_lib.uniform_bias(x.shape[-1])
    return layers_lib.linear(
      self.out,
      kernel_init=layers_lib.KERNELS[self.start],
      bias_init=bias if self.start == "torch" else nn.initializers.zeros,
      dtype=self.dtype,
      name="head",
    )(x)
