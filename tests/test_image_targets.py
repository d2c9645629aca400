"""Golden values and properties of targets made of pixels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssljax import targets

few = settings(max_examples=10, deadline=None, derandomize=True)


def signal(shape, w, phase=0.0):
  """The input of the golden values: sin(w·n + phase) over the flat index, rounded to float32."""
  n = np.arange(math.prod(shape), dtype=np.float64)
  return np.sin(w * n + phase).astype(np.float32).reshape(shape)


def draw(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Gradients

ACROSS = np.tile(np.arange(32.0), (32, 1))
SIDE = 0.98995


@pytest.mark.parametrize(
  "image, want",
  [
    (ACROSS, {4: 1}),
    (-ACROSS, {4: 1}),
    (ACROSS.T, {0: 1}),
    (-ACROSS.T, {0: 1}),
    # Reflected borders give the corner cell a little of both axes.
    (ACROSS + ACROSS.T, {0: 0.1, 2: SIDE, 4: 0.1}),
    (ACROSS - ACROSS.T, {0: 0.1, 4: 0.1, 6: SIDE}),
    (0 * ACROSS, {}),
  ],
  ids=["x", "-x", "y", "-y", "x+y", "x-y", "flat"],
)
def test_golden_ramps(image, want):
  got = targets.hog(jnp.asarray(image[:16, :16], jnp.float32)[None, :, :, None])[0, 0, 0, 0]
  np.testing.assert_allclose(got, [want.get(k, 0) for k in range(9)], atol=1e-4)


@pytest.mark.parametrize("bins, across", [(9, 4), (18, 9), (2, 1), (6, 3)])
def test_directions_on_the_bound_of_two_bins(bins, across):
  """With an even number of bins the angle π/2 is a bound, and the borders have just that angle."""
  for ramp, bin_ in ((ACROSS, across), (ACROSS.T, 0)):
    for image in (ramp, -ramp):
      got = targets.hog(jnp.asarray(image, jnp.float32)[None, :, :, None], bins=bins)
      np.testing.assert_allclose(got[..., bin_], 1, rtol=1e-6)


def test_golden_hog():
  x = jnp.asarray(signal((1, 3, 32, 32), 0.37).transpose(0, 2, 3, 1))
  got = targets.hog(x)
  assert got.shape == (1, 4, 4, 3, 9)
  np.testing.assert_allclose(got.sum(), 52.4434, atol=1e-4)
  np.testing.assert_allclose(jnp.square(got).sum(), 48, rtol=1e-6)  # length 1 by cell and channel
  red = [0.11685, 0, 0, 0, 0.05971, 0, 0, 0.99135, 0]
  np.testing.assert_allclose(got[0, 0, 0, 0], red, atol=1e-5)


@given(scale=st.floats(0.1, 50), offset=st.floats(-10, 10), sign=st.sampled_from([-1, 1]))
@few
def test_contrast_brightness_and_sign_do_not_matter(scale, offset, sign):
  # Whole numbers of 1/8: gradients are exact, so no pixel changes its bin by rounding.
  x = jnp.round(8 * draw((1, 16, 16, 3))) / 8
  scale, offset = round(scale * 8) / 8 or 1.0, round(offset * 8) / 8
  np.testing.assert_allclose(targets.hog(sign * scale * x + offset), targets.hog(x), atol=1e-6)


def test_cells_see_their_own_pixels_and_one_around():
  x = draw((1, 32, 32, 2))
  other = x.at[0, :4, :4, 0].set(7.0)
  moved = np.asarray(targets.hog(other) != targets.hog(x)).any((0, 4))
  want = np.zeros((4, 4, 2), bool)
  want[0, 0, 0] = True
  np.testing.assert_array_equal(moved, want)


def test_leading_axes_are_kept():
  x = draw((2, 3, 16, 16, 3))
  flat = x.reshape(6, 16, 16, 3)
  np.testing.assert_array_equal(targets.hog(x).reshape(6, 2, 2, 3, 9), targets.hog(flat))
  video = targets.hog_tokens(x, (16, 16))
  assert video.shape == (2, 3, 1, 108)
  np.testing.assert_array_equal(video.reshape(6, 1, 108), targets.hog_tokens(flat, (16, 16)))


def test_order_inside_a_token_is_channel_bin_row_column():
  x = draw((2, 32, 48, 3))
  cells = targets.hog(x)
  tokens = targets.hog_tokens(x, (16, 16)).reshape(2, 2, 3, 3, 9, 2, 2)
  for row, column in np.ndindex(2, 2):
    want = cells[:, row::2, column::2]
    np.testing.assert_array_equal(tokens[..., row, column], want)


@pytest.mark.parametrize(
  "call",
  [
    lambda x: targets.hog(x),
    lambda x: targets.hog(x[:, :8, :8], window=16),
    lambda x: targets.hog_tokens(x[:, :16, :16], (12, 12)),
    lambda x: targets.hog_tokens(x[:, :16, :16], (32, 16)),
  ],
)
def test_sizes_that_do_not_divide_are_refused(call):
  with pytest.raises(ValueError, match="divi"):
    call(jnp.ones((1, 17, 16, 3)))


# Spectra


def test_parseval():
  x = draw((2, 6, 10, 3))
  np.testing.assert_allclose(
    jnp.square(targets.spectrum(x)).sum((1, 2, 4)), jnp.square(x).sum((1, 2)), rtol=1e-5
  )
  np.testing.assert_allclose(
    jnp.square(targets.spectrum(x)).sum(-1), jnp.square(targets.amplitudes(x)), rtol=1e-4, atol=1e-5
  )


@given(rows=st.integers(-5, 5), columns=st.integers(-5, 5))
@few
def test_a_shift_leaves_the_amplitudes(rows, columns):
  x = draw((1, 8, 8, 2))
  moved = targets.amplitudes(jnp.roll(x, (rows, columns), (1, 2)))
  np.testing.assert_allclose(moved, targets.amplitudes(x), atol=1e-5)


def test_gradient_at_amplitude_zero_is_zero():
  gradient = jax.grad(lambda x: targets.amplitudes(x).sum())(jnp.zeros((1, 4, 4, 1)))
  np.testing.assert_array_equal(gradient, 0.0)


# Patches


@given(scale=st.floats(0.5, 100), offset=st.floats(-50, 50))
@few
def test_normalised_pixels_forget_scale_and_offset(scale, offset):
  x = draw((2, 3, 48))
  got = targets.normalised_pixels(scale * x + offset)
  np.testing.assert_allclose(got, targets.normalised_pixels(x), atol=2e-3)
  np.testing.assert_allclose(got.mean(-1), 0, atol=1e-3)
  np.testing.assert_allclose(jnp.square(got).mean(-1), 47 / 48, rtol=1e-3)


def test_flat_patches_are_zero_with_a_finite_gradient():
  x = jnp.ones((1, 2, 12))
  np.testing.assert_array_equal(targets.normalised_pixels(x), 0.0)
  gradient = jax.grad(lambda x: jnp.square(targets.normalised_pixels(x)).sum())(x)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("unbiased", [True, False])
def test_unnormalise_is_the_inverse(unbiased):
  x = 3 * draw((2, 3, 12)) + 1
  got = targets.normalised_pixels(x, unbiased=unbiased)
  np.testing.assert_allclose(targets.unnormalise(got, x, unbiased=unbiased), x, atol=1e-5)


def test_one_value_has_no_unbiased_variance():
  with pytest.raises(ValueError, match="unbiased"):
    targets.normalised_pixels(jnp.ones((1, 2, 1)))
  np.testing.assert_array_equal(targets.normalised_pixels(jnp.ones((1, 2, 1)), unbiased=False), 0.0)
