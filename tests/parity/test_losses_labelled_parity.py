"""Losses that know labels against optax, lightly and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
pytest.importorskip("lightly")

import torch
import torch.nn.functional as F
from copied import close
from lightly.loss import NTXentLoss

from ssljax import losses

pytestmark = pytest.mark.parity


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


VIEWS = gaussian(6, 2, 8)


@pytest.mark.parametrize("form", [losses.supcon, losses.supcon_in])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_without_labels_as_lightly_nt_xent(form, temperature):
  """Value and gradient; lightly means over the batch."""
  theirs = torch.tensor(VIEWS, requires_grad=True)
  want = NTXentLoss(temperature)(theirs[:, 0], theirs[:, 1])
  want.backward()
  run = jax.value_and_grad(lambda z: form(z, None, temperature).mean())
  value, gradient = jax.jit(run)(VIEWS)
  close(value, want)
  close(gradient, theirs.grad)


def test_pairs_of_one_label_as_optax_ntxent():
  """Only with one positive an anchor: optax puts each positive below its own line, SupCon all."""
  rows, labels = VIEWS.reshape(12, 8), jnp.arange(12) // 2
  got = losses.supcon(rows, labels, 0.3).mean()
  close(got, optax.losses.ntxent(rows, labels, 0.3))
  fewer = labels // 2
  assert abs(losses.supcon(rows, fewer, 0.3).mean() - optax.losses.ntxent(rows, fewer, 0.3)) > 0.1


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_soft_targets_as_torch_cross_entropy(weight):
  q, k, queue = gaussian(6, 8), gaussian(6, 8, seed=1), gaussian(10, 8, seed=2)
  names, labels = np.arange(10) % 3, np.arange(6) % 4
  targets = losses.maskcon_targets(k, queue, names, labels, 0.05, weight)
  theirs = torch.tensor(q, requires_grad=True)
  unit, fixed = F.normalize(theirs, dim=1), F.normalize(torch.tensor(queue), dim=1)
  own = (unit * F.normalize(torch.tensor(k), dim=1)).sum(1, keepdim=True)
  logits = torch.cat([own, unit @ fixed.T], 1) / 0.1
  want = F.cross_entropy(logits, torch.tensor(np.asarray(targets)), reduction="none")
  want.sum().backward()

  def loss(q):
    return losses.soft_info_nce_queue(q, k, queue, names, labels, 0.1, 0.05, weight)

  close(loss(q), want)
  close(jax.grad(lambda q: loss(q).sum())(q), theirs.grad)


def test_multi_label_bce_as_torch():
  z, queue = gaussian(6, 8), gaussian(10, 8, seed=1)
  targets = (gaussian(6, 10, seed=2) > 0.5).astype(np.float32)
  cosines = F.normalize(torch.tensor(z), dim=1) @ F.normalize(torch.tensor(queue), dim=1).T
  want = F.binary_cross_entropy_with_logits(cosines / 0.2, torch.tensor(targets), reduction="none")
  close(losses.multi_label_bce(z, queue, targets, 0.2), want.mean(1))
