"""Residual networks (He et al. 2015, 1512.03385), version 1.5: the 3×3 has the stride."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import layers as layers_lib
from ssljax.models.norms import BatchNorm

# variant -> blocks of the four stages, and whether they are bottlenecks.
VARIANTS: dict[str, tuple[tuple[int, ...], bool]] = {
  "18": ((2, 2, 2, 2), False),
  "34": ((3, 4, 6, 3), False),
  "50": ((3, 4, 6, 3), True),
  "101": ((3, 4, 23, 3), True),
}
# stem -> kernel, stride and padding of its convolution, and whether a 3×3 maximum with stride 2
# follows. "cifar_pad2" is that of solo-learn's CIFAR runs: 34×34 places of a 32×32 image.
STEMS = {
  "imagenet": (7, 2, 3, True),
  "cifar": (3, 1, 1, False),
  "cifar_pool": (3, 1, 1, True),
  "cifar_pad2": (3, 1, 2, False),
}
# PyTorch's kaiming_normal_(mode="fan_out").
KERNEL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(nn.Module):
  """Convolutional encoder. Build it with `resnet`, which checks and explains the arguments."""

  blocks: tuple[int, ...]
  bottleneck: bool
  stem: str
  base: int
  zero_init: bool
  momentum: float
  eps: float
  remat: str
  dtype: Any

  prefix = 0  # no tokens before the grid's
  patch = None  # no patches: places cannot be hidden
  pool = "mean"
  batch_norm = True  # examples meet in the batch statistics

  @property
  def depth(self) -> int:
    """Stages, which is what `layers` counts."""
    return len(self.blocks)

  @property
  def widths(self) -> tuple[int, ...]:
    """Features of the map after each stage."""
    return tuple(self.base * 2**i * (4 if self.bottleneck else 1) for i in range(self.depth))

  @property
  def width(self) -> int:
    """Features of "pooled"."""
    return self.widths[-1]

  def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Static size of the last map of one example of shape (h, w) or (h, w, c)."""
    kernel, stride, padding, pooled = STEMS[self.stem]
    sides = [(side + 2 * padding - kernel) // stride + 1 for side in shape[:2]]
    shrink = 2 ** (self.depth - 1 + int(pooled))
    return tuple(-(-side // shrink) for side in sides)

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
      keys: [b]; giving any is training, as is `train`: batch norm takes the statistics of the batch
        and moves those of the collection "batch_stats", which must be mutable. Nothing is drawn.
      layers: stages (from 0, negative from the end) whose maps are returned as well.

    Returns:
      "pooled" [b d] float32, "patches" [b n d] (the last map, row by row), "layer_i" [b n_i d_i].
    """
    train = train or keys is not None
    wanted = {range(self.depth)[i] for i in layers}
    out = {}
    x = self._stem(layers_lib.batch_sharded(x.astype(self.dtype)), train)
    for stage, count in enumerate(self.blocks):
      for i in range(count):
        block = self._block(stage, stride=2 if stage and not i else 1, index=i)
        x = layers_lib.batch_sharded(block(x, train))
      if stage in wanted:
        out[f"layer_{stage}"] = _places(x)
    # float32: a mean over places in bfloat16 loses three digits.
    pooled = x.astype(jnp.float32).mean((1, 2))
    return out | {"pooled": pooled, "patches": _places(x)}

  def _stem(self, x: jax.Array, train: bool) -> jax.Array:
    kernel, stride, padding, pooled = STEMS[self.stem]
    x = convolution(self.base, kernel, stride, padding, self.dtype, "stem_conv")(x)
    norm = BatchNorm(self.momentum, self.eps, dtype=self.dtype, name="stem_norm")
    x = nn.relu(norm(x, train=train))
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if pooled else x

  def _block(self, stage: int, stride: int, index: int) -> "Residual":
    module = nn.remat(Residual, static_argnums=(2,)) if self.remat == "full" else Residual
    return module(
      self.base * 2**stage, stride, self.bottleneck, self.zero_init, self.momentum, self.eps,
      self.dtype, name=f"stage_{stage}_block_{index}",
    )  # fmt: skip


class Residual(nn.Module):
  """x + branch(x), then ReLU: [b h w c] -> [b h/s w/s f], sizes rounded up.

  f is `features`, four times that in a bottleneck. x goes through a 1×1 convolution where its shape
  changes.
  """

  features: int
  stride: int
  bottleneck: bool
  zero_init: bool
  momentum: float
  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    norm = functools.partial(BatchNorm, self.momentum, self.eps, dtype=self.dtype)
    f, s = self.features, self.stride
    sizes = [(f, 3, s), (f, 3, 1)]  # features, kernel, stride
    if self.bottleneck:
      sizes = [(f, 1, 1), (f, 3, s), (4 * f, 1, 1)]
    last = nn.initializers.zeros if self.zero_init else nn.initializers.ones
    y = x
    for i, (features, kernel, stride) in enumerate(sizes, start=1):
      y = convolution(features, kernel, stride, kernel // 2, self.dtype, f"conv{i}")(y)
      if i < len(sizes):
        y = nn.relu(norm(name=f"norm{i}")(y, train=train))
    y = norm(name=f"norm{i}", scale_init=last)(y, train=train)
    if s != 1 or x.shape[-1] != y.shape[-1]:
      x = convolution(y.shape[-1], 1, s, 0, self.dtype, "down_conv")(x)
      x = norm(name="down_norm")(x, train=train)
    return nn.relu(x + y)


def convolution(features: int, kernel: int, stride: int, padding: int, dtype: Any, name: str):
  """Without bias, padded alike on both sides: linen's "SAME" would pad a stride of 2 unevenly."""
  pad = (padding, padding)
  return nn.Conv(
    features, (kernel, kernel), stride, (pad, pad), use_bias=False, kernel_init=KERNEL,
    dtype=dtype, name=name,
  )  # fmt: skip


def _places(x: jax.Array) -> jax.Array:
  """[b h w d] -> [b h·w d]"""
  return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def resnet(
  *,
  variant: str = "50",
  stem: str = "imagenet",
  width: int = 64,
  blocks: tuple[int, ...] = (),
  zero_init: bool = True,
  momentum: float = 0.9,
  eps: float = 1e-5,
  remat: str = "none",
  dtype: str = "float32",
) -> ResNet:
  """A residual network with batch norm.

  Args:
    variant: 18, 34, 50 or 101. Later stages double the features; 50 and 101 have bottlenecks.
    stem: "imagenet" (7×7, stride 2, then a 3×3 maximum, stride 2), "cifar" (3×3), "cifar_pool"
      (3×3, then the maximum) or "cifar_pad2" (3×3 with padding 2, solo-learn's CIFAR runs).
    width: features of the stem; 128 is the "2×" of SimCLR, whose every layer is twice as wide.
    blocks: of each stage, instead of the variant's.
    zero_init: start every block as the identity, the scale of its last norm being 0 (Goyal et al.
      2017, 1706.02677), as SimCLR, SimSiam and Barlow Twins do and torchvision by default does not.
    momentum: of the running statistics, 0.9 = PyTorch's 0.1.
    remat: "none", or "full" to compute the inside of blocks again in the backward pass.
    dtype: of the computation; parameters, statistics and "pooled" are float32.

  Raises:
    ValueError: an unknown name, or a size that is not positive.
  """
  _choose("variant", variant, VARIANTS)
  _choose("stem", stem, STEMS)
  _choose("remat", remat, ("none", "full"))
  stages, bottleneck = VARIANTS[variant]
  stages = tuple(blocks) or stages
  if width < 1 or min(stages) < 1:
    raise ValueError(f"encoder.width {width} and encoder.blocks {stages} must be positive")
  if not 0 <= momentum < 1:
    raise ValueError(f"encoder.momentum {momentum} must be at least 0 and below 1")
  return ResNet(stages, bottleneck, stem, width, zero_init, momentum, eps, remat, jnp.dtype(dtype))


def _choose(argument: str, value: str, names: Any) -> None:
  if value not in names:
    raise ValueError(f"encoder.{argument} {value!r} is none of {', '.join(names)}")
