"""Assignments: known values, marginals, extremes and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from ssljax import losses

quick = settings(max_examples=12, deadline=None, derandomize=True)
I, J, K = np.arange(8)[:, None], np.arange(6)[None], np.arange(5)[:, None]
Z1 = np.sin(1.7 * (I + 1) * (J + 1) * 0.37 + 0.3 * J)
Z2 = Z1 + 0.3 * np.cos(1.1 * I - 0.5 * J)
PROTOTYPES = np.cos(1.53 * K + 0.4 * J)
S1, S2 = (
  z / np.linalg.norm(z, axis=1, keepdims=True)
  @ (PROTOTYPES / np.linalg.norm(PROTOTYPES, axis=1, keepdims=True)).T
  for z in (Z1, Z2)
)  # fmt: skip


def random(*shape, seed=0, scale=1.0):
  return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def finite(*arrays):
  return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(arrays))


def test_known_value_of_swav():
  with jax.enable_x64(True):
    scores = [jnp.asarray(S1), jnp.asarray(S2)]
    codes = [losses.sinkhorn_knopp(s) for s in scores]
    mass = [0.9079, 2.6102, 1.8141, 1.4269, 1.2409]
    np.testing.assert_allclose(codes[0].sum(0), mass, atol=5e-5)
    loss = losses.swapped_ce(scores, codes).mean()
    np.testing.assert_allclose(loss, 1.793533792392, rtol=1e-9)


def test_known_masses_of_a_partial_plan():
  with jax.enable_x64(True):
    plan = losses.partial_ot_plan(jnp.asarray(S1) / 0.1, 0.5, tolerance=0.0, max_iters=378)
    plan = np.asarray(plan) / 8
  np.testing.assert_allclose(plan.sum(), 0.499999984, atol=1e-9)
  np.testing.assert_allclose(plan.sum(0), [0.1235, 0.0665, 0.0885, 0.1409, 0.0806], atol=5e-5)


@quick
@given(b=st.sampled_from([1, 2, 9]), log_eps=st.floats(-3, 1), seed=st.integers(0, 99))
def test_rows_are_exact_and_prototypes_become_so(b, log_eps, seed):
  scores = jnp.tanh(random(b, 4, seed=seed))
  q = jax.jit(losses.sinkhorn_knopp)(scores, 10**log_eps)
  np.testing.assert_allclose(q.sum(1), np.ones(b), rtol=1e-5)
  share = np.arange(1.0, 5)
  q = losses.sinkhorn_knopp(scores, 1.0, 100, jnp.float32(share))
  np.testing.assert_allclose(q.sum(0), b * share / share.sum(), rtol=1e-3)


@quick
@given(seed=st.integers(0, 99))
def test_scores_may_be_shifted_by_prototype_and_as_a_whole(seed):
  scores = random(6, 4, seed=seed)
  moved = scores + random(4, seed=seed + 1) + 3.0
  want = losses.sinkhorn_knopp(scores, 0.3)
  np.testing.assert_allclose(losses.sinkhorn_knopp(moved, 0.3), want, atol=1e-5)


def test_equal_scores_give_uniform_codes_and_log_k():
  scores = [jnp.zeros((4, 7))] * 3
  codes = [losses.sinkhorn_knopp(s) for s in scores[:2]]
  np.testing.assert_allclose(codes[0], np.full((4, 7), 1 / 7), rtol=1e-6)
  np.testing.assert_allclose(losses.swapped_ce(scores, codes), np.log(7), rtol=1e-6)


def test_rows_without_weight_have_no_say():
  scores, other = random(6, 4), random(6, 4, seed=1)
  weights = jnp.arange(6) < 4
  mixed = jnp.where(weights[:, None], scores, 5 * other)
  got = losses.sinkhorn_knopp(mixed, 0.3, weights=weights)
  np.testing.assert_allclose(got[:4], losses.sinkhorn_knopp(scores[:4], 0.3), rtol=1e-5)
  none = losses.sinkhorn_knopp(scores, 0.3, weights=jnp.zeros(6))
  np.testing.assert_allclose(none, jax.nn.softmax(scores / 0.3), rtol=1e-5)


def test_places_are_balanced_alone():
  scores = random(6, 3, 4)
  moved = scores.at[:, 1].add(random(6, 4, seed=1))
  before, after = (losses.positionwise_sinkhorn(s, 0.3) for s in (scores, moved))
  np.testing.assert_array_equal(before[:, [0, 2]], after[:, [0, 2]])
  np.testing.assert_allclose(before[:, 1], losses.sinkhorn_knopp(scores[:, 1], 0.3), rtol=1e-5)


def test_multi_sinkhorn_without_rounds_is_the_scaled_softmax():
  q = jax.nn.softmax(random(5, 6) / 0.3)
  low, high = q.min(1, keepdims=True), q.max(1, keepdims=True)
  got = losses.multi_sinkhorn(random(5, 6), 0.3, n_iters=0, properties=1)
  np.testing.assert_allclose(got, (q - low) / (high - low), rtol=1e-5)
  np.testing.assert_array_equal(losses.multi_sinkhorn(jnp.ones((5, 6)), properties=2), 0.0)


@quick
@given(mass=st.floats(0.05, 1), gamma=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_a_partial_plan_has_its_mass(mass, gamma, seed):
  plan = losses.partial_ot_plan(random(12, 4, seed=seed), mass, gamma)
  np.testing.assert_allclose(plan.sum() / 12, mass, atol=2e-3)
  assert (plan.sum(1) < 1 + 1e-4).all() and (plan >= 0).all()


def test_a_whole_plan_with_held_sizes_is_balanced():
  logits = random(12, 4)
  plan = losses.partial_ot_plan(logits, 1.0, gamma=1e6, eps=0.5)
  np.testing.assert_allclose(plan.sum(0), np.full(4, 3.0), rtol=1e-3)
  want = losses.sinkhorn_knopp(jax.nn.log_softmax(logits), 0.5, 200)
  np.testing.assert_allclose(plan, want, atol=1e-3)


EXTREME = {
  "huge": (1e30, 0.1), "tiny temperature": (1.0, 1e-10), "both": (1e30, 1e-10),
  "huge temperature": (1.0, 1e30), "equal": (0.0, 0.1),
}  # fmt: skip


@jax.jit
def everything(scores, places, temperature):
  """The balanced rows, and all else: values and gradients."""
  q = losses.sinkhorn_knopp(scores, temperature)
  views = lambda s: losses.swapped_ce([s, scores], [q, q], temperature).sum()  # noqa: E731
  soft = lambda s: losses.soft_ce(s, q[:, None] * jnp.ones((3, 1)), temperature).sum()  # noqa: E731
  return q, (
    losses.positionwise_sinkhorn(places, temperature),
    losses.multi_sinkhorn(scores, temperature, properties=2),
    losses.partial_ot_plan(scores, 0.5, eps=temperature, max_iters=50),
    jax.value_and_grad(views)(scores),
    jax.value_and_grad(soft)(places),
  )


@pytest.mark.parametrize("b", [1, 5])
@pytest.mark.parametrize("scale, temperature", EXTREME.values(), ids=EXTREME)
def test_extremes_stay_finite(scale, temperature, b):
  scores, places = random(b, 4, scale=scale), random(b, 3, 4, scale=scale)
  q, others = everything(scores, places, temperature)
  np.testing.assert_allclose(q.sum(1), 1, rtol=1e-5)
  assert finite(others)


def test_known_minimum_and_masks():
  q = jax.nn.softmax(random(5, 4))
  loss = lambda x, w=None: losses.soft_ce(x, q, weights=w).sum()  # noqa: E731
  at = jnp.log(q)
  np.testing.assert_allclose(losses.soft_ce(at, q), special.entr(q).sum(1), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(loss)(at), np.zeros_like(q), atol=1e-6)
  value, gradient = jax.value_and_grad(loss)(random(5, 4, seed=1), jnp.zeros(5, bool))
  assert value == 0 and (gradient == 0).all()


BAD = {
  "scores": (TypeError, lambda: losses.sinkhorn_knopp(jnp.ones((4, 2), int))),
  "scores rank": (ValueError, lambda: losses.sinkhorn_knopp(jnp.ones(4))),
  "eps": (ValueError, lambda: losses.sinkhorn_knopp(jnp.ones((4, 2)), 0.0)),
  "marginal": (ValueError, lambda: losses.sinkhorn_knopp(jnp.ones((4, 2)), marginal=jnp.ones(3))),
  "weights": (ValueError, lambda: losses.sinkhorn_knopp(jnp.ones((4, 2)), weights=jnp.ones(3))),
  "weights list": (TypeError, lambda: losses.soft_ce(jnp.ones((4, 2)), jnp.ones((4, 2)), 1.0, [1])),
  "scores [b n k]": (ValueError, lambda: losses.positionwise_sinkhorn(jnp.ones((4, 2)))),
  "properties": (ValueError, lambda: losses.multi_sinkhorn(jnp.ones((4, 2)))),
  "mass": (ValueError, lambda: losses.partial_ot_plan(jnp.ones((4, 2)), 1.5)),
  "gamma": (ValueError, lambda: losses.partial_ot_plan(jnp.ones((4, 2)), 0.5, -1.0)),
  "targets": (ValueError, lambda: losses.soft_ce(jnp.ones((4, 2)), jnp.ones((3, 2)))),
  "temperature": (ValueError, lambda: losses.soft_ce(jnp.ones((4, 2)), jnp.ones((4, 2)), -1)),
  "logits array": (TypeError, lambda: losses.swapped_ce(jnp.ones((2, 4, 2)), [jnp.ones((4, 2))])),
  "logits one": (ValueError, lambda: losses.swapped_ce([jnp.ones((4, 2))], [jnp.ones((4, 2))])),
  "codes": (ValueError, lambda: losses.swapped_ce([jnp.ones((4, 2))] * 2, [jnp.ones((4, 3))])),
  "crops_for_assign": (
    ValueError, lambda: losses.swapped_ce([jnp.ones((4, 2))] * 2, [jnp.ones((4, 2))], 0.1, (2,)),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
  error, call = BAD[name]
  with pytest.raises(error, match=name.split()[0]):
    call()
