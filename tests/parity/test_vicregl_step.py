"""VICRegL's step against lightly's loss on torch's heads with the same weights: the loss, and the
gradients of encoder and heads. Where conventions agree: of one pair a map there is no order, and
distances alone are the same in any."""

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

pytest.importorskip("torch")
pytest.importorskip("lightly")

import torch
from copied import close
from lightly.loss import VICRegLLoss
from torch import nn

from ssljax.methods.vicregl import vicregl
from ssljax.models.vit import vit

pytestmark = pytest.mark.parity
B, LEAVES = 8, {"global": (2, 16, 4), "local": (3, 8, 2)}  # views, pixels, cells of a side
HEADS = dict(projector=(12, 12, 7), map_projector=(9, 9, 5))
AGREED = {
  "one pair a map": (dict(matches=(1, 1), feature_matches=(1, 1)), dict(num_matches=(1, 1))),
  "distances alone": (
    dict(matches=(5, 4), feature_matches=(5, 4), variance_weight=0.0, covariance_weight=0.0),
    dict(num_matches=(5, 5), mu_param=0.0, nu_param=0.0),
  ),
}


def batch():
  rng = np.random.default_rng(3)
  views = {leaf: rng.normal(size=(B, v, s, s, 3)) for leaf, (v, s, _) in LEAVES.items()}
  corner, side = rng.uniform(0, 0.5, (B, 5, 2)), rng.uniform(0.2, 0.5, (B, 5, 2))
  boxes = np.concatenate([corner, corner + side], -1)
  boxes = np.where(rng.random((B, 5, 1)) < 0.5, boxes[..., [0, 3, 2, 1]], boxes)
  made = {k: np.float32(x) for k, x in {**views, "boxes": boxes}.items()}
  return made | {"index": np.arange(B)}


def head(params):
  """Linear, batch norm and ReLU twice, then linear without bias."""
  layers = []
  for i in range(3):
    kernel, last = params[f"layer_{i}"]["kernel"], i == 2
    linear = nn.Linear(*kernel.shape, bias=not last)
    tensors = [(linear.weight, kernel.T)]
    layers += [linear] if last else [linear, nn.BatchNorm1d(kernel.shape[1]), nn.ReLU()]
    if not last:
      tensors.append((linear.bias, params[f"layer_{i}"]["bias"]))
    with torch.no_grad():
      for tensor, value in tensors:
        tensor.copy_(torch.tensor(np.array(value)))
  return nn.Sequential(*layers).train()


def grid(box, cells):
  """Centres of the cells of views in boxes [b 4]: [b cells cells 2]."""
  share = (np.arange(cells) + 0.5) / cells
  y, x = (a[:, None] * (1 - share) + z[:, None] * share for a, z in (box.T[::2], box.T[1::2]))
  both = np.broadcast_arrays(y[:, :, None], x[:, None, :])
  return torch.tensor(np.stack(both, -1))


@pytest.mark.parametrize("case", AGREED)
def test_loss_and_gradients_are_lightlys(case):
  ours, theirs = AGREED[case]
  encoder, one = vit(width=16, depth=1, heads=2, patch=(4, 4)), batch()
  method = vicregl(encoder, B, views=tuple(LEAVES), alpha=0.7, **HEADS, **ours)
  params, extra = method.init(jax.random.key(0), one)
  loss = jax.value_and_grad(lambda p: method.loss(p, extra, one, jax.random.key(1), 0)[0])
  value, grads = jax.jit(loss)(params)

  def seen(weights):
    views = {leaf: one[leaf].reshape(-1, *one[leaf].shape[2:]) for leaf in LEAVES}
    return {leaf: encoder.apply({"params": weights}, x) for leaf, x in views.items()}

  out, back = jax.vjp(jax.jit(seen), params["encoder"])
  leaves = jax.tree.map(lambda x: torch.tensor(np.array(x), requires_grad=True), out)
  nets = {name: head(params[name]) for name in HEADS}
  features, grids = {leaf: [] for leaf in LEAVES}, {leaf: [] for leaf in LEAVES}
  start = 0
  for leaf, (v, _, cells) in LEAVES.items():
    whole, maps = (leaves[leaf][k].unflatten(0, (B, v)) for k in ("pooled", "patches"))
    for i in range(v):
      cell = nets["map_projector"](maps[:, i].flatten(0, 1)).view(B, cells, cells, -1)
      features[leaf].append((nets["projector"](whole[:, i]), cell))
      grids[leaf].append(grid(one["boxes"][:, start + i], cells))
    start += v
  wanted = VICRegLLoss(alpha=0.7, **theirs)(
    features["global"], grids["global"], features["local"], grids["local"]
  )
  wanted.backward()
  np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
  zero = lambda x: torch.zeros_like(x) if x.grad is None else x.grad  # noqa: E731
  (through,) = back(jax.tree.map(lambda x: zero(x).numpy(), leaves))
  close(*(ravel_pytree(tree)[0] for tree in (grads["encoder"], through)))
  for name, net in nets.items():
    for i, place in enumerate((0, 3, 6)):
      close(grads[name][f"layer_{i}"]["kernel"], net[place].weight.grad.T)
