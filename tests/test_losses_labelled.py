"""Losses that know labels: golden values, limits, extreme inputs, padding, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssljax import losses

few = settings(max_examples=12, deadline=None, derandomize=True)
I, J = np.arange(8)[:, None], np.arange(6)[None]
Z1 = np.sin(1.7 * (I + 1) * (J + 1) * 0.37 + 0.3 * J)
Z2 = Z1 + 0.3 * np.cos(1.1 * I - 0.5 * J)
Y = np.arange(8) // 2


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


GOLDEN = {
  "supcon": (lambda a, b: losses.supcon(jnp.stack([a, b], 1), Y, 0.1), 8.100745327086),
  "supcon, stacked along the batch": (
    lambda a, b: losses.supcon(jnp.concatenate([a, b]), np.tile(Y, 2), 0.1),
    8.100745327086,
  ),
  "supcon as printed": (
    lambda a, b: losses.supcon(jnp.stack([a, b], 1), Y, 0.1, base_temperature=0.07),
    8.100745327086 / 0.7,
  ),
  "supcon without labels is NT-Xent": (
    lambda a, b: losses.supcon(jnp.stack([a, b], 1), None, 0.1),
    0.010035329741,
  ),
  "supcon_in": (lambda a, b: losses.supcon_in(jnp.stack([a, b], 1), Y, 0.1), 0.010019184187),
  "look": (lambda a, b: losses.look(a, Y, 0.1), 5.787722914001),
  "look, k of all": (lambda a, b: losses.look(a, Y, 0.1, k=7), 5.787722914001),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
  loss, want = GOLDEN[name]
  with jax.enable_x64(True):
    got = jax.jit(loss)(jnp.asarray(Z1), jnp.asarray(Z2))
    assert got.ndim == 1 and got.dtype == jnp.float64
    np.testing.assert_allclose(got.mean(), want, rtol=1e-9)


def test_golden_row_of_maskcon():
  """Keys of view 1, a queue of view 2; entries 0, 3 and 6 share the label."""
  with jax.enable_x64(True):
    labels = np.arange(8) % 3
    row = losses.maskcon_targets(jnp.asarray(Z1), jnp.asarray(Z2), labels, labels, 0.05)[0]
  want = [0.499977, 0.499977, 0, 0, 0, 0, 0, 4.5e-5, 0]
  np.testing.assert_allclose(row, want, atol=5e-7)


# Every loss as a function of rows [b d] and a temperature.

QUEUE, QUEUE_LABELS = gaussian(5, 3, seed=5), np.array([0, 0, 1, 2, 7])


def labels(z):
  return np.arange(len(z)) % 2


FORMS = {
  "supcon": lambda z, t: losses.supcon(z, labels(z), t),
  "supcon/views": lambda z, t: losses.supcon(jnp.stack([z, z[::-1]], 1), labels(z), t),
  "supcon/each": lambda z, t: losses.supcon(
    z, labels(z), 1.0, per_anchor_temperature=jnp.full(len(z), t)
  ),
  "supcon_in": lambda z, t: losses.supcon_in(z, labels(z), t),
  "soft_info_nce_queue": lambda z, t: losses.soft_info_nce_queue(
    z, z[::-1], QUEUE, QUEUE_LABELS, labels(z), t, t
  ),
  "sbcl": lambda z, t: losses.sbcl(
    jnp.stack([z, z[::-1]], 1), labels(z), np.arange(len(z)) % 4, t, base_temperature=None
  ),
  "look": lambda z, t: losses.look(z, labels(z), t, k=2 if len(z) > 2 else None),
  "look/queue": lambda z, t: losses.look(z, labels(z), t, 2, QUEUE, QUEUE_LABELS),
  "multi_label_bce": lambda z, t: losses.multi_label_bce(
    z, QUEUE, np.arange(len(z) * 5).reshape(-1, 5) % 3 == 0, t
  ),
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
def test_extreme_inputs_give_finite_values_and_gradients(form):
  z, same = gaussian(4, 3), np.ones((4, 3), np.float32)
  rows = {
    "as they come": z,
    "duplicate rows": same,
    "opposite": same * np.array([[1], [-1], [1], [-1]], np.float32),
    "a zero vector": np.where(np.arange(4)[:, None] == 2, 0.0, z).astype(np.float32),
    "zeros": 0 * z,
    "large": 1e15 * z,
    "small": 1e-15 * z,
  }
  temperatures = np.array([1e-38, 1e-20, 1e-6, 0.1, 1e6, 1e30, np.inf], np.float32)
  run = jax.value_and_grad(lambda z, t: FORMS[form](z, t).mean(), argnums=(0, 1))
  run = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))
  for b in (4, 1):
    value, gradient = run(np.stack([x[:b] for x in rows.values()]), temperatures)
    for name, x in {"value": value, "z": gradient[0], "temperature": gradient[1]}.items():
      bad = {(float(temperatures[t]), list(rows)[r]) for t, r, *_ in np.argwhere(~np.isfinite(x))}
      assert not bad, (name, b, bad)


@forms
def test_only_directions_count(form):
  loss = jax.jit(FORMS[form])

  @few
  @given(st.integers(0, 10**6), st.floats(-3, 3))
  def check(seed, power):
    z = gaussian(6, 3, seed=seed)
    scale = 10.0 ** (power * np.random.default_rng(seed).random((6, 1)))
    got = loss((scale * z).astype(np.float32), 0.3)
    np.testing.assert_allclose(got, loss(z, 0.3), rtol=1e-3, atol=1e-5)

  check()


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
@forms
def test_python_temperatures_far_out(form, temperature):
  run = jax.jit(jax.value_and_grad(lambda z: FORMS[form](z, temperature).sum()))
  value, gradient = run(gaussian(4, 3))
  assert np.isfinite(value) and np.isfinite(gradient).all()


# Two ways to the same, and values known in closed form.

A, V = gaussian(6, 3), gaussian(6, 2, 3, seed=1)
YA = np.array([0, 0, 1, 1, 2, 2])
SAME = {
  "no labels are NT-Xent": (
    lambda: losses.supcon(V, None, 0.3),
    lambda: losses.nt_xent(V[:, 0], V[:, 1], 0.3),
  ),
  "labels as a mask": (
    lambda: losses.supcon(V, None, 0.3, positives=YA[:, None] == YA),
    lambda: losses.supcon(V, YA, 0.3),
  ),
  "one positive an anchor: both forms": (
    lambda: losses.supcon(A, YA, 0.3),
    lambda: losses.supcon_in(A, YA, 0.3),
  ),
  "one temperature for each": (
    lambda: losses.supcon(V, YA, 0.1, 0.07, per_anchor_temperature=jnp.full(6, 0.3)),
    lambda: losses.supcon(V, YA, 0.3, 0.07),
  ),
  "maskcon of weight 0 is MoCo": (
    lambda: losses.soft_info_nce_queue(A, V[:, 0], QUEUE, QUEUE_LABELS, YA, 0.3, 0.05, 0.0),
    lambda: losses.info_nce_queue(A, V[:, 0], QUEUE, 0.3),
  ),
  "maskcon at a high temperature is SupCon's target": (
    lambda: losses.maskcon_targets(A, QUEUE, np.zeros(5, int), np.zeros(6, int), 1e9),
    lambda: np.full((6, 6), 1 / 6),
  ),
  "one subclass a class is SupCon": (
    lambda: losses.sbcl(V, YA, YA + 3, 0.3),
    lambda: losses.supcon(V, YA, 0.3, 0.07),
  ),
  "one subclass an example and gamma 0 is SimCLR": (
    lambda: losses.sbcl(V, YA, np.arange(6), 0.3, gamma=0.0, base_temperature=None),
    lambda: losses.nt_xent(V[:, 0], V[:, 1], 0.3),
  ),
  "all neighbours are SupCon, form in": (
    lambda: losses.look(A, YA, 0.3),
    lambda: losses.supcon_in(A, YA, 0.3),
  ),
  "neighbours in a queue in any order": (
    lambda: losses.look(A, YA, 0.3, 3, QUEUE, QUEUE_LABELS),
    lambda: losses.look(A, YA, 0.3, 3, QUEUE[::-1], QUEUE_LABELS[::-1]),
  ),
  "neighbours of one label": (lambda: losses.look(A, 0 * YA, 0.3, 3), lambda: np.zeros(6)),
  "far temperature of BCE": (
    lambda: losses.multi_label_bce(A, QUEUE, np.eye(6, 5, dtype=bool), 1e9),
    lambda: np.full(6, np.log(2)),
  ),
  "0/1 in any kind": (
    lambda: losses.multi_label_bce(A, QUEUE, np.eye(6, 5, dtype=int), 0.3),
    lambda: losses.multi_label_bce(A, QUEUE, np.eye(6, 5), 0.3),
  ),
}


@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_the_same(name):
  one, two = (jax.jit(f)() for f in SAME[name])
  np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("b, v, t", [(4, 2, 0.1), (5, 1, 2.0), (1, 3, 0.5)])
def test_one_class_of_equal_rows(b, v, t):
  z, want = jnp.ones((b, v, 3)), np.log(b * v - 1)
  np.testing.assert_allclose(losses.supcon(z, np.zeros(b, int), t), want, rtol=1e-5)
  np.testing.assert_allclose(losses.supcon_in(z, np.zeros(b, int), t), 0.0, atol=1e-6)


def test_supcon_is_least_where_classes_meet():
  """Each class one point, the points of a simplex; any change is worse."""
  best = jnp.repeat(jnp.eye(3) - 1 / 3, 2, axis=0)
  least = losses.supcon(best, YA, 0.2).mean()
  for seed in range(5):
    assert losses.supcon(best + 0.1 * gaussian(6, 3, seed=seed), YA, 0.2).mean() > least


maskcon = jax.jit(
  lambda k, queue, names, own, w: losses.maskcon_targets(k, queue, names, own, 0.1, w)
)


@few
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_maskcon_targets_are_shares(seed, weight):
  rng = np.random.default_rng(seed)
  k, queue = gaussian(3, 4, seed=seed), gaussian(6, 4, seed=seed + 1)
  names, own, order = rng.integers(0, 3, 6), rng.integers(0, 4, 3), rng.permutation(6)
  targets = maskcon(k, queue, names, own, weight)
  np.testing.assert_allclose(targets.sum(1), 1.0, rtol=1e-5)
  assert (targets[:, 0] >= targets[:, 1:].max(1) - 1e-6).all()
  np.testing.assert_array_equal(targets[:, 1:][own[:, None] != names], 0.0)
  moved = maskcon(k, queue[order], names[order], own, weight)
  np.testing.assert_allclose(moved[:, 1:], targets[:, 1:][:, order], rtol=1e-4, atol=1e-6)


# Padding, and masks that select nothing.

PADDED = {
  "supcon": lambda z, y, w: losses.supcon(z, y, 0.3, weights=w),
  "supcon_in": lambda z, y, w: losses.supcon_in(z, y, 0.3, weights=w),
  "sbcl": lambda z, y, w: losses.sbcl(z, y, y * 2 + np.arange(len(y)) % 2, 0.3, weights=w),
  "look": lambda z, y, w: losses.look(z, y, 0.3, 2, weights=w),
}


@pytest.mark.parametrize("form", PADDED)
@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
def test_padding_does_not_count(form, kind):
  loss, there = PADDED[form], np.array([1, 1, 1, 1, 0, 0]).astype(kind)
  some, y = there > 0, np.array([0, 0, 0, 1, 0, 1])
  z = np.where(some[:, None], A, np.nan)

  def run(y, weights):
    return jax.jit(jax.value_and_grad(lambda z: loss(z, y, weights).sum()))

  (got, gradient), (want, plain) = run(y, there)(z), run(y[some], None)(A[some])
  assert want > 0.1
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(gradient[some], plain, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(gradient[~some], 0.0)


nobody = np.zeros(6, bool)
EMPTY = {
  **{f: (lambda a, f=f: PADDED[f](a, YA, nobody)) for f in PADDED},
  "all labels differ": lambda a: losses.supcon(a, np.arange(6), 0.3),
  "all labels differ, in": lambda a: losses.supcon_in(a, np.arange(6), 0.3),
  "no positives": lambda a: losses.supcon(a, None, 0.3, positives=np.zeros((6, 6), bool)),
  "no candidates": lambda a: losses.supcon(a, YA, 0.3, candidates=np.zeros((6, 6), bool)),
  "no neighbour of the label": lambda a: losses.look(a, np.arange(6), 0.3, 2),
  "no label in the queue": lambda a: losses.look(a, YA + 9, 0.3, 2, QUEUE, QUEUE_LABELS),
  "one example": lambda a: sum(f(a[:1], 0.3) for f in (FORMS["supcon"], FORMS["look"])),
}


@pytest.mark.parametrize("name", EMPTY)
def test_masks_that_select_nothing_give_zero(name):
  value, gradient = jax.jit(jax.value_and_grad(lambda a: EMPTY[name](a).sum()))(A)
  np.testing.assert_array_equal(value, 0.0)
  np.testing.assert_array_equal(gradient, 0.0)


def test_an_anchor_without_positives_is_zero_and_still_a_negative():
  y = np.array([0, 0, 1, 1, 2, 3])
  value = losses.supcon(A, y, 0.3)
  np.testing.assert_array_equal(value[4:], 0.0)
  gradient = jax.grad(lambda a: losses.supcon(a, y, 0.3).sum())(A)
  assert (value[:4] > 0).all() and (jnp.abs(gradient[4:]).max(1) > 1e-3).all()


# Bad input.

Z, N = jnp.ones((4, 3)), jnp.zeros(4, int)
M = jnp.ones((4, 4), bool)
BAD = {
  "rank": (lambda: losses.supcon(Z[0], N, 0.1), ValueError, r"z .*\[b v d\]"),
  "no array": (lambda: losses.supcon_in([1.0], N, 0.1), TypeError, "z"),
  "labels": (lambda: losses.supcon(Z, N[:3], 0.1), ValueError, "labels"),
  "float labels": (lambda: losses.supcon(Z, Z[:, 0], 0.1), TypeError, "labels"),
  "temperature": (lambda: losses.supcon(Z, N, 0.0), ValueError, "temperature"),
  "temperatures": (lambda: losses.supcon_in(Z, N, Z[:, 0]), ValueError, "temperature"),
  "temperature None": (lambda: losses.look(Z, N, None), TypeError, "temperature"),
  "base": (lambda: losses.supcon(Z, N, 0.1, -1.0), ValueError, "base_temperature"),
  "labels and positives": (lambda: losses.supcon(Z, N, 0.1, positives=M), ValueError, "positives"),
  "kind of positives": (
    lambda: losses.supcon(Z, None, 0.1, positives=Z @ Z.T),
    TypeError,
    "positives",
  ),
  "each": (
    lambda: losses.supcon(Z, N, 0.1, per_anchor_temperature=jnp.ones(3)),
    ValueError,
    "per_anchor_temperature",
  ),
  "candidates": (
    lambda: losses.supcon(Z, N, 0.1, candidates=M[:3]),
    ValueError,
    "candidates",
  ),
  "weights": (lambda: losses.supcon_in(Z, N, 0.1, weights=jnp.ones(5)), ValueError, "weights"),
  "queue": (
    lambda: losses.soft_info_nce_queue(Z, Z, Z[:, :2], N, N, 0.1, 0.1),
    ValueError,
    "queue",
  ),
  "queue labels": (
    lambda: losses.maskcon_targets(Z, Z, N[:2], N, 0.1),
    ValueError,
    "queue_labels",
  ),
  "weight": (lambda: losses.maskcon_targets(Z, Z, N, N, 0.1, 1.5), ValueError, "weight"),
  "target temperature": (
    lambda: losses.soft_info_nce_queue(Z, Z, Z, N, N, 0.1, 0),
    ValueError,
    "target_temperature",
  ),
  "subclasses": (lambda: losses.sbcl(Z, N, N[:2], 0.1), ValueError, "subclasses"),
  "k": (lambda: losses.look(Z, N, 0.1, 4), ValueError, "k must be from 1 to 3"),
  "k 0": (lambda: losses.look(Z, N, 0.1, 0, Z, N), ValueError, "k must be from 1 to 4"),
  "queue without labels": (lambda: losses.look(Z, N, 0.1, queue=Z), ValueError, "queue_labels"),
  "targets": (lambda: losses.multi_label_bce(Z, Z, M[:, :3], 0.1), ValueError, "targets"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
  call, error, message = BAD[name]
  with pytest.raises(error, match=message):
    call()
