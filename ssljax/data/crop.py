"""Random crops and antialiased resizing on the host, as TensorFlow operations.

TensorFlow is imported on first use.
"""

import math

from ssljax.data.resize import resize as numpy_resize
from ssljax.data.tensorflow import load

TRIES = 10
# Pixels of a view from which on its resize goes through NumPy and OpenCV even where nothing
# shrinks: a call into Python costs more than the whole of a picture of 32 x 32.
LARGE = 64 * 64


def inception_window(height, width, u, scale, ratio):
  """Torchvision's RandomResizedCrop geometry from uniforms [4 tries]: area, ratio, row, column ->
  y x h w."""
  tf = load()
  h, w = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
  area = h * w * (scale[0] + (scale[1] - scale[0]) * u[0])
  low, high = math.log(ratio[0]), math.log(ratio[1])
  # Padded to whole vector registers: the kernel's remainder has another exp, and in a batch other
  # tries would be in the remainder than in an example alone.
  aspect = tf.exp(tf.pad(low + (high - low) * u[1], [[0, -u.shape[1] % 16]]))[: u.shape[1]]
  ws, hs = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
  fits = (ws > 0) & (ws <= w) & (hs > 0) & (hs <= h)
  first = tf.argmax(fits)
  # The fallback: the whole image, its longer side cut to the nearest allowed ratio.
  wf = tf.minimum(w, tf.round(h * ratio[1]))
  hf = tf.minimum(h, tf.round(w / ratio[0]))
  some = tf.reduce_any(fits)
  hc, wc = tf.where(some, hs[first], hf), tf.where(some, ws[first], wf)
  y = tf.where(some, tf.floor(u[2][first] * (h - hc + 1)), tf.floor((h - hc) / 2))
  x = tf.where(some, tf.floor(u[3][first] * (w - wc + 1)), tf.floor((w - wc) / 2))
  return tuple(tf.cast(v, tf.int32) for v in (y, x, hc, wc))


def resize(image, size, method, rounded=False, mirrored=False):
  """Antialiased resize to a static size: [h w c] -> [size c], as `resize_to`."""
  out = resize_to(image, size, method, rounded, mirrored)
  return load().ensure_shape(out, [*size, image.shape[-1]])


def resize_to(image, size, method, rounded=False, mirrored=False):
  """Antialiased resize: float32, or `rounded` to the image's dtype; `mirrored`: left for right.

  Where neither axis of a small view shrinks nothing needs antialiasing: TensorFlow's plain kernel
  gives the same values without a call into Python.
  """
  tf = load()
  small = rounded and image.dtype == tf.uint8
  large = isinstance(size, tuple) and math.prod(size) >= LARGE

  def plain():
    out = tf.image.resize(image, size, method=method, antialias=False)
    out = to_dtype(out, image.dtype) if rounded else out
    if mirrored is False:
      return out
    return tf.cond(mirrored, lambda: tf.reverse(out, [1]), lambda: out)

  def shrunk():
    def run(image, size, mirrored):
      return numpy_resize(image, tuple(size.tolist()), method, small, bool(mirrored))

    dtype = tf.uint8 if small else tf.float32
    out = tf.numpy_function(run, [image, size, mirrored], dtype, stateful=False)
    out = tf.ensure_shape(out, [None, None, image.shape[-1]])
    return to_dtype(out, image.dtype) if rounded and not small else out

  return shrunk() if large else tf.cond(tf.reduce_any(tf.shape(image)[:2] > size), shrunk, plain)


def to_dtype(image, dtype):
  """Back to the source's dtype: integers are rounded and clipped to their range."""
  tf = load()
  if dtype.is_integer:
    # A cast cuts towards zero: adding one half rounds, in a third of the time of tf.round.
    image = image + 0.5 if dtype.min == 0 else tf.floor(image + 0.5)
    image = tf.clip_by_value(image, float(dtype.min), float(dtype.max))
  return tf.cast(image, dtype)
