"""Colour operations of views: jitter, grey, blur, solarise, in this order, each with its own
probability.

`draw(u, colour) -> parameters` from uniforms, `alter(image, parameters, colour)`; images are
float32 [h w c] on the 0…1 scale. In a batch every example has other parameters, so that each
operation is computed for all and selected.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssljax.views.crop import separable

DRAWS = 13  # uniforms of one view


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


def draw(u: jax.Array, colour: Colour) -> dict[str, jax.Array]:
  """Parameters from uniforms [13]: what is done, with which factors, turn, order and sigma."""
  strength = jnp.array(colour.jitter)
  low = jnp.maximum(0.0, 1 - strength[:3])
  factors = low + (1 + strength[:3] - low) * u[:3]
  return {
    "jitter": u[8] < colour.jitter_probability,
    "factors": jnp.append(factors, strength[3] * (2 * u[3] - 1)),
    "order": jnp.argsort(u[4:8]),
    "gray": u[9] < colour.gray,
    "blur": u[10] < colour.blur,
    "sigma": colour.sigma[0] + (colour.sigma[1] - colour.sigma[0]) * u[11],
    "solarize": u[12] < colour.solarize,
  }


def alter(image: jax.Array, drawn: dict[str, jax.Array], colour: Colour) -> jax.Array:
  """The operations that were drawn, in order: [h w c] -> [h w c]."""
  if any(colour.jitter) and colour.jitter_probability:
    changed = jitter(image, drawn["factors"], drawn["order"], colour.jitter)
    image = jnp.where(drawn["jitter"], changed, image)
  if colour.gray:
    image = jnp.where(drawn["gray"], luma(image), image)
  if colour.blur:
    image = gaussian_blur(image, drawn["sigma"], colour.kernel, drawn["blur"])
  if colour.solarize:
    image = jnp.where(drawn["solarize"], solarise(image, colour.threshold), image)
  return image


def luma(image: jax.Array) -> jax.Array:
  """Brightness as seen: [h w 3] -> [h w 1]; the mean of other channels."""
  if image.shape[-1] != 3:
    return image.mean(-1, keepdims=True)
  red, green, blue = image[..., :1], image[..., 1:2], image[..., 2:]
  return 0.299 * red + 0.587 * green + 0.114 * blue


def jitter(
  image: jax.Array, factors: jax.Array, order: jax.Array, strengths: Sequence[float]
) -> jax.Array:
  """Brightness, contrast, saturation and hue in the order given (torchvision's definitions).

  factors [4]: three of brightness, contrast, saturation (1 = no change), hue in turns; order [4]: a
  permutation of 0…3. strengths: operations of strength 0 are left out. The first three blend the
  image with black, its mean grey, its grey: each place computes one blend and one turn of hue.
  """
  active = jnp.array([strength > 0 for strength in strengths])

  def change(image, kind):
    grey = luma(image)
    other = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, grey.mean(), grey))
    weight = factors[jnp.minimum(kind, 2)]
    changed = jnp.clip(weight * image + (1 - weight) * other, 0.0, 1.0)
    if strengths[3]:
      changed = jnp.where(kind == 3, turn_hue(image, factors[3]), changed)
    return jnp.where(active[kind], changed, image), None

  # A loop, not four copies: the program is compiled in a third of the time.
  return jax.lax.scan(change, jnp.clip(image, 0.0, 1.0), order)[0]


def turn_hue(image: jax.Array, turn: jax.Array) -> jax.Array:
  """Hue moved by `turn` (1 is the full circle), saturation and value kept: [h w 3] -> [h w 3]."""
  value, least = image.max(-1, keepdims=True), image.min(-1, keepdims=True)
  spread = value - least
  red, green, blue = image[..., :1], image[..., 1:2], image[..., 2:]
  scale = 1 / jnp.where(spread > 0, spread, 1.0)
  hue = jnp.where(
    value == red,
    (green - blue) * scale,
    jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
  )
  # A channel falls from `value` to `least` as the hue, in sixths, leaves its own third.
  k = (hue + 6 * turn + jnp.array([5.0, 3.0, 1.0])) % 6
  return value - spread * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)


def solarise(image: jax.Array, threshold: float = 0.5) -> jax.Array:
  """What is not darker than the threshold is inverted."""
  return jnp.where(image < threshold, image, 1 - image)


def kernel_size(size: Sequence[int], kernel: int = 0) -> int:
  """SimCLR's rule where `kernel` is 0: a tenth of the height, made odd (224: 23, 32: 3)."""
  return kernel or 2 * (size[0] // 10 // 2) + 1


def gaussian_blur(
  image: jax.Array, sigma: jax.Array, kernel: int, wanted: jax.Array | bool = True
) -> jax.Array:
  """Gaussian blur where `wanted`, sigma in pixels, cut to `kernel` pixels (odd); the border is
  mirrored. One matrix product for each axis."""
  height, width = image.shape[:2]
  rows, columns = _band(height, sigma, kernel), _band(width, sigma, kernel)
  # Selecting the matrix is cheaper than selecting the picture: unwanted, it changes nothing.
  rows, columns = (jnp.where(wanted, m, jnp.eye(len(m))) for m in (rows, columns))
  return separable(rows, columns, image)


def _band(n: int, sigma: jax.Array, kernel: int) -> jax.Array:
  """The blur of n places as a matrix [n n], in closed form: beyond a border lies the mirror image,
  without the border itself."""

  def gauss(distance):
    return jnp.where(abs(distance) <= kernel // 2, jnp.exp(-0.5 * (distance / sigma) ** 2), 0.0)

  to, of = jnp.arange(n)[:, None], jnp.arange(n)[None]
  before = jnp.where(of > 0, gauss(to + of), 0.0)
  after = jnp.where(of < n - 1, gauss(2 * (n - 1) - to - of), 0.0)
  total = gauss(jnp.arange(-(kernel // 2), kernel // 2 + 1)).sum()
  return (gauss(to - of) + before + after) / total
