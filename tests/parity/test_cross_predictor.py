"""CAPI's predictor against torch's MultiheadAttention with a context of another length; copied
weights, float32."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from copied import arrays, close, randomise

from ssljax.models import positions
from ssljax.models.predictors import CrossPredictor

pytestmark = pytest.mark.parity
WIDTH, GRID = 16, (4, 6)


class Block(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.norm1, self.norm2 = (torch.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
    self.attn = torch.nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    self.fc1, self.fc2 = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

  def forward(self, x, context):
    x = x + self.attn(self.norm1(x), context, context, need_weights=False)[0]
    return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def norm(state, name):
  return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def linear(state, name):
  return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def block_params(state, i):
  weight, bias = state[f"{i}.attn.in_proj_weight"].T, state[f"{i}.attn.in_proj_bias"]
  return {
    "norm1": norm(state, f"{i}.norm1"),
    "norm2": norm(state, f"{i}.norm2"),
    "q": {"kernel": weight[:, :WIDTH], "bias": bias[:WIDTH]},
    "kv": {"kernel": weight[:, WIDTH:], "bias": bias[WIDTH:]},
    "proj": linear(state, f"{i}.attn.out_proj"),
    "mlp": {"fc1": linear(state, f"{i}.fc1"), "fc2": linear(state, f"{i}.fc2")},
  }


def test_predictor():
  blocks = randomise(torch.nn.ModuleList([Block(), Block()]))
  rng = np.random.default_rng(1)
  tokens = rng.normal(size=(3, 2 + 7, WIDTH)).astype(np.float32)
  places = np.stack([rng.permutation(24) for _ in range(3)])
  context, targets = places[:, :7], places[:, 7:12]
  token = rng.normal(size=WIDTH).astype(np.float32)
  state = arrays(blocks)
  params = {f"block_{i}": block_params(state, i) for i in range(2)}
  params |= {"mask_token": token, "norm": {"scale": np.ones(WIDTH), "bias": np.zeros(WIDTH)}}
  table = positions.sincos(GRID, WIDTH)
  with torch.no_grad():
    seen = tokens.copy()
    seen[:, 2:] += table[context]
    x = torch.tensor(token + table[targets])
    for block in blocks:
      x = block(x, torch.tensor(seen))
    theirs = F.layer_norm(x, (WIDTH,), eps=1e-6)
  head = CrossPredictor(WIDTH, 2, 2, prefix=2)
  close(head.apply({"params": params}, tokens, GRID, context, targets), theirs)
