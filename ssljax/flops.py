"""FLOPs of a function, from its jaxpr, and the peaks of devices: what MFU is made of.

Model FLOPs are matrix multiplications and convolutions only, a multiply-add counted as two
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B). The compiler's own count is per device, takes
the body of a loop once, and includes what rematerialisation does again.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Dense peaks in TFLOP/s per JAX device. bf16 and f16 are equal on all of these.
# "float32" is what a float32 matmul at JAX's default precision can reach: one bf16 pass on TPU,
# TF32 on NVIDIA.
# TPU: docs.cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e ("Peak compute per chip (bf16)": 197, 459,
# 918; read again in November 2026), v2 to v4 their pages there. v2 and v3 show one device per core,
# half a chip.
# A100: NVIDIA A100 data sheet (2021). H100: NVIDIA H100 data sheet (2023), half of the figures
# "with sparsity". H200: NVIDIA H200 data sheet (2024), also halved. GH200: as H100 SXM.
# The first entry whose name is in the device kind counts: the special before the general.
_PEAKS = (
  # device kind, bfloat16, float32
  ("TPU v6", 918.0, 918.0),  # "TPU v6 lite", v6e (Trillium)
  ("TPU v5 lite", 197.0, 197.0),  # v5e
  ("TPU v5e", 197.0, 197.0),
  ("TPU v5", 459.0, 459.0),  # v5p
  ("TPU v4", 275.0, 275.0),
  ("TPU v3", 61.5, 61.5),
  ("TPU v2", 22.5, 22.5),
  ("H200 NVL", 835.5, 417.5),
  ("H200", 989.5, 494.5),
  ("GH200", 989.5, 494.5),
  ("H100 PCIe", 756.5, 378.0),
  ("H100 NVL", 835.5, 417.5),
  ("H100", 989.5, 494.5),
  ("A100", 312.0, 156.0),
)


def device_peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
  """Dense FLOP/s of one device (`jax.devices()[0].device_kind`), None for an unknown one (a CPU).

  dtype: the type that matmuls compute in: "bfloat16", "float16" or "float32" (at JAX's default
  precision, see the table). ValueError for others.
  """
  if dtype not in ("bfloat16", "float16", "float32"):
    raise ValueError(f"no peak is known for {dtype}: bfloat16, float16 and float32 are")
  for name, half, single in _PEAKS:
    if name.lower() in device_kind.lower():
      return 1e12 * (single if dtype == "float32" else half)
  return None


def count_flops(function: Callable, *args: Any) -> float:
  """FLOPs of one call of `function` on `args` (arrays or shapes); nothing is run or compiled.

  The whole global batch: sharding does not divide it. A scan counts its length, a cond its most
  expensive branch, a while loop one round (its length is not known). For a training step, give it a
  function without rematerialisation: what is computed again is no work of the model.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
  return sum((_equation(equation) for equation in jaxpr.eqns), start=0.0)


def _equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot(equation)
  if name == "conv_general_dilated":
    return _convolution(equation)
  if name.startswith("dot_product_attention_"):  # cuDNN's fused kernel shows no matmul
    return _fused_attention(equation)
  inner = [_count(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
  if name == "cond":
    return max(inner)
  times = 1
  if name == "scan":
    times = params["length"]
  elif name == "shard_map":  # the body is what one device does
    axes = params.get("newly_manual_axes", params.get("manual_axes", ()))  # by version of JAX
    times = math.prod(params["mesh"].shape[axis] for axis in axes)
  return times * sum(inner)


def _jaxprs(value: Any) -> Iterator[Any]:
  """The jaxprs in a parameter of an equation: itself, or in a tuple (branches)."""
  for item in value if isinstance(value, tuple | list) else (value,):
    item = getattr(item, "jaxpr", item)  # a closed jaxpr
    if hasattr(item, "eqns"):
      yield item


def _dot(equation: Any) -> float:
  (contracting, _), _ = equation.params["dimension_numbers"]
  left, out = equation.invars[0].aval, equation.outvars[0].aval
  return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracting)


def _fused_attention(equation: Any) -> float:
  """Scores and weighted values: two matmuls forward, four backward (scores done again: not)."""
  query, key = equation.invars[0].aval.shape, equation.invars[1].aval.shape
  length = 1 if equation.params["layout"] == 0 else 2  # [b t heads d] or [b heads t d]
  matmuls = 4 if "_bwd" in equation.primitive.name else 2
  return matmuls * 2.0 * math.prod(query) * key[length]


def _convolution(equation: Any) -> float:
  """Every output element takes a window of every input channel of its group.

  lhs_dilation puts zeros between the inputs (the gradient of a strided convolution): they are not
  counted. Windows over the padding are.
  """
  numbers = equation.params["dimension_numbers"]
  kernel, out = equation.invars[1].aval, equation.outvars[0].aval
  window = math.prod(kernel.shape[axis] for axis in numbers.rhs_spec[1:])  # all but out features
  return 2.0 * math.prod(out.shape) * window / math.prod(equation.params["lhs_dilation"])
