"""Colour operations on RGB images [h w 3], float32 on the 0…1 scale."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def luma(image: jax.Array) -> jax.Array:
  """Grey value: [h w 3] -> [h w 1]."""
  red, green, blue = image[..., :1], image[..., 1:2], image[..., 2:]
  return 0.299 * red + 0.587 * green + 0.114 * blue


def jitter(image: jax.Array, u: jax.Array, strength: Sequence[float]) -> jax.Array:
  """Brightness, contrast, saturation and hue in random order (torchvision's definitions), from
  uniforms u [8]: four strengths, then four whose order is that of the operations.

  The first three blend the image with black, its mean grey, its grey. In a batch every example has
  another order: each of the four places computes one blend and one turn of hue, and selects.
  """
  image = jnp.clip(image, 0.0, 1.0)
  low = jnp.array([max(0.0, 1 - s) for s in strength[:3]])
  weight = low + (1 + jnp.array(strength[:3]) - low) * u[:3]
  turn = strength[3] * (2 * u[3] - 1)
  for kind in jnp.argsort(u[4:]):
    grey = luma(image)
    other = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, grey.mean(), grey))
    w = weight[jnp.minimum(kind, 2)]
    blended = jnp.clip(w * image + (1 - w) * other, 0.0, 1.0)
    turned = turn_hue(image, turn) if strength[3] else image
    image = jnp.where(kind == 3, turned, blended)
  return image


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


def solarise(image: jax.Array, threshold: float) -> jax.Array:
  """Values from the threshold on are inverted."""
  return jnp.where(image >= threshold, 1 - image, image)
