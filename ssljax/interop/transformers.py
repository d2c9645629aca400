"""Names of Transformers' ViTModel and ViTMAEForPreTraining, to and from those of timm.

Both the names of released files and those that models of version 5 have in memory are read; the
former are written, which every version reads.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

_RULES = (
  (r"^vit\.", ""),
  (r"^embeddings\.(cls|mask)_token$", r"\1_token"),
  (r"^embeddings\.position_embeddings$", "pos_embed"),
  (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
  (r"^decoder\.mask_token$", "mask_token"),
  (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
  (r"^decoder\.decoder_", "decoder_"),
  (r"^(encoder\.layer|layers)\.", "blocks."),
  (r"\.attention\.attention\.(q|k|v)[a-z]+\.", r".attn.\1."),
  (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
  (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
  (r"\.intermediate\.dense\.", ".mlp.fc1."),
  (r"\.output\.dense\.", ".mlp.fc2."),
  (r"\.layernorm_before\.", ".norm1."),
  (r"\.layernorm_after\.", ".norm2."),
  (r"^layernorm\.", "norm."),
)
_BACK = (
  (r"^pos_embed$", "embeddings.position_embeddings"),
  (r"^cls_token$", "embeddings.cls_token"),
  (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
  (r"^norm\.", "layernorm."),
  (r"^blocks\.", "encoder.layer."),
  (r"\.norm1\.", ".layernorm_before."),
  (r"\.norm2\.", ".layernorm_after."),
  (r"\.attn\.proj\.", ".attention.output.dense."),
  (r"\.mlp\.fc1\.", ".intermediate.dense."),
  (r"\.mlp\.fc2\.", ".output.dense."),
)


def is_transformers(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether the names are those of Transformers."""
  return any("embeddings.patch_embeddings.projection" in name for name in tensors)


def to_timm_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renamed, with query, key and value joined into one matrix. A missing bias of keys is zero."""
  renamed = {_sub(name, _RULES): tensor for name, tensor in tensors.items()}
  for name in [n for n in renamed if re.search(r"\.attn\.q\.(weight|bias)$", n)]:
    zeros = np.zeros_like(renamed[name])
    parts = [renamed.pop(name.replace(".q.", f".{letter}."), zeros) for letter in "qkv"]
    renamed[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
  return renamed


def from_timm_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `to_timm_names`; layer scale, which ViTModel lacks, goes into the matrices
  before it."""
  named = {}
  for name, tensor in _folded(tensors).items():
    if ".attn.qkv." in name:
      for part, word in zip(np.split(tensor, 3), ("query", "key", "value")):
        named[_sub(name.replace("attn.qkv", f"attention.attention.{word}"), _BACK)] = part
    else:
      named[_sub(name, _BACK)] = tensor
  return named


def _folded(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  folded = {k: v for k, v in tensors.items() if not k.endswith(".gamma")}
  for name, gamma in tensors.items():
    if not name.endswith(".gamma"):
      continue
    branch = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
    folded[f"{branch}.weight"] = folded[f"{branch}.weight"] * gamma[:, None]
    folded[f"{branch}.bias"] = folded[f"{branch}.bias"] * gamma
  return folded


def _sub(name: str, rules: Sequence[tuple[str, str]]) -> str:
  for pattern, new in rules:
    name = re.sub(pattern, new, name)
  return name


def config(encoder, size: Sequence[int], channels: int) -> dict:
  """config.json with which `ViTModel.from_pretrained` builds this encoder."""
  square = size[0] == size[1]
  one_patch = encoder.patch[0] == encoder.patch[1]
  return {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": encoder.width,
    "num_hidden_layers": encoder.depth,
    "num_attention_heads": encoder.heads,
    "intermediate_size": int(encoder.width * encoder.mlp_ratio),
    "hidden_act": "gelu",  # the exact one
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": encoder.eps,
    "image_size": size[0] if square else list(size),
    "patch_size": encoder.patch[0] if one_patch else list(encoder.patch),
    "num_channels": channels,
    "qkv_bias": encoder.qkv_bias != "none",
  }


def preprocessor(size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> dict:
  """preprocessor_config.json: how a picture becomes the model's input."""
  return {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": size[0], "width": size[1]},
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [float(m) for m in mean],
    "image_std": [float(s) for s in std],
  }
