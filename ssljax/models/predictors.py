"""From what an encoder saw of an example to its features at places that it did not see."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import attention
from ssljax.models import layers as layers_lib
from ssljax.models import positions as positions_lib
from ssljax.models import tokens as tokens_lib


class PlacePredictor(nn.Module):
  """I-JEPA's narrow transformer (Assran et al. 2023, 2301.08243): the context, and a query at each
  place that is asked for. Each list of places is predicted by itself, from the same context.

  A query is a learnt vector and its position; with `noise` it is the noise, through the layer that
  embeds the context, and its position (FlexPredict: Bar et al. 2024, 2308.00566).
  """

  width: int
  depth: int
  heads: int
  out: int
  prefix: int = 0
  eps: float = 1e-6
  start: str = "normal"
  scan: bool = False
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    grid: tuple[int, ...],
    context: jax.Array,
    targets: jax.Array,
    noise: jax.Array | None = None,
  ) -> jax.Array:
    """tokens [b p+k d], context int32 [b k], targets int32 [b m t], noise [b m t d] -> [b m t out].

    p prefix tokens have no position.
    """
    (b, m, t), p = targets.shape, self.prefix
    kernel = layers_lib.KERNELS[self.start]
    embed = nn.Dense(self.width, kernel_init=kernel, dtype=self.dtype, name="embed")
    table = jnp.asarray(positions_lib.sincos(grid, self.width), self.dtype)
    x = embed(tokens)
    x = jnp.concatenate([x[:, :p], x[:, p:] + tokens_lib.take(table, context)], axis=1)
    if noise is None:
      token = self.param("mask_token", layers_lib.TOKENS[self.start], (self.width,))
      query = token.astype(self.dtype) + tokens_lib.take(table, targets)
    else:
      query = embed(noise.astype(self.dtype)) + tokens_lib.take(table, targets)
    x = jnp.broadcast_to(x[:, None], (b, m, *x.shape[1:]))
    x = jnp.concatenate([x, query], axis=2).reshape(b * m, -1, self.width)
    block = layers_lib.Block(self.heads, eps=self.eps, kernel=kernel, dtype=self.dtype, parent=None)
    stack = layers_lib.Transformer(self.depth, block, self.scan, self.remat, name="blocks")
    x, _ = stack(layers_lib.batch_sharded(x))
    x = layers_lib.layer_norm("norm", self.eps, self.dtype)(x[:, -t:])
    x = nn.Dense(self.out, kernel_init=kernel, dtype=self.dtype, name="head")(x)
    return x.reshape(b, m, t, self.out)


class GridPredictor(nn.Module):
  """data2vec 2.0's convolutional decoder (Baevski et al. 2022, 2212.07525): what was seen at its
  places and noise everywhere else, on the grid; `depth` times a grouped convolution, layer norm
  without parameters and GELU, each added to what came before; a linear layer at the targets.

  Layers keep PyTorch's default start.
  """

  width: int
  depth: int
  out: int
  prefix: int = 0
  kernel: int = 3
  groups: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    grid: tuple[int, ...],
    context: jax.Array,
    targets: jax.Array,
    noise: jax.Array,
  ) -> jax.Array:
    """tokens [b p+k d], context int32 [b k], targets int32 [b m t], noise [b n d] -> [b m t out].

    p prefix tokens are left out.
    """
    (b, m, t), d = targets.shape, tokens.shape[-1]
    seen = tokens[:, self.prefix :].astype(self.dtype)
    x = jax.vmap(lambda row, at, new: row.at[at].set(new, unique_indices=True))(
      noise.astype(self.dtype), context, seen
    )
    x = layers_lib.batch_sharded(x.reshape(b, *grid, d))
    torch = layers_lib.KERNELS["torch"]
    for i in range(self.depth):
      fan_in = self.kernel ** len(grid) * x.shape[-1] // self.groups
      conv = nn.Conv(
        self.width, (self.kernel,) * len(grid), feature_group_count=self.groups, kernel_init=torch,
        bias_init=layers_lib.uniform_bias(fan_in), dtype=self.dtype, name=f"conv_{i}",
      )  # fmt: skip
      norm = nn.LayerNorm(
        epsilon=1e-5, use_bias=False, use_scale=False, use_fast_variance=False, dtype=self.dtype
      )
      y = nn.gelu(norm(conv(x)), approximate=False)
      x = x + y if x.shape == y.shape else y  # the first changes the width where widths differ
    x = tokens_lib.take(x.reshape(b, -1, self.width), targets.reshape(b, m * t))
    bias = layers_lib.uniform_bias(self.width)
    x = nn.Dense(self.out, kernel_init=torch, bias_init=bias, dtype=self.dtype, name="head")(x)
    return x.reshape(b, m, t, self.out)


class CrossBlock(nn.Module):
  """Pre-norm block that sees a context and never its neighbours: [b n d], [b k e] -> [b n d].

  `drop` [2 b] as in `models.layers.Block`.
  """

  heads: int
  mlp_ratio: float = 4.0
  eps: float = 1e-6
  start: str = "xavier"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array, drop: jax.Array | None = None) -> jax.Array:
    (b, n, d), h = x.shape, self.heads
    kernel = layers_lib.KERNELS[self.start]
    dense = functools.partial(nn.Dense, kernel_init=kernel, dtype=self.dtype)
    norm = functools.partial(layers_lib.layer_norm, eps=self.eps, dtype=self.dtype)
    keep = (lambda y, i: y) if drop is None else (lambda y, i: y * drop[i][:, None, None])
    q = dense(d, name="q")(norm("norm1")(x)).reshape(b, n, h, d // h)
    kv = dense(2 * d, name="kv")(context).reshape(b, -1, 2, h, d // h)
    y = attention.attend(q, kv[:, :, 0], kv[:, :, 1], None).reshape(b, n, d)
    x = x + keep(dense(d, name="proj")(y), 0).astype(x.dtype)
    mlp = layers_lib.Mlp(int(d * self.mlp_ratio), kernel, self.dtype, name="mlp")
    return x + keep(mlp(norm("norm2")(x)), 1).astype(x.dtype)


class CrossPredictor(nn.Module):
  """CAPI's predictor (Darcet et al. 2025, 2502.08769): queries of a learnt vector and a position,
  blocks that look at the context alone, so that what is predicted at a place does not depend on
  what else is asked for."""

  width: int
  depth: int
  heads: int
  prefix: int = 0
  eps: float = 1e-6
  start: str = "xavier"
  drop_path: float = 0.0
  remat: str = "none"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    grid: tuple[int, ...],
    context: jax.Array,
    targets: jax.Array,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """tokens [b p+k d], context int32 [b k], targets int32 [b t] -> [b t width]; keys [b] for drop
    path."""
    p, d = self.prefix, tokens.shape[-1]
    seen = jnp.asarray(positions_lib.sincos(grid, d), self.dtype)
    seen = tokens[:, p:] + tokens_lib.take(seen, context)
    seen = layers_lib.batch_sharded(jnp.concatenate([tokens[:, :p], seen], axis=1))
    token = self.param("mask_token", layers_lib.TOKENS[self.start], (self.width,))
    table = jnp.asarray(positions_lib.sincos(grid, self.width), self.dtype)
    x = layers_lib.batch_sharded(token.astype(self.dtype) + tokens_lib.take(table, targets))
    drop = layers_lib.drop_path(keys, self.drop_path, self.depth, len(x))
    block = CrossBlock if self.remat == "none" else nn.remat(CrossBlock)
    for i in range(self.depth):
      one = block(self.heads, eps=self.eps, start=self.start, dtype=self.dtype, name=f"block_{i}")
      x = layers_lib.batch_sharded(one(x, seen, None if drop is None else drop[i]))
    return layers_lib.layer_norm("norm", self.eps, self.dtype)(x)
