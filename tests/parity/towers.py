"""Stacks of transformer blocks of Transformers' models as our parameters."""

import re

import numpy as np

# Their name of a part of a block -> ours. What they have besides is an error.
PARTS = (
  (r"^(norm|layer_norm)([12])\.", r"norm\2/"),
  (r"^(attention|self_attn)\.([qkv])_proj\.", r"attn/\2/"),
  (r"^(attention|self_attn)\.(o|out)_proj\.", "attn/proj/"),
  (r"^mlp\.(fc1|up_proj)\.", "mlp/fc1/"),
  (r"^mlp\.(fc2|down_proj)\.", "mlp/fc2/"),
  (r"^layer_scale([12])\.lambda1$", r"scale\1"),
)


def linear(state, name):
  """A linear layer: kernel [in out] and, where they have one, bias."""
  made = {"kernel": state[f"{name}.weight"].T}
  return made | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def norm(state, name):
  return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def stem(state, name):
  """A patch convolution [d c p p] as a linear layer of pixels in our order; no bias is zero."""
  kernel = state[f"{name}.weight"]
  bias = state.get(f"{name}.bias", np.zeros(len(kernel), np.float32))
  return {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)), "bias": bias}


def blocks(state, prefix, depth):
  """{"block_0": …} of the layers `prefix`.0, `prefix`.1, …"""
  return {f"block_{i}": _block(state, f"{prefix}.{i}.") for i in range(depth)}


def _block(state, prefix):
  flat = {}
  for name, leaf in state.items():
    if name.startswith(prefix):
      path = name.removeprefix(prefix)
      for pattern, new in PARTS:
        path = re.sub(pattern, new, path)
      assert "." not in path, path
      path = path.replace("weight", "scale" if path.startswith("norm") else "kernel")
      flat[path] = leaf.T if path.endswith("kernel") else leaf
  qkv = [flat.pop(f"attn/{x}/kernel") for x in "qkv"]
  attn = {"qkv": {"kernel": np.concatenate(qkv, axis=1)}}
  bias = [flat.pop(f"attn/{x}/bias", None) for x in "qkv"]
  if bias[1] is None:  # no bias of keys
    attn |= {"q_bias": bias[0], "v_bias": bias[2]}
  else:
    attn["qkv"]["bias"] = np.concatenate(bias)
  block = {"attn": attn}
  for path, leaf in flat.items():
    inner = block
    for part in path.split("/")[:-1]:
      inner = inner.setdefault(part, {})
    inner[path.split("/")[-1]] = leaf
  return block
