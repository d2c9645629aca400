"""Losses of cells, pairs and groups against lightly, torch, torchvision and optax."""

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
pytest.importorskip("lightly")
pytest.importorskip("torchvision")

import torch
import torch.nn.functional as F
from copied import close
from lightly.models.utils import select_most_similar
from torchvision.ops import sigmoid_focal_loss

from ssljax import losses

pytestmark = pytest.mark.parity


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


MAPS = [gaussian(4, 9, d, seed=i) for i, d in enumerate((8, 8, 12, 12))]


def test_matched_keys_as_lightly():
  _, k_map, q_feat, k_feat = MAPS
  index = np.asarray(losses.grid_match(q_feat, k_feat))
  theirs = select_most_similar(*(torch.tensor(x) for x in (q_feat, k_feat, k_map)))
  np.testing.assert_array_equal(np.take_along_axis(k_map, index[..., None], 1), theirs.numpy())


def test_dense_info_nce_as_lightly_and_torch():
  queue, q = gaussian(20, 8, seed=9), torch.tensor(MAPS[0], requires_grad=True)
  _, k_map, q_feat, k_feat = (F.normalize(torch.tensor(x), dim=-1) for x in MAPS)
  keys, unit = select_most_similar(q_feat, k_feat, k_map), F.normalize(q, dim=-1)
  others = unit @ F.normalize(torch.tensor(queue), dim=1).T
  logits = torch.cat([(unit * keys).sum(-1, keepdim=True), others], -1).flatten(0, 1) / 0.2
  want = F.cross_entropy(logits, torch.zeros(36, dtype=torch.long))
  want.backward()
  run = jax.value_and_grad(lambda x: losses.dense_info_nce(x, *MAPS[1:], queue, 0.2).mean())
  value, gradient = jax.jit(run)(MAPS[0])
  close(value, want)
  close(gradient, q.grad)


@pytest.mark.parametrize("standardise", [False, True])
def test_patch_info_nce_as_torch(standardise):
  ours = 3 * MAPS[0] + 1
  p, t = torch.tensor(ours, requires_grad=True), F.normalize(torch.tensor(MAPS[1]), dim=-1)
  predictions = (
    (p - p.mean(1, keepdim=True)) / (p.std(1, keepdim=True) + 1e-4) if standardise else p
  )
  logits = F.normalize(predictions, dim=-1) @ t.mT / 0.2
  want = F.cross_entropy(logits.flatten(0, 1), torch.arange(9).repeat(4))
  want.backward()
  run = jax.value_and_grad(
    lambda p: losses.patch_info_nce(p, MAPS[1], 0.2, standardise=standardise).mean()
  )
  value, gradient = jax.jit(run)(ours)
  close(value, want)
  close(gradient, p.grad)


TRIPLET = [gaussian(10, 6, seed=i) for i in range(3)]


@pytest.mark.parametrize("margin", [0.3, 2.0])
def test_triplet_as_optax_and_torch(margin):
  got = losses.triplet(*TRIPLET, margin)
  close(got, optax.losses.triplet_margin_loss(*TRIPLET, margin=margin, eps=0.0))
  # Each has its own way around the root's slope at 0: eps under the root, and on the differences.
  close(got, optax.losses.triplet_margin_loss(*TRIPLET, margin=margin), 1e-5)
  theirs = [torch.tensor(x, requires_grad=True) for x in TRIPLET]
  want = F.triplet_margin_loss(*theirs, margin=margin, reduction="none")
  want.sum().backward()
  close(got, want)
  gradient = jax.grad(lambda *x: losses.triplet(*x, margin).sum(), argnums=(0, 1, 2))(*TRIPLET)
  for g, t in zip(gradient, theirs):
    close(g, t.grad)


def test_triplets_of_cosines_as_torch():
  want = F.triplet_margin_with_distance_loss(
    *(torch.tensor(x) for x in TRIPLET),
    distance_function=lambda x, y: 1 - F.cosine_similarity(x, y),
    margin=0.2,
    reduction="none",
  )
  close(losses.triplet(*TRIPLET, 0.2, distance="cosine"), want)


@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.5), (1.0, 0.25), (0.0, 0.9)])
def test_focal_loss_as_torchvision(gamma, alpha):
  logits, targets = gaussian(50, seed=3) * 4, (np.arange(50) % 2).astype(np.float32)
  theirs = torch.tensor(logits, requires_grad=True)
  want = sigmoid_focal_loss(theirs, torch.tensor(targets), alpha, gamma)
  want.sum().backward()
  close(losses.relation_bce_focal(logits, targets, gamma, alpha), want)
  gradient = jax.grad(lambda x: losses.relation_bce_focal(x, targets, gamma, alpha).sum())(logits)
  close(gradient, theirs.grad)
