"""Deep clustering: golden values, known minima, edges (nothing selected, zeros, one example)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssljax import losses

few = settings(max_examples=10, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)

# The input of the golden values.
I, J = np.arange(8)[:, None], np.arange(6)[None]
Z1 = np.sin(1.7 * (I + 1) * (J + 1) * 0.37 + 0.3 * J)
Z2 = Z1 + 0.3 * np.cos(1.1 * I - 0.5 * J)
Y = np.array([0, 0, 1, 1, 2, 2, 3, 3])
W = np.cos(1.53 * np.arange(5)[:, None] + 0.4 * J)
W = W / np.linalg.norm(W, axis=1, keepdims=True)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


S1, S2 = unit(Z1) @ W.T, unit(Z2) @ W.T
P1, P2 = softmax(S1 / 0.1), softmax(S2 / 0.1)
TOP2 = S1 >= np.sort(S1, axis=1)[:, -2:-1]


def depict(kind):
  target = losses.depict_target(jnp.asarray(P1), kind)
  return -(target * np.log(P2)).sum(-1).mean()


def volmax(memberships, pairs, same):
  link = jnp.asarray(0.8 * np.eye(5) + 0.04)
  return losses.volmax_dcc(jnp.asarray(memberships), link, jnp.asarray(pairs), same, eps=0.0)[1]


ROLLED = np.stack([np.arange(8), 8 + np.roll(np.arange(8), 1)], axis=1)
GOLDEN = {
  "SCAN": (lambda: losses.scan_loss(jnp.asarray(P1), jnp.asarray(P2), 5.0)[0], -6.515915218731),
  "R": (lambda: losses.rate_reduction(jnp.asarray(unit(Z1)), jnp.eye(4)[Y])[0], 2.909841565447),
  "R_c": (lambda: losses.rate_reduction(jnp.asarray(unit(Z1)), jnp.eye(4)[Y])[1], 1.918721074209),
  "DEC": (lambda: losses.dec_kl(jnp.asarray(unit(Z1)), jnp.asarray(W)).mean(), 0.014800791876),
  "DEPICT paper": (lambda: depict("paper"), 2.132684534073),
  "DEPICT code": (lambda: depict("code"), 1.977615995378),
  "DivClust": (lambda: losses.divclust(jnp.asarray(np.stack([P1, P2], 1)), 0.5), 0.453193207400),
  "MLCD": (
    lambda: losses.multi_label_cluster_loss(jnp.asarray(10 * S1), TOP2, ~TOP2).mean(),
    1.829555760391,
  ),
  # The pairs are of the one view with the other, a place on; the volume is of the first view.
  "VolMaxDCC BCE": (
    lambda: volmax(np.concatenate([P1, P2]), ROLLED, Y == np.roll(Y, 1))[0],
    1.021194990360,
  ),
  "VolMaxDCC log det": (lambda: volmax(P1, ROLLED[:1] % 8, Y[:1] == 0)[1], -8.009505163592),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
  with jax.enable_x64(True):
    got, want = GOLDEN[name][0](), GOLDEN[name][1]
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_golden_labels_of_sela():
  with jax.enable_x64(True):
    log_p = jnp.log(jnp.asarray(P1))
    labels, plan = losses.sinkhorn_full(log_p, 5.0, 1e-14)
  assert labels.tolist() == [0, 4, 4, 1, 3, 1, 2, 3]
  np.testing.assert_allclose(np.asarray(plan).sum(0), np.full(5, 1 / 5), rtol=1e-9)
  np.testing.assert_allclose(np.asarray(plan).sum(1), np.full(8, 1 / 8), rtol=1e-12)


# Known values and minima.


def _scan(p):
  return losses.scan_loss(p, p, 5.0)[0]


@pytest.mark.parametrize(("k", "repeats"), [(2, 1), (5, 3)])
def test_scan_is_minimal_where_neighbours_agree_and_clusters_are_balanced(k, repeats):
  balanced = jnp.eye(k)[np.arange(k * repeats) % k]
  collapsed = jnp.eye(k)[np.zeros(k, int)]
  flat = jnp.full((4, k), 1 / k)
  np.testing.assert_allclose(_scan(balanced), -5 * np.log(k), rtol=1e-5)
  np.testing.assert_allclose(_scan(collapsed), 0.0, atol=1e-5)
  np.testing.assert_allclose(_scan(flat), -4 * np.log(k), rtol=1e-5)


@given(seed=seeds)
@few
def test_self_labels_are_scans_weighted_cross_entropy(seed):
  rng = np.random.default_rng(seed)
  p, logits = softmax(rng.normal(0, 3, (12, 4))), rng.normal(size=(12, 4))
  mask, labels, weights = losses.confident_self_label(jnp.float32(p), 0.7)
  got = losses.cluster_ce(jnp.float32(logits), labels, weights).mean()
  # Every class that has a confident example counts the same.
  ce = -np.log(softmax(logits))[np.arange(12), labels]
  per_class = [ce[np.asarray(mask & (labels == c))] for c in range(4)]
  want = np.mean([x.mean() for x in per_class if len(x)]) if mask.any() else 0.0
  np.testing.assert_allclose(got, want, rtol=1e-5)


@given(seed=seeds, k=st.sampled_from([2, 5]))
@few
def test_sela_has_equal_clusters_and_keeps_float32(seed, k):
  logits = np.random.default_rng(seed).normal(size=(40, k))
  log_p = np.log(softmax(logits))
  labels, plan = losses.sinkhorn_full(jnp.float32(log_p), 3.0, 1e-3)
  np.testing.assert_allclose(plan.sum(0), np.full(k, 1 / k), rtol=1e-3)
  np.testing.assert_allclose(plan.sum(1), np.full(40, 1 / 40), rtol=1e-5)
  np.testing.assert_array_equal(labels, plan.argmax(1))


def test_sela_ends_and_is_finite_for_impossible_scores():
  log_p = jnp.full((4, 3), -jnp.inf).at[:, 0].set(0.0)
  labels, plan = losses.sinkhorn_full(log_p, 25.0, 1e-9, max_iterations=50)
  np.testing.assert_allclose(plan.sum(1), np.full(4, 1 / 4), rtol=1e-5)


def test_one_cluster_has_nothing_to_reduce():
  z = jnp.float32(unit(Z1))
  rate, parts = losses.rate_reduction(z, jnp.ones((8, 1)))
  np.testing.assert_allclose(rate, parts, rtol=1e-5)


@given(m=st.sampled_from([1, 3]), threshold=st.floats(0.0, 1.0))
@few
def test_divclust_of_equal_and_of_orthogonal_clusterings(m, threshold):
  equal = jnp.stack([jnp.eye(6)] * m, axis=1)
  np.testing.assert_allclose(
    losses.divclust(equal, threshold), m * (m - 1) * (1 - threshold), rtol=1e-5, atol=1e-5
  )
  apart = jnp.stack([jnp.eye(12)[:, i * 3 : i * 3 + 3] for i in range(m)], axis=1)
  assert losses.divclust(apart, threshold) == 0


def test_divclust_does_not_see_the_size_of_a_column():
  a = jnp.float32(np.stack([P1, P2], 1))
  np.testing.assert_allclose(losses.divclust(7 * a, 0.5), losses.divclust(a, 0.5), rtol=1e-5)


def test_calibration_of_single_members_is_soft_cross_entropy():
  logits, probs = jnp.float32(Z1[:, :5]), jnp.float32(P1)
  got = losses.cdc_calibration(logits, probs, jnp.arange(8), 8, 0.0)
  want = -(P1 * np.log(softmax(Z1[:, :5]))).sum(-1).mean()
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_dec_is_zero_at_its_target_and_hard_assignments_stay():
  z = jnp.float32(unit(Z1))
  q = losses.student_t_assign(z, jnp.float32(W))
  np.testing.assert_allclose(losses.dec_kl(z, jnp.float32(W), target=q), np.zeros(8), atol=1e-6)
  np.testing.assert_array_equal(losses.dec_target(jnp.eye(4)), np.eye(4))
  own = losses.dec_kl(z, jnp.float32(W), target=losses.dec_target(q))
  np.testing.assert_allclose(losses.dec_kl(z, jnp.float32(W)), own, rtol=1e-6)


def test_depict_of_equal_frequencies_is_the_assignment():
  p = jnp.float32([[0.7, 0.3], [0.3, 0.7]])
  np.testing.assert_allclose(losses.depict_target(p), p, rtol=1e-6)


def test_tell_is_the_distortion_of_spherical_k_means():
  distance = ((unit(Z1)[:, None] - W) ** 2).sum(-1).min(-1)
  got = losses.tell(jnp.float32(3 * Z1), jnp.float32(2 * 0.25 * W), alpha=0.25)
  np.testing.assert_allclose(got, (0.25 * distance + 2 * 0.25 * 4) / 5, rtol=1e-5)


@given(alpha=st.floats(0.05, 1.0), steps=st.sampled_from([0, 4]))
@few
def test_one_prototype_attracts_by_alpha_each_step(alpha, steps):
  x = jnp.ones((2, 3))
  loss, recalled = losses.clam_loss(x, 2 * x[:1], jnp.ones((2, 3), bool), 2.0, alpha, steps)
  away = (1 - alpha) ** steps
  np.testing.assert_allclose(recalled, np.full((2, 3), 2 * (1 - away)), rtol=1e-5)
  np.testing.assert_allclose(loss, np.full(2, (1 - 2 * away) ** 2), rtol=1e-4, atol=1e-6)


@given(seed=seeds, b=st.sampled_from([1, 7]))
@few
def test_noise_targets_are_a_permutation_that_follows_the_batch(seed, b):
  assign = jax.jit(losses.noise_target_assignment)
  rng = np.random.default_rng(seed)
  f, targets, order = rng.normal(size=(b, 4)), rng.normal(size=(b, 4)), rng.permutation(b)
  f, targets = jnp.float32(f), jnp.float32(targets)
  got = assign(f, targets)
  assert sorted(got.tolist()) == list(range(b))
  np.testing.assert_array_equal(assign(f[order], targets), got[order])
  after = losses.noise_target_loss(f, targets[got]).sum()
  assert after <= losses.noise_target_loss(f, targets).sum() + 1e-5
  np.testing.assert_array_equal(assign(f, f), np.arange(b))


# Edges: finite values and gradients, or nothing.


FINITE = {
  "cluster_ce, huge": lambda x: losses.cluster_ce(x, jnp.zeros(len(x), int)),
  "cluster_ce, none": lambda x: losses.cluster_ce(x, jnp.full(len(x), -100)),
  "instance_ce, huge": lambda x: losses.instance_ce(x, jnp.zeros(len(x), int)),
  "neighbours that disagree": lambda x: losses.neighbour_consistency(x, 1e-30 * x[:, None]),
  "scan_loss": lambda x: losses.scan_loss(x, jax.lax.stop_gradient(x))[0],
  "scan_loss, apart": lambda x: losses.scan_loss(x, 0 * x)[0],
  "scan_loss, padding": lambda x: losses.scan_loss(x, x, weights=jnp.zeros(len(x)))[0],
  "cdc_calibration, huge": lambda x: losses.cdc_calibration(
    x, jnp.eye(len(x), 4), jnp.zeros(len(x), int), 3, 1.0
  ),
  "multi_label, huge": lambda x: losses.multi_label_cluster_loss(x, x > 1, x <= 1),
  "divclust": lambda x: losses.divclust(x[:, None].repeat(2, 1), 0.1),
  "volmax_dcc": lambda x: losses.volmax_dcc(
    x, jnp.eye(x.shape[1]), jnp.zeros((2, 2), int), jnp.array([0, 1])
  )[0],
  "rate_reduction": lambda x: losses.rate_reduction(x, 0 * x, eps=1e-4)[0],
  "R_c": lambda x: losses.rate_reduction(x, jnp.zeros_like(x).at[:, 0].set(1.0), eps=1e-4)[1],
  "dec_kl": lambda x: losses.dec_kl(x, x[:1].repeat(3, 0)),
  "dec_kl, far": lambda x: losses.dec_kl(1e15 * x, jnp.eye(4), alpha=1e-3),
  "tell": lambda x: losses.tell(x, x[:1].repeat(3, 0)),
  "clam_loss": lambda x: losses.clam_loss(x, jnp.eye(4), x > -1, 1e4, 0.1, 10)[0],
  "noise_target_loss": lambda x: losses.noise_target_loss(x, x),
}
INPUTS = {
  "zeros": lambda: jnp.zeros((3, 4)),
  "equal rows": lambda: jnp.full((3, 4), 0.25),
  "one example": lambda: jnp.float32(P1[:1, :4]),
  "one-hot": lambda: jnp.eye(4)[jnp.array([0, 1, 1])],
}


@functools.cache
def compiled(name):
  return jax.jit(jax.value_and_grad(lambda x: FINITE[name](x).sum()))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", FINITE)
def test_finite_value_and_gradient(name, inputs):
  # The product is made outside: compiled with what follows, XLA would keep more digits of it than
  # its own maximum has, and 1e30·x less that maximum would not be 0.
  x = INPUTS[inputs]() * (1e30 if "huge" in name else 1)
  value, gradient = compiled(name)(x)
  assert np.isfinite(value) and np.isfinite(gradient).all(), (value, gradient)


def nothing(b):
  return jnp.zeros((b, 3), bool)


NOTHING = {
  "cluster_ce, ids": lambda x: losses.cluster_ce(x, jnp.full(4, -1)),
  "cluster_ce, weights": lambda x: losses.cluster_ce(x, jnp.arange(4) % 3, jnp.zeros(4, bool)),
  "neighbours": lambda x: losses.neighbour_consistency(x, x[:, None], jnp.zeros((4, 1), bool)),
  "scan": lambda x: losses.scan_loss(x, x, weights=jnp.zeros(4))[0],
  "confident": lambda x: losses.cluster_ce(x, *losses.confident_self_label(x, 2.0)[1:]),
  "mini-clusters": lambda x: losses.cdc_calibration(x, x, jnp.full(4, 9), 3, 0.0),
  "multi-label": lambda x: losses.multi_label_cluster_loss(x, nothing(4), nothing(4)),
  "clam": lambda x: losses.clam_loss(x, jnp.eye(3), nothing(4), 1.0, 0.1, 3)[0],
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_selects_nothing_gives_zero(name):
  x = jnp.float32(P1[:4, :3])
  value, gradient = jax.jit(jax.value_and_grad(lambda x: NOTHING[name](x).sum()))(x)
  assert value == 0 and not gradient.any()


@pytest.mark.parametrize("weights", [None, np.array([2, 1, 0, 1])])
def test_padded_rows_may_hold_anything(weights):
  x = jnp.float32(P1[:4, :3])
  bad, ids = x.at[1].set(jnp.nan), jnp.array([0, -100, 2, 1])

  def total(x):
    return losses.cluster_ce(x, ids, weights).sum()

  np.testing.assert_array_equal(total(bad), total(x))
  gradient = jax.grad(total)(bad)
  assert np.isfinite(gradient).all() and not gradient[1].any()


def test_padded_probabilities_may_hold_anything():
  p, there = jnp.float32(P1[:4, :3]), jnp.array([1, 0, 1, 1])
  bad = p.at[1].set(jnp.nan)

  def scan(p):
    return losses.scan_loss(p, p, 5.0, weights=there)[0]

  def neighbours(p):
    weights = jnp.ones((3, 4), bool).at[:, 1].set(False)
    return losses.neighbour_consistency(
      p[jnp.array([0, 2, 3])], p[None].repeat(3, 0), weights
    ).sum()

  for loss in (scan, neighbours):
    value, gradient = jax.jit(jax.value_and_grad(loss))(bad)
    np.testing.assert_allclose(value, loss(p), rtol=1e-6)
    assert np.isfinite(gradient).all() and not gradient[1].any()


def test_empty_clusters_have_no_target():
  p = jnp.array([[1.0, 0.0], [1.0, 0.0]])
  for target in (losses.dec_target(p), losses.depict_target(p), losses.depict_target(p, "code")):
    np.testing.assert_allclose(target, p, rtol=1e-6)


X, IDS = jnp.ones((4, 3)), jnp.zeros(4, int)
BAD = {
  "ids are floats": (TypeError, "ids", lambda: losses.cluster_ce(X, X[:, 0])),
  "ids too many": (ValueError, "ids", lambda: losses.cluster_ce(X, IDS[:2])),
  "smoothing": (ValueError, "smoothing", lambda: losses.instance_ce(X, IDS, smoothing=1.5)),
  "rank": (ValueError, "p_anchor", lambda: losses.scan_loss(X[0], X)),
  "integers": (TypeError, "p", lambda: losses.confident_self_label(IDS[:, None])),
  "sharpness": (ValueError, "sharpness", lambda: losses.sinkhorn_full(X, 0.0, 0.1)),
  "clusters differ": (
    ValueError,
    "cluster_probs",
    lambda: losses.cdc_calibration(X, X[:, :2], IDS, 2, 1.0),
  ),
  "per_class": (ValueError, "per_class", lambda: losses.select_by_class_confidence(X, 0)),
  "mask is int": (
    TypeError,
    "pos_mask",
    lambda: losses.multi_label_cluster_loss(X, jnp.ones((4, 3), int), X > 0),
  ),
  "eps": (ValueError, "eps", lambda: losses.rate_reduction(X, X, eps=-1.0)),
  "link": (ValueError, "link", lambda: losses.volmax_dcc(X, X, IDS.reshape(2, 2), IDS[:2])),
  "assignments": (ValueError, "assignments", lambda: losses.divclust(X, 0.5)),
  "widths differ": (ValueError, "centroids", lambda: losses.dec_kl(X, X[:, :2])),
  "kind": (ValueError, "kind", lambda: losses.depict_target(X, "both")),
  "alpha": (ValueError, "alpha", lambda: losses.tell(X, X, alpha=0.0)),
  "mask": (ValueError, "mask", lambda: losses.clam_loss(X, X, X[:, :2], 1.0, 0.1, 2)),
  "a list": (TypeError, "targets", lambda: losses.noise_target_loss(X, [1.0])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
  error, word, call = BAD[name]
  with pytest.raises(error, match=word):
    call()
