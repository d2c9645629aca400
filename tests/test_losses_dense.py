"""Losses of cells, pairs and groups: golden values, limits, extreme inputs, masks, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssljax import losses

few = settings(max_examples=12, deadline=None, derandomize=True)
I, J = np.arange(8)[:, None], np.arange(6)[None]
Z1 = np.sin(1.7 * (I + 1) * (J + 1) * 0.37 + 0.3 * J)
Z2 = Z1 + 0.3 * np.cos(1.1 * I - 0.5 * J)


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def groco(a, b, steepness=1.0):
  similarities = losses.group_similarities(a, b[:, None], a, n_neg=min(4, len(a) - 1))
  sorter = partial(losses.differentiable_sort, steepness=steepness)
  return losses.group_ordering_loss(similarities, min(4, len(a) - 1), sorter)


GOLDEN = {
  # diffsort in float64 with the published aggregation (in float32 it prints 0.241642624).
  "GroCo": (groco, 0.24164262181989327),
  "CARE": (losses.pairwise_equivariance, 0.200638193766),
  "triplet": (
    lambda a, b: losses.triplet(a, b, jnp.roll(b, 1, axis=0), 0.2, distance="cosine"),
    0.0,
  ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
  loss, want = GOLDEN[name]
  with jax.enable_x64(True):
    got = jax.jit(loss)(jnp.asarray(Z1), jnp.asarray(Z2))
    assert got.shape == (8,) and got.dtype == jnp.float64
    np.testing.assert_allclose(got.mean(), want, rtol=1e-9)


def test_sorting_gives_the_values_of_diffsort():
  """Odd-even, Cauchy, steepness 3, in float64; the permutation's first and last rows."""
  with jax.enable_x64(True):
    values = jnp.array([0.3, -1.2, 2.0, 0.5, -0.1])
    ordered, places = jax.jit(partial(losses.differentiable_sort, steepness=3.0))(values)
  close = partial(np.testing.assert_allclose, rtol=1e-12)
  close(
    ordered,
    [
      -0.8883308627065101,
      0.030453469751441933,
      0.23307162774050802,
      0.43842342019367436,
      1.686382345020886,
    ],
  )
  close(
    places[0],
    [
      0.13664080298746156,
      0.29150755517228455,
      0.34833779067542137,
      0.2109499151983234,
      0.01256393596650914,
    ],
  )
  close(
    places[4],
    [
      0.04082847118546081,
      0.40448892173425255,
      0.29027859146411833,
      0.20246146893577038,
      0.06194254668039794,
    ],
  )


# Every loss as a function of maps [b n d] and a temperature or steepness.

QUEUE = gaussian(5, 3, seed=5)
OTHER = gaussian(4, 5, 3, seed=6)


def other(x):
  return OTHER[: len(x)]


FORMS = {
  "dense_info_nce": lambda x, t: losses.dense_info_nce(x, x[:, ::-1], other(x), x, QUEUE, t),
  "patch_info_nce": lambda x, t: losses.patch_info_nce(x, other(x), t),
  "patch_info_nce/standardised": lambda x, t: losses.patch_info_nce(x, x, t, standardise=True),
  "pixel_consistency": lambda x, t: losses.pixel_consistency(x, other(x), jnp.ones((len(x), 5, 5))),
  "pairwise_equivariance": lambda x, t: losses.pairwise_equivariance(x[:, 0], x[:, 1]),
  "differentiable_sort": lambda x, t: losses.differentiable_sort(x, t)[0],
  "groco": lambda x, t: groco(x[0], x[0, ::-1], t),
  "triplet": lambda x, t: losses.triplet(x[:, 0], x[:, 1], x[:, 2], 1.0),
  "triplet/cosine": lambda x, t: losses.triplet(x[:, 0], x[:, 1], x[:, 2], 1.0, distance="cosine"),
  "triplet/soft": lambda x, t: losses.triplet(x[:, 0], x[:, 1], x[:, 2], 1.0, True, "squared"),
  "weighted_triplet": lambda x, t: losses.weighted_triplet(x[:, 0], x[:, 1], x[:, 2]),
  "relation_bce_focal": lambda x, t: losses.relation_bce_focal(x.ravel(), np.arange(x.size) % 2),
  "relation_bce_focal/root": lambda x, t: losses.relation_bce_focal(
    x.ravel(), np.linspace(0, 1, x.size), 0.5
  ),
}


@pytest.mark.parametrize("form", FORMS)
def test_extreme_inputs_give_finite_values_and_gradients(form):
  x, same = gaussian(4, 5, 3), np.ones((4, 5, 3), np.float32)
  maps = {
    "as they come": x,
    "duplicate cells": same,
    "a zero vector": np.where(np.arange(5)[:, None] == 1, 0.0, x).astype(np.float32),
    "zeros": 0 * x,
    "large": 1e15 * x,
    "small": 1e-15 * x,
  }
  temperatures = np.array([1e-38, 1e-20, 1e-6, 0.1, 1e6, 1e30], np.float32)
  run = jax.value_and_grad(lambda x, t: FORMS[form](x, t).mean(), argnums=(0, 1))
  run = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))
  for b in (4, 1):
    value, gradient = run(np.stack([x[:b] for x in maps.values()]), temperatures)
    for name, got in {"value": value, "x": gradient[0], "temperature": gradient[1]}.items():
      wrong = np.argwhere(~np.isfinite(got))
      bad = {(float(temperatures[t]), list(maps)[r]) for t, r, *_ in wrong}
      assert not bad, (name, b, bad)


RUN = {form: jax.jit(f) for form, f in FORMS.items()}


@few
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_only_directions_count(seed, power):
  x = gaussian(4, 5, 3, seed=seed)
  scaled = x * 10.0 ** (power * np.random.default_rng(seed).random((4, 5, 1)))
  for form in ("dense_info_nce", "patch_info_nce", "pixel_consistency", "pairwise_equivariance"):
    got, want = RUN[form](scaled.astype(np.float32), 0.3), RUN[form](x, 0.3)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


# Sorting.

sort = jax.jit(losses.differentiable_sort)


@few
@given(st.sampled_from([1, 4, 7]), st.integers(0, 10**6), st.floats(0.1, 100))
def test_a_soft_permutation_moves_the_values_and_steepens_to_sorting(n, seed, steepness):
  values = np.random.default_rng(seed).permutation(n).astype(np.float32) - n / 2
  ordered, places = sort(values, jnp.float32(steepness))
  assert places.shape == (n, n) and (places >= 0).all()
  np.testing.assert_allclose(places.sum(0), 1.0, rtol=1e-5)
  np.testing.assert_allclose(places.sum(1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(values @ places, ordered, rtol=1e-4, atol=1e-5)
  hard = sort(values, jnp.float32(1e6))
  np.testing.assert_allclose(hard[0], np.sort(values), atol=1e-4)
  np.testing.assert_array_equal(hard[1].argmax(1), np.argsort(np.argsort(values)))


def test_group_order_does_not_matter_but_groups_do():
  """Right: small, however each group is ordered. Wrong: large."""
  sorter = partial(losses.differentiable_sort, steepness=1e4)
  row = jnp.array([[0.1, 0.2, 0.3, 0.6, 0.8], [0.3, 0.1, 0.2, 0.8, 0.6], [0.8, 0.6, 0.3, 0.2, 0.1]])
  right, mixed, wrong = losses.group_ordering_loss(row, 3, sorter)
  assert right < 0.02 and mixed < 0.02 and wrong > 3
  better = losses.group_ordering_loss(row, 3)
  assert better[0] < better[2]


def test_only_the_anchor_learns_from_group_similarities():
  parts = gaussian(6, 4), gaussian(6, 2, 4, seed=1), gaussian(6, 4, seed=2)
  total = jax.jit(lambda *x: losses.group_similarities(*x, 3).sum())
  gradient = jax.grad(total, argnums=(0, 1, 2))(*parts)
  assert np.abs(gradient[0]).max() > 0 and not gradient[1].any() and not gradient[2].any()


# Two ways to the same, and values known in closed form.

A, X, F = gaussian(6, 4), gaussian(6, 5, 4, seed=1), gaussian(6, 5, 8, seed=2)
K = gaussian(6, 5, 4, seed=3)
TURN = np.linalg.qr(gaussian(4, 4, seed=9))[0]
LOGITS, PAIRS = np.linspace(-5, 5, 6, dtype=np.float32), np.arange(6) % 2
eye = np.broadcast_to(np.eye(5, dtype=bool), (6, 5, 5))
SAME = {
  "cells meet themselves": (lambda: losses.grid_match(F, F), lambda: np.tile(np.arange(5), (6, 1))),
  "cells in another order": (
    lambda: losses.grid_match(F, F[:, ::-1]),
    lambda: np.tile(np.arange(5)[::-1], (6, 1)),
  ),
  "empty queue": (
    lambda: losses.dense_info_nce(X, K, F, F, jnp.zeros((0, 4)), 0.2),
    lambda: np.zeros(6),
  ),
  "one cell is MoCo": (
    lambda: losses.dense_info_nce(X[:, :1], K[:, :1], F[:, :1], F[:, :1], A, 0.2),
    lambda: losses.info_nce_queue(X[:, 0], K[:, 0], A, 0.2),
  ),
  "keys move with their features": (
    lambda: losses.dense_info_nce(X, K, F, F, A, 0.2),
    lambda: losses.dense_info_nce(X, K[:, ::-1], F, F[:, ::-1], A, 0.2),
  ),
  "equal patches": (
    lambda: losses.patch_info_nce(jnp.ones((6, 5, 4)), jnp.ones((6, 5, 4)), 0.2),
    lambda: np.full(6, np.log(5)),
  ),
  "two of five patches": (
    lambda: losses.patch_info_nce(X, K, 0.2, jnp.broadcast_to(jnp.arange(5) < 2, (6, 5))),
    lambda: losses.patch_info_nce(X[:, :2], K[:, :2], 0.2),
  ),
  "one patch": (lambda: losses.patch_info_nce(X[:, :1], K[:, :1], 0.2), lambda: np.zeros(6)),
  "shifted predictions": (
    lambda: losses.patch_info_nce(X + 3.0, K, 0.2, standardise=True),
    lambda: losses.patch_info_nce(X, K, 0.2, standardise=True),
  ),
  "an image for itself": (
    lambda: losses.patch_info_nce(X, K, 0.2)[:2],
    lambda: losses.patch_info_nce(X[:2], K[:2], 0.2),
  ),
  "patches are a batch": (
    lambda: losses.patch_info_nce(X, K, 0.2)[0],
    lambda: losses.info_nce_inbatch(X[0], K[0], 0.2).mean(),
  ),
  "a cell and itself": (lambda: losses.pixel_consistency(X, X, eye), lambda: np.full(6, -1.0)),
  "opposite cells": (lambda: losses.pixel_consistency(X, -X, eye), lambda: np.ones(6)),
  "a rotation": (lambda: losses.pairwise_equivariance(A, A @ TURN), lambda: np.zeros(6)),
  "runs and their numbers": (
    lambda: losses.pairwise_equivariance(A, X[:, 0], 2),
    lambda: losses.pairwise_equivariance(A, X[:, 0], jnp.array([4, 4, 4, 1, 1, 1])),
  ),
  "groups of one": (
    lambda: losses.pairwise_equivariance(A, X[:, 0], jnp.arange(6)),
    lambda: np.zeros(6),
  ),
  "half of BCE": (
    lambda: losses.relation_bce_focal(LOGITS, PAIRS, 0.0),
    lambda: 0.5 * optax.losses.sigmoid_binary_cross_entropy(LOGITS, PAIRS),
  ),
  "0/1 in any kind": (
    lambda: losses.relation_bce_focal(LOGITS, PAIRS == 1),
    lambda: losses.relation_bce_focal(LOGITS, PAIRS.astype(np.float32)),
  ),
  "weighted triplet": (
    lambda: losses.weighted_triplet(A, X[:, 0], X[:, 1], 0.2),
    lambda: losses.triplet(A, X[:, 0], X[:, 1], 0.2, distance="squared"),
  ),
  "no difference, soft": (lambda: losses.triplet(A, A, A, 9.0, True), lambda: np.full(6, 0.25)),
  "no difference": (lambda: losses.triplet(A, A, A, 0.3), lambda: np.full(6, 0.3)),
}


@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_the_same(name):
  one, two = (jax.jit(f)() for f in SAME[name])
  np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_a_triplet_with_room_has_no_gradient(distance):
  loss = partial(losses.triplet, p=A + 1e-3, n=-A, margin=0.1, distance=distance)
  value, gradient = jax.value_and_grad(lambda a: loss(a).sum())(A)
  assert value == 0 and not gradient.any()


# Masks that select nothing, and cells that do not count.

EMPTY = {
  "dense_info_nce": lambda x, w: losses.dense_info_nce(x, K, F, F, A, 0.2, w),
  "patch_info_nce": lambda x, w: losses.patch_info_nce(x, K, 0.2, w),
  "patch_info_nce/standardised": lambda x, w: losses.patch_info_nce(x, K, 0.2, w, True),
  "pixel_consistency": lambda x, w: losses.pixel_consistency(
    x, K, w[..., None] & (K[:, :, 0] < 9)[:, None]
  ),
}


@pytest.mark.parametrize("form", EMPTY)
def test_masks_that_select_nothing_give_zero(form):
  run = jax.jit(jax.value_and_grad(lambda x, w: EMPTY[form](x, w).sum()))
  value, gradient = run(X, np.zeros((6, 5), bool))
  assert value == 0 and not gradient.any()
  one = np.arange(6)[:, None] + np.zeros(5) != 2
  value, gradient = run(X, one)
  assert (
    np.isfinite(value) and value != 0 and not gradient[2].any() and np.abs(gradient[3]).max() > 1e-3
  )


@pytest.mark.parametrize("form", list(EMPTY)[:3])
def test_cells_that_do_not_count_may_be_anything(form):
  there = np.arange(5) + np.zeros((6, 1)) != 1
  run = jax.jit(jax.value_and_grad(lambda x: EMPTY[form](x, there).sum()))
  (value, gradient), (want, plain) = run(np.where(there[..., None], X, np.nan)), run(X)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  np.testing.assert_allclose(gradient, plain, rtol=1e-4, atol=1e-6)
  assert not gradient[:, 1].any()


# Bad input.

M, Z = jnp.ones((4, 5, 3)), jnp.ones((4, 3))
BAD = {
  "rank": (lambda: losses.grid_match(Z, M), ValueError, r"a .*\[b n d\]"),
  "width": (lambda: losses.grid_match(M, M[..., :2]), ValueError, "b must"),
  "queue": (lambda: losses.dense_info_nce(M, M, M, M, Z[:, :2], 0.1), ValueError, "queue"),
  "features": (lambda: losses.dense_info_nce(M, M, M[:, :4], M, Z, 0.1), ValueError, "q_feat"),
  "keys": (lambda: losses.dense_info_nce(M, M[:, :4], M, M, Z, 0.1), ValueError, "k_feat"),
  "cells": (lambda: losses.dense_info_nce(M, M, M, M, Z, 0.1, Z), ValueError, "weights"),
  "temperature": (lambda: losses.patch_info_nce(M, M, 0.0), ValueError, "temperature"),
  "temperature None": (lambda: losses.patch_info_nce(M, M, None), TypeError, "temperature"),
  "mask": (lambda: losses.patch_info_nce(M, M, 0.1, Z > 0), ValueError, "mask"),
  "kind of mask": (lambda: losses.patch_info_nce(M, M, 0.1, M[..., 0]), TypeError, "mask"),
  "pairs": (lambda: losses.pixel_consistency(M, M, M), ValueError, "mask"),
  "no array": (lambda: losses.differentiable_sort([1.0]), TypeError, "values"),
  "integers": (lambda: losses.differentiable_sort(jnp.arange(3)), TypeError, "values"),
  "steepness": (lambda: losses.differentiable_sort(Z, -1.0), ValueError, "steepness"),
  "n_neg": (lambda: losses.group_similarities(Z, M[..., :3], Z, 4), ValueError, "n_neg"),
  "n_neg of all": (lambda: losses.group_ordering_loss(Z, 3), ValueError, "n_neg"),
  "groups": (lambda: losses.pairwise_equivariance(Z, Z, 3), ValueError, "groups"),
  "float groups": (lambda: losses.pairwise_equivariance(Z, Z, Z[:, 0]), TypeError, "groups"),
  "gamma": (lambda: losses.relation_bce_focal(Z[0], Z[0], -1.0), ValueError, "gamma"),
  "targets": (lambda: losses.relation_bce_focal(Z[0], Z[:, 0]), ValueError, "targets"),
  "negatives": (lambda: losses.triplet(Z, Z, Z[:2], 0.1), ValueError, "n must"),
  "distance": (lambda: losses.triplet(Z, Z, Z, 0.1, distance="l1"), ValueError, "distance"),
  "positives": (lambda: losses.weighted_triplet(Z, Z[:, :1], Z), ValueError, "p must"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
  call, error, message = BAD[name]
  with pytest.raises(error, match=message):
    call()
