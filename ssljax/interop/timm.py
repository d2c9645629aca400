"""Names and layouts of timm's VisionTransformer, which are those of the MAE release too.

Ours                          timm                                   layout
stem/kernel [p1·p2·c d]       patch_embed.proj.weight [d c p1 p2]    a convolution
…/kernel [in out]             ….weight [out in]
norm…/scale                   norm….weight
scale1, scale2 [d]            ls1.gamma, ls2.gamma                   layer scale
cls_token [d]                 cls_token [1 1 d]
registers [r d]               reg_token [1 r d]
positions [n d]               pos_embed [1 m+n d]                    rows of the prefix first
decoder: embed, head          decoder_embed, decoder_pred            the MAE release alone
"""

import re
from collections.abc import Sequence

import numpy as np

_RULES = (
  (r"^stem/", "patch_embed/proj/"),
  (r"^registers$", "reg_token"),
  (r"block_(\d+)", r"\1"),
  (r"/scale([12])$", r"/ls\1/gamma"),
  (r"/(kernel|scale)$", "/weight"),
  (r"/", "."),
)


def timm_name(path: str) -> str:
  """timm's name of one of the encoder's parameters, e.g. "blocks/block_0/mlp/fc1/kernel"."""
  for pattern, new in _RULES:
    path = re.sub(pattern, new, path)
  return path


def decoder_name(path: str) -> str:
  """The MAE release's name of one of the decoder's parameters."""
  if path == "mask_token":
    return path
  return "decoder_" + timm_name(re.sub("^head/", "pred/", path))


def to_timm(path: str, leaf: np.ndarray, patch: Sequence[int]) -> np.ndarray:
  """One of our parameters in timm's layout; `patch` is the size of a patch."""
  if path == "stem/kernel":
    kernel = leaf.reshape(*patch, -1, leaf.shape[-1])
    return np.moveaxis(kernel, (-1, -2), (0, 1))
  if path.endswith("/kernel"):
    return leaf.T
  if path in ("cls_token", "mask_token"):
    return leaf[None, None]
  return leaf[None] if path == "registers" else leaf


def from_timm(path: str, tensor: np.ndarray) -> np.ndarray:
  """The inverse of `to_timm`."""
  if path == "stem/kernel":
    return np.moveaxis(tensor, (0, 1), (-1, -2)).reshape(-1, tensor.shape[0])
  if path.endswith("/kernel"):
    return tensor.T
  if path in ("cls_token", "mask_token"):
    return tensor.reshape(-1)
  return tensor.reshape(-1, tensor.shape[-1]) if path == "registers" else tensor


def timm_shape(path: str, shape: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
  """The shape of a parameter in timm's layout."""
  return to_timm(path, np.broadcast_to(np.float32(0), tuple(shape)), patch).shape


def arguments(encoder, size: Sequence[int], channels: int) -> dict:
  """Arguments with which `timm.models.vision_transformer.VisionTransformer` is this encoder."""
  return {
    "img_size": list(size),
    "patch_size": list(encoder.patch),
    "in_chans": channels,
    "num_classes": 0,
    "embed_dim": encoder.width,
    "depth": encoder.depth,
    "num_heads": encoder.heads,
    "mlp_ratio": encoder.mlp_ratio,
    "qkv_bias": encoder.qkv_bias != "none",
    "init_values": encoder.layer_scale or None,
    "class_token": encoder.class_token,
    "reg_tokens": encoder.registers,
    "global_pool": "token" if encoder.pool == "cls" else "avg",
    # The final norm comes before the mean over tokens, as here; timm's default is the reverse.
    "fc_norm": False,
  }
