"""Deep clustering and pretext losses against torch, scipy and scikit-learn.

lightly and transformers have none of these. One deviation: SCAN's logarithm ends at -87.3 in
float32, torch's at -100.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch.nn import functional as F

from ssljax import losses

pytestmark = pytest.mark.parity
B, K = 12, 5


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def integers(below, seed=1):
  return np.random.default_rng(seed).integers(0, below, B)


def same(ours, theirs, x, rtol=2e-5):
  """Value and gradient of `ours(x)` equal those of `theirs`, a torch scalar."""
  value, gradient = jax.value_and_grad(ours)(x)
  tensor = torch.tensor(x, requires_grad=True)
  want = theirs(tensor)
  want.backward()
  np.testing.assert_allclose(value, want.item(), rtol=rtol)
  np.testing.assert_allclose(gradient, tensor.grad, rtol=10 * rtol, atol=rtol)


def test_cluster_ce_ignores_and_weighs_as_torch():
  ids = integers(K)
  ids[[2, 5]] = -100
  target, weights = torch.tensor(ids), np.float32([0.5, 1.0, 2.0, 0.0, 3.0])
  x = gaussian(B, K)
  same(lambda x: losses.cluster_ce(x, ids).mean(), lambda x: F.cross_entropy(x, target), x)
  same(
    lambda x: losses.cluster_ce(x, ids, jnp.asarray(weights)[ids]).mean(),
    lambda x: F.cross_entropy(x, target, torch.tensor(weights)),
    x,
  )


@pytest.mark.parametrize("smoothing", [0.0, 0.8, 1.0])
def test_instance_ce(smoothing):
  idx = integers(30)
  same(
    lambda x: losses.instance_ce(x, idx, smoothing).mean(),
    lambda x: F.cross_entropy(x, torch.tensor(idx), label_smoothing=smoothing),
    gaussian(B, 30),
  )


def scan_of_torch(x, other):
  p, q = F.softmax(x, 1), F.softmax(torch.tensor(other), 1)
  product = (p * q).sum(1)
  mean = p.mean(0).clamp(min=1e-8)
  consistency = F.binary_cross_entropy(product, torch.ones_like(product))
  return consistency + 5 * (mean * mean.log()).sum()


def test_scan():
  other = gaussian(B, K, seed=3)
  same(
    lambda x: losses.scan_loss(jax.nn.softmax(x), jax.nn.softmax(other), 5.0)[0],
    lambda x: scan_of_torch(x, other),
    gaussian(B, K),
  )


def test_neighbours_without_a_common_cluster():
  p, q = jnp.array([[1.0, 0.0]]), jnp.array([[[0.0, 1.0]]])
  product = torch.zeros(1)
  assert F.binary_cross_entropy(product, torch.ones(1)).item() == 100
  np.testing.assert_allclose(losses.neighbour_consistency(p, q), [87.3365], rtol=1e-5)
  with jax.enable_x64(True):
    p, q = jnp.asarray(np.array(p, np.float64)), jnp.asarray(np.array(q, np.float64))
    np.testing.assert_array_equal(losses.neighbour_consistency(p, q), [100.0])


def test_confident_self_labels_with_cluster_ce():
  weak, strong = gaussian(B, K), gaussian(B, K, seed=4)
  _, labels, weights = losses.confident_self_label(jax.nn.softmax(weak), 0.7)

  def theirs(x):
    p, target = F.softmax(torch.tensor(weak), 1).max(1)
    there = p > 0.7
    seen, counts = torch.unique(target[there], return_counts=True)
    class_weights = torch.ones(K)
    class_weights[seen] = there.sum() / counts.float()
    return F.cross_entropy(x[there], target[there], class_weights)

  same(lambda x: losses.cluster_ce(x, labels, weights).mean(), theirs, strong)


def test_dec_is_torchs_kl():
  z, centroids = gaussian(B, 4), gaussian(K, 4, seed=5)
  q = losses.student_t_assign(z, centroids)
  target = losses.dec_target(q)

  def theirs(z):
    kernel = 1 / (1 + torch.cdist(z, torch.tensor(centroids)) ** 2)
    q = kernel / kernel.sum(1, keepdim=True)
    return F.kl_div(q.log(), torch.tensor(np.asarray(target)), reduction="batchmean")

  same(lambda z: losses.dec_kl(z, centroids, target=target).mean(), theirs, z, rtol=1e-4)


def test_rate_reduction_by_torchs_logdet():
  z, membership = gaussian(B, 4), np.asarray(jax.nn.softmax(gaussian(B, K, seed=6)))

  def theirs(z):
    pi = torch.tensor(membership)
    rate = torch.logdet(torch.eye(4) + 4 / (B * 0.5) * z.T @ z) / 2
    for j in range(K):
      t = pi[:, j].sum()
      gram = torch.eye(4) + 4 / (t * 0.5) * (z * pi[:, j, None]).T @ z
      rate = rate - t / (2 * B) * torch.logdet(gram)
    return -rate

  def ours(z):
    rate, parts = losses.rate_reduction(z, membership, 0.5)
    return parts - rate

  same(ours, theirs, z, rtol=1e-4)


def test_noise_targets_are_scipys_assignment():
  f, targets = gaussian(40, 6), gaussian(40, 6, seed=7)
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (f, targets)]
  want = linear_sum_assignment(-unit[0] @ unit[1].T)[1]
  np.testing.assert_array_equal(losses.noise_target_assignment(f, targets), want)


def test_tell_of_scikit_learns_centroids_is_their_distortion():
  x = gaussian(60, 3) + 6 * np.eye(3, dtype=np.float32)[np.arange(60) % 3]
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  kmeans = KMeans(3, n_init=3, random_state=0).fit(x)
  centroids = kmeans.cluster_centers_
  centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
  nearest = ((x[:, None] - centroids) ** 2).sum(-1).min(-1)
  got = losses.tell(x, jnp.float32(2 * 0.1 * centroids), alpha=0.1)
  np.testing.assert_allclose(got.mean(), (0.1 * nearest.mean() + 0.4) / 3, rtol=1e-5)


PRETEXT = {
  "rotation": (4, lambda x, y: losses.rotation_ce(x, y)),
  "local rotation": (16, lambda x, y: losses.local_rotation_ce(x, y // 4, y % 4)),
  "joint label": (12, lambda x, y: losses.joint_label_ce(x, y // 4, y % 4, 4)),
  "jigsaw": (100, lambda x, y: losses.jigsaw_ce(x, y)),
  "relative patch": (8, lambda x, y: losses.relative_patch_ce(x, y)),
}


@pytest.mark.parametrize("name", PRETEXT)
def test_pretext_classifications(name):
  k, ours = PRETEXT[name]
  y = integers(k)
  same(lambda x: ours(x, y).mean(), lambda x: F.cross_entropy(x, torch.tensor(y)), gaussian(B, k))


def test_spectral_norm_term():
  same(
    losses.spectral_norm_term, lambda s: torch.linalg.matrix_norm(s, 2), gaussian(B, B), rtol=1e-4
  )
