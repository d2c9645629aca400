"""Colour operations against torchvision's, on the same parameters."""

import numpy as np
import pytest

from ssljax.data import colour

tf = pytest.importorskip("tensorflow")
torch = pytest.importorskip("torch")
functional = pytest.importorskip("torchvision.transforms.v2.functional")

STEPS = (
  functional.adjust_brightness,
  functional.adjust_contrast,
  functional.adjust_saturation,
  functional.adjust_hue,
)


@pytest.fixture(scope="module")
def image():
  """[h w 3] on the 0…1 scale, with greys and pure colours among the pixels."""
  made = np.random.default_rng(0).random((20, 27, 3)).astype(np.float32)
  made[0], made[1], made[2, :, 1:] = 0.4, 1.0, 0.0
  return made


def theirs(operation, image, *arguments):
  return operation(torch.tensor(image).permute(2, 0, 1), *arguments).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 1.8])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_factors(image, which, factor):
  factors = [factor if i == which else 1.0 for i in range(3)] + [0.0]
  ours = colour.jitter(tf.constant(image), factors, tf.range(4)).numpy()
  # Theirs takes 0.2989 for red, so that its grey of white is 0.9999.
  np.testing.assert_allclose(ours, theirs(STEPS[which], image, factor), atol=2e-4)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.07, 0.2])
def test_hue(image, turn):
  ours = colour.jitter(tf.constant(image), [1.0, 1.0, 1.0, turn], tf.range(4)).numpy()
  np.testing.assert_allclose(ours, theirs(functional.adjust_hue, image, turn), atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (1, 3, 2, 0)])
def test_jitter_in_order(image, order):
  factors, expected = [1.3, 0.6, 1.5, 0.13], image
  for step in order:
    expected = theirs(STEPS[step], expected, factors[step])
  ours = colour.jitter(tf.constant(image), factors, tf.constant(order)).numpy()
  np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_grey(image):
  expected = theirs(functional.rgb_to_grayscale, image, 3)
  np.testing.assert_allclose(colour.grey(tf.constant(image)), expected, atol=2e-4)


@pytest.mark.parametrize(("kernel", "sigma"), [(3, 0.1), (3, 2.0), (7, 1.1), (23, 2.0)])
def test_blur(image, kernel, sigma):
  expected = theirs(functional.gaussian_blur, image, [kernel, kernel], [sigma, sigma])
  ours = colour.gaussian_blur(tf.constant(image), tf.constant(sigma), kernel)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_solarise(image, threshold):
  expected = theirs(functional.solarize, image, threshold)
  np.testing.assert_allclose(colour.solarise(tf.constant(image), threshold), expected, atol=1e-6)
