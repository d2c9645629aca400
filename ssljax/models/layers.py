"""Transformer blocks, built from linen pieces and applied as pure functions of their parameters.

Each block's parameters are a subtree of their own (`block_0`, `block_1`, …), whether or not the
stack is run as a scan: a checkpoint does not know how it will be executed, and per-layer rates,
trust ratios and weight export see one layer at a time. A scan stacks them inside the step.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax.models import attention

Init = Callable[..., jax.Array]


def beit_normal(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Normal of scale 0.02 cut at one standard deviation (BEiT): its real deviation is 0.0108."""
  return 0.02 * jax.random.truncated_normal(rng, -1.0, 1.0, shape, dtype)


def uniform_bias(fan_in: int) -> Init:
  """Uniform(±1/sqrt(fan_in)): a bias left at PyTorch's default, as MAE's patch convolution is."""
  bound = fan_in**-0.5
  return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)


# Name -> initialiser of all linear kernels [in out].
# xavier: MAE; of the fused qkv matrix as one (bound sqrt(6/4d)). normal: timm's truncated normal,
# whose cut at ±2 in absolute value never bites. torch: U(±1/sqrt(fan_in)), PyTorch's default.
# kaiming: normal of variance 2/fan_in, kaiming_normal_'s default.
KERNELS: dict[str, Init] = {
  "xavier": nn.initializers.xavier_uniform(),
  "normal": nn.initializers.normal(0.02),
  "beit": beit_normal,
  "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
  "kaiming": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
}
# Class, register and mask tokens follow the kernels only where those are cut.
TOKENS: dict[str, Init] = dict.fromkeys(KERNELS, nn.initializers.normal(0.02))
TOKENS["beit"] = beit_normal


def layer_norm(name: str, eps: float, dtype: Any) -> nn.LayerNorm:
  """Layer norm with the two-pass variance (linen's default, E[x²]-E[x]², cancels in float32)."""
  return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=dtype, name=name)


def gelu(x: jax.Array) -> jax.Array:
  """x Φ(x), the exact GELU (Hendrycks and Gimpel 2016, 1606.08415), any shape.

  On a CPU from erf in float32, as PyTorch computes it; elsewhere linen's, from erfc, which keeps
  its digits in bfloat16 but on a CPU costs two polynomials and an exponential a number.
  """
  if attention.compiled_platform() != "cpu":
    return nn.gelu(x, approximate=False)
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def token_dot(x: jax.Array, kernel: jax.Array, *given: Any, **options: Any) -> jax.Array:
  """`dot_general` of a linear layer, [… d] and [d e] -> [… e], on a CPU as one flat product.

  The gradient of a kernel that meets [b n d] contracts two axes, for which XLA's CPU backend writes
  the transpose of x to memory first, 8 % of ViT-S's step; of [b·n d] it reads x as it lies.
  """
  if attention.compiled_platform() != "cpu":
    return jax.lax.dot_general(x, kernel, *given, **options)
  flat = x.reshape(-1, x.shape[-1])
  y = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


# The linear layer of everything that sees tokens.
linear = functools.partial(nn.Dense, dot_general=token_dot)


class Attention(nn.Module):
  """Multi-head self-attention: [b n d] -> [b n d], softmax scale 1/sqrt(d/heads).

  `bias` is "qkv", "qv" (no bias on keys: BEiT) or "none". `rotary` turns queries and keys.
  """

  heads: int
  bias: str = "qkv"
  kernel: Init = KERNELS["xavier"]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    attention_bias: jax.Array | None = None,
    rotary: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    b, n, d = x.shape
    qkv = linear(
      3 * d, use_bias=self.bias == "qkv", kernel_init=self.kernel, dtype=self.dtype, name="qkv"
    )(x)
    if self.bias == "qv":
      zeros = nn.initializers.zeros
      q_bias, v_bias = self.param("q_bias", zeros, (d,)), self.param("v_bias", zeros, (d,))
      qkv += jnp.concatenate([q_bias, jnp.zeros(d), v_bias]).astype(qkv.dtype)
    qkv = batch_sharded(qkv.reshape(b, n, 3, self.heads, d // self.heads), tensor=3)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    if rotary is not None:
      q, k = attention.rotate(q, rotary), attention.rotate(k, rotary)
    if attention_bias is not None:
      attention_bias = attention_bias[None].astype(q.dtype)
    if self.is_mutable_collection("attention"):  # by whoever wants the weights
      self.sow("attention", "first", attention.of_first(q, k, attention_bias))
    x = attention.attend(q, k, v, attention_bias).reshape(b, n, d)
    return linear(d, kernel_init=self.kernel, dtype=self.dtype, name="proj")(x)


# gelu: the exact one (linen's default is the tanh form, which is SigLIP's). quick_gelu: that of the
# released CLIP weights.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_tanh": nn.gelu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


class Mlp(nn.Module):
  """Two linear layers with an activation between them, one of `ACTIVATIONS`."""

  hidden: int
  kernel: Init = KERNELS["xavier"]
  dtype: Any = jnp.float32
  activation: str = "gelu"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(linear, kernel_init=self.kernel, dtype=self.dtype)
    y = batch_sharded(dense(self.hidden, name="fc1")(x), tensor=2)
    return dense(x.shape[-1], name="fc2")(ACTIVATIONS[self.activation](y))


class Block(nn.Module):
  """Pre-norm transformer block: [b n d] -> [b n d]; with `post` the norms follow the sums.

  `drop` [2 b] multiplies the two branches example by example: 0 drops, 1/(1-rate) keeps, 1 is
  evaluation. `layer_scale` 0 means none.
  """

  heads: int
  mlp_ratio: float = 4.0
  eps: float = 1e-6
  bias: str = "qkv"
  layer_scale: float = 0.0
  kernel: Init = KERNELS["xavier"]
  dtype: Any = jnp.float32
  post: bool = False
  activation: str = "gelu"

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    drop: jax.Array | None = None,
    attention_bias: jax.Array | None = None,
    rotary: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    d = x.shape[-1]
    attention = Attention(self.heads, self.bias, self.kernel, self.dtype, name="attn")
    hidden = int(d * self.mlp_ratio)
    mlp = Mlp(hidden, self.kernel, self.dtype, self.activation, name="mlp")
    norm = functools.partial(layer_norm, eps=self.eps, dtype=self.dtype)
    if self.post:
      x = norm("norm1")(x + self._branch(1, attention(x, attention_bias, rotary), drop))
      y = mlp(x)
    else:
      x = x + self._branch(1, attention(norm("norm1")(x), attention_bias, rotary), drop)
      y = mlp(norm("norm2")(x))
    self.sow("mlp", "branch", y)  # for whoever makes this collection mutable
    x = x + self._branch(2, y, drop)
    return norm("norm2")(x) if self.post else x

  def _branch(self, which: int, y: jax.Array, drop: jax.Array | None) -> jax.Array:
    if self.layer_scale:
      init = nn.initializers.constant(self.layer_scale)
      y = y * self.param(f"scale{which}", init, y.shape[-1:]).astype(y.dtype)
    if drop is not None:
      y = y * drop[which - 1][:, None, None].astype(y.dtype)
    return y


def drop_path(
  keys: jax.Array | None, rate: float, depth: int, b: int, rule: str = "linear"
) -> jax.Array | None:
  """Multipliers of the residual branches (stochastic depth; Huang et al. 2016, 1603.09382).

  keys [b], one per example, or None in evaluation -> [depth 2 b] float32, or None where nothing is
  dropped. Rates grow linearly from 0 to `rate` over the depth, or are all `rate` ("uniform").
  """
  if keys is None or rate == 0.0:
    return None
  keep = 1.0 - jnp.linspace(rate if rule == "uniform" else 0.0, rate, depth)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)), out_axes=2)(keys)
  return jnp.where(uniform < keep[:, None, None], 1.0 / keep[:, None, None], 0.0)


REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def batch_sharded(x: jax.Array, tensor: int | None = None) -> jax.Array:
  """Keeps activations split by example where a mesh is set; without it the compiler may gather the
  batch and split the features instead, which costs a hundred times the memory.

  `tensor` is the axis (of heads, of hidden features) that lies along the mesh's `tensor` axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or "data" not in mesh.axis_names:
    return x
  rows = tuple(name for name in ("replica", "data") if name in mesh.axis_names)
  if x.shape[0] % math.prod(mesh.shape[name] for name in rows):
    return x
  spec = [rows if len(rows) > 1 else "data", *(None,) * (x.ndim - 1)]
  if tensor is not None:
    if "tensor" not in mesh.axis_names or x.shape[tensor] % mesh.shape["tensor"]:
      return x
    spec[tensor] = "tensor"
  return jax.lax.with_sharding_constraint(x, P(*spec))


class Transformer(nn.Module):
  """A stack of blocks: [b n d] -> [b n d], and by name what `wanted` asks for: {"layer": (i, …)}
  gives "layer_i", the output of block i, "mlp" that of its MLP before it is added, and "attention"
  the weights [b h n] with which its first token sees all.

  scan: run the stack as one compiled block (short compile; the numbers stay the same).
  remat: "none", "full" (recompute everything in the backward pass) or "dots" (keep matmul results).
  depth_scale: divide the output projections of block l (from 1) by sqrt(2l) at the start (BEiT).
  """

  depth: int
  block: Block
  scan: bool = False
  remat: str = "none"
  depth_scale: bool = False

  def setup(self):
    if self.remat not in REMAT:
      raise ValueError(f"remat {self.remat!r} is none of {', '.join(REMAT)}")

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    drop: jax.Array | None = None,
    attention_bias: jax.Array | None = None,
    rotary: tuple[jax.Array, jax.Array] | None = None,
    wanted: Mapping[str, tuple[int, ...]] = {},
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    block = self.block.clone(parent=None, name=None)
    sample = jax.ShapeDtypeStruct((1, 1, x.shape[-1]), x.dtype)
    params = [
      self.param(f"block_{i}", functools.partial(self._init_block, block, sample), i)
      for i in range(self.depth)
    ]

    sown = [name for name in ("mlp", "attention") if wanted.get(name)]

    def one(p, x, d):
      given = {"params": p}, batch_sharded(x), d, attention_bias, rotary
      if not sown:
        return batch_sharded(block.apply(*given)), {}
      x, kept = block.apply(*given, mutable=sown)
      return batch_sharded(x), {name: jax.tree.leaves(kept[name])[0] for name in sown}

    if REMAT[self.remat] is not None:
      one = jax.checkpoint(one, policy=REMAT[self.remat], prevent_cse=not self.scan)
    run = _scan if self.scan else _loop
    return run(one, params, x, drop, {name: places for name, places in wanted.items() if places})

  def _init_block(self, block: Block, sample: Any, rng: jax.Array, index: int) -> Any:
    params = block.init(rng, jnp.zeros(sample.shape, sample.dtype))["params"]
    if self.depth_scale:
      scale = (2.0 * (index + 1)) ** -0.5
      params["attn"]["proj"]["kernel"] *= scale
      params["mlp"]["fc2"]["kernel"] *= scale
    return params


def _loop(one, params, x, drop, wanted):
  taken = {}
  for i, p in enumerate(params):
    x, kept = one(p, x, None if drop is None else drop[i])
    kept |= {"layer": x}
    taken |= {f"{name}_{i}": kept[name] for name, places in wanted.items() if i in places}
  return x, taken


def _scan(one, params, x, drop, wanted):
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

  def step(x, inputs):
    x, kept = one(inputs[0], x, inputs[1])
    return x, kept | ({"layer": x} if "layer" in wanted else {})

  x, kept = jax.lax.scan(step, x, (stacked, drop))
  return x, {f"{name}_{i}": kept[name][i] for name, places in wanted.items() for i in places}
