"""Pretext classifications and labelled terms: known values and minima, edges, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssljax import losses

collapse = jax.jit(losses.nc_regulariser, static_argnums=2)
cip = jax.jit(losses.cip, static_argnames="unit")
spectral = jax.jit(losses.spectral_norm_term)
few = settings(max_examples=10, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
ZEROS = jnp.zeros(3, int)
CLASSIFICATIONS = {
  "rotation": (4, lambda x, y: losses.rotation_ce(x, y)),
  "local rotation": (16, lambda x, y: losses.local_rotation_ce(x, y, 0 * y)),
  "joint label": (12, lambda x, y: losses.joint_label_ce(x, y, 0 * y, 4)),
  "jigsaw": (100, lambda x, y: losses.jigsaw_ce(x, y)),
  "relative patch": (8, lambda x, y: losses.relative_patch_ce(x, y)),
}


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_classifications_at_known_logits(name):
  k, loss = CLASSIFICATIONS[name]
  np.testing.assert_allclose(loss(jnp.zeros((3, k)), ZEROS), np.full(3, np.log(k)), rtol=1e-6)
  both = jax.jit(jax.value_and_grad(lambda x: loss(x, ZEROS).sum()))
  value, gradient = both(jnp.zeros((3, k)).at[:, 0].set(1e4))
  assert value == 0 and not gradient.any()
  value, gradient = both(jnp.zeros((3, k)).at[:, 1].set(1e30))
  assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_classifications_of_padding_are_zero(name):
  k, loss = CLASSIFICATIONS[name]
  logits = jnp.full((3, k), jnp.nan)
  value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, ZEROS - 1).sum()))(logits)
  assert value == 0 and not gradient.any()


def test_joint_label_of_one_transformation_is_plain():
  logits = jnp.float32(np.random.default_rng(0).normal(size=(4, 5)))
  y = jnp.array([0, 4, 2, 1])
  np.testing.assert_array_equal(
    losses.joint_label_ce(logits, y, 0 * y, 1), losses.jigsaw_ce(logits, y)
  )


# Labelled features.


@pytest.mark.parametrize("k", [2, 3, 6])
def test_the_simplex_is_the_minimum_of_neural_collapse(k):
  h, y = jnp.eye(k)[np.arange(2 * k) % k], jnp.arange(2 * k) % k
  loss, (within, angle) = collapse(7 * h + 3, y, k, 2.0, 0.5)
  np.testing.assert_allclose(within, 0.0, atol=1e-9)
  # Two classes: arccos(-1), where cosines end 1e-6 before it.
  np.testing.assert_allclose(angle, -np.arccos(-1 / (k - 1)), rtol=1e-3 if k == 2 else 1e-5)
  np.testing.assert_allclose(loss, 0.5 * angle, rtol=1e-5)


@given(seed=seeds)
@few
def test_neural_collapse_scales_and_absent_classes_do_not_count(seed):
  rng = np.random.default_rng(seed)
  h, y = jnp.float32(rng.normal(size=(8, 5))), jnp.arange(8) % 4
  _, (within, angle) = collapse(h, y, 4)
  _, (within3, angle3) = collapse(3 * h, y, 4)
  np.testing.assert_allclose(within3, 9 * within, rtol=1e-4)
  np.testing.assert_allclose(angle3, angle, rtol=1e-4)
  _, more = collapse(h, y, 9)
  np.testing.assert_allclose(more, (within, angle), rtol=1e-5)
  padded = jnp.concatenate([h, jnp.full((1, 5), jnp.nan)])
  _, rest = collapse(padded, jnp.append(y, -1), 4)
  np.testing.assert_allclose(rest, (within, angle), rtol=1e-5)


@given(seed=seeds)
@few
def test_cip_of_unit_rows_is_scale_free_and_padding_counts_nothing(seed):
  rng = np.random.default_rng(seed)
  h, y = jnp.float32(rng.normal(size=(6, 4))), jnp.array([0, 0, 1, 1, 2, 0])
  one = cip(h, y)
  np.testing.assert_allclose(cip(5 * h, y), one, rtol=1e-4)
  for unit in (True, False):
    padded = jnp.concatenate([h, jnp.full((2, 4), jnp.inf)])
    got = cip(padded, jnp.append(y, jnp.array([-1, -1])), unit=unit)
    np.testing.assert_allclose(got[:6], cip(h, y, unit=unit), rtol=1e-5)
    assert not got[6:].any()


def test_cip_of_orthogonal_classes_is_zero():
  np.testing.assert_array_equal(cip(jnp.eye(3)[ZEROS], ZEROS), np.zeros(3))
  np.testing.assert_array_equal(cip(4 * jnp.eye(3), jnp.arange(3), unit=False), np.zeros(3))


def test_proto_triplet_at_its_margin():
  q, prototypes = jnp.float32([[0.0, 0.0]]), jnp.float32([[1.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
  loss = functools.partial(losses.proto_triplet, q, prototypes)
  assert loss(jnp.array([0]), margin=1.9) == 0
  np.testing.assert_allclose(loss(jnp.array([0]), margin=2.5), [0.5], rtol=1e-6)
  np.testing.assert_allclose(loss(jnp.array([1]), margin=0.5), [2.5], rtol=1e-6)
  assert losses.proto_triplet(q, prototypes[:1], jnp.array([0]), margin=9.0) == 0
  assert loss(jnp.array([-1]), margin=9.0) == 0


# The largest singular value.


@given(seed=seeds, scale=st.sampled_from([1e-18, 1.0, 1e18]))
@few
def test_spectral_norm_of_any_size_and_order(seed, scale):
  rng = np.random.default_rng(seed)
  s = rng.normal(size=(6, 6))
  got = spectral(jnp.float32(scale * s))
  np.testing.assert_allclose(got, scale * np.linalg.norm(s, 2), rtol=1e-4)
  order = rng.permutation(6)
  moved = spectral(jnp.float32(scale * s[order][:, order]))
  np.testing.assert_allclose(moved, got, rtol=1e-4)


def test_spectral_norm_of_the_identity_of_ones_and_of_nothing():
  loss = jax.jit(jax.value_and_grad(losses.spectral_norm_term))
  value, gradient = loss(jnp.eye(5))  # all singular values equal
  np.testing.assert_allclose(value, 1.0, rtol=1e-6)
  np.testing.assert_allclose(jnp.trace(gradient), 1.0, rtol=1e-5)
  value, gradient = loss(jnp.ones((5, 5)))
  np.testing.assert_allclose(value, 5.0, rtol=1e-6)
  np.testing.assert_allclose(gradient, np.full((5, 5), 0.2), rtol=1e-5)
  value, gradient = loss(jnp.zeros((5, 5)))
  assert value == 0 and not gradient.any()


# Edges.

FINITE = {
  "nc": lambda x: losses.nc_regulariser(x, jnp.arange(len(x)) % 2, 3)[0],
  "nc, one class": lambda x: losses.nc_regulariser(x, jnp.zeros(len(x), int), 3)[0],
  "cip": lambda x: losses.cip(x, jnp.arange(len(x)) % 2),
  "cip, inner": lambda x: losses.cip(x, jnp.arange(len(x)) % 2, unit=False),
  "proto_triplet": lambda x: losses.proto_triplet(x, x, jnp.arange(len(x))),
  "spectral": lambda x: losses.spectral_norm_term(x),
}
INPUTS = {
  "zeros": jnp.zeros((4, 3)),
  "equal rows": jnp.full((4, 3), 0.5),
  "one example": jnp.float32([[1.0, 2.0, 3.0]]),
  "huge": 1e15 * jnp.eye(4, 3),
}


@functools.cache
def compiled(name):
  return jax.jit(jax.value_and_grad(lambda x: FINITE[name](x).sum()))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", FINITE)
def test_finite_value_and_gradient(name, inputs):
  value, gradient = compiled(name)(INPUTS[inputs])
  assert np.isfinite(value) and np.isfinite(gradient).all(), (value, gradient)


def test_a_batch_of_padding_gives_zero():
  for loss in (
    lambda x: losses.nc_regulariser(x, ZEROS - 1, 3)[0],
    lambda x: losses.cip(x, ZEROS - 1).sum(),
    lambda x: losses.proto_triplet(x, jnp.eye(3), ZEROS - 1).sum(),
  ):
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.ones((3, 3)))
    assert value == 0 and not gradient.any()


X = jnp.ones((3, 4))
BAD = {
  "rotation of 5": (ValueError, "logits", lambda: losses.rotation_ce(jnp.ones((3, 5)), ZEROS)),
  "float labels": (TypeError, "k", lambda: losses.rotation_ce(X, X[:, 0])),
  "sixteen": (ValueError, "logits", lambda: losses.local_rotation_ce(X, ZEROS, ZEROS)),
  "not k times m": (ValueError, "logits", lambda: losses.joint_label_ce(X, ZEROS, ZEROS, 3)),
  "m": (ValueError, "m must", lambda: losses.joint_label_ce(X, ZEROS, ZEROS, 0)),
  "rows": (ValueError, "perm_id", lambda: losses.jigsaw_ce(X, ZEROS[:2])),
  "eight": (ValueError, "logits", lambda: losses.relative_patch_ce(X, ZEROS)),
  "n_classes": (ValueError, "n_classes", lambda: losses.nc_regulariser(X, ZEROS, 0)),
  "labels": (TypeError, "y", lambda: losses.cip(X, X[:, 0])),
  "widths": (ValueError, "prototypes", lambda: losses.proto_triplet(X, X[:, :2], ZEROS)),
  "rank": (ValueError, "s ", lambda: losses.spectral_norm_term(X[0])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
  error, word, call = BAD[name]
  with pytest.raises(error, match=word):
    call()
