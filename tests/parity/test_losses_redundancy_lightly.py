"""Losses without negatives against lightly: values, and gradients of the first argument.

Known deviations of lightly: MMCRLoss does not normalise (it is given unit vectors); VICRegLLoss
adds its two matchings, as the authors' code does, where ours averages them, and orders the matched
cells by distance (the maps here are in that order already).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lightly")

import torch
from lightly import loss as lightly
from lightly.loss import hypersphere_loss, vicreg_loss

from ssljax import losses
from ssljax.losses import gaussian

pytestmark = pytest.mark.parity
B, D = 12, 5


def two(seed=0, d=D):
  rng = np.random.default_rng(seed)
  z = rng.normal(0, 1, (B, d)) * np.linspace(0.3, 2, d)
  return np.float32(z), np.float32(z + 0.5 * rng.normal(0, 1, (B, d)))


def unit(z):
  return z / np.linalg.norm(z, axis=-1, keepdims=True)


def compare(ours, theirs, *arrays, rtol=1e-4):
  """Scalars of the arrays, and their gradients with respect to the first."""
  value, gradient = jax.value_and_grad(ours)(*map(jnp.asarray, arrays))
  tensors = [torch.tensor(a) for a in arrays]
  tensors[0].requires_grad_()
  want = theirs(*tensors)
  want.sum().backward()
  np.testing.assert_allclose(value, want.sum().item(), rtol=rtol, atol=1e-6)
  scale = tensors[0].grad.abs().max().item()
  np.testing.assert_allclose(gradient, tensors[0].grad, rtol=rtol, atol=rtol * scale)


def w_mse(size):
  """In training mode, where it uses the batch's statistics."""
  loss = lightly.WMSELoss(embedding_dim=D, w_size=size)
  return lambda a, b: loss(torch.cat([a, b]))


PAIRS = {
  "negative_cosine": (
    lambda p, z: losses.negative_cosine(p, z).mean(),
    lightly.NegativeCosineSimilarity(),
  ),
  "normalized_l2": (
    lambda p, z: losses.normalized_l2(p, z).mean(),
    lambda p, z: 2 + 2 * lightly.NegativeCosineSimilarity()(p, z),
  ),
  "barlow_twins": (
    lambda a, b: losses.barlow_twins(a, b, 0.0051),
    lightly.BarlowTwinsLoss(lambda_param=0.0051),
  ),
  "vicreg": (lambda a, b: losses.vicreg(a, b)[0], lightly.VICRegLoss()),
  "variance_term": (
    lambda a, b: losses.variance_term(a),
    lambda a, b: vicreg_loss.variance_loss(a),
  ),
  "covariance_term": (
    lambda a, b: losses.covariance_term(a),
    lambda a, b: vicreg_loss.covariance_loss(a),
  ),
  "alignment": (
    lambda a, b: losses.alignment(a, b, 3.0).mean(),
    hypersphere_loss.HypersphereLoss(lam=0.0, alpha=3.0),
  ),
  "uniformity": (
    lambda a, b: (
      losses.alignment(a, b).mean() + (losses.uniformity(a, 1.5) + losses.uniformity(b, 1.5)) / 2
    ),
    hypersphere_loss.HypersphereLoss(t=1.5),
  ),
  "w_mse": (lambda a, b: losses.w_mse([a, b]).mean(), w_mse(B)),
  "koleo": (lambda a, b: losses.koleo(a).mean(), lambda a, b: lightly.KoLeoLoss()(a)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_views(name):
  compare(*PAIRS[name], *two(), rtol=1e-3 if name == "w_mse" else 1e-4)


def test_w_mse_in_sub_batches(monkeypatch):
  a, b = two(d=2)
  order = np.random.default_rng(1).permutation(B)
  monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(order))
  loss = lightly.WMSELoss(embedding_dim=2, w_size=B // 2)
  compare(
    lambda a, b: losses.w_mse([a, b], B // 2, order=jnp.asarray(order)).mean(),
    lambda a, b: loss(torch.cat([a, b])),
    a,
    b,
    rtol=1e-3,
  )


def test_cholesky_whiten():
  from lightly.loss.wmse_loss import Whitening2d

  for eps in (0.0, 0.1):
    layer = Whitening2d(D, eps=eps, track_running_stats=False)
    compare(
      lambda a, b, eps=eps: (losses.cholesky_whiten(a, eps) * b).sum(),
      lambda a, b, layer=layer: (layer(a) * b).sum(),
      *two(),
      rtol=1e-3,
    )


def test_tico_over_three_steps():
  theirs, memory = lightly.TiCoLoss(beta=0.9, rho=8.0), jnp.zeros((D, D))
  for seed in range(3):
    compare(
      lambda a, b, memory=memory: losses.tico(a, b, memory)[0].mean(),
      lambda a, b: theirs(a, b, update_covariance_matrix=False),
      *two(seed),
    )
    a, b = two(seed)
    theirs(torch.tensor(a), torch.tensor(b))
    memory = losses.tico(jnp.asarray(a), jnp.asarray(b), memory)[1]
    np.testing.assert_allclose(memory, theirs.C, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_mmcr(weight):
  rng = np.random.default_rng(0)
  online, momentum = (np.float32(unit(rng.normal(0, 1, (B, 2, D)))) for _ in range(2))

  # Ours normalises, which only takes the part of the gradient along the vectors away.
  def theirs(online, momentum):
    online = torch.nn.functional.normalize(online, dim=-1)
    return lightly.MMCRLoss(lmda=weight)(online, momentum)

  compare(lambda a, b: losses.mmcr(jnp.concatenate([a, b], 1), weight), theirs, online, momentum)


def ordered_maps(rng, side):
  """Cells of which each later one is further from its partner, in features and in the image."""
  n = side * side
  m1 = rng.normal(0, 1, (B, n, 3)) + 10 * np.arange(n)[None, :, None]
  m2 = m1 + 0.1 * np.arange(1, n + 1)[None, :, None] * unit(rng.normal(0, 1, (B, n, 3)))
  pos1 = rng.uniform(0, 0.1, (B, n, 2)) + np.arange(n)[None, :, None]
  pos2 = pos1 + 0.01 * np.arange(1, n + 1)[None, :, None] * unit(rng.normal(0, 1, (B, n, 2)))
  return [np.float32(x) for x in (m1, m2, pos1, pos2)]


@pytest.mark.parametrize("matches", [(20, 4), (2, 1)])
def test_vicregl(matches):
  side, (g1, g2) = 2, two()
  m1, m2, pos1, pos2 = ordered_maps(np.random.default_rng(0), side)
  theirs = lightly.VICRegLLoss(num_matches=matches)

  def ours(m1, m2, g1, g2, pos1, pos2):
    # lightly keeps matches[0] of the first map in both orders of the views.
    _, one = losses.vicregl(g1, g2, m1, m2, pos1, pos2, matches=matches)
    _, other = losses.vicregl(g2, g1, m2, m1, pos2, pos1, matches=matches)
    local = sum(parts["features"] + parts["locations"] for parts in (one, other)) / 2
    return 0.75 * one["global"] + 0.25 * local

  def reference(m1, m2, g1, g2, pos1, pos2):
    m1, m2, pos1, pos2 = (x.reshape(B, side, side, -1) for x in (m1, m2, pos1, pos2))
    return theirs([(g1, m1), (g2, m2)], [pos1, pos2])

  compare(ours, reference, m1, m2, g1, g2, pos1, pos2)


def test_sigreg_and_lejepa(monkeypatch):
  key = jax.random.key(3)
  drawn = torch.tensor(np.asarray(gaussian._unit_directions(key, D, 64, jnp.float32)))
  monkeypatch.setattr(lightly.SIGReg, "_generate_unit_vectors", lambda *_, **__: drawn)
  z = np.stack(two() + two(1), 1)
  compare(
    lambda z: losses.sigreg(z, key, 64),
    lambda z: lightly.SIGReg(num_vectors=64)(z.transpose(0, 1)),
    z,
  )
  theirs = lightly.LeJEPALoss(lambda_param=0.05, sigreg_num_vectors=64)
  compare(
    lambda z: losses.lejepa(z, key, 0.05, global_views=2, directions=64)[0],
    lambda z: theirs(global_proj=z[:, :2].transpose(0, 1), local_proj=z[:, 2:].transpose(0, 1)),
    z,
  )
