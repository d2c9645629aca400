"""Contrastive losses against lightly and torch: values, and gradients of both views."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lightly")

import torch
from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss
from lightly.models.modules import NNMemoryBankModule
from torch.nn import functional as F

from ssljax import losses

pytestmark = pytest.mark.parity


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def both(ours, theirs, *arrays, rtol=2e-5):
  """Mean value and gradients of `ours` [b] equal those of `theirs`, a torch scalar."""
  value, gradients = jax.value_and_grad(lambda *x: ours(*x).mean(), tuple(range(len(arrays))))(
    *arrays
  )
  tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
  want = theirs(*tensors)
  want.backward()
  np.testing.assert_allclose(value, want.item(), rtol=rtol)
  for got, tensor in zip(gradients, tensors):
    grad = np.zeros_like(got) if tensor.grad is None else tensor.grad.numpy()
    np.testing.assert_allclose(got, grad, rtol=1e-3, atol=rtol * max(np.abs(grad).max(), 1e-3))


@pytest.mark.parametrize("b, d", [(8, 6), (5, 16), (32, 3)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent(b, d, temperature):
  def ours(a, b):
    return losses.nt_xent(a, b, temperature)

  both(ours, NTXentLoss(temperature), gaussian(b, d), gaussian(b, d, seed=1))


@pytest.mark.parametrize("b, d", [(8, 6), (5, 16)])
@pytest.mark.parametrize("sigma", [None, 0.5])
# lightly wraps a tensor in torch.tensor(), which warns.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_decoupled_nce(b, d, sigma):
  def ours(a, b):
    return losses.decoupled_nce(a, b, 0.1, sigma)

  theirs = DCLLoss(0.1) if sigma is None else DCLWLoss(0.1, sigma)
  both(ours, theirs, gaussian(b, d), gaussian(b, d, seed=1))


def test_info_nce_queue():
  """lightly's keys keep their gradient where ours, MoCo's, have none: they are detached here."""
  q, k, queue = gaussian(8, 6), gaussian(8, 6, seed=1), gaussian(16, 6, seed=2)
  loss = NTXentLoss(0.2, memory_bank_size=(16, 6))
  loss.memory_bank.bank = F.normalize(torch.tensor(queue), dim=1)
  loss.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)

  def ours(q, k):
    return losses.info_nce_queue(q, k, queue, 0.2)

  both(ours, lambda q, k: loss(q, k.detach()), q, k)
  # Its bank took the normalised keys, after the loss; ours takes what it is given.
  unit = k / np.linalg.norm(k, axis=1, keepdims=True)
  new, position = losses.enqueue(F.normalize(torch.tensor(queue)).numpy(), unit, 0)
  np.testing.assert_allclose(new, loss.memory_bank.bank.numpy(), rtol=1e-5, atol=1e-6)
  assert int(position) == int(loss.memory_bank.bank_ptr)


def test_nearest_neighbour_lookup():
  z, queue = gaussian(8, 6), gaussian(16, 6, seed=2)
  bank = NNMemoryBankModule(size=(16, 6))
  bank.bank = F.normalize(torch.tensor(queue), dim=1)
  want = bank(torch.tensor(z), update=False)
  got, _ = losses.nearest_neighbour_lookup(z, queue)
  np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6)


def logits(a, k, temperature):
  return F.normalize(a, dim=1) @ F.normalize(k, dim=1).T / temperature


A, K = gaussian(8, 6), gaussian(5, 6, seed=1)
PLACES = np.array([4, 0, 2, 2, 1, 3, 0, 4])
SOFT = np.random.default_rng(3).dirichlet(np.ones(5), 8).astype(np.float32)
WEIGHTS = np.random.default_rng(4).uniform(0.2, 2, (8, 5)).astype(np.float32)
FORMS = {
  "places": (
    lambda a, k: losses.info_nce(a, k, 0.2, PLACES),
    lambda a, k: F.cross_entropy(logits(a, k, 0.2), torch.tensor(PLACES)),
  ),
  "soft targets": (
    lambda a, k: losses.info_nce(a, k, 0.2, SOFT),
    lambda a, k: F.cross_entropy(logits(a, k, 0.2), torch.tensor(SOFT)),
  ),
  "all weights times one constant": (
    lambda a, k: losses.info_nce(a, k, 0.2, PLACES, weights=3.0 * np.ones((8, 5), np.float32)),
    lambda a, k: F.cross_entropy(logits(a, k, 0.2), torch.tensor(PLACES)) + np.log(3.0),
  ),
  "weights as logits": (
    lambda a, k: losses.info_nce(a, k, 0.2, SOFT, weights=WEIGHTS),
    lambda a, k: (
      F.cross_entropy(logits(a, k, 0.2) + torch.tensor(WEIGHTS).log(), torch.tensor(SOFT))
      + (torch.tensor(SOFT) * torch.tensor(WEIGHTS).log()).sum(1).mean()
    ),
  ),
}


@pytest.mark.parametrize("name", FORMS)
def test_info_nce(name):
  both(*FORMS[name], A, K)


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_inbatch(symmetric):
  def theirs(q, k):
    s, own = logits(q, k.detach(), 0.2), torch.arange(8)
    one = F.cross_entropy(s, own)
    return (one + F.cross_entropy(s.T, own)) / 2 if symmetric else one

  def ours(q, k):
    return losses.info_nce_inbatch(q, k, 0.2, symmetric)

  both(ours, theirs, A, gaussian(8, 6, seed=2))


def test_mochi_and_nnclr_in_torch():
  """Mixed negatives are extra columns of MoCo's logits; NNCLR's anchors are rows of the queue."""
  queue, k = gaussian(16, 6, seed=5), gaussian(8, 6, seed=2)
  hard = losses.mix_hard_negatives(jax.random.key(0), A, queue, 4, 3, 2)

  def mochi(q):
    q, own = F.normalize(q, dim=1), torch.tensor(np.asarray(hard))
    positive = (q * F.normalize(torch.tensor(k), dim=1)).sum(1, keepdim=True)
    far = q @ F.normalize(torch.tensor(queue), dim=1).T
    columns = torch.cat([positive, far, torch.einsum("bd,bsd->bs", q, own)], 1) / 0.2
    return F.cross_entropy(columns, torch.zeros(8, dtype=torch.long))

  both(lambda q: losses.info_nce_queue(q, k, queue, 0.2, hard), mochi, A)

  def nnclr(p1, p2):
    def near(z):
      return torch.tensor(queue)[logits(torch.tensor(z), torch.tensor(queue), 1).argmax(1)]

    one = F.cross_entropy(logits(near(A), p2, 0.2), torch.arange(8))
    return (one + F.cross_entropy(logits(near(k), p1, 0.2), torch.arange(8))) / 2

  p = gaussian(8, 6, seed=7), gaussian(8, 6, seed=8)
  both(lambda p1, p2: losses.nnclr(A, k, p1, p2, jnp.asarray(queue), 0.2), nnclr, *p)
