"""Views on the host, as TensorFlow operations: `draw(key) -> parameters`, `apply(image,
parameters)`.

Keys are int64 [2]; every random operation is stateless with `alg="philox"`, so that a view is a
function of (seed, epoch, index). TensorFlow is imported on first use.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ssljax.data.resize import resize as numpy_resize
from ssljax.data.tensorflow import load

TRIES = 10


class View(NamedTuple):
  """A view of one image `[h w c] -> [size c]`, or no change at all (`keep`: everything None).

  `draw(key [2]) -> parameters`. `window(h, w, parameters) -> y, x, height, width` is the part of
  the image that is used, so that JPEGs are cropped while decoding; `finish(part, parameters)` does
  the rest; `apply(image, parameters)` is both. `colour`: needs RGB.
  """

  draw: Callable | None = None
  apply: Callable | None = None
  size: tuple[int, int] | None = None
  colour: bool = False
  window: Callable | None = None
  finish: Callable | None = None


def keep() -> View:
  """No change: for arrays that have the right size."""
  return View()


def crop_flip(
  *,
  size: Sequence[int] = (224, 224),
  scale: Sequence[float] = (0.2, 1.0),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
  method: str = "bicubic",
  flip: bool = True,
  jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
) -> View:
  """Inception crop (torchvision's rule: 10 tries, log-uniform ratio, clamped centre), flip, colour
  jitter.

  size (height, width); scale: area of the crop; ratio: width / height; method: bicubic or
  bilinear, both antialiased; jitter: brightness, contrast, saturation, hue as in torchvision, in
  random order, after the crop.
  """
  size = _size(size)
  _range("scale", scale)
  _range("ratio", ratio)
  _method(method)
  if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
    raise ValueError(f"jitter {jitter}: four numbers >= 0 are needed, the last (hue) at most 0.5")

  def draw(key):
    tf = load()
    u = tf.random.stateless_uniform([4 * TRIES + 9], key, alg="philox")
    crop = tf.cast(tf.reshape(u[: 4 * TRIES], [4, TRIES]), tf.float64)
    return {"crop": crop, "flip": u[4 * TRIES], "colour": u[4 * TRIES + 1 :]}

  def window(height, width, drawn):
    return inception_window(height, width, drawn["crop"], scale, ratio)

  def finish(part, drawn):
    # Mirrored while resizing: a reverse of its own took 0.06 ms of 0.8.
    mirrored = drawn["flip"] < 0.5 if flip else False
    image = resize(part, size, method, rounded=not any(jitter), mirrored=mirrored)
    if any(jitter):
      image = colour_jitter(image, drawn["colour"], jitter, part.dtype)
      image = to_dtype(image, part.dtype)
    return image

  return View(draw, _applied(window, finish), size, any(jitter), window, finish)


def resize_crop(*, size: Sequence[int], resize: int = 0, method: str = "bicubic") -> View:
  """Evaluation view: shorter side to `resize`, then the central crop of `size` (height, width).

  `resize` 0 is 256/224 of the size. A size that is not square is covered with the same margin.
  """
  size = _size(size)
  _method(method)
  margin = resize / min(size) if resize else 256 / 224
  if margin < 1:
    raise ValueError(f"resize {resize} is smaller than the crop {size}")

  def finish(image, drawn):
    tf = load()
    shape = tf.cast(tf.shape(image)[:2], tf.float64)
    cover = tf.constant([margin * s for s in size], tf.float64)
    factor = tf.reduce_max(cover / shape)
    target = tf.maximum(tf.cast(shape * factor + 1e-6, tf.int32), size)
    image = resize_to(image, target, method, rounded=True)
    corner = tf.cast(tf.round((target - size) / 2), tf.int32)
    image = tf.slice(image, tf.concat([corner, [0]], 0), [*size, -1])
    return tf.ensure_shape(image, [*size, None])

  return View(lambda key: {}, finish, size, False, None, finish)


def inception_window(height, width, u, scale, ratio):
  """Torchvision's RandomResizedCrop geometry from uniforms [4 tries]: area, ratio, row, column ->
  y x h w."""
  tf = load()
  h, w = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
  area = h * w * (scale[0] + (scale[1] - scale[0]) * u[0])
  low, high = math.log(ratio[0]), math.log(ratio[1])
  aspect = tf.exp(low + (high - low) * u[1])
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
  """Antialiased resize, in NumPy: float32, or `rounded` to the dtype of the image; `mirrored`: left
  for right."""
  tf = load()
  small = rounded and image.dtype == tf.uint8

  def run(image, size, mirrored):
    return numpy_resize(image, tuple(size.tolist()), method, small, bool(mirrored))

  dtype = tf.uint8 if small else tf.float32
  out = tf.numpy_function(run, [image, size, mirrored], dtype, stateful=False)
  out = tf.ensure_shape(out, [None, None, image.shape[-1]])
  return to_dtype(out, image.dtype) if rounded and not small else out


def to_dtype(image, dtype):
  """Back to the source's dtype: integers are rounded and clipped to their range."""
  tf = load()
  if dtype.is_integer:
    # A cast cuts towards zero: adding one half rounds, in a third of the time of tf.round.
    image = image + 0.5 if dtype.min == 0 else tf.floor(image + 0.5)
    image = tf.clip_by_value(image, float(dtype.min), float(dtype.max))
  return tf.cast(image, dtype)


def colour_jitter(image, u, jitter, dtype):
  """Brightness, contrast, saturation and hue in random order (torchvision's definitions), u [8]
  uniforms."""
  tf = load()
  top = float(dtype.max) if dtype.is_integer else 1.0
  low = [max(0.0, 1 - j) for j in jitter[:3]]
  factor = [lo + (1 + j - lo) * u[i] for i, (lo, j) in enumerate(zip(low, jitter[:3]))]
  turn = jitter[3] * (2 * u[3] - 1)
  image = tf.clip_by_value(image / top, 0.0, 1.0)

  def grey(x):
    return tf.tensordot(x, tf.constant([0.299, 0.587, 0.114]), 1)[..., None]

  def blend(x, other, weight):
    return tf.clip_by_value(weight * x + (1 - weight) * other, 0.0, 1.0)

  steps = [
    lambda x: blend(x, 0.0, factor[0]),
    lambda x: blend(x, tf.reduce_mean(grey(x)), factor[1]),
    lambda x: blend(x, grey(x), factor[2]),
    lambda x: tf.image.adjust_hue(x, turn) if jitter[3] else x,
  ]
  order = tf.argsort(u[4:])
  for place in range(4):
    image = tf.switch_case(order[place], [lambda f=f, x=image: f(x) for f in steps])
  return image * top


def _applied(window, finish):
  def apply(image, drawn):
    shape = load().shape(image)
    y, x, h, w = window(shape[0], shape[1], drawn)
    return finish(image[y : y + h, x : x + w], drawn)

  return apply


def _size(size) -> tuple[int, int]:
  size = (size, size) if isinstance(size, int) else tuple(int(s) for s in size)
  if len(size) != 2 or min(size) < 1:
    raise ValueError(f"view size {size}: (height, width) in pixels is needed")
  return size


def _range(name, pair):
  if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
    raise ValueError(f"{name} {tuple(pair)}: (low, high) with 0 < low <= high is needed")


def _method(method):
  if method not in ("bicubic", "bilinear"):
    raise ValueError(f"unknown resize method {method!r}: there are 'bicubic', 'bilinear'")
