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
from ssljax.models.resnet import STEMS

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
  check_known(encoder)
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


def check_exportable(encoder: Any, to: str) -> None:
  """Raises ValueError where `timm.models.resnet.ResNet` cannot be this encoder."""
  check_known(encoder)
  if to != "timm":
    raise ValueError(f"a ResNet is exported to timm, not to {to}: use --to=timm")
  if encoder.depth != 4:
    raise ValueError(f"timm's ResNet has four stages, this encoder has {encoder.depth}")
  if encoder.base != 64:
    raise ValueError(f"timm's ResNet has a stem of 64 features, this encoder's has {encoder.base}")


def check_known(encoder: Any) -> None:
  """Raises ValueError where a convolutional encoder is no ResNet."""
  if not hasattr(encoder, "bottleneck"):
    kind = type(encoder).__name__
    raise ValueError(f"weights of a {kind} are neither read nor written: of ViT and ResNet alone")


def about(encoder: Any, channels: int) -> dict[str, Any]:
  """What a file says of its encoder; `timm_arguments` are those of `timm.models.resnet.ResNet`."""
  return {
    "stem": encoder.stem,
    "block": _block(encoder),
    "eps": encoder.eps,
    "timm_arguments": arguments(encoder, channels),
  }


def arguments(encoder: Any, channels: int) -> dict[str, Any]:
  """Arguments of timm's ResNet besides its block; see `timm_model` for the stem."""
  return {"layers": list(encoder.blocks), "in_chans": channels, "num_classes": 0}


def timm_model(encoder: Any, channels: int) -> Any:
  """timm's model of this encoder's architecture."""
  import functools

  from timm.models import resnet
  from torch import nn

  norm = functools.partial(nn.BatchNorm2d, eps=encoder.eps)
  block = getattr(resnet, _block(encoder))
  model: Any = resnet.ResNet(block, **arguments(encoder, channels), norm_layer=norm)
  if encoder.stem != "imagenet":
    _, _, padding, pooled = STEMS[encoder.stem]
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=padding, bias=False)
    model.maxpool = model.maxpool if pooled else nn.Identity()
  return model.eval()


def how_to_load(encoder: Any, channels: int) -> list[str]:
  """The lines of Python that make the same model."""
  given = ", ".join(f"{key}={value!r}" for key, value in arguments(encoder, channels).items())
  if encoder.eps != 1e-5:
    given += f", norm_layer=functools.partial(torch.nn.BatchNorm2d, eps={encoder.eps})"
  lines = [f"load: R = timm.models.resnet; model = R.ResNet(R.{_block(encoder)}, {given})"]
  if encoder.stem != "imagenet":
    _, _, padding, pooled = STEMS[encoder.stem]
    new = f"torch.nn.Conv2d({channels}, 64, 3, padding={padding}, bias=False)"
    lines.append(f"      model.conv1 = {new}")
    if not pooled:
      lines.append("      model.maxpool = torch.nn.Identity()")
  return lines


def _block(encoder: Any) -> str:
  return "Bottleneck" if encoder.bottleneck else "BasicBlock"


def _prefix(tensors: Mapping) -> str:
  """What stands before every name: "", or for instance "module.encoder_q."."""
  end = "layer1.0.conv1.weight"
  prefixes = sorted(name.removesuffix(end) for name in tensors if name.endswith(end))
  if not prefixes:
    raise ValueError(
      f"these are no weights of a ResNet: they hold {', '.join(list(tensors)[:3])}, …"
    )
  if len(prefixes) > 1:
    raise ValueError(f"the file holds several ResNets, {', '.join(map(repr, prefixes))}, keep one")
  return prefixes[0]
