"""What methods put on an encoder's features: projectors, predictors, prototypes."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssljax.models import layers as layers_lib
from ssljax.models.norms import BatchNorm

ACTIVATIONS = {
  "relu": nn.relu,
  "gelu": lambda x: nn.gelu(x, approximate=False),  # linen's default is the tanh form
}
CHOICES: dict[str, Sequence[str]] = {
  "norm": ("batch", "layer", "none"),
  "last": ("none", "batch", "layer", "scale", "plain", "whiten"),
  "bias": ("auto", "all", "none", "hidden"),
  "activation": tuple(ACTIVATIONS),
  "start": tuple(layers_lib.KERNELS),
  "unit": ("no", "start", "use"),
  "gain": ("fixed", "trained", "none"),
}


class Projector(nn.Module):
  """Linear layers with a norm and an activation between them: [… d] -> [… sizes[-1]].

  sizes: widths of the layers, the last one's included; () is the identity.
  norm: "batch", "layer" or "none" after all layers but the last.
  last: after the last layer "none", "batch" (scale and shift), "scale" (no shift: SimCLR), "plain"
    (neither: SimSiam), "layer", or "whiten": the function of that name, [b d] -> [b d], then scale
    and shift (VIbCReg).
  bias: which layers have one: "auto" (those that no norm follows), "all", "none", or "hidden" (all
    but the last: BYOL and VICReg).
  start: "torch" (PyTorch's default) or another name of `models.layers.KERNELS`, with zero biases;
    "normal" has deviation 0.02.

  train=True needs the collection "batch_stats" mutable, see `models.norms.BatchNorm`.
  """

  sizes: tuple[int, ...]
  norm: str = "batch"
  last: str = "none"
  bias: str = "auto"
  activation: str = "relu"
  start: str = "torch"
  momentum: float = 0.9
  eps: float = 1e-5
  dtype: Any = jnp.float32
  whiten: Callable | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    _check(self, "norm", "last", "bias", "activation", "start")
    final = len(self.sizes) - 1
    for i, size in enumerate(self.sizes):
      norm = self.last if i == final else self.norm
      bias = {"auto": norm == "none", "all": True, "none": False, "hidden": i < final}[self.bias]
      x = linear(size, x, self.start, bias, self.dtype, f"layer_{i}")
      if norm == "whiten":
        x = self._whitened(x, f"norm_{i}")
      elif norm == "layer":
        x = layers_lib.layer_norm(f"norm_{i}", self.eps, self.dtype)(x)
      elif norm != "none":
        x = BatchNorm(
          self.momentum, self.eps, use_scale=norm != "plain", use_bias=norm == "batch",
          dtype=self.dtype, name=f"norm_{i}",
        )(x, train=train)  # fmt: skip
      x = x if i == final else ACTIVATIONS[self.activation](x)
    return x

  def _whitened(self, x: jax.Array, name: str) -> jax.Array:
    if self.whiten is None:
      raise ValueError('Projector.last "whiten" needs the function Projector.whiten')
    scale = self.param(f"{name}_scale", nn.initializers.ones, x.shape[-1:])
    shift = self.param(f"{name}_shift", nn.initializers.zeros, x.shape[-1:])
    return (self.whiten(x) * scale + shift).astype(self.dtype)


Predictor = Projector  # the same block: from one view's projection to the other's


class Prototypes(nn.Module):
  """Scores of k prototypes, without bias: [… d] -> [… k] float32. It leaves x as long as it is.

  unit: "no"; "start" (unit vectors at the start: whoever trains them puts them back on the sphere
    after each step with `unit_columns`, as SwAV does); "use" (normalised whenever they are used,
    which is weight norm with gain 1: Salimans and Kingma 2016, 1602.07868).
  The parameter is `kernel` [d k].
  """

  count: int
  unit: str = "use"
  start: str = "torch"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    del train  # the same in both
    _check(self, "unit", "start")
    kernel = self.param("kernel", self._init, (x.shape[-1], self.count))
    if self.unit == "use":
      kernel = unit_columns(kernel)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)

  def _init(self, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    kernel = layers_lib.KERNELS[self.start](rng, shape)
    return unit_columns(kernel) if self.unit == "start" else kernel


class DINOHead(nn.Module):
  """DINO's head (Caron et al. 2021, 2104.14294): [… d] -> scores [… out] float32.

  `layers` linear layers with GELU between them, the last of width `bottleneck`; its output made
  unit, then `last_layer`, linear without bias, whose directions keep PyTorch's default start.
  gain: of its weight norm, "fixed" to 1 (DINO), "trained" from 1 (DINO's ViT-S, DINOv2), or "none":
  no weight norm (DINOv3, which draws it with `start`, too).
  """

  out: int = 65536
  hidden: int = 2048
  bottleneck: int = 256
  layers: int = 3
  norm: str = "none"
  bias: str = "all"
  gain: str = "fixed"
  start: str = "normal"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    _check(self, "norm", "bias", "gain", "start")
    sizes = (self.hidden,) * (self.layers - 1) + (self.bottleneck,)
    mlp = Projector(
      sizes, self.norm, bias=self.bias, activation="gelu", start=self.start, dtype=self.dtype,
      name="mlp",
    )  # fmt: skip
    x = unit(mlp(x, train=train))
    normed = self.gain != "none"
    last = Prototypes(
      self.out, "use" if normed else "no", "torch" if normed else self.start, self.dtype,
      name="last_layer",
    )  # fmt: skip
    scores = last(x)
    if self.gain == "trained":
      scores *= self.param("last_layer_gain", nn.initializers.ones, (self.out,))
    return scores


def linear(size: int, x: jax.Array, start: str, bias: bool, dtype: Any, name: str) -> jax.Array:
  """A linear layer of the module that calls it: [… d] -> [… size]."""
  torch = layers_lib.uniform_bias(x.shape[-1])
  return nn.Dense(
    size,
    use_bias=bias,
    kernel_init=layers_lib.KERNELS[start],
    bias_init=torch if start == "torch" else nn.initializers.zeros,
    dtype=dtype,
    name=name,
  )(x)


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
  """x / max(‖x‖, 1e-12) along an axis, in at least float32; the gradient at 0 is finite."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(jnp.square(x), axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def unit_columns(kernel: jax.Array) -> jax.Array:
  """Prototypes [d k] of length 1."""
  return unit(kernel, 0)


def _check(module: Any, *arguments: str) -> None:
  for argument in arguments:
    value = getattr(module, argument)
    if value not in CHOICES[argument]:
      names = ", ".join(CHOICES[argument])
      raise ValueError(f"{type(module).__name__}.{argument} {value!r} is none of {names}")
