"""Batch norm (Ioffe and Szegedy 2015, 1502.03167) with PyTorch's running statistics."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models.layers import Init


class BatchNorm(nn.Module):
  """Normalises each channel over everything else: [b … d] -> [b … d].

  train=True takes the statistics of the batch and moves the running ones, float32 [d] `mean` and
  `var` of the collection "batch_stats", which must be mutable: new = momentum·old + (1-momentum)·
  batch, momentum 0.9 being PyTorch's 0.1. As there, the batch is divided by its biased variance and
  the unbiased one enters the running statistics (linen keeps the biased one: a factor n/(n-1)).
  Under jit a sharded batch is one global array, so its statistics are global, too.

  Raises:
    ValueError: training on one value per channel, which would be normalised to zero.
  """

  momentum: float = 0.9
  eps: float = 1e-5
  use_scale: bool = True
  use_bias: bool = True
  scale_init: Init = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    d = x.shape[-1:]
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, d, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, d, jnp.float32)
    mean, var = running_mean.value, running_var.value
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if train and not self.is_initializing():
      n = math.prod(x.shape[:-1])
      if n < 2:
        raise ValueError(
          "batch norm needs more than one value per channel: batch_size is too small"
        )
      mean, var = moments(wide, mean)
      for running, new in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
        moved = self.momentum * running.value + (1 - self.momentum) * new
        running.value = jax.lax.stop_gradient(moved).astype(jnp.float32)
    factor = jax.lax.rsqrt(var + self.eps)
    if self.use_scale:
      factor *= self.param("scale", self.scale_init, d)
    y = (wide - mean) * factor
    if self.use_bias:
      y += self.param("bias", nn.initializers.zeros, d)
    return y.astype(self.dtype)


def moments(x: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance of each channel in one pass: [b … d], [d] -> [d], [d].

  `near` is any guess at the mean; the running one costs no communication. E[x²]-E[x]² about zero
  cancels where the mean is large against the deviation, as it is in a collapsing projector.
  """
  axes = tuple(range(x.ndim - 1))
  near = jax.lax.stop_gradient(near)
  offset = x - near
  mean = offset.mean(axes)
  return near + mean, jnp.maximum(jnp.square(offset).mean(axes) - jnp.square(mean), 0.0)


def running(extra: Any, name: str, place: str = "stats") -> Any:
  """Running statistics of a part of a method, of what its `extra` keeps at a place; {} where it has
  none: a checkpoint keeps no empty parts."""
  return extra.get(place, {}).get(name, {})


def with_statistics(
  module: nn.Module, params: Any, stats: Any, *args: Any, **given: Any
) -> tuple[Any, Any]:
  """A module in training mode -> its output and its running statistics after this batch; `stats`
  is {} where it has none."""
  variables = {"params": params} | ({"batch_stats": stats} if stats else {})
  out, new = module.apply(variables, *args, **given, mutable=["batch_stats"])
  return out, new.get("batch_stats", stats)
