"""CLIP and SigLIP: golden values, closed forms, extreme inputs, padding, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssljax import losses

I, J = np.arange(8)[:, None], np.arange(6)[None]
Z1 = np.sin(1.7 * (I + 1) * (J + 1) * 0.37 + 0.3 * J)
Z2 = Z1 + 0.3 * np.cos(1.1 * I - 0.5 * J)
FORMS = {
  "clip": (losses.clip_loss, (6.5,)),
  "clip rows": (lambda *x, **w: losses.clip_loss(*x, row_only_grad=True, **w), (6.5,)),
  "siglip": (losses.siglip_loss, (7.0, -4.0)),
}


@pytest.fixture(params=FORMS)
def form(request):
  loss, numbers = FORMS[request.param]
  return loss, numbers


def gaussian(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def both(loss, *arrays):
  """The loss and the gradient of its sum to all arrays and numbers."""
  arrays = [jnp.asarray(x) for x in arrays]
  gradient = jax.grad(lambda *x: loss(*x).sum(), argnums=range(len(arrays)))
  return loss(*arrays), gradient(*arrays)


def test_golden_values():
  with jax.enable_x64(True):
    one, two = jnp.asarray(Z1), jnp.asarray(Z2)
    clip = np.asarray(losses.clip_loss(one, two, 1 / 0.07))
    rows = np.asarray(losses.clip_loss(one, two, 1 / 0.07, row_only_grad=True))
    siglip = np.asarray(losses.siglip_loss(one, two, 10.0, -10.0))
  np.testing.assert_allclose(clip.mean(), 0.000830629548, rtol=1e-9)
  np.testing.assert_allclose(siglip.mean(), 0.884387728829, rtol=1e-9)
  np.testing.assert_array_equal(rows, clip)


def test_gradient_of_rows_only():
  def one_way(rows, columns):
    rows, columns = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (rows, columns))
    logits = rows @ jax.lax.stop_gradient(columns).T / 0.07
    return -jnp.diag(jax.nn.log_softmax(logits)).mean() / 2

  def ours(only):
    return lambda a, b: losses.clip_loss(a, b, 1 / 0.07, row_only_grad=only).mean()

  with jax.enable_x64(True):
    at = jnp.asarray(Z1), jnp.asarray(Z2)
    full, rows, want = (
      jax.device_get(jax.grad(f, (0, 1))(*at))
      for f in (ours(False), ours(True), lambda a, b: one_way(a, b) + one_way(b, a))
    )
  np.testing.assert_allclose(rows, want, rtol=1e-9, atol=1e-12)
  norms = np.linalg.norm(rows[0]), np.linalg.norm(full[0])
  np.testing.assert_allclose(norms, (0.00177, 0.00357), atol=5e-6)
  np.testing.assert_allclose((rows[0] * full[0]).sum() / np.prod(norms), 0.986, atol=5e-4)


def test_closed_forms():
  equal = jnp.ones((5, 3))
  np.testing.assert_allclose(losses.clip_loss(equal, equal, 14.0), np.log(5), rtol=1e-6)
  # Zero vectors are orthogonal to all, their own partner too.
  nothing = jnp.zeros((4096, 1))
  np.testing.assert_allclose(losses.siglip_loss(nothing, nothing, 10.0, -10.0), 10.186, atol=1e-3)
  assert float(losses.clip_loss(gaussian(1, 3), gaussian(1, 3, seed=1), 14.0)[0]) == 0.0


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.floats(0.01, 100.0))
def test_neither_size_nor_order_of_modalities_matters(seed, size):
  image, text = gaussian(5, 3, seed=seed), gaussian(5, 3, seed=seed + 100)
  clip = losses.clip_loss(image, text, 7.0)
  np.testing.assert_allclose(losses.clip_loss(size * text, image, 7.0), clip, rtol=1e-4, atol=1e-6)
  siglip = losses.siglip_loss(image, text, 7.0, -4.0)
  np.testing.assert_allclose(losses.siglip_loss(size * image, text, 7.0, -4.0), siglip, rtol=1e-4)
  swapped = losses.siglip_loss(text, image, 7.0, -4.0)
  np.testing.assert_allclose(swapped.sum(), siglip.sum(), rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("b", [1, 4])
def test_extreme_inputs_stay_finite(form, scale, b):
  loss, numbers = form
  rest = tuple(jnp.float32(x) for x in numbers[1:])
  some = gaussian(b, 3)
  for image, text in ((some, some[::-1]), (some, 0 * some), (0 * some, 0 * some), (some, some)):
    value, gradients = both(loss, image, text, jnp.float32(scale), *rest)
    assert np.isfinite(value).all() and (np.asarray(value) >= 0).all()
    assert all(np.isfinite(g).all() for g in gradients)


def test_weights_of_zero_are_padding(form):
  loss, numbers = form
  image, text = gaussian(6, 3), gaussian(6, 3, seed=1)
  some = jnp.arange(6) < 4
  filled = [jnp.where(some[:, None], x, jnp.nan) for x in (image, text)]
  value, gradients = both(lambda *x: loss(*x, weights=some), *filled, *numbers)
  want, wanted = both(loss, image[:4], text[:4], *numbers)
  np.testing.assert_allclose(value[:4], want, rtol=1e-6)
  np.testing.assert_array_equal(value[4:], 0.0)
  for got, want in zip(gradients[:2], wanted):
    np.testing.assert_allclose(got[:4], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[4:], 0.0)
  np.testing.assert_allclose(gradients[2:], wanted[2:], rtol=1e-5)


def test_weights_of_zero_everywhere(form):
  loss, numbers = form
  none = jnp.zeros(4)
  value, gradients = both(
    lambda *x: loss(*x, weights=none), gaussian(4, 3), gaussian(4, 3), *numbers
  )
  for leaf in (value, *gradients):
    np.testing.assert_array_equal(leaf, 0.0)


def test_masked_contrast_with_one_weight_0():
  z, x = gaussian(2, 4, 3), gaussian(3, 4, 5, 2)
  hidden = jnp.arange(5) < jnp.array([[2], [0], [3], [1]])
  simclr = losses.masked_contrast(*z, *x, hidden, ~hidden, 0.2, 0.0)
  np.testing.assert_array_equal(simclr, losses.nt_xent(*z, 0.2))
  # Equal embeddings without negatives: what is left are two reconstructions; nothing hidden is 0.
  one = losses.masked_contrast(z[0, :1], z[0, :1], *x[:, 1:2], hidden[1:2], hidden[:1], 0.2)
  np.testing.assert_allclose(one, jnp.abs(x[1, 1, :2] - x[2, 1, :2]).mean(), rtol=1e-6)


X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
  ("call", "error", "text"),
  [
    (lambda: losses.clip_loss(X, X[:3], 1.0), ValueError, r"text must have shape \[b d\]"),
    (lambda: losses.clip_loss(X[0], X, 1.0), ValueError, "image must have shape"),
    (lambda: losses.clip_loss([1.0], X, 1.0), TypeError, "image must be an array"),
    (lambda: losses.clip_loss(X.astype(int), X, 1.0), TypeError, "image .* kind float"),
    (lambda: losses.clip_loss(X, X, 0.0), ValueError, "scale must be a positive number"),
    (lambda: losses.clip_loss(X, X, "1"), TypeError, "scale must be an array"),
    (lambda: losses.clip_loss(X, X, X[0]), ValueError, "scale must have shape"),
    (lambda: losses.clip_loss(X, X, 1.0, weights=X), ValueError, "weights must have shape"),
    (lambda: losses.siglip_loss(X, X, -1.0, 0.0), ValueError, "t must be a positive number"),
    (lambda: losses.siglip_loss(X, X, 1.0, X), ValueError, "b must have shape"),
    (lambda: losses.siglip_loss(X, X[:, :2], 1.0, 0.0), ValueError, "text must have shape"),
  ],
)
def test_bad_input(call, error, text):
  with pytest.raises(error, match=text):
    call()
