"""Random crops and antialiased resizing, as two small matrix products with static shapes.

On TPUs and GPUs products run at full float32 precision: with bfloat16 inputs a picture would lose
its last bits before it is seen.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

TRIES = 10


def inception_window(
  height: int, width: int, u: jax.Array, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[jax.Array, ...]:
  """Torchvision's RandomResizedCrop geometry from uniforms [4 tries]: area, ratio, row, column ->
  y, x, height, width, whole numbers in float32."""
  area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
  low, high = math.log(ratio[0]), math.log(ratio[1])
  aspect = jnp.exp(low + (high - low) * u[1])
  ws, hs = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
  fits = (ws > 0) & (ws <= width) & (hs > 0) & (hs <= height)
  first, some = jnp.argmax(fits), fits.any()
  # The fallback: the whole image, its longer side cut to the nearest allowed ratio.
  wf, hf = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
  h, w = jnp.where(some, hs[first], hf), jnp.where(some, ws[first], wf)
  y = jnp.where(some, jnp.floor(u[2][first] * (height - h + 1)), (height - hf) // 2)
  x = jnp.where(some, jnp.floor(u[3][first] * (width - w + 1)), (width - wf) // 2)
  return y, x, h, w


def resize_weights(
  out: int, size: int, start: jax.Array, length: jax.Array, method: str
) -> jax.Array:
  """Antialiased resize of the pixels start … start + length of `size` to `out`: float32 [out size].

  The definition of Pillow and of `tf.image.resize(antialias=True)`: half-pixel centres, the kernel
  stretched where it shrinks, nothing read beyond the crop, rows that sum to one.
  """
  step = length / out
  centre = (jnp.arange(out) + 0.5)[:, None] * step
  place = jnp.arange(size)[None] - start
  t = jnp.abs(place + 0.5 - centre) / jnp.maximum(step, 1.0)
  inside = (place >= 0) & (place < length)
  weight = jnp.where(inside, KERNELS[method](t), 0.0)
  return weight / weight.sum(1, keepdims=True)


def _cubic(t: jax.Array) -> jax.Array:
  """Keys (1981) with a = -1/2."""
  near = (1.5 * t - 2.5) * t * t + 1
  far = ((-0.5 * t + 2.5) * t - 4) * t + 2
  return jnp.where(t < 1, near, jnp.where(t < 2, far, 0.0))


KERNELS = {"bicubic": _cubic, "bilinear": lambda t: jnp.maximum(1 - t, 0.0)}


def resize_window(
  image: jax.Array,
  window: tuple[jax.Array, ...],
  size: tuple[int, int],
  method: str,
  mirrored: jax.Array | None = None,
) -> jax.Array:
  """A part of an image, resized and mirrored where asked: float32 [h w c] -> [size c]."""
  y, x, height, width = window
  rows = resize_weights(size[0], image.shape[0], y, height, method)
  columns = resize_weights(size[1], image.shape[1], x, width, method)
  if mirrored is not None:  # for free: the matrix is turned over, not the picture
    columns = jnp.where(mirrored, columns[::-1], columns)
  return separable(rows, columns, image)


def separable(rows: jax.Array, columns: jax.Array, image: jax.Array) -> jax.Array:
  """A linear map of rows and one of columns: [o h], [p w], [h w c] -> [o p c]."""
  exact = jax.lax.Precision.HIGHEST
  image = jnp.einsum("oh,hwc->owc", rows, image, precision=exact)
  return jnp.einsum("pw,owc->opc", columns, image, precision=exact)


def unit_scale(image: jax.Array) -> jax.Array:
  """Integers on the 0…1 scale, floats as they are: float32."""
  top = jnp.iinfo(image.dtype).max if jnp.issubdtype(image.dtype, jnp.integer) else 1
  return jnp.asarray(image, jnp.float32) / top
