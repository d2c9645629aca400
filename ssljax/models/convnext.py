"""ConvNeXt (Liu et al. 2022, 2201.03545): depthwise convolutions in the form of a transformer."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import layers as layers_lib

# variant -> blocks and features of the four stages. Tiny and above are the paper's, the smaller
# ones those of ConvNeXt V2 (Woo et al. 2023, 2301.00808) and timm.
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
  "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
  "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
  "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
  "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
  "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
  "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
  "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
  "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
KERNEL = layers_lib.KERNELS["normal"]
EPS = 1e-6


class ConvNeXt(nn.Module):
  """Convolutional encoder. Build it with `convnext`, which checks and explains the arguments."""

  blocks: tuple[int, ...]
  widths: tuple[int, ...]  # features of the map after each stage
  stem: int
  drop_path: float
  layer_scale: float
  remat: str
  dtype: Any

  prefix = 0  # no tokens before the grid's
  patch = None  # its convolutions overlap: places cannot be hidden
  pool = "mean"
  batch_norm = False

  @property
  def depth(self) -> int:
    """Stages, which is what `layers` counts."""
    return len(self.blocks)

  @property
  def width(self) -> int:
    """Features of "pooled"."""
    return self.widths[-1]

  def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Static size of the last map of one example of shape (h, w) or (h, w, c).

    Raises:
      ValueError: nothing is left of a side.
    """
    shrink = self.stem * 2 ** (self.depth - 1)
    sides = tuple(side // shrink for side in shape[:2])
    if min(sides) < 1:
      raise ValueError(
        f"images of {shape[0]}×{shape[1]} are smaller than the {shrink} pixels of one place of"
        " ConvNeXt's last map: use larger images or a smaller encoder.stem"
      )
    return sides

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    keys: jax.Array | None = None,
    train: bool = False,
    layers: tuple[int, ...] = (),
  ) -> dict[str, jax.Array]:
    """Encodes images [b h w c], already normalised.

    Args:
      keys: [b] one key per example for drop path; None is evaluation.
      train: without effect, there are no batch statistics.
      layers: stages (from 0, negative from the end) whose maps are returned as well.

    Returns:
      "pooled" [b d] float32, the final norm of the mean over places; "patches" [b n d], the same
      norm of every place, row by row; "layer_i" [b n_i d_i], the map after stage i without it.
    """
    self.grid(x.shape[1:])
    wanted = {range(self.depth)[i] for i in layers}
    total = sum(self.blocks)
    drop = layers_lib.drop_path(keys, self.drop_path, total, x.shape[0])
    out: dict[str, jax.Array] = {}
    x, block = layers_lib.batch_sharded(x.astype(self.dtype)), 0
    for stage, count in enumerate(self.blocks):
      x = self._shrink(x, stage)
      for i in range(count):
        module = self._block(f"stage_{stage}_block_{i}")
        x = layers_lib.batch_sharded(module(x, None if drop is None else drop[block, 0]))
        block += 1
      if stage in wanted:
        out[f"layer_{stage}"] = _places(x)
    norm = layers_lib.layer_norm("norm", EPS, self.dtype)
    # float32: a mean over places in bfloat16 loses three digits.
    pooled = norm(x.astype(jnp.float32).mean((1, 2))).astype(jnp.float32)
    return out | {"pooled": pooled, "patches": norm(_places(x))}

  def _shrink(self, x: jax.Array, stage: int) -> jax.Array:
    """The stem, whose norm comes last, or the step to the next stage, whose norm comes first."""
    step = 2 if stage else self.stem
    conv = nn.Conv(
      self.widths[stage], (step, step), step, "VALID", kernel_init=KERNEL, dtype=self.dtype,
      name=f"down_{stage}" if stage else "stem",
    )  # fmt: skip
    norm = layers_lib.layer_norm(f"down_norm_{stage}" if stage else "stem_norm", EPS, self.dtype)
    return conv(norm(x)) if stage else norm(conv(x))

  def _block(self, name: str) -> nn.Module:
    module = nn.remat(Block) if self.remat == "full" else Block
    return module(self.layer_scale, self.dtype, name=name)


class Block(nn.Module):
  """x + drop · scale · MLP(norm(7×7 depthwise convolution of x)): [b h w d] -> [b h w d].

  `drop` [b] multiplies the branch example by example; `layer_scale` 0 means none.
  """

  layer_scale: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, drop: jax.Array | None) -> jax.Array:
    d = x.shape[-1]
    pads = ((3, 3), (3, 3))
    y = nn.Conv(
      d, (7, 7), padding=pads, feature_group_count=d, kernel_init=KERNEL, dtype=self.dtype,
      name="conv",
    )(x)  # fmt: skip
    y = layers_lib.layer_norm("norm", EPS, self.dtype)(y)
    # Places in a row: the MLP's sharding knows examples, tokens and features.
    y = layers_lib.Mlp(4 * d, KERNEL, self.dtype, name="mlp")(_places(y)).reshape(x.shape)
    if self.layer_scale:
      init = nn.initializers.constant(self.layer_scale)
      y = y * self.param("scale", init, (d,)).astype(y.dtype)
    if drop is not None:
      y = y * drop[:, None, None, None].astype(y.dtype)
    return x + y


def _places(x: jax.Array) -> jax.Array:
  """[b h w d] -> [b h·w d]"""
  return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def convnext(
  *,
  variant: str = "tiny",
  stem: int = 4,
  blocks: tuple[int, ...] = (),
  widths: tuple[int, ...] = (),
  drop_path: float = 0.0,
  layer_scale: float = 1e-6,
  remat: str = "none",
  dtype: str = "float32",
) -> ConvNeXt:
  """A ConvNeXt.

  Args:
    variant: atto, femto, pico, nano, tiny, small, base or large.
    stem: side of the patches that the first convolution cuts; 4 as published, 2 or 1 for small
      pictures.
    blocks, widths: of each stage, instead of the variant's.
    drop_path: largest rate; rates grow linearly over the blocks.
    layer_scale: its starting value; 0 means none.
    remat: "none", or "full" to compute the inside of blocks again in the backward pass.
    dtype: of the computation; parameters and "pooled" are float32.

  Raises:
    ValueError: an unknown name, a size that is not positive, or lists of unequal length.
  """
  if variant not in VARIANTS:
    raise ValueError(f"encoder.variant {variant!r} is none of {', '.join(VARIANTS)}")
  if remat not in ("none", "full"):
    raise ValueError(f"encoder.remat {remat!r} is none of none, full")
  counts, features = VARIANTS[variant]
  counts, features = tuple(blocks) or counts, tuple(widths) or features
  if len(counts) != len(features):
    raise ValueError(
      f"encoder.blocks {counts} and encoder.widths {features} must name the same stages"
    )
  if min(*counts, *features, stem) < 1:
    raise ValueError(
      f"encoder.stem {stem}, encoder.blocks {counts} and encoder.widths {features} must be positive"
    )
  return ConvNeXt(counts, features, stem, drop_path, layer_scale, remat, jnp.dtype(dtype))
