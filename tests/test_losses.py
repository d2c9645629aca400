"""The losses against NumPy statements, in several types, with weights, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import losses

B, M, T = 3, 5, 7


def l2(error):
  return error**2


def l1(error):
  return np.abs(error)


def smooth_l1(error, beta=1.0):
  error = np.abs(error)
  return np.where(error < beta, 0.5 * error**2 / beta, error - 0.5 * beta)


CASES = {
  "l2": (losses.masked_l2, l2, {}),
  "l1": (losses.masked_l1, l1, {}),
  "smooth_l1": (losses.masked_smooth_l1, smooth_l1, {}),
  "smooth_l1_beta2": (losses.masked_smooth_l1, smooth_l1, {"beta": 2.0}),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
  return request.param


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  # Deviation 2: errors on both sides of beta 1 and of beta 2.
  return rng.normal(0, 2, (B, M, T)), rng.normal(0, 2, (B, M, T)), rng.uniform(0, 1, (B, M))


def test_mean_over_values_and_places(case, arrays):
  loss, numpy, options = case
  pred, target, _ = arrays
  got = loss(jnp.float32(pred), jnp.float32(target), **options)
  want = numpy(pred - target, **options).mean((1, 2))
  assert got.shape == (B,) and got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_weights_count_places(case, arrays):
  loss, numpy, options = case
  pred, target, weights = arrays
  got = loss(jnp.float32(pred), jnp.float32(target), weights=jnp.float32(weights), **options)
  place = numpy(pred - target, **options).mean(-1)
  np.testing.assert_allclose(got, (place * weights).sum(1) / weights.sum(1), rtol=1e-6)
  # Weight 0 takes a place out of it altogether, and no place at all gives 0, not a division by 0.
  only = jnp.zeros((B, M)).at[:, 1].set(1.0)
  got = loss(jnp.float32(pred), jnp.float32(target), weights=only, **options)
  np.testing.assert_allclose(got, place[:, 1], rtol=1e-6)
  nothing = loss(jnp.float32(pred), jnp.float32(target), weights=jnp.zeros((B, M)), **options)
  np.testing.assert_array_equal(nothing, np.zeros(B))


def test_bfloat16_is_widened_before_the_first_operation(case, arrays):
  loss, numpy, options = case
  pred, target = (jnp.asarray(a, jnp.bfloat16) for a in arrays[:2])
  got = loss(pred, target, **options)
  assert got.dtype == jnp.float32
  exact = np.float64(pred.astype(jnp.float32)) - np.float64(target.astype(jnp.float32))
  # Difference and sum in bfloat16 would be off by 1e-2.
  np.testing.assert_allclose(got, numpy(exact, **options).mean((1, 2)), rtol=1e-6)


def test_float64_stays(case, arrays):
  loss, numpy, options = case
  pred, target, _ = arrays
  with jax.enable_x64(True):
    got = np.asarray(loss(jnp.asarray(pred), jnp.asarray(target), **options))
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, numpy(pred - target, **options).mean((1, 2)), rtol=1e-14)


def test_gradient_against_finite_differences(case, arrays):
  loss, _, options = case
  pred, target, weights = arrays
  with jax.enable_x64(True):
    target, weights = jnp.asarray(target), jnp.asarray(weights)

    def value(pred):
      return loss(pred, target, weights=weights, **options).mean()

    got = np.asarray(jax.grad(value)(jnp.asarray(pred)))
    step = 1e-6
    want = np.zeros_like(pred)
    for at in np.ndindex(pred.shape):
      up, down = pred.copy(), pred.copy()
      up[at] += step
      down[at] -= step
      want[at] = (value(jnp.asarray(up)) - value(jnp.asarray(down))) / (2 * step)
  np.testing.assert_allclose(got, want, atol=1e-9)


def test_perfect_prediction_is_zero_with_finite_gradient(case, arrays):
  loss, _, options = case
  x = jnp.float32(arrays[0])
  value, grad = jax.value_and_grad(lambda p: loss(p, x, **options).sum())(x)
  assert value == 0 and np.all(np.isfinite(grad))


def test_smooth_l1_tends_to_l1_and_meets_at_beta(arrays):
  pred, target = (jnp.float32(a) for a in arrays[:2])
  got = losses.masked_smooth_l1(pred, target, beta=1e-6)
  np.testing.assert_allclose(got, losses.masked_l1(pred, target), rtol=1e-5)
  two = jnp.full((1, 1, 1), 2.0)
  assert losses.masked_smooth_l1(two, 0 * two, beta=2.0)[0] == 1.0  # 0.5·4/2 = 2 - 1
