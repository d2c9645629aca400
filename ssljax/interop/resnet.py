"""ResNets to and from the names of torchvision, which are timm's too.

Ours                                   theirs                        layout
stem_conv, stem_norm                   conv1, bn1
stage_0_block_1/conv2, norm2           layer1.1.conv2, bn2
stage_1_block_0/down_conv, down_norm   layer2.0.downsample.0, .1
kernel [h w in out]                    weight [out in h w]
scale, bias [d]                        weight, bias [d]
mean, var [d] of batch_stats           running_mean, running_var
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssljax.leaves import named, nested

_RULES = (
  (r"^(params|batch_stats)/", ""),
  (r"^stem_conv", "conv1"),
  (r"^stem_norm", "bn1"),
  (r"^stage_(\d+)_block_(\d+)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}"),
  (r"/down_conv", "/downsample.0"),
  (r"/down_norm", "/downsample.1"),
  (r"/norm(\d)", r"/bn\1"),
  (r"/(kernel|scale)$", "/weight"),
  (r"/(mean|var)$", r"/running_\1"),
  (r"/", "."),
)


def torch_name(path: str) -> str:
  """Their name of one of our variables, e.g. "params/stage_0_block_0/conv1/kernel"."""
  for pattern, new in _RULES:
    path = re.sub(pattern, new, path)
  return path


def from_variables(variables: Mapping) -> dict[str, np.ndarray]:
  """{"params", "batch_stats"} of the encoder as tensors that timm and torchvision load."""
  tensors = {}
  for path, leaf in named(variables).items():
    leaf = np.asarray(leaf, np.float32)
    tensors[torch_name(path)] = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf
  return tensors


def to_variables(
  tensors: Mapping[str, np.ndarray], encoder: Any, shape: Sequence[int]
) -> tuple[dict, tuple[str, ...]]:
  """The inverse, for an encoder of examples (h, w, c) -> (variables, tensors that were not used).

  Prefixes of wrappers are taken off; a classifier and counters of batches are not used.

  Raises:
    ValueError: the file is of another architecture; one line that says where.
  """
  prefix = _prefix(tensors)
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  found, used = {}, set()
  for path, leaf in named(jax.eval_shape(encoder.init, jax.random.key(0), x)).items():
    name = prefix + torch_name(path)
    if name not in tensors:
      raise ValueError(f"the weights lack {name}, which the encoder needs for {path}")
    tensor = np.asarray(tensors[name], np.float32)
    found[path] = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
    if found[path].shape != leaf.shape:
      raise ValueError(
        f"{name} is {list(tensor.shape)} in the file and does not fit {path}, {list(leaf.shape)}"
        " (encoder.variant, stem, width or data.channels differ)"
      )
    used.add(name)
  unused = [n for n in tensors if n not in used and not n.endswith("num_batches_tracked")]
  for name in unused:
    if re.match(r"(layer\d|conv|bn)", name.removeprefix(prefix)):
      raise ValueError(f"the encoder has nothing like {name}: the file is of another architecture")
  return nested(found), tuple(unused)


def is_resnet(tensors: Mapping) -> bool:
  """Whether these are a ResNet's, under whatever prefix."""
  return any(name.endswith("layer1.0.conv1.weight") for name in tensors)


def arguments(encoder: Any, channels: int) -> dict:
  """Arguments with which `timm.models.resnet.ResNet` is this encoder; its `block` is "Bottleneck"
  or "BasicBlock" of the same module."""
  return {
    "layers": list(encoder.blocks),
    "in_chans": channels,
    "num_classes": 0,
    "channels": [encoder.base * 2**i for i in range(encoder.depth)],
    "stem_width": encoder.base,
  }


def _prefix(tensors: Mapping) -> str:
  """What stands before every name: "", or for instance "module.encoder_q."."""
  end = "layer1.0.conv1.weight"
  prefixes = sorted(name.removesuffix(end) for name in tensors if name.endswith(end))
  if not prefixes:
    raise ValueError(
      f"these are no weights of a ResNet: they hold {', '.join(list(tensors)[:3])}, …"
    )
  if len(prefixes) > 1:
    raise ValueError(f"the file holds several ResNets, {', '.join(prefixes)}: keep one of them")
  return prefixes[0]
