"""Golden values, limits and bad input of the regressions at hidden places."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssljax import losses, targets

few = settings(max_examples=10, deadline=None, derandomize=True)


def signal(shape, w, phase=0.0):
  """The input of the golden values: sin(w·n + phase) over the flat index, rounded to float32."""
  n = np.arange(math.prod(shape), dtype=np.float64)
  return np.sin(w * n + phase).astype(np.float32).reshape(shape)


def patches(x, p=8):
  """[b c h w] -> [b n p·p·c] in the order (row, column, channel)."""
  b, c, h, w = x.shape
  x = x.reshape(b, c, h // p, p, w // p, p).transpose(0, 2, 4, 3, 5, 1)
  return jnp.asarray(x.reshape(b, -1, p * p * c))


IMAGES = signal((2, 3, 16, 16), 0.37)
MASK = jnp.array([[1, 0, 1, 1], [0, 1, 1, 1]])


def golden(loss, value, *arrays, **options):
  """Our float64 on the same rounded input against the eight digits of the originals' float32."""
  with jax.enable_x64(True):
    got = loss(*(jnp.asarray(a, jnp.float64) for a in arrays), **options).mean()
    np.testing.assert_allclose(got, value, rtol=4e-7)


@pytest.mark.parametrize(
  "target, value",
  [
    (targets.normalised_pixels, 1.5720917),
    (lambda x: targets.normalised_pixels(x, unbiased=False), 1.5774984),
    (lambda x: x, 1.0380005),
  ],
  ids=["normalised", "biased", "raw"],
)
@pytest.mark.parametrize("over", ["example", "batch"])
def test_golden_mae(target, value, over):
  def loss(pred, images):
    return losses.masked_l2(pred, target(images), MASK, over=over)

  golden(loss, value, signal((2, 4, 192), 0.23, 1), patches(IMAGES))


def test_golden_simmim_is_a_mean_over_the_batch():
  pred, target = patches(signal((2, 3, 16, 16), 0.23, 1)), patches(IMAGES)
  mask = jnp.array([[True, False, True, True], [False, True, False, True]])
  golden(losses.masked_l1, 0.8092964, pred, target, weights=mask, over="batch")
  assert abs(losses.masked_l1(pred, target, mask).mean() - 0.8092964) > 9e-4


@pytest.mark.parametrize("average, value", [(True, 0.4523686), (False, 0.6742743)])
def test_golden_focal_frequency(average, value):
  pred, target = (
    signal((2, 3, 8, 8), *numbers).transpose(0, 2, 3, 1) for numbers in ((0.37,), (0.23, 1))
  )
  golden(losses.focal_frequency_loss, value, pred, target, average=average)


def test_golden_uniformity():
  golden(losses.second_moment_uniformity, 0.5137987, signal((4, 6), 0.9))
  same = losses.second_moment_uniformity(jnp.ones((4, 6)))
  np.testing.assert_allclose(same, np.ones(4), rtol=1e-6)


# Loss by name: a function of (pred, weights), for arrays of these shapes, all weights first.


def draw(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def regression(loss):
  return (3, 5, 4), (3, 5), lambda p, w: loss(p, draw((3, 5, 4), 1), weights=w)


FORMS = {
  "l1": regression(losses.masked_l1),
  "l1_batch": regression(functools.partial(losses.masked_l1, over="batch")),
  "l2": regression(losses.masked_l2),
  "l2_batch": regression(functools.partial(losses.masked_l2, over="batch")),
  "smooth_l1": regression(losses.masked_smooth_l1),
  "focal_l1": regression(losses.masked_focal_l1),
  "inpainting": (
    (3, 4, 4, 2),
    (3, 4, 4, 1),
    lambda p, w: losses.inpainting_l2(p, draw((3, 4, 4, 2), 1), w),
  ),
  "region_bce": (
    (3, 2, 5, 4),
    (3, 5),
    lambda p, w: losses.region_bce(p, draw((3, 2, 5, 4), 1) > 0, w),
  ),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request):
  return request.param


def value_and_gradient(loss, x, weights):
  return loss(x, weights), jax.grad(lambda x: loss(x, weights).sum())(x)


def test_a_mask_of_nothing_is_zero_with_zero_gradient(form):
  shape, mask, loss = form
  x = draw(shape).at[0].set(jnp.inf)  # what is not chosen may be anything
  one = jnp.ones(mask, bool).at[0].set(False)
  for weights, empty in ((one, slice(0, 1)), (jnp.zeros(mask), slice(None))):
    value, gradient = value_and_gradient(loss, x, weights)
    assert np.isfinite(value).all() and (value[empty] == 0).all()
    np.testing.assert_array_equal(gradient[empty], 0.0)
    assert np.isfinite(gradient[1:]).all()


def test_no_places_at_all_are_zero():
  x = jnp.ones((2, 0, 4))
  for weights in (None, jnp.ones((2, 0))):
    for over in ("example", "batch"):
      np.testing.assert_array_equal(losses.masked_l2(x, x, weights, over=over), [0, 0])


def test_gradient_is_exactly_zero_at_visible_places(form):
  shape, mask, loss = form
  weights = jnp.zeros(mask).at[:, 1:3].set(1.0)
  _, gradient = value_and_gradient(loss, draw(shape), weights)
  moved = np.asarray(gradient != 0)
  places = 2 if len(shape) == 4 and mask[-1] != 1 else 1
  assert moved.any() and not np.delete(moved, [1, 2], axis=places).any()


def test_scale_of_the_weights_does_not_matter(form):
  shape, mask, loss = form
  weights = jnp.abs(draw(mask, 3)) + 0.1
  np.testing.assert_allclose(loss(draw(shape), weights), loss(draw(shape), 7 * weights), rtol=1e-5)


def test_all_weights_one_is_no_weights(form):
  shape, mask, loss = form
  want = loss(draw(shape), jnp.ones(mask))
  np.testing.assert_allclose(loss(draw(shape), jnp.ones(mask, int)), want, rtol=1e-6)
  if mask[-1] != 1:
    np.testing.assert_allclose(loss(draw(shape), None), want, rtol=1e-5)


REGRESSIONS = (
  losses.masked_l1,
  losses.masked_l2,
  losses.masked_smooth_l1,
  losses.masked_focal_l1,
)


@jax.jit
def everything(pred, target):
  """Sums of all losses with their gradients; the spectra see [b m t] as one channel."""

  def maps(x):
    return x[..., None]

  spectra = [
    lambda p, t, average=average: losses.focal_frequency_loss(maps(p), maps(t), average=average)
    for average in (True, False)
  ]

  def one(loss):
    return jax.value_and_grad(lambda p: loss(p, target).sum())(pred)

  return [one(loss) for loss in (*REGRESSIONS, *spectra)]


@given(size=st.sampled_from([1e-20, 1e-6, 1.0, 1e6, 1e15]), b=st.sampled_from([1, 3]))
@few
def test_finite_at_any_size(size, b):
  x = size * draw((b, 3, 4))
  for pred, target in ((x, 0 * x), (x, x), (0 * x, 0 * x)):
    for leaf in jax.tree.leaves(everything(pred, target)):
      assert np.isfinite(leaf).all()
  assert all(value == 0 for value, _ in everything(x, x))


@given(scale=st.floats(0.01, 100))
@few
def test_scaling(scale):
  x, y = draw((3, 4, 5)), draw((3, 4, 5), 1)
  assert np.allclose(
    losses.masked_l1(scale * x, scale * y), scale * losses.masked_l1(x, y), rtol=1e-4
  )
  want = scale**2 * losses.masked_l2(x, y)
  assert np.allclose(losses.masked_l2(scale * x, scale * y), want, rtol=1e-4)
  got = losses.masked_smooth_l1(scale * x, scale * y, beta=scale)
  assert np.allclose(got, scale * losses.masked_smooth_l1(x, y), rtol=1e-4)


def test_focal_l1_limits():
  x, zero = jnp.full((1, 1, 1), 300.0), jnp.zeros((1, 1, 1))
  np.testing.assert_allclose(losses.masked_focal_l1(x, zero), 300.0, rtol=1e-6)  # weight 1 far away
  np.testing.assert_allclose(losses.masked_focal_l1(x * 1e-5, zero), 9e-7, rtol=1e-4)  # 0.1·e²


def test_two_equal_images_have_the_spectrum_of_one():
  x, y = draw((1, 6, 4, 3)), draw((1, 6, 4, 3), 1)
  twice = [jnp.concatenate([a, a]) for a in (x, y)]
  one = losses.focal_frequency_loss(x, y)
  np.testing.assert_allclose(losses.focal_frequency_loss(*twice), one, rtol=1e-6)
  # Opposite errors cancel in the mean of the batch, and only there.
  opposite = jnp.concatenate([x - y, y - x])
  assert losses.focal_frequency_loss(opposite, 0 * opposite) < 1e-12
  assert losses.focal_frequency_loss(opposite, 0 * opposite, average=False).min() > 0.1


def test_focal_frequency_with_matrix_one_is_the_pixels_error():
  x, y = draw((3, 6, 4, 2)), draw((3, 6, 4, 2), 1)
  got = losses.focal_frequency_loss(x, y, matrix=jnp.ones((6, 4, 2)))
  np.testing.assert_allclose(got, np.square((x - y).mean(0)).mean(), rtol=1e-5)
  each = losses.focal_frequency_loss(x, y, average=False, matrix=jnp.ones((3, 6, 4, 2)))
  np.testing.assert_allclose(each, np.square(x - y).mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("average", [True, False])
def test_the_frequencies_own_weight_is_a_constant_of_the_gradient(average):
  x, y = draw((2, 6, 4, 2)), draw((2, 6, 4, 2), 1)
  error = (x - y).mean(0) if average else x - y
  weight = jnp.log1p(jnp.abs(jnp.fft.fft2(error, axes=(-3, -2), norm="ortho")))

  def slope(**o):
    return jax.grad(lambda x: losses.focal_frequency_loss(x, y, average=average, **o).sum())(x)

  np.testing.assert_allclose(slope(), slope(matrix=weight / weight.max()), atol=1e-7)


def test_regions():
  logits, regions = draw((2, 3, 5, 4)), draw((2, 3, 5, 4), 1) > 0
  want = losses.region_bce(logits, regions)
  turned = losses.region_bce(logits[:, ::-1], regions[:, ::-1])
  np.testing.assert_allclose(turned, want, rtol=1e-6)  # regions have no order
  none = losses.region_bce(logits[:, :0], regions[:, :0])
  np.testing.assert_array_equal(none, [0, 0])
  assert losses.region_bce(100 * jnp.where(regions, 1.0, -1.0), regions).max() == 0


X = jnp.ones((2, 3, 4))
MAPS = jnp.ones((2, 4, 4, 3))
BAD = {
  "pred must be an array": (TypeError, lambda: losses.masked_l2([1.0], X)),
  "pred .* must be of kind float": (TypeError, lambda: losses.masked_l1(X.astype(int), X)),
  "target must have shape": (ValueError, lambda: losses.masked_l2(X, X[..., :1])),
  "pred must have shape": (ValueError, lambda: losses.masked_smooth_l1(X[0], X)),
  "weights must have shape": (ValueError, lambda: losses.masked_l2(X, X, jnp.ones((3, 2)))),
  "weights must be an array": (TypeError, lambda: losses.masked_l2(X, X, 1.0)),
  "beta must be a positive": (ValueError, lambda: losses.masked_smooth_l1(X, X, beta=0.0)),
  "gamma must be a positive": (ValueError, lambda: losses.masked_focal_l1(X, X, gamma=-1)),
  "over must be": (ValueError, lambda: losses.masked_l2(X, X, over="batches")),
  "alpha must be a positive": (
    ValueError,
    lambda: losses.focal_frequency_loss(MAPS, MAPS, alpha=0),
  ),
  "matrix must have shape": (
    ValueError,
    lambda: losses.focal_frequency_loss(MAPS, MAPS, matrix=jnp.ones((4, 4))),
  ),
  "weights must have shape .b h w 1.": (
    ValueError,
    lambda: losses.inpainting_l2(MAPS, MAPS, MAPS),
  ),
  "regions must have shape": (ValueError, lambda: losses.region_bce(MAPS, MAPS[:1])),
  "background must be": (ValueError, lambda: losses.region_bce(MAPS, MAPS, background=0.0)),
  "z must have shape": (ValueError, lambda: losses.second_moment_uniformity(X)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
  error, call = BAD[message]
  with pytest.raises(error, match=message):
    call()


def test_one_example_zero_vectors_duplicates():
  assert losses.second_moment_uniformity(draw((1, 5))).round(5) == 1
  value, gradient = jax.value_and_grad(lambda z: losses.second_moment_uniformity(z).sum())(
    jnp.zeros((3, 5)).at[1:].set(1.0)
  )
  np.testing.assert_allclose(value, 4 / 3, rtol=1e-6)
  assert np.isfinite(gradient).all()
