"""Whitening, spectra, densities: golden values, known minima, invariances, degenerate batches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group

from ssljax import losses

I, J = np.arange(8)[:, None], np.arange(6)[None]
Z1 = np.sin(1.7 * (I + 1) * (J + 1) * 0.37 + 0.3 * J)
Z2 = Z1 + 0.3 * np.cos(1.1 * I - 0.5 * J)
KEY = jax.random.key(0)


def lid(z):
  """log LID of every row, all above 0 in this batch."""
  return -losses.ldreg(z, None, 4, 1.0, 0.0)


GOLDEN = {
  "w_mse": (lambda a, b: losses.w_mse([a, b]).mean(), 0.318363511763),
  "w_mse/four": (lambda a, b: losses.w_mse([a[:, :4], b[:, :4]]).mean(), 0.192139832452),
  "mmcr": (lambda a, b: losses.mmcr(jnp.stack([a, b], 1)), -6.357198525532),
  "mmcr/local": (lambda a, b: losses.mmcr(jnp.stack([a, b], 1), 0.1), -6.199081903709),
  "ssl_ey": (losses.ssl_ey, -0.199026174001),
  "von_neumann_entropy": (lambda a, b: losses.von_neumann_entropy(a), 1.503875710359),
  "er_entropy/average": (lambda a, b: losses.er_entropy(a, form="average"), 0.717901058271),
  "er_entropy": (lambda a, b: losses.er_entropy(a), 0.717892412906),
  "er_reconstruction": (lambda a, b: losses.er_reconstruction(a, b).mean(), -1.017360859438),
  "ldreg/mean": (lambda a, b: lid(a).mean(), 2.318560784245),
  "ldreg/geometric": (lambda a, b: jnp.exp(lid(a).mean()), 10.161039848891),
}

# Scalars of two views, for the batches below.
TWO = {
  "iter_norm": lambda a, b: (losses.iter_norm(a, 2) * b).sum(),
  "iter_norm/many": lambda a, b: (losses.iter_norm(a, iterations=30) * b).sum(),
  "cholesky_whiten": lambda a, b: (losses.cholesky_whiten(a) * b).mean(),
  "cholesky_whiten/shrunk": lambda a, b: (losses.cholesky_whiten(a, 0.1) * b).mean(),
  "w_mse": lambda a, b: losses.w_mse([a, b]).mean(),
  "mmcr": lambda a, b: losses.mmcr(jnp.stack([a, b], 1), 0.1),
  "ssl_ey": losses.ssl_ey,
  "von_neumann_entropy": lambda a, b: losses.von_neumann_entropy(a),
  "max_entropy_marginals": lambda a, b: losses.max_entropy_marginals(a, 1.0),
  "max_entropy_marginals/normal": lambda a, b: losses.max_entropy_marginals(a, 1.0, "normal"),
  "er_entropy": lambda a, b: losses.er_entropy(a),
  "er_entropy/sharp": lambda a, b: losses.er_entropy(a, 1e4),
  "er_entropy/flat": lambda a, b: losses.er_entropy(a, 1e-4),
  "er_reconstruction": lambda a, b: losses.er_reconstruction(a, b).mean(),
  "ldreg": lambda a, b: losses.ldreg(a, None, 3).mean(),
  "ldreg/eps 0": lambda a, b: losses.ldreg(a, None, 3, eps=0.0).mean(),
  "sigreg": lambda a, b: losses.sigreg(a, KEY, 16),
  "lejepa": lambda a, b: losses.lejepa(jnp.stack([a, b], 1), KEY, directions=16)[0],
  "koleo": lambda a, b: losses.koleo(a).mean(),
}
ONE_EXAMPLE = {
  "cholesky_whiten": "more rows",
  "w_mse": "more rows",
  "ssl_ey": "at least 2",
  "max_entropy_marginals": "at least 2",
  "ldreg": "at least 4",
  "koleo": "at least 2",
}


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
    "equal features": (z[:, [0, 0, 1, 1]], z),
    "one direction": (z[:, :1] * z[:1], z[:, :1] * z[:1]),
    "orthogonal": (np.eye(6, 4), np.eye(6, 4)),
    "tiny": (1e-12 * z, 1e-12 * z),
    "large": (1e6 * z, -1e6 * z),
  }


BATCHES = batches()


def value_and_gradient(loss, a, b):
  value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.float32(a), jnp.float32(b))
  assert np.isfinite(value) and value.shape == ()
  for gradient in gradients:
    assert np.isfinite(gradient).all()
  return value, gradients


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
  loss, want = GOLDEN[name]
  with jax.enable_x64(True):
    np.testing.assert_allclose(loss(jnp.asarray(Z1), jnp.asarray(Z2)), want, rtol=1e-9)


@pytest.mark.parametrize("name", TWO)
def test_degenerate_batches_are_finite(name):
  run = jax.jit(jax.value_and_grad(TWO[name], (0, 1)))
  for batch, (a, b) in BATCHES.items():
    for leaf in jax.tree.leaves(run(jnp.float32(a), jnp.float32(b))):
      assert np.isfinite(leaf).all(), batch


@pytest.mark.parametrize("name", TWO)
def test_one_example(name):
  z = jnp.float32([[1, 2, 0, -1]])
  why = None if "shrunk" in name else ONE_EXAMPLE.get(name.split("/")[0])
  if name == "cholesky_whiten/shrunk":
    why = "more rows"
  if why:
    with pytest.raises(ValueError, match=why):
      TWO[name](z, z)
  else:
    value_and_gradient(TWO[name], z, 2 * z)


def test_whitening_whitens():
  z = np.random.default_rng(0).normal(0, 1, (12, 4)) @ np.float64(
    ortho_group.rvs(4, random_state=0)
  )
  with jax.enable_x64(True):
    for whiten, ddof in (
      (losses.cholesky_whiten, 1),
      (functools.partial(losses.iter_norm, iterations=30, eps=1e-14), 0),
    ):
      got = np.cov(np.asarray(whiten(jnp.asarray(z))).T, ddof=ddof)
      np.testing.assert_allclose(got, np.eye(4), atol=1e-11)


seeds = st.integers(0, 2**31)
few = settings(max_examples=10, deadline=None, derandomize=True)


@few
@given(seeds, st.floats(1e-3, 1e3))
def test_scale_free(seed, scale):
  rng = np.random.default_rng(seed)
  a, b = jnp.float32(rng.normal(0, 1, (6, 4))), jnp.float32(rng.normal(0, 1, (6, 4)))
  rows = jnp.float32(rng.uniform(0.5, 2, (6, 1)) * scale)
  for name in ("mmcr", "von_neumann_entropy", "er_entropy", "er_reconstruction", "koleo"):
    np.testing.assert_allclose(TWO[name](rows * a, b), TWO[name](a, b), rtol=1e-4, atol=1e-5)
  with jax.enable_x64(True):
    a, b, columns = (jnp.asarray(x, jnp.float64) for x in (a, b, scale * np.arange(1, 5.0)))
    np.testing.assert_allclose(
      losses.w_mse([a * columns + 3, b]), losses.w_mse([a, b]), rtol=1e-7, atol=1e-9
    )


@few
@given(seeds)
def test_rotations_leave_spectra(seed):
  rng = np.random.default_rng(seed)
  a, b = jnp.float32(rng.normal(0, 1, (6, 4))), jnp.float32(rng.normal(0, 1, (6, 4)))
  turn = jnp.float32(ortho_group.rvs(4, random_state=seed))
  for name in ("mmcr", "ssl_ey", "von_neumann_entropy", "er_entropy", "ldreg", "koleo"):
    got, want = TWO[name](a @ turn, b @ turn), TWO[name](a, b)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_known_values():
  basis = jnp.eye(4)
  # Four orthogonal centroids, b = d: a tight frame, the minimum -sqrt(b d); equal ones: -sqrt b.
  assert abs(losses.mmcr(basis[:, None]) + 4) < 1e-5
  assert abs(losses.mmcr(jnp.ones((9, 2, 3))) + 3) < 1e-5
  z = jnp.float32(Z1)
  assert losses.mmcr(jnp.stack([z, -z], 1)) == 0
  assert abs(losses.von_neumann_entropy(jnp.concatenate([basis, -2 * basis])) - math.log(4)) < 1e-6
  assert abs(losses.von_neumann_entropy(jnp.ones((5, 3)))) < 1e-6
  np.testing.assert_allclose(losses.w_mse([z[:, :3], z[:, :3]]), 0.0, atol=1e-5)
  # Evenly spaced marginals, log((b + 1)/m · m/(b - 1)) in the units of their range.
  even = jnp.linspace(0.1, 0.9, 9)
  logits = jnp.log(even / (1 - even))[:, None]
  np.testing.assert_allclose(
    losses.max_entropy_marginals(logits, 1.0), -math.log(10 * 0.8 / 8), atol=1e-5
  )


def test_entropy_of_er_is_that_of_a_density():
  # One point: the entropy of its own kernel's peak; on a circle of two features log(2π I_0(κ)) - κ.
  got = losses.er_entropy(jnp.float32([[3, 4]]), 2.0)
  np.testing.assert_allclose(got, math.log(2 * math.pi * np.i0(2.0)) - 2, rtol=1e-6)
  # In 512 dimensions I of 255 is 1e-300 and less, and the value still finite and right.
  flat = losses.er_reconstruction(jnp.eye(2, 512), jnp.eye(2, 512), 1e-6)
  area = math.log(2) + 256 * math.log(math.pi) - math.lgamma(256)
  np.testing.assert_allclose(flat, area, rtol=1e-6)


def test_sigreg_under_a_normal_distribution():
  t = np.linspace(0, 3, 17)
  want = 2 * np.trapezoid(np.exp(-(t**2) / 2) * (1 - np.exp(-(t**2))), t)
  assert abs(want - 1.0525) < 1e-4
  for b in (64, 512):
    draws = [losses.sigreg(jax.random.normal(key, (b, 8)), key) for key in jax.random.split(KEY, 8)]
    np.testing.assert_allclose(np.mean(draws), want, rtol=0.1)


def test_sigreg_of_a_collapsed_batch():
  zeros = jnp.zeros((256, 4))
  value, gradient = jax.value_and_grad(losses.sigreg)(zeros, KEY)
  np.testing.assert_allclose(value, 102.9, rtol=1e-3)
  np.testing.assert_array_equal(gradient, 0.0)


def test_keys_draw_directions():
  z = jnp.float32(Z1)
  other = losses.sigreg(z, jax.random.key(1), 4)
  assert losses.sigreg(z, KEY, 4) == losses.sigreg(z, KEY, 4) != other


@pytest.mark.parametrize("name", ["sigreg", "koleo"])
@pytest.mark.parametrize("kind", [bool, np.float32, np.int32])
def test_rows_of_weight_0_may_hold_anything(name, kind):
  loss = {
    "sigreg": lambda z, w=None: losses.sigreg(z, KEY, 16, weights=w),
    "koleo": lambda z, w=None: losses.koleo(z, weights=w).sum(),
  }[name]
  weights = jnp.asarray(np.array([1, 0, 1, 1, 0, 1, 1, 1]).astype(kind))
  z = jnp.float32(Z1)
  want = loss(z[weights != 0])
  value, gradient = jax.value_and_grad(loss)(z.at[1].set(jnp.nan), weights)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[weights == 0], 0.0)
  two = jnp.where(jnp.arange(8) < 2, weights, 0)  # row 0 without another
  for alone in (0 * weights, *([two] if name == "koleo" else [])):
    value, gradient = jax.value_and_grad(loss)(z, alone)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)


z = jnp.ones((8, 3))
BAD = [
  (lambda: losses.iter_norm(z, 2), ValueError, "groups must divide the width 3"),
  (lambda: losses.iter_norm(z[0]), ValueError, "x must have shape"),
  (lambda: losses.cholesky_whiten(z[:3]), ValueError, "x must have more rows"),
  (lambda: losses.w_mse([z]), ValueError, "views must be at least 2"),
  (lambda: losses.w_mse([z, z[:4]]), ValueError, r"views\[1\]"),
  (lambda: losses.w_mse([z, z], 5), ValueError, "size must divide"),
  (lambda: losses.w_mse([z, z], order=jnp.ones(8)), TypeError, "order"),
  (lambda: losses.mmcr(z), ValueError, r"z must have shape \[b v d\]"),
  (lambda: losses.ssl_ey(z, z[:, :2]), ValueError, "z2"),
  (lambda: losses.von_neumann_entropy(jnp.arange(3)), TypeError, "x"),
  (lambda: losses.max_entropy_marginals(z, 1.0, "tanh"), ValueError, "squash"),
  (lambda: losses.max_entropy_marginals(z, 1.0, eps=0.0), ValueError, "eps"),
  (lambda: losses.er_entropy(z, -1.0), ValueError, "concentration"),
  (lambda: losses.er_entropy(z, jnp.ones(())), TypeError, "concentration"),
  (lambda: losses.er_entropy(z, form="joe"), ValueError, "form"),
  (lambda: losses.er_reconstruction(z, z[:, :2]), ValueError, "z2"),
  (lambda: losses.ldreg(z, z[:, :2]), ValueError, "reference"),
  (lambda: losses.ldreg(z, neighbours=1), ValueError, "neighbours"),
  (lambda: losses.sigreg(z[0], KEY), ValueError, "z must have shape"),
  (lambda: losses.sigreg(z, KEY, knots=1), ValueError, "knots"),
  (lambda: losses.sigreg(z, KEY, t_max=0.0), ValueError, "t_max"),
  (lambda: losses.sigreg(z, KEY, weights=jnp.ones(3)), ValueError, "weights"),
  (lambda: losses.lejepa(z[:, None], KEY, global_views=2), ValueError, "global_views"),
  (lambda: losses.koleo(z, -1.0), ValueError, "eps"),
  (lambda: losses.koleo(z, weights=jnp.ones(3)), ValueError, "weights"),
]


@pytest.mark.parametrize("call,error,match", BAD)
def test_bad_input(call, error, match):
  with pytest.raises(error, match=match):
    call()
