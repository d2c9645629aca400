"""Losses without negatives: golden values, known minima, invariances, degenerate batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import redundancy as statements

from ssljax import losses

I, J = np.arange(8)[:, None], np.arange(6)[None]
Z1 = np.sin(1.7 * (I + 1) * (J + 1) * 0.37 + 0.3 * J)
Z2 = Z1 + 0.3 * np.cos(1.1 * I - 0.5 * J)

GOLDEN = {
  "negative_cosine": (lambda a, b: losses.negative_cosine(a, b).mean(), -0.965841858676),
  "normalized_l2": (lambda a, b: losses.normalized_l2(a, b).mean(), 0.068316282648),
  "barlow_twins": (losses.barlow_twins, 0.021044934691),
  "vicreg": (lambda a, b: losses.vicreg(a, b)[0], 6.307151313450),
  "vicreg/solo": (lambda a, b: losses.vicreg(a, b, variance_scale=1.0)[0], 11.162178866474),
  "vicreg/vicregl": (lambda a, b: losses.vicreg(a, b, covariance_scale=0.5)[0], 6.144650125332),
  "vibcreg": (lambda a, b: losses.vibcreg(a, b)[0], 38.819284052802),
  "tico": (lambda a, b: losses.tico(a, b, jnp.zeros((6, 6)))[0].mean(), 0.227518905279),
  "alignment": (lambda a, b: losses.alignment(a, b).mean(), 0.068316282648),
  "uniformity": (lambda a, b: losses.uniformity(a), -3.857073184781),
}

# Scalars of two views, for the batches below.
TWO = {
  "negative_cosine": lambda a, b: losses.negative_cosine(a, b).mean(),
  "normalized_l2": lambda a, b: losses.normalized_l2(a, b).mean(),
  "barlow_twins": losses.barlow_twins,
  "barlow_twins/unbiased": lambda a, b: losses.barlow_twins(a, b, unbiased=True),
  "batch_barlow": losses.batch_barlow,
  "variance_term": lambda a, b: losses.variance_term(a),
  "covariance_term": lambda a, b: losses.covariance_term(a),
  "vicreg": lambda a, b: losses.vicreg(a, b)[0],
  "vibcreg": lambda a, b: losses.vibcreg(a, b)[0],
  "vicregl": lambda a, b: vicregl(a, b)[0],
  "tico": lambda a, b: losses.tico(a, b, jnp.zeros((4, 4)))[0].mean(),
  "alignment": lambda a, b: losses.alignment(a, b, 0.5).mean(),
  "uniformity": lambda a, b: losses.uniformity(a),
  "uniformity/huge t": lambda a, b: losses.uniformity(a, 1e6),
  "uniformity/tiny t": lambda a, b: losses.uniformity(a, 1e-6),
}
# Those over the statistics of a batch, which refuse one example.
STATISTICS = [k for k in TWO if k.split("/")[0] in (
  "barlow_twins", "variance_term", "covariance_term", "vicreg", "vibcreg", "vicregl", "uniformity"
)]  # fmt: skip
WEIGHTED = {
  "barlow_twins": lambda a, b, weights: losses.barlow_twins(a, b, weights=weights),
  "variance_term": lambda a, b, weights: losses.variance_term(a, weights=weights),
  "covariance_term": lambda a, b, weights: losses.covariance_term(a, weights),
  "vicreg": lambda a, b, weights: losses.vicreg(a, b, weights=weights)[0],
  "vibcreg": lambda a, b, weights: losses.vibcreg(a, b, weights=weights)[0],
  "uniformity": lambda a, b, weights: losses.uniformity(a, weights=weights),
}


def vicregl(a, b, **options):
  """One map of four cells an example, made of the vectors."""
  m1, m2 = (jnp.stack([z, -z, 2 * z, jnp.sin(z)], 1) for z in (a, b))
  return losses.vicregl(a, b, m1, m2, m1[..., :2], m2[..., :2], **options)


def batches():
  z = np.random.default_rng(0).normal(0, 1, (6, 4))
  constant = z.copy()
  constant[:, 1] = 3.0
  return {
    "zeros": (0 * z, 0 * z),
    "equal rows": (0 * z + z[0], 0 * z + z[0]),
    "duplicates": (z[[0, 0, 1, 1, 2, 2]], z[[0, 0, 1, 1, 2, 2]]),
    "equal views": (z, z),
    "opposite views": (z, -z),
    "one zero row": (z * (I[:6] != 2), z),
    "constant feature": (constant, constant),
    "one direction": (z[:, :1] * z[:1], z[:, :1] * z[:1]),
    "tiny": (1e-12 * z, 1e-12 * z),
    "large": (1e6 * z, -1e6 * z),
    "two rows": (z[:2], z[2:4]),
  }


BATCHES = batches()


def value_and_gradient(loss, a, b):
  value, gradients = jax.value_and_grad(loss, (0, 1))(jnp.float32(a), jnp.float32(b))
  assert np.isfinite(value) and value.shape == ()
  for gradient in gradients:
    assert np.isfinite(gradient).all()
  return value, gradients


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
  loss, want = GOLDEN[name]
  with jax.enable_x64(True):
    np.testing.assert_allclose(loss(jnp.asarray(Z1), jnp.asarray(Z2)), want, rtol=1e-9)


def test_golden_value_of_the_unbiased_form():
  # stable-pretraining computed it in float32.
  with jax.enable_x64(True):
    got = losses.barlow_twins(jnp.asarray(Z1), jnp.asarray(Z2), unbiased=True)
  np.testing.assert_allclose(got, 0.154751728759, rtol=2e-7)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", TWO)
def test_degenerate_batches_are_finite(name, batch):
  value_and_gradient(TWO[name], *BATCHES[batch])


@pytest.mark.parametrize("name", TWO)
def test_one_example(name):
  z = jnp.ones((1, 4))
  if name in STATISTICS:
    with pytest.raises(ValueError, match="at least 2 rows"):
      TWO[name](z, z)
  else:
    value_and_gradient(TWO[name], z, 2 * z)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("kind", [bool, np.float32, np.int32])
def test_rows_of_weight_0_may_hold_anything(name, kind):
  a, b = (z.copy() for z in BATCHES["equal views"])
  b += 0.3 * b[::-1]
  weights = np.array([1, 0, 1, 1, 0, 1])
  want, _ = value_and_gradient(TWO[name], a[weights > 0], b[weights > 0])
  a[1], b[4] = np.nan, np.inf
  loss = functools.partial(WEIGHTED[name], weights=jnp.asarray(weights.astype(kind)))
  value, gradients = value_and_gradient(loss, a, b)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient[weights == 0], 0.0)


@pytest.mark.parametrize("name", WEIGHTED)
def test_no_row_counts(name):
  loss = functools.partial(WEIGHTED[name], weights=jnp.zeros(6, bool))
  value, gradients = value_and_gradient(loss, *BATCHES["equal views"])
  assert value == 0
  np.testing.assert_array_equal(gradients, np.zeros((2, 6, 4)))


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "vibcreg"])
def test_a_weight_of_2_is_a_row_twice(name):
  a, b = BATCHES["equal views"][0], BATCHES["equal views"][0][::-1]
  rows = np.array([0, 0, 1, 2, 3, 4, 4, 5])
  got = WEIGHTED[name](jnp.float32(a), jnp.float32(b), jnp.float32([2, 1, 1, 1, 2, 1]))
  np.testing.assert_allclose(got, TWO[name](jnp.float32(a[rows]), jnp.float32(b[rows])), rtol=1e-5)


seeds = st.integers(0, 2**31)
few = settings(max_examples=10, deadline=None, derandomize=True)


@few
@given(seeds, st.floats(1e-3, 1e3))
def test_scale_free(seed, scale):
  rng = np.random.default_rng(seed)
  a, b = jnp.float32(rng.normal(0, 1, (6, 4))), jnp.float32(rng.normal(0, 1, (6, 4)))
  scales = jnp.float32(rng.uniform(0.5, 2, (6, 1)) * scale)
  for name in (
    "negative_cosine",
    "normalized_l2",
    "batch_barlow",
    "tico",
    "alignment",
    "uniformity",
  ):
    np.testing.assert_allclose(TWO[name](scales * a, b), TWO[name](a, b), rtol=2e-5, atol=1e-5)
  # Features, not rows; eps of the variance counts for small ones, so scales stay near 1 or above.
  scales, shift = jnp.float32(rng.uniform(10, 20, (1, 4))), jnp.float32(rng.normal(0, 1, (1, 4)))
  plain = losses.barlow_twins(10 * a, 10 * b)
  np.testing.assert_allclose(losses.barlow_twins(scales * a + shift, scales * b), plain, rtol=1e-4)
  got, want = (losses.vibcreg(z, z)[1]["covariance"] for z in (scales * a, a))
  np.testing.assert_allclose(got, want, rtol=1e-4)
  np.testing.assert_allclose(TWO["vicreg"](a + shift, b + shift), TWO["vicreg"](a, b), rtol=1e-4)


def test_minima():
  hadamard = jnp.float32([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
  assert losses.barlow_twins(hadamard, hadamard) < 1e-6
  assert losses.batch_barlow(jnp.eye(4), 3 * jnp.eye(4)) == 0
  # Deviations of 1 and more and no covariance: all of VICReg is 0.
  assert losses.vicreg(hadamard, hadamard)[0] == 0
  constant = jnp.ones((5, 3))
  np.testing.assert_allclose(losses.vicreg(constant, constant)[0], 24.75, rtol=1e-6)
  # Two opposite points spread best; t times their squared distance 4.
  np.testing.assert_allclose(losses.uniformity(jnp.float32([[1, 0], [-1, 0]]), 1.5), -6, rtol=1e-6)
  # d equal columns: (d - 1) / d, from each view.
  equal = jnp.arange(5.0)[:, None] * jnp.ones((5, 3))
  np.testing.assert_allclose(losses.vibcreg(equal, equal)[1]["covariance"], 4 / 3, rtol=1e-6)


def test_vicreg_gives_no_gradient_to_wide_features_and_its_parts_add_up():
  z = jnp.float32(BATCHES["equal views"][0] * 100)
  np.testing.assert_array_equal(jax.grad(losses.variance_term)(z), 0.0)
  loss, parts = losses.vicreg(z, z[::-1], 2.0, 3.0, 5.0)
  want = 2 * parts["invariance"] + 3 * parts["variance"] + 5 * parts["covariance"]
  np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_tico_remembers():
  memory, z = jnp.zeros((4, 4)), jnp.float32(BATCHES["equal views"][0])
  for turn in range(1, 4):
    loss, memory = losses.tico(z, z[::-1], memory)
    np.testing.assert_allclose(jnp.trace(memory), 1 - 0.9**turn, rtol=1e-5)
  # All vectors equal: the quadratic form is the trace.
  equal = jnp.ones((5, 4))
  loss, _ = losses.tico(equal, equal, jnp.zeros((4, 4)), covariance_weight=1.0)
  np.testing.assert_allclose(loss, 0.1, rtol=1e-5)
  np.testing.assert_allclose(
    losses.tico(z, z[::-1], memory, covariance_weight=0.0)[0],
    1 + losses.negative_cosine(z, z[::-1]),
    rtol=1e-5,
  )


def test_tico_weights_choose_what_is_remembered():
  z, weights = jnp.float32(BATCHES["equal views"][0]), jnp.asarray([1, 0, 1, 1, 0, 1])
  memory = jnp.eye(4)
  _, got = losses.tico(z.at[1].set(jnp.nan), z, memory, weights=weights)
  np.testing.assert_allclose(got, losses.tico(z[weights > 0], z[weights > 0], memory)[1], rtol=1e-5)
  np.testing.assert_array_equal(losses.tico(z, z, memory, weights=0 * weights)[1], memory)


def test_vicregl_with_one_cell_is_its_global_part():
  a, b = (jnp.float32(z) for z in (Z1, Z2))
  place = jnp.zeros((8, 1, 2))
  loss, parts = losses.vicregl(a, b, a[:, None], b[:, None], place, place)
  for part in parts.values():
    np.testing.assert_allclose(part, 6.144650125332, rtol=1e-5)
  np.testing.assert_allclose(loss, 6.144650125332, rtol=1e-5)


def test_vicregl_keeps_the_nearest_cells():
  with jax.enable_x64(True):
    arrays = {k: jnp.asarray(v) for k, v in statements.maps(np.random.default_rng(5), 6).items()}
    for kept in ((1, 1), (20, 20)):
      want = statements.vicregl(**{k: np.asarray(v) for k, v in arrays.items()}, kept=kept)
      got = jax.jit(functools.partial(losses.vicregl, matches=kept))(**arrays)
      np.testing.assert_allclose(jax.tree.leaves(got), jax.tree.leaves(want), rtol=1e-9)
    other = functools.partial(losses.vicregl, matches=(1, 1), feature_matches=(20, 20))
    parts = [one(**arrays)[1] for one in (other, functools.partial(other, feature_matches=None))]
    for name, kept in (("features", want[1]), ("locations", parts[1]), ("global", parts[1])):
      np.testing.assert_allclose(parts[0][name], kept[name], rtol=1e-9)


z = jnp.ones((4, 3))
BAD = [
  (lambda: losses.negative_cosine(z, z[:3]), ValueError, "z must have shape"),
  (lambda: losses.normalized_l2(z[0], z), ValueError, r"p must have shape \[b d\]"),
  (lambda: losses.barlow_twins(z, jnp.arange(4)), TypeError, "z2"),
  (lambda: losses.barlow_twins(z, z, weights=jnp.ones(3)), ValueError, "weights"),
  (lambda: losses.batch_barlow(z, None), TypeError, "z must be an array"),
  (lambda: losses.variance_term(jnp.ones((4, 3), int)), TypeError, "z"),
  (lambda: losses.covariance_term(z[None]), ValueError, "z must have shape"),
  (lambda: losses.vicreg(z, z[:, :2]), ValueError, "z2"),
  (lambda: losses.vibcreg(z, z[0]), ValueError, "z2"),
  (lambda: vicregl(z, z, matches=(0, 3)), ValueError, r"matches\[0\]"),
  (lambda: losses.vicregl(z, z, z, z, z, z), ValueError, "m1"),
  (lambda: losses.tico(z, z, jnp.zeros((4, 4))), ValueError, "memory"),
  (lambda: losses.alignment(z, z, 0.0), ValueError, "alpha"),
  (lambda: losses.uniformity(z, -1.0), ValueError, "t must be"),
  (lambda: losses.uniformity(z[:1]), ValueError, "x must have at least 2 rows"),
]


@pytest.mark.parametrize("call,error,match", BAD)
def test_bad_input(call, error, match):
  with pytest.raises(error, match=match):
    call()
