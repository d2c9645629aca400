"""Text encoder: the transformer of `models.vit` on token ids, as in CLIP (Radford et al. 2021,
2103.00020) and SigLIP (Zhai et al. 2023, 2303.15343)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import layers as layers_lib
from ssljax.models import positions as positions_lib

POOLS = ("end", "last", "first", "mean")


class TextEncoder(nn.Module):
  """Encoder of token ids. Build it with `text`, which checks and explains the arguments."""

  vocabulary: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float
  causal: bool
  pool: str
  end: int
  padding: int
  eps: float
  activation: str
  init_kernels: str
  scan: bool
  remat: str
  dtype: Any

  @nn.compact
  def __call__(self, ids: jax.Array) -> dict[str, jax.Array]:
    """Encodes ids int32 [b l] -> "tokens" [b l d] after the final norm, "pooled" [b d] float32."""
    normal = nn.initializers.normal
    table = self.param("embedding", normal(0.02), (self.vocabulary, self.width))
    place = self.param("positions", normal(0.01), (ids.shape[1], self.width))
    x = layers_lib.batch_sharded((table[ids] + place).astype(self.dtype))
    bias = jnp.asarray(positions_lib.causal_bias(ids.shape[1])) if self.causal else None
    x, _ = self._stack()(x, None, bias)
    x = layers_lib.layer_norm("norm", self.eps, self.dtype)(x)
    return {"tokens": x, "pooled": self._pooled(x.astype(jnp.float32), ids)}

  def _stack(self) -> layers_lib.Transformer:
    block = layers_lib.Block(
      heads=self.heads,
      mlp_ratio=self.mlp_ratio,
      eps=self.eps,
      kernel=layers_lib.KERNELS[self.init_kernels],
      dtype=self.dtype,
      activation=self.activation,
      parent=None,
    )
    return layers_lib.Transformer(self.depth, block, self.scan, self.remat, name="blocks")

  def _pooled(self, x: jax.Array, ids: jax.Array) -> jax.Array:
    if self.pool == "end":
      place = jnp.argmax(ids == self.end, axis=1)  # the first of them
      return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
    if self.pool == "mean":
      weight = (ids != self.padding)[..., None].astype(x.dtype)
      return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
    return x[:, 0 if self.pool == "first" else -1]


def text(
  vocabulary: int,
  *,
  width: int = 512,
  depth: int = 12,
  heads: int = 8,
  mlp_ratio: float = 4.0,
  causal: bool = True,
  pool: str = "end",
  end: int = 2,
  padding: int = 0,
  eps: float = 1e-5,
  activation: str = "gelu",
  init_kernels: str = "normal",
  scan: bool = False,
  remat: str = "none",
  dtype: str = "float32",
) -> TextEncoder:
  """A transformer over token ids, with learned positions. The defaults are those of CLIP B.

  Args:
    vocabulary: number of ids.
    causal: a token sees itself and those before it; False: all see all, padding included, as in
      SigLIP.
    pool: what "pooled" is: the token of the first `end` id, the "last" or "first" one, or the
      "mean" over all that are no `padding`.
    eps, activation, init_kernels, scan, remat, dtype: as of `models.vit`.

  Raises:
    ValueError: an unknown name, or a width that the heads do not divide.
  """
  choices = {
    "pool": (pool, POOLS), "activation": (activation, layers_lib.ACTIVATIONS),
    "init_kernels": (init_kernels, layers_lib.KERNELS), "remat": (remat, layers_lib.REMAT),
  }  # fmt: skip
  for argument, (value, names) in choices.items():
    if value not in names:
      raise ValueError(f"text_encoder.{argument} {value!r} is none of {', '.join(names)}")
  if width % heads:
    raise ValueError(f"text_encoder.width {width} is not divisible by {heads} heads")
  return TextEncoder(
    vocabulary, width, depth, heads, mlp_ratio, causal, pool, end, padding, eps, activation,
    init_kernels, scan, remat, jnp.dtype(dtype),
  )  # fmt: skip
