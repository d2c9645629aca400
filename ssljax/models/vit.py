"""Vision transformer over a grid of any number of axes (Dosovitskiy et al. 2020, 2010.11929)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import layers as layers_lib
from ssljax.models import positions as positions_lib
from ssljax.models import tokens as tokens_lib
from ssljax.models.pooling import AttentionPool

# variant -> width, depth, heads, mlp ratio. `g` is the giant of DINOv2 (Oquab et al. 2023,
# 2304.07193) with a plain MLP: width 1536, depth 40.
VARIANTS = {
  "Ti": (192, 12, 3, 4.0),
  "S": (384, 12, 6, 4.0),
  "B": (768, 12, 12, 4.0),
  "L": (1024, 24, 16, 4.0),
  "H": (1280, 32, 16, 4.0),
  "g": (1536, 40, 24, 4.0),
}


class ViT(nn.Module):
  """Encoder of tokens on a grid. Build it with `vit`, which checks and explains the arguments."""

  width: int
  depth: int
  heads: int
  mlp_ratio: float
  patch: tuple[int, ...]
  positions: str
  class_token: bool
  registers: int
  pool: str
  drop_path: float
  layer_scale: float
  eps: float
  qkv_bias: str
  rotary_base: float
  pre_norm: bool
  activation: str
  init_kernels: str
  depth_scale: bool
  scan: bool
  remat: str
  dtype: Any
  positions_size: tuple[int, ...] = ()
  positions_resize: str = "size"
  drop_path_rule: str = "linear"
  init_stem: str = ""
  init_tokens: float = 0.0
  norm: str = "pre"

  def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Static grid of one example of shape (s1…sr) or (s1…sr, c)."""
    return tokens_lib.grid_of(shape[: len(self.patch)], self.patch)

  @property
  def prefix(self) -> int:
    """Tokens before the grid's: class token and registers."""
    return int(self.class_token) + self.registers

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    keep: jax.Array | None = None,
    hidden: jax.Array | None = None,
    mask_token: jax.Array | None = None,
    keys: jax.Array | None = None,
    layers: tuple[int, ...] = (),
    mlp_layers: tuple[int, ...] = (),
    attention_layers: tuple[int, ...] = (),
  ) -> dict[str, Any]:
    """Encodes examples [b s1…sr c], already normalised.

    Args:
      keep: int32 [b k], the places the encoder may see (layout "drop"); None means all.
      hidden, mask_token: bool [b n] and [d]: places whose token is replaced (layout "replace").
      keys: [b] one key per example for drop path; None is evaluation.
      layers: blocks (from 0, negative from the end) whose outputs are returned as well.
      mlp_layers: blocks whose MLP's outputs are returned, before they are added.
      attention_layers: blocks whose attention weights of the class token are returned.

    Returns:
      "tokens" [b m+k d] after the final norm (prefix first), "pooled" [b d], "patches" [b k d],
      "cls" [b d] and "registers" [b r d] where they exist, "layer_i" [b m+k d] for i in `layers`:
      the residual stream after block i, before the final norm, prefix included; "mlp_i" likewise;
      "attention_i" float32 [b heads m+k], each head's weights, which sum to 1.
    """
    if attention_layers and not self.class_token:
      raise ValueError("the attention of the class token needs an encoder with class_token=True")
    grid = self.grid(x.shape[1:-1])
    x = layers_lib.batch_sharded(tokens_lib.patchify(x, self.patch))
    if keep is not None:  # before the stem: what is not seen needs no stem either
      x = tokens_lib.take(x, keep)
    x = self._stem(x)
    if hidden is not None and mask_token is not None:
      x = tokens_lib.replace(x, hidden, mask_token)
    x = layers_lib.batch_sharded(self._add_prefix(self._add_positions(x, grid, keep)))
    if self.pre_norm:
      x = layers_lib.layer_norm("pre_norm", self.eps, self.dtype)(x)
    bias, rotary = self._relative_bias(grid, keep), self._rotary(grid, keep)
    drop = layers_lib.drop_path(keys, self.drop_path, self.depth, x.shape[0], self.drop_path_rule)
    asked = {"layer": layers, "mlp": mlp_layers, "attention": attention_layers}
    wanted = {name: tuple(range(self.depth)[i] for i in which) for name, which in asked.items()}
    norm = layers_lib.layer_norm("norm", self.eps, self.dtype)
    after = self.norm == "post"  # each block ends in a norm, the first has none before it
    x = norm(x) if after else x
    x, taken = self._stack()(x, drop, bias, rotary, wanted)
    x = x if after else norm(x)
    return self._outputs(x) | taken

  def _stem(self, patches: jax.Array) -> jax.Array:
    # The kernel is drawn as a linear layer [p d], as MAE does, not as a convolution, whose fan-out
    # would count the patch area and make it ten times too small. MAE alone leaves the bias of that
    # convolution at its framework's default; BEiT and its children set it to zero.
    bias = layers_lib.uniform_bias(patches.shape[-1])
    start = self.init_stem or self.init_kernels
    return layers_lib.linear(
      self.width,
      kernel_init=layers_lib.KERNELS[start],
      bias_init=bias if start in ("xavier", "torch") else nn.initializers.zeros,
      dtype=self.dtype,
      name="stem",
    )(patches.astype(self.dtype))

  def _add_positions(self, x: jax.Array, grid: tuple[int, ...], keep: Any) -> jax.Array:
    if self.positions == "sincos":
      table = jnp.asarray(positions_lib.sincos(grid, self.width))
    elif self.positions == "learned":
      table = self._learned(grid)
    else:
      return x
    return x + (table if keep is None else tokens_lib.take(table, keep)).astype(x.dtype)

  def _learned(self, grid: tuple[int, ...]) -> jax.Array:
    """The learned table [n d], read at another grid where `positions_size` allows it."""
    own = self.grid(self.positions_size) if self.positions_size else grid
    held = self.variables.get("params", {}).get("positions")
    if held is not None and held.shape[0] != math.prod(own):
      raise ValueError(
        f"images of grid {grid} have no place in the {held.shape[0]} learned positions: with"
        " encoder.positions_size=(height, width) of those they were made for they are interpolated"
      )
    table = self.param("positions", nn.initializers.normal(0.02), (math.prod(own), self.width))
    if own == grid:
      return table
    table = table.reshape(*own, self.width)
    for axis, weights in enumerate(positions_lib.interpolation(own, grid, self.positions_resize)):
      exact = jax.lax.Precision.HIGHEST
      table = jnp.moveaxis(jnp.tensordot(weights, table, (1, axis), precision=exact), 0, axis)
    return table.reshape(-1, self.width)

  def _add_prefix(self, x: jax.Array) -> jax.Array:
    normal = layers_lib.TOKENS[self.init_kernels]
    if self.init_tokens:
      normal = nn.initializers.normal(self.init_tokens)
    prefix = []
    if self.class_token:
      prefix.append(self.param("cls_token", normal, (self.width,))[None])
    if self.registers:
      prefix.append(self.param("registers", normal, (self.registers, self.width)))
    if not prefix:
      return x
    vectors = jnp.concatenate(prefix).astype(x.dtype)
    return jnp.concatenate([jnp.broadcast_to(vectors, (x.shape[0], *vectors.shape)), x], axis=1)

  def _relative_bias(self, grid, keep) -> jax.Array | None:
    if self.positions != "relative":
      return None
    if keep is not None:
      raise ValueError('positions="relative" needs the whole grid: use layout "replace"')
    rows = positions_lib.relative_rows(grid)
    table = self.param("relative_bias", nn.initializers.zeros, (rows, self.heads))
    index = positions_lib.relative_index(grid, self.prefix)
    return jnp.moveaxis(table[index], -1, 0)

  def _rotary(self, grid, keep) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines [b|1 m+k 1 e/2]; the prefix is not turned."""
    if self.positions != "rotary":
      return None
    angle = jnp.asarray(positions_lib.rotary(grid, self.width // self.heads, self.rotary_base))
    angle = angle[None] if keep is None else tokens_lib.take(angle, keep)
    angle = jnp.pad(angle, ((0, 0), (self.prefix, 0), (0, 0)))[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)

  def _stack(self) -> layers_lib.Transformer:
    block = layers_lib.Block(
      heads=self.heads,
      mlp_ratio=self.mlp_ratio,
      eps=self.eps,
      bias=self.qkv_bias,
      layer_scale=self.layer_scale,
      kernel=layers_lib.KERNELS[self.init_kernels],
      dtype=self.dtype,
      post=self.norm == "post",
      activation=self.activation,
      parent=None,
    )
    return layers_lib.Transformer(
      self.depth, block, self.scan, self.remat, self.depth_scale, name="blocks"
    )

  def _outputs(self, x: jax.Array) -> dict[str, jax.Array]:
    m = self.prefix
    out = {"tokens": x, "patches": x[:, m:]}
    if self.class_token:
      out["cls"] = x[:, 0]
    if self.registers:
      out["registers"] = x[:, int(self.class_token) : m]
    # float32: a mean over tokens in bfloat16 loses three digits.
    mean = out["patches"].astype(jnp.float32).mean(1)
    if self.pool == "attention":
      kind = (self.heads, self.mlp_ratio, self.eps, self.activation, self.dtype)
      out["pooled"] = AttentionPool(*kind, name="pool")(x)
    else:
      out["pooled"] = out["cls"].astype(jnp.float32) if self.pool == "cls" else mean
    return out


def vit(
  *,
  variant: str = "B",
  patch: tuple[int, ...] = (16, 16),
  width: int = 0,
  depth: int = 0,
  heads: int = 0,
  mlp_ratio: float = 0.0,
  positions: str = "sincos",
  positions_size: tuple[int, ...] = (),
  positions_resize: str = "size",
  class_token: bool = True,
  registers: int = 0,
  pool: str = "cls",
  drop_path: float = 0.0,
  drop_path_rule: str = "linear",
  layer_scale: float = 0.0,
  eps: float = 1e-6,
  norm: str = "pre",
  qkv_bias: str = "qkv",
  rotary_base: float = 100.0,
  pre_norm: bool = False,
  activation: str = "gelu",
  init_kernels: str = "xavier",
  init_stem: str = "",
  init_tokens: float = 0.0,
  depth_scale: bool = False,
  scan: bool = False,
  remat: str = "none",
  dtype: str = "float32",
) -> ViT:
  """A vision transformer.

  Args:
    variant: Ti, S, B, L, H or g; `width`, `depth`, `heads`, `mlp_ratio` override it where not 0.
    patch: size of a patch along each axis; its length is the number of axes of the grid.
    positions: "sincos" (fixed), "learned", "relative" (BEiT's bias table, shared by all blocks),
      "rotary" (DINOv3's, with periods up to `rotary_base` times the picture) or "none".
    positions_size: size of the images that learned positions belong to, (224, 224); () is the one
      size there is. Images of other sizes, such as local views, read them interpolated.
    positions_resize: how: "size", "offset" or "antialias", see `models.positions.interpolation`.
    pool: what "pooled" is: "cls", the "mean" of the grid's tokens or "attention" (SigLIP's head).
    drop_path_rule: "linear" (from 0 in the first block to `drop_path` in the last) or "uniform".
    layer_scale: its starting value; 0 means none.
    norm: "pre" (before each branch, and after the last block) or "post" (after each sum, and before
      the first block: data2vec 2.0).
    qkv_bias: "qkv", "qv" (no bias on keys) or "none".
    pre_norm: a layer norm before the first block (CLIP).
    activation: of the MLPs: "gelu", "gelu_tanh" (SigLIP) or "quick_gelu" (released CLIP weights).
    init_kernels: "xavier" (MAE), "normal" (timm: deviation 0.02) or "beit" (0.02 cut at one sigma).
    init_stem: the same for the patches' layer; "" is as the others, "torch" the default that DINO
      and its children leave it at, kernel and bias, "kaiming" (normal of variance 2/fan-in) MSN's.
    init_tokens: deviation of class token and registers; 0 is that which goes with init_kernels.
    depth_scale: divide the output projections of block l (from 1) by sqrt(2l) at the start.
    scan, remat: how the blocks are run, see `models.layers.Transformer`.
    dtype: of the computation; parameters are float32.

  Raises:
    ValueError: an unknown name, or a width that the heads do not divide.
  """
  _choose("variant", variant, VARIANTS)
  _choose("positions", positions, ("sincos", "learned", "relative", "rotary", "none"))
  _choose("positions_resize", positions_resize, ("size", "offset", "antialias"))
  if positions_size and positions != "learned":
    raise ValueError('encoder.positions_size needs encoder.positions="learned"')
  _choose("pool", pool, ("cls", "mean", "attention"))
  _choose("norm", norm, ("pre", "post"))
  _choose("qkv_bias", qkv_bias, ("qkv", "qv", "none"))
  _choose("activation", activation, layers_lib.ACTIVATIONS)
  _choose("init_kernels", init_kernels, layers_lib.KERNELS)
  _choose("init_stem", init_stem, ("", *layers_lib.KERNELS))
  _choose("drop_path_rule", drop_path_rule, ("linear", "uniform"))
  _choose("remat", remat, layers_lib.REMAT)
  if pool == "cls" and not class_token:
    raise ValueError('pool="cls" needs class_token=True; use pool="mean"')
  base = VARIANTS[variant]
  width, depth, heads = width or base[0], depth or base[1], heads or base[2]
  if width % heads:
    raise ValueError(f"width {width} is not divisible by {heads} heads")
  if positions == "rotary":
    positions_lib.rotary((1,) * len(patch), width // heads, rotary_base)  # says what does not fit
  return ViT(
    width, depth, heads, mlp_ratio or base[3], tuple(patch), positions, class_token, registers,
    pool, drop_path, layer_scale, eps, qkv_bias, rotary_base, pre_norm, activation, init_kernels,
    depth_scale, scan, remat, jnp.dtype(dtype), tuple(positions_size), positions_resize,
    drop_path_rule, init_stem, init_tokens, norm,
  )  # fmt: skip


def _choose(argument: str, value: str, names: Any) -> None:
  if value not in names:
    raise ValueError(f"encoder.{argument} {value!r} is none of {', '.join(names)}")
