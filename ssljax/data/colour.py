"""Colour operations of views, on the host: jitter, grey, blur, solarise.

As in the originals, in this order, each with its own probability. `draw(u, colour) -> parameters`
from uniforms, `alter(image, parameters, colour, dtype)`; the operations alone take images on the
0…1 scale: float32 [h w c].
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ssljax.data.tensorflow import load

DRAWS = 13  # uniforms of one view
LUMA = (0.299, 0.587, 0.114)


class Colour(NamedTuple):
  """What happens to the colours of one view. jitter: strengths of brightness, contrast,
  saturation, hue. gray, blur, solarize: probabilities. kernel: pixels, odd."""

  jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
  jitter_probability: float = 1.0
  gray: float = 0.0
  blur: float = 0.0
  sigma: Sequence[float] = (0.1, 2.0)
  kernel: int = 1
  solarize: float = 0.0
  threshold: float = 0.5


def changes(colour: Colour) -> bool:
  """Whether any operation can happen."""
  return any(colour.jitter) or max(colour.gray, colour.blur, colour.solarize) > 0


def needs_rgb(colour: Colour) -> tuple[str, str] | None:
  """The operation that other channels do not allow, and what would have to be zero."""
  if any(colour.jitter[2:]) and colour.jitter_probability:
    return "colour jitter", "saturation and hue of jitter"
  return ("grayscale", "gray") if colour.gray else None


def check(colour: Colour, size: Sequence[int]):
  """Raises ValueError where a number makes no sense for views of this size."""
  jitter, sigma, kernel = colour.jitter, colour.sigma, colour.kernel
  if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
    raise ValueError(f"jitter {jitter}: four numbers >= 0 are needed, the last (hue) at most 0.5")
  if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
    raise ValueError(f"blur_sigma {tuple(sigma)}: (low, high) with 0 < low <= high is needed")
  if not 0 <= colour.threshold <= 1:
    raise ValueError(f"solarize_threshold {colour.threshold}: a number from 0 to 1 is needed")
  if colour.blur and (kernel % 2 == 0 or not 0 < kernel // 2 < min(size)):
    raise ValueError(
      f"blur_kernel {kernel}: an odd number of pixels, 3 or more and below twice the view"
      f" {tuple(size)}, is needed; blur=(0., 0.) switches it off"
    )


def draw(u, colour: Colour) -> dict:
  """Parameters from uniforms [13]: what is done, with which factors, turn, order and sigma."""
  tf = load()
  low = [max(0.0, 1 - j) for j in colour.jitter[:3]]
  factors = [lo + (1 + j - lo) * u[i] for i, (lo, j) in enumerate(zip(low, colour.jitter[:3]))]
  return {
    "jitter": u[8] < colour.jitter_probability,
    "factors": tf.stack([*factors, colour.jitter[3] * (2 * u[3] - 1)]),
    "order": tf.argsort(u[4:8]),
    "gray": u[9] < colour.gray,
    "blur": u[10] < colour.blur,
    "sigma": colour.sigma[0] + (colour.sigma[1] - colour.sigma[0]) * u[11],
    "solarize": u[12] < colour.solarize,
  }


def alter(image, drawn, colour: Colour, dtype):
  """The operations that were drawn, in order, on an image of the source's scale: [h w c] float32.

  Floating-point images are taken to be on the 0…1 scale.
  """
  top = float(dtype.max) if dtype.is_integer else 1.0
  image = image / top
  if any(colour.jitter) and colour.jitter_probability:
    jittered = lambda x: jitter(x, drawn["factors"], drawn["order"], colour.jitter)  # noqa: E731
    image = _sometimes(colour.jitter_probability, drawn["jitter"], jittered, image)
  if colour.gray:
    image = _sometimes(colour.gray, drawn["gray"], grey, image)
  if colour.blur:
    blurred = lambda x: gaussian_blur(x, drawn["sigma"], colour.kernel)  # noqa: E731
    image = _sometimes(colour.blur, drawn["blur"], blurred, image)
  if colour.solarize:
    solar = lambda x: solarise(x, colour.threshold)  # noqa: E731
    image = _sometimes(colour.solarize, drawn["solarize"], solar, image)
  return image * top


def _sometimes(probability, chosen, operation, image):
  """The operation where it was chosen; without a branch where it always is."""
  if probability == 1:
    return operation(image)
  return load().cond(chosen, lambda: operation(image), lambda: image)


def jitter(image, factors, order, strengths: Sequence[float] = (1.0, 1.0, 1.0, 0.5)):
  """Brightness, contrast, saturation and hue in the order given (torchvision's definitions).

  factors [4]: three of brightness, contrast, saturation (1 = no change), hue in turns; order [4]: a
  permutation of 0…3. strengths: operations of strength 0 are left out.
  """
  tf = load()

  def blend(x, other, weight):
    return tf.clip_by_value(weight * x + (1 - weight) * other, 0.0, 1.0)

  steps = [
    lambda x: blend(x, 0.0, factors[0]),
    lambda x: blend(x, tf.reduce_mean(luma(x)), factors[1]),
    lambda x: blend(x, luma(x), factors[2]),
    lambda x: tf.image.adjust_hue(x, factors[3]),
  ]
  steps = [step if strength else lambda x: x for step, strength in zip(steps, strengths)]
  image = tf.clip_by_value(image, 0.0, 1.0)  # bicubic resizing goes beyond

  def step(place, x):
    return place + 1, tf.switch_case(order[place], [lambda f=f: f(x) for f in steps])

  # A loop: four branches to build, not sixteen; they were most of the time to the first batch.
  return tf.while_loop(lambda place, x: place < 4, step, [0, image])[1]


def luma(image):
  """Brightness as seen: [h w 3] -> [h w 1]; the mean of other channels."""
  tf = load()
  if image.shape[-1] != 3:
    return tf.reduce_mean(image, -1, keepdims=True)
  return tf.tensordot(image, tf.constant(LUMA), 1)[..., None]


def grey(image):
  """No colour: [h w 3], three times the same."""
  return load().broadcast_to(luma(image), load().shape(image))


def solarise(image, threshold: float = 0.5):
  """What is not darker than the threshold is inverted."""
  return load().where(image < threshold, image, 1 - image)


def kernel_size(size: Sequence[int], kernel: int = 0) -> int:
  """SimCLR's rule where `kernel` is 0: a tenth of the height, made odd (224: 23, 32: 3)."""
  return kernel or 2 * (size[0] // 10 // 2) + 1


def gaussian_blur(image, sigma, kernel: int):
  """Gaussian blur, sigma in pixels, cut to `kernel` pixels (odd); the border is mirrored.

  Each axis is one product of matrices: at 224 x 224 in 1.5 ms, 2.5 ms as a depthwise convolution.
  """
  tf = load()
  side = kernel // 2
  place = tf.range(-side, side + 1, dtype=tf.float32)
  weight = tf.nn.softmax(-0.5 * tf.square(place / sigma))
  height, width, channels = image.shape

  def along(x, n):
    return tf.matmul(_band(weight, n, side), tf.reshape(x, [n, -1]))

  image = tf.transpose(tf.reshape(along(image, height), image.shape), [1, 0, 2])
  return tf.transpose(tf.reshape(along(image, width), [width, height, channels]), [1, 0, 2])


def _band(weight, n: int, side: int):
  """The convolution of n places as a matrix [n n]: weights that fall outside come back mirrored."""
  to = np.arange(n)[:, None]
  source = np.abs(to + np.arange(-side, side + 1))
  source = np.where(source < n, source, 2 * (n - 1) - source)
  places = np.stack([np.broadcast_to(to, source.shape), source], -1).reshape(-1, 2)
  tf = load()
  return tf.scatter_nd(places, tf.tile(weight, [n]), [n, n])
