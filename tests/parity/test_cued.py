"""Latent MIM's decoder against torch's MultiheadAttention, and its cues written out in NumPy;
copied weights, float32."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from copied import arrays, close, randomise
from test_cross_predictor import linear, norm

from ssljax.models import positions
from ssljax.models.cued import CuedPredictor

pytestmark = pytest.mark.parity
WIDTH, GRID, SEEN, OUT = 16, (4, 6), 12, 10


class Block(torch.nn.Module):
  """Three branches, each after a norm of its own; the context has one, too."""

  def __init__(self):
    super().__init__()
    self.norm0, self.norm1, self.norm2, self.norm_context = (
      torch.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(4)
    )
    self.own, self.attn = (
      torch.nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2)
    )
    self.fc1, self.fc2 = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

  def forward(self, x, context):
    y, seen = self.norm0(x), self.norm_context(context)
    x = x + self.own(y, y, y, need_weights=False)[0]
    x = x + self.attn(self.norm1(x), seen, seen, need_weights=False)[0]
    return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Whole(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.embed, self.head = torch.nn.Linear(SEEN, WIDTH), torch.nn.Linear(WIDTH, OUT)
    self.blocks = torch.nn.ModuleList([Block(), Block()])
    self.norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)
    self.cls_token, self.mask_token = (torch.nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))


def copied(state):
  def block(i):
    at = f"blocks.{i}."
    own, weight = state[f"{at}own.in_proj_weight"].T, state[f"{at}attn.in_proj_weight"].T
    bias = state[f"{at}attn.in_proj_bias"]
    return {
      "norm": norm(state, f"{at}norm0"),
      "norm_context": norm(state, f"{at}norm_context"),
      "attn": {
        "qkv": {"kernel": own, "bias": state[f"{at}own.in_proj_bias"]},
        "proj": linear(state, f"{at}own.out_proj"),
      },
      "cross": {
        "norm1": norm(state, f"{at}norm1"),
        "norm2": norm(state, f"{at}norm2"),
        "q": {"kernel": weight[:, :WIDTH], "bias": bias[:WIDTH]},
        "kv": {"kernel": weight[:, WIDTH:], "bias": bias[WIDTH:]},
        "proj": linear(state, f"{at}attn.out_proj"),
        "mlp": {"fc1": linear(state, f"{at}fc1"), "fc2": linear(state, f"{at}fc2")},
      },
    }

  tokens = {name: state[name] for name in ("cls_token", "mask_token")}
  ends = {name: linear(state, name) for name in ("embed", "head")}
  return tokens | ends | {"norm": norm(state, "norm")} | {f"block_{i}": block(i) for i in range(2)}


def cue(place, context, embedded):
  """What was seen near a place, by the products of positions: [k w] -> [w]."""
  table = positions.sincos(GRID, WIDTH).astype(np.float64)
  weights = np.exp([table[place] @ table[other] / np.sqrt(WIDTH) for other in context])
  return (weights / weights.sum()) @ embedded


def test_decoder():
  whole = randomise(Whole())
  rng = np.random.default_rng(1)
  tokens = rng.normal(size=(3, 1 + 7, SEEN)).astype(np.float32)
  places = np.stack([rng.permutation(24) for _ in range(3)])
  context, targets = places[:, :7], places[:, 7:17].reshape(3, 2, 5)
  table = positions.sincos(GRID, WIDTH)
  head = CuedPredictor(WIDTH, 2, 2, OUT, prefix=1)
  params = copied(arrays(whole))
  ours = head.apply({"params": params}, tokens, GRID, context, targets)
  for m in range(2):  # lists of targets do not see each other
    with torch.no_grad():
      embedded = whole.embed(torch.tensor(tokens)).numpy()
      queries = np.array(
        [[cue(place, context[i], embedded[i, 1:]) for place in targets[i, m]] for i in range(3)]
      )
      x = torch.tensor(queries + table[targets[:, m]], dtype=torch.float32) + whole.mask_token
      x = torch.cat([whole.cls_token.expand(3, 1, -1), x], 1)
      embedded[:, 1:] += table[context]
      for block in whole.blocks:
        x = block(x, torch.tensor(embedded))
      theirs = whole.head(whole.norm(x))[:, 1:]
    close(ours[:, m], theirs)
