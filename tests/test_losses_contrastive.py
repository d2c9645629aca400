"""Contrastive losses: golden values, closed forms, extreme inputs, masks, bad input."""

import functools

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


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


GOLDEN = {
  "nt_xent .1": (losses.nt_xent, (0.1,), 0.010035329741),
  "nt_xent .5": (losses.nt_xent, (0.5,), 1.063480717498),
  "info_nce": (losses.info_nce, (0.2,), 0.086489912692),
  "info_nce_inbatch": (losses.info_nce_inbatch, (0.2,), 0.086489912692),
  "MoCo v3": (lambda a, b: 0.8 * losses.info_nce_inbatch(a, b, 0.2, True), (), 0.069888072182),
  "DCL": (losses.decoupled_nce, (0.1,), -5.306836069454),
  "DCLW": (losses.decoupled_nce, (0.1, 0.5), -5.303597083357),
  "debiased": (losses.debiased_nce, (0.5, 0.1), 0.439588313970),
  "debiased 0": (losses.debiased_nce, (0.5, 0.0), 1.063480717498),
  "HCL": (losses.debiased_nce, (0.5, 0.1, 1.0), 0.817875003643),
  "Gaussian": (losses.kernel_info_nce, (2, 1.0), 1.063480717498),
  "Laplacian": (losses.kernel_info_nce, (1, 0.5), 0.836611405446),
  "hardness 1": (losses.hardness_weighted_nce, (5.0, 1.0), 0.117523354883),
  "hardness 0": (losses.hardness_weighted_nce, (5.0, 0.0), 0.087360090227),
  "CLIP": (losses.hardness_weighted_nce, (1 / 0.07, 0.0), 0.000830629548),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
  loss, scalars, want = GOLDEN[name]
  with jax.enable_x64(True):
    got = loss(jnp.asarray(Z1), jnp.asarray(Z2), *scalars)
    assert got.shape == (8,) and got.dtype == jnp.float64
    # The Laplacian's reference is good to 5e-8 only, as numbers from √(2 - 2cos) are: 1e-8, not 0,
    # on the diagonal. Distances taken directly, as in the table's statement, give 0.8366114458.
    np.testing.assert_allclose(got.mean(), want, rtol=1e-7 if name == "Laplacian" else 1e-9)


def test_input_of_the_golden_values():
  np.testing.assert_allclose(Z1[0, :3], [0.588336, 0.999918, 0.608836], atol=1e-6)
  np.testing.assert_allclose([Z1.sum(), Z2.sum()], [1.475469, 3.362431], atol=1e-6)


# Everything with two arrays and a temperature.

QUEUE = gaussian(5, 3, seed=5)
FORMS = {
  "info_nce": losses.info_nce,
  "info_nce/targets": lambda a, b, t: losses.info_nce(a, b, t, positives=jnp.eye(len(a))),
  "info_nce/Laplacian": lambda a, b, t: losses.info_nce(a, b, t, queue=QUEUE, gamma=1.0),
  "nt_xent": losses.nt_xent,
  "info_nce_inbatch": lambda a, b, t: losses.info_nce_inbatch(a, b, t, symmetric=True),
  "info_nce_queue": lambda a, b, t: losses.info_nce_queue(a, b, QUEUE, t),
  "nnclr": lambda a, b, t: losses.nnclr(a, b, b, a, QUEUE, t),
  "decoupled_nce": losses.decoupled_nce,
  "decoupled_nce/weighted": lambda a, b, t: losses.decoupled_nce(a, b, t, 0.5),
  "debiased_nce": lambda a, b, t: losses.debiased_nce(a, b, t, 0.1),
  "debiased_nce/hard": lambda a, b, t: losses.debiased_nce(a, b, t, 0.1, 1.0),
  "kernel_info_nce/1": lambda a, b, t: losses.kernel_info_nce(a, b, 1.0, t),
  "kernel_info_nce/.5": lambda a, b, t: losses.kernel_info_nce(a, b, 0.5, t),
  # 1 / t itself has no finite gradient below 1e-19.
  "hardness_weighted_nce": lambda a, b, t: losses.hardness_weighted_nce(
    a, b, 1 / jnp.maximum(t, 1e-15)
  ),
}
forms = pytest.mark.parametrize("form", FORMS)


def with_gradient(form):
  return jax.value_and_grad(lambda *x: FORMS[form](*x).mean(), argnums=(0, 1, 2))


@forms
def test_extreme_inputs_give_finite_values_and_gradients(form):
  a, b = gaussian(4, 3), gaussian(4, 3, seed=1)
  same = np.ones((4, 3), np.float32)
  zero = np.where(I[:4] == 2, 0.0, a).astype(np.float32)
  views = {
    "as they come": (a, b),
    "view twice": (a, a),
    "duplicate rows": (same, same),
    "opposite": (same, -same),
    "a zero vector": (zero, b),
    "zeros": (0 * a, 0 * a),
    "large": (1e15 * a, 1e15 * b),
    "small": (1e-15 * a, 1e-15 * b),
  }
  temperatures = np.array([1e-38, 1e-20, 1e-6, 0.1, 1e6, 1e30, np.inf], np.float32)
  first, second = (np.stack([v[i] for v in views.values()]) for i in (0, 1))
  run = jax.vmap(with_gradient(form), (0, 0, None))
  run = jax.jit(jax.vmap(run, (None, None, 0)))
  for rows in (4, 1):  # one example: nothing to contrast it with
    value, gradient = run(first[:, :rows], second[:, :rows], temperatures)
    for name, x in {"value": value, "z1": gradient[0], "z2": gradient[1], "T": gradient[2]}.items():
      bad = np.argwhere(~np.isfinite(x))
      where = {(float(temperatures[t]), list(views)[v]) for t, v, *_ in bad}
      assert not where, (name, rows, where)


@forms
def test_only_directions_count(form):
  loss = jax.jit(FORMS[form])

  @few
  @given(st.integers(0, 10**6), st.floats(-3, 3))
  def check(seed, power):
    rng = np.random.default_rng(seed)
    a, b = gaussian(4, 3, seed=seed), gaussian(4, 3, seed=seed + 1)

    def scale():
      return (10.0 ** (power * rng.random((4, 1)))).astype(np.float32)

    np.testing.assert_allclose(
      loss(scale() * a, scale() * b, 0.3), loss(a, b, 0.3), rtol=1e-3, atol=1e-5
    )

  check()


WITHOUT_QUEUE = [f for f in FORMS if f not in ("info_nce_queue", "info_nce/Laplacian")]


@pytest.mark.parametrize("form", WITHOUT_QUEUE)
def test_one_example_has_nothing_to_learn_from(form):
  value, gradient = with_gradient(form)(gaussian(1, 3), gaussian(1, 3, seed=1), jnp.float32(0.2))
  np.testing.assert_array_equal(value, 0.0)
  for g in gradient:
    np.testing.assert_array_equal(g, 0.0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_python_temperatures_far_out(temperature):
  value, gradient = with_gradient("nt_xent")(gaussian(4, 3), gaussian(4, 3, seed=1), temperature)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient)


# Closed forms.


@pytest.mark.parametrize("b, t", [(1, 0.5), (4, 0.1), (5, 2.0)])
def test_values_known_in_closed_form(b, t):
  equal, axes = jnp.ones((b, 3)), jnp.eye(b)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(losses.nt_xent(equal, equal, t), np.log(2 * b - 1))
  close(losses.info_nce(equal, equal, t), np.log(b))
  close(losses.nt_xent(axes, axes, t), np.log1p((2 * b - 2) * np.exp(-1 / t)))
  close(losses.decoupled_nce(axes, axes, t), np.log(2 * b - 2) - 1 / t if b > 1 else 0.0)
  q, k = gaussian(b, 3), gaussian(b, 3, seed=1)
  s = (unit(q) * unit(k)).sum(1) / t
  close(losses.info_nce_queue(q, k, jnp.zeros((7, 3)), t), np.log1p(7 * np.exp(-s)))
  nce, penalty = losses.multi_scale_nce(jnp.zeros((b, 3)), jnp.ones((b, 4, 3)))
  close(nce, np.log1p(4 * (b - 1)))
  close(penalty, 0.0)


def test_small_losses_are_exact():
  """log(1 + x) of x far below float32's step at 1, and its gradient."""
  loss = losses.nt_xent(jnp.eye(4), jnp.eye(4), 0.03)
  np.testing.assert_allclose(loss, 6 * np.exp(-1 / 0.03), rtol=1e-4)


def test_the_positive_at_the_top_is_the_minimum():
  """Orthogonal rows that meet their partner: worse after any change of one view."""
  best = losses.nt_xent(jnp.eye(4), jnp.eye(4), 0.2).mean()
  for seed in range(5):
    moved = jnp.eye(4) + 0.1 * gaussian(4, 4, seed=seed)
    assert losses.nt_xent(moved, -jnp.eye(4) + jnp.eye(4)[::-1], 0.2).mean() > best
    assert losses.info_nce(jnp.eye(4), moved[::-1], 0.2).mean() > best


A, B = gaussian(6, 3), gaussian(6, 3, seed=1)
SAME = {
  "views swapped": (lambda: losses.nt_xent(A, B, 0.3), lambda: losses.nt_xent(B, A, 0.3)),
  "Gaussian kernel with 2T": (
    lambda: losses.kernel_info_nce(A, B, 2.0, 0.6),
    lambda: losses.nt_xent(A, B, 0.3),
  ),
  "core with a Gaussian kernel": (
    lambda: losses.info_nce(A, B, 0.6, gamma=2.0),
    lambda: losses.info_nce(A, B, 0.3),
  ),
  "no bias, no hardness": (
    lambda: losses.debiased_nce(A, B, 0.3, 0.0),
    lambda: losses.nt_xent(A, B, 0.3),
  ),
  "hardness 0 is both directions": (
    lambda: losses.hardness_weighted_nce(A, B, 1 / 0.3, 0.0),
    lambda: losses.info_nce_inbatch(A, B, 0.3, symmetric=True),
  ),
  "softplus of the decoupled loss": (
    lambda: losses.nt_xent(A, A, 0.3),
    lambda: jax.nn.softplus(losses.decoupled_nce(A, A, 0.3)),
  ),
  "one view of NT-Xent from the core": (
    lambda: (
      0.5
      * sum(
        losses.info_nce(x, np.concatenate([y, x]), 0.3, jnp.arange(6), weights=1 - np.eye(6, 12, 6))
        for x, y in ((A, B), (B, A))
      )
    ),
    lambda: losses.nt_xent(A, B, 0.3),
  ),
  "weight 0 of the positive decouples": (
    lambda: (
      0.5
      * sum(
        losses.info_nce(
          x,
          y,
          0.3,
          negatives=np.stack([np.delete(x, i, 0) for i in range(6)]),
          weights=1 - np.eye(6),
        )
        for x, y in ((A, B), (B, A))
      )
    ),
    lambda: losses.decoupled_nce(A, B, 0.3),
  ),
  "places and their matrix": (
    lambda: losses.info_nce(A, B[:4], 0.3, positives=jnp.array([3, 1, 0, 2, 0, 1])),
    lambda: losses.info_nce(A, B[:4], 0.3, positives=jnp.eye(4)[jnp.array([3, 1, 0, 2, 0, 1])]),
  ),
  "queue is more keys": (
    lambda: losses.info_nce(A, B[:4], 0.3, jnp.zeros(6, int), queue=B[4:]),
    lambda: losses.info_nce(A, B, 0.3, jnp.zeros(6, int)),
  ),
  "queue in any order": (
    lambda: losses.info_nce_queue(A, B, QUEUE, 0.3),
    lambda: losses.info_nce_queue(A, B, QUEUE[::-1], 0.3),
  ),
  "nothing mixed is MoCo v2": (
    lambda: losses.info_nce_queue(
      A, B, QUEUE, 0.3, losses.mix_hard_negatives(jax.random.key(0), A, QUEUE, 3, 0, 0)
    ),
    lambda: losses.info_nce_queue(A, B, QUEUE, 0.3),
  ),
  "the batch as queue of NNCLR": (
    lambda: losses.nnclr(A, A, B, B, A, 0.3),
    lambda: losses.info_nce(A, B, 0.3),
  ),
  "circle with one positive": (
    lambda: losses.circle_contrast(
      (unit(A) * unit(B)).sum(1, keepdims=True), unit(A) @ unit(QUEUE).T, 1 / 0.3
    ),
    lambda: losses.info_nce_queue(A, B, QUEUE, 0.3),
  ),
  "ids that all differ": (
    lambda: losses.multi_scale_nce(A, gaussian(6, 4, 3), jnp.arange(6)[::-1]),
    lambda: losses.multi_scale_nce(A, gaussian(6, 4, 3)),
  ),
}


@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_the_same(name):
  one, two = (f() for f in SAME[name])
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def test_debiasing_lowers_the_loss_of_close_pairs_and_stops_at_its_bound():
  z, t = jnp.eye(4), 0.5
  values = [float(losses.debiased_nce(z, z, t, p)[0]) for p in (0.0, 0.05, 0.9, 0.95)]
  assert values[0] > values[1] > values[2] == values[3]
  np.testing.assert_allclose(values[3], np.log1p(6 * np.exp(-2 / t)), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_of_optax(temperature):
  """Its labels occur twice each here; with more positives it is another loss."""
  both, labels = np.concatenate([A, B]), np.tile(np.arange(6), 2)
  want = optax.losses.ntxent(both, labels, temperature)
  np.testing.assert_allclose(losses.nt_xent(A, B, temperature).mean(), want, rtol=1e-5)


# Masks.

PADDED = {
  "nt_xent": lambda a, b, w: losses.nt_xent(a, b, 0.3, weights=w),
  "info_nce_inbatch": lambda a, b, w: losses.info_nce_inbatch(a, b, 0.3, True, weights=w),
  "decoupled_nce": lambda a, b, w: losses.decoupled_nce(a, b, 0.3, 0.5, weights=w),
  "debiased_nce": lambda a, b, w: losses.debiased_nce(a, b, 0.3, 0.1, 1.0, weights=w),
  "kernel_info_nce": lambda a, b, w: losses.kernel_info_nce(a, b, 1.0, 0.3, weights=w),
  "hardness_weighted_nce": lambda a, b, w: losses.hardness_weighted_nce(a, b, 3.0, weights=w),
}


KINDS = [("nt_xent", "int32"), ("nt_xent", "float32"), *((form, "bool") for form in PADDED)]


@pytest.mark.parametrize("form, kind", KINDS)
def test_padding_does_not_count(form, kind):
  loss, there = PADDED[form], np.array([1, 1, 0, 1, 0, 1]).astype(kind)
  some = there > 0
  a, b = np.where(some[:, None], A, np.nan), np.where(some[:, None], B, np.inf)
  got, gradient = jax.value_and_grad(lambda a: loss(a, b, there).sum())(a)
  want, plain = jax.value_and_grad(lambda a: loss(a, B[some], None).sum())(A[some])
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(gradient[some], plain, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(gradient[~some], 0.0)


def every(x, *shape):
  return jnp.full(shape, x)


EMPTY = {
  **{f: (lambda a, f=f: PADDED[f](a, B, every(False, 6))) for f in PADDED},
  "no positive": lambda a: losses.info_nce(a, B, 0.3, positives=every(-1, 6)),
  "beyond the keys": lambda a: losses.info_nce(a, B, 0.3, positives=every(6, 6)),
  "empty matrix": lambda a: losses.info_nce(a, B, 0.3, positives=every(False, 6, 6)),
  "empty targets": lambda a: losses.info_nce(a, B, 0.3, positives=every(0.0, 6, 6)),
  "no key": lambda a: losses.info_nce(a, B, 0.3, weights=every(False, 6, 6)),
  "no key, matrix": lambda a: losses.info_nce(
    a, B, 0.3, positives=jnp.eye(6), weights=every(0.0, 6, 6)
  ),
  "empty queue": lambda a: losses.info_nce_queue(a, B, QUEUE, 0.3, queue_weights=every(0, 5)),
  "no positives": lambda a: losses.circle_contrast(a, B, 3.0, positive_mask=every(False, 6, 3)),
  "no negatives": lambda a: losses.circle_contrast(a, B, 3.0, negative_mask=every(False, 6, 3)),
  "one image": lambda a: losses.multi_scale_nce(a, gaussian(6, 2, 3), every(0, 6))[0],
}


@pytest.mark.parametrize("name", EMPTY)
def test_masks_that_select_nothing_give_zero(name):
  value, gradient = jax.value_and_grad(lambda a: EMPTY[name](a).sum())(A)
  np.testing.assert_array_equal(value, 0.0)
  np.testing.assert_array_equal(gradient, 0.0)


def test_an_empty_row_is_zero_and_leaves_the_others():
  mask = jnp.eye(6, dtype=bool).at[2].set(False)
  got, want = losses.info_nce(A, B, 0.3, mask), losses.info_nce(A, B, 0.3)
  np.testing.assert_allclose(got, want.at[2].set(0.0), rtol=1e-5)


# Memory.


def test_mixed_negatives_are_unit_vectors_nearer_to_the_queue_than_to_the_query():
  q, queue = gaussian(5, 8), gaussian(20, 8, seed=1)
  hard = losses.mix_hard_negatives(jax.random.key(1), q, queue, 6, 4, 300)
  assert hard.shape == (5, 304, 8)
  np.testing.assert_allclose(np.linalg.norm(hard, axis=-1), 1.0, rtol=1e-5)
  harder = hard[:, 4:]
  to_query = (harder * unit(q)[:, None]).sum(-1)
  to_queue = (harder @ unit(queue).T).max(-1)
  assert (to_queue >= to_query - 1e-6).all()
  # The share of the query is up to one half, no more: v from 0 to .5 reaches both ends.
  assert (to_queue - to_query).min() < 0.05 and to_queue.max() > 0.999


def test_mixtures_of_one_row_are_that_row():
  hard = losses.mix_hard_negatives(jax.random.key(0), A, QUEUE, 1, 2, 0)
  nearest, _ = losses.nearest_neighbour_lookup(A, QUEUE)
  np.testing.assert_allclose(hard, np.stack([nearest, nearest], 1), atol=1e-6)


@few
@given(
  st.integers(1, 7),
  st.lists(st.integers(1, 7), max_size=4),
  st.sampled_from(["float32", "bfloat16"]),
)
def test_enqueue_is_first_in_first_out(m, sizes, dtype):
  queue, position, written = jnp.zeros((m, 1), dtype), jnp.asarray(0), []
  for size in sizes:
    size = min(size, m)
    keys = np.arange(len(written) + 1, len(written) + size + 1, dtype=np.float32)[:, None]
    queue, position = losses.enqueue(queue, keys, position)
    written += keys[:, 0].tolist()
  assert queue.dtype == dtype and int(position) == len(written) % m
  want = sorted((written + [0.0] * m)[:m] if len(written) < m else written[-m:])
  assert sorted(queue[:, 0].tolist()) == want


# Bad input.

Z = jnp.ones((4, 3))
BAD = {
  "rank": (lambda: losses.nt_xent(Z[0], Z, 0.1), ValueError, r"z1 .*\[b d\]"),
  "batch": (lambda: losses.nt_xent(Z, Z[:2], 0.1), ValueError, "z2"),
  "width": (lambda: losses.info_nce_inbatch(Z, Z[:, :2], 0.1), ValueError, "k must"),
  "integers": (lambda: losses.nt_xent(Z.astype(int), Z, 0.1), TypeError, "z1"),
  "no array": (lambda: losses.kernel_info_nce([1.0], Z, 1, 0.1), TypeError, "z1"),
  "temperature 0": (lambda: losses.nt_xent(Z, Z, 0), ValueError, "temperature"),
  "temperature < 0": (lambda: losses.info_nce(Z, Z, -1.0), ValueError, "temperature"),
  "temperature nan": (lambda: losses.nnclr(Z, Z, Z, Z, Z, np.nan), ValueError, "temperature"),
  "temperature [4]": (lambda: losses.info_nce_queue(Z, Z, Z, Z[:, 0]), ValueError, "temperature"),
  "temperature None": (lambda: losses.decoupled_nce(Z, Z, None), TypeError, "temperature"),
  "sigma": (lambda: losses.decoupled_nce(Z, Z, 0.1, 0.0), ValueError, "sigma"),
  "gamma": (lambda: losses.kernel_info_nce(Z, Z, 0.0, 0.1), ValueError, "gamma"),
  "gamma of the core": (lambda: losses.info_nce(Z, Z, 0.1, gamma=-1.0), ValueError, "gamma"),
  "gamma of circle": (lambda: losses.circle_contrast(Z, Z, 0.0), ValueError, "gamma"),
  "tau_plus": (lambda: losses.debiased_nce(Z, Z, 0.1, 1.0), ValueError, "tau_plus"),
  "beta": (lambda: losses.debiased_nce(Z, Z, 0.1, 0.1, -1.0), ValueError, "beta"),
  "positives of debiased": (
    lambda: losses.debiased_nce(Z, Z, 0.1, 0.1, positives=Z),
    ValueError,
    "positives",
  ),
  "scale": (lambda: losses.hardness_weighted_nce(Z, Z, 0.0), ValueError, "scale"),
  "clip": (lambda: losses.multi_scale_nce(Z, Z[:, None], clip=0.0), ValueError, "clip"),
  "c": (lambda: losses.soft_clip(Z, -1.0), ValueError, "c must"),
  "weights": (lambda: losses.nt_xent(Z, Z, 0.1, jnp.ones(3)), ValueError, "weights"),
  "key weights": (lambda: losses.info_nce(Z, Z, 0.1, weights=jnp.ones(4)), ValueError, "weights"),
  "unpaired": (lambda: losses.info_nce(Z, jnp.ones((5, 3)), 0.1), ValueError, "keys"),
  "float places": (
    lambda: losses.info_nce(Z, Z, 0.1, positives=jnp.ones(4)),
    TypeError,
    "positives",
  ),
  "matrix": (
    lambda: losses.info_nce(Z, Z, 0.1, positives=jnp.ones((4, 5))),
    ValueError,
    "positives",
  ),
  "queue": (lambda: losses.info_nce_queue(Z, Z, Z[:, :2], 0.1), ValueError, "queue"),
  "queue weights": (
    lambda: losses.info_nce_queue(Z, Z, Z, 0.1, queue_weights=jnp.ones(3)),
    ValueError,
    "queue_weights",
  ),
  "weights of no queue": (
    lambda: losses.info_nce(Z, Z, 0.1, queue_weights=jnp.ones(3)),
    ValueError,
    "queue_weights",
  ),
  "n_hard": (
    lambda: losses.mix_hard_negatives(jax.random.key(0), Z, Z, 5, 1, 1),
    ValueError,
    "n_hard",
  ),
  "s": (lambda: losses.mix_hard_negatives(jax.random.key(0), Z, Z, 2, -1, 1), ValueError, "s and"),
  "keys": (lambda: losses.enqueue(Z, jnp.ones((5, 3)), 0), ValueError, "keys"),
  "position": (lambda: losses.enqueue(Z, Z, 0.5), TypeError, "position"),
  "lookup": (lambda: losses.nearest_neighbour_lookup(Z, Z[0]), ValueError, "queue"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
  call, error, names = BAD[name]
  with pytest.raises(error, match=names):
    call()
