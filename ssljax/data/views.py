"""Views on the host, as TensorFlow operations: `draw(key) -> parameters`, `apply(image,
parameters)`.

Keys are int64 [2]; every random operation is stateless with `alg="philox"`, so that a view is a
function of (seed, epoch, index). TensorFlow is imported on first use.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ssljax.data import colour as colour_lib
from ssljax.data.colour import Colour
from ssljax.data.crop import LARGE, TRIES, inception_window, resize, resize_to, to_dtype
from ssljax.data.resize import resize as numpy_resize
from ssljax.data.tensorflow import load


class View(NamedTuple):
  """A view of one image `[h w c] -> [size c]`, or no change at all (`keep`: everything None).

  `draw(key [2]) -> parameters`. `window(h, w, parameters) -> y, x, height, width` is the part of
  the image that is used, so that JPEGs are cropped while decoding; `finish(part, parameters)` does
  the rest; `apply(image, parameters)` is both. `colour`: what needs RGB, and how it is switched
  off. `direct(part, parameters, out)`: `finish` without TensorFlow, to the same bits, from uint8
  [h w c] into `out` [size c]; None where there is no such thing. `patch`: the patches that the view
  is made of, where it is, which must be the encoder's.
  """

  draw: Callable | None = None
  apply: Callable | None = None
  size: tuple[int, int] | None = None
  colour: tuple[str, str] | None = None
  window: Callable | None = None
  finish: Callable | None = None
  direct: Callable | None = None
  patch: tuple[int, ...] | None = None


class Views(NamedTuple):
  """Several views of each example: what each leaf of the batch is made of.

  A tuple of views is stacked, [v size c], a single one is not: {"image": a}, {"views": (a, b)},
  {"global": (a, b), "local": (c,) * 8}.

  `boxes`: beside them the leaf `boxes`, float32 [v 4] of all views, leaf by leaf: where in the
  picture, upright, the view's top, left, bottom and right edges lie, in units of the picture's
  longer side. A mirrored view has its left edge on the right of its right one.
  """

  leaves: Mapping[str, Any]
  boxes: bool = False

  def each(self) -> list[Any]:
    """All views, leaf by leaf."""
    groups = [[v] if isinstance(v, View) else v for v in self.leaves.values()]
    return [view for group in groups for view in group]

  def shapes(self, image: Sequence) -> dict[str, tuple]:
    """Shape of each leaf of one example; image: (h, w, c) of the source, where a view keeps it."""

    def shape(view):
      return (*(view.size or image[:-1]), image[-1])

    return {
      leaf: shape(views) if isinstance(views, View) else (len(views), *shape(views[0]))
      for leaf, views in self.leaves.items()
    }

  def beside(self) -> dict[str, tuple[tuple, str]]:
    """What there is beside pictures: leaf -> shape, type."""
    return {"boxes": ((len(self.each()), 4), "float32")} if self.boxes else {}

  def draw(self, key) -> tuple:
    """Parameters of each view. The first has the example's own key, the others keys beside it."""
    return tuple(
      view.draw(key + [n << 32, 0]) if view.draw else {} for n, view in enumerate(self.each())
    )

  def grouped(self, made: Sequence) -> dict:
    """Finished views, in the order of `each`, as leaves."""
    rest = iter(made)
    return {
      leaf: next(rest) if isinstance(views, View) else load().stack([next(rest) for _ in views])
      for leaf, views in self.leaves.items()
    }


def recipe_of(views: View | Views | None) -> Views:
  """The recipe of a batch: a single view, or none, makes the leaf `image`."""
  return views if isinstance(views, Views) else Views({"image": views or View()})


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
  jitter_probability: float = 1.0,
  gray: float = 0.0,
  blur: float = 0.0,
) -> View:
  """Inception crop (torchvision's rule: 10 tries, log-uniform ratio, clamped centre), flip, colour
  jitter, grey, blur.

  size (height, width); scale: area of the crop; ratio: width / height; method: bicubic or
  bilinear, both antialiased; jitter: brightness, contrast, saturation, hue as in torchvision, in
  random order, after the crop. gray and blur are probabilities; blur is that of `two_views`.
  """
  size = _size(size)
  chances = dict(jitter_probability=(jitter_probability,), gray=(gray,), blur=(blur,))
  _probabilities(chances, 0.0, 1, "1 view")
  kernel = colour_lib.kernel_size(size) if blur else 1
  colour = Colour(jitter, jitter_probability, gray, blur, kernel=kernel)
  return _crop(size, scale, ratio, method, 0.5 if flip else 0.0, colour)


def two_views(
  *,
  size: Sequence[int] = (224, 224),
  scale: Sequence[float] = (0.08, 1.0),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
  method: str = "bicubic",
  flip: float = 0.5,
  jitter: Sequence[float] = (0.8, 0.8, 0.8, 0.2),
  jitter_probability: Sequence[float] = (0.8, 0.8),
  gray: Sequence[float] = (0.2, 0.2),
  blur: Sequence[float] = (0.5, 0.5),
  blur_sigma: Sequence[float] = (0.1, 2.0),
  blur_kernel: int = 0,
  solarize: Sequence[float] = (0.0, 0.0),
  solarize_threshold: float = 0.5,
  boxes: bool = False,
) -> Views:
  """Two views of each image, the leaf `views` [b 2 size c]: inception crop, jitter, grey, blur,
  solarise, flip, in this order. The defaults are SimCLR's (Chen et al. 2020, arXiv 2002.05709).

  jitter_probability, gray, blur, solarize: one probability for each view, so that BYOL's pair is
  blur=(1, .1), solarize=(0, .2). The flip commutes with all but the crop. blur_sigma: range, in
  pixels; blur_kernel: pixels, odd, 0: a tenth of the height (224: 23, 32: 3), as in SimCLR and
  BYOL; solarize_threshold on the 0…1 scale; boxes: the leaf of `Views`, too.
  """
  each = dict(jitter_probability=jitter_probability, gray=gray, blur=blur, solarize=solarize)
  _probabilities(each, flip, 2, "2 views")
  kernel = colour_lib.kernel_size(_size(size), blur_kernel)
  shared: dict[str, Any] = dict(sigma=blur_sigma, kernel=kernel, threshold=solarize_threshold)
  pair: list[dict[str, Any]] = [dict(zip(each, values)) for values in zip(*each.values())]
  crops = [_crop(size, scale, ratio, method, flip, Colour(jitter, **one, **shared)) for one in pair]
  return Views({"views": tuple(crops)}, boxes)


def multi_crop(
  *,
  size: Sequence[int] = (224, 224),
  scale: Sequence[float] = (0.4, 1.0),
  local_views: int = 8,
  local_size: Sequence[int] = (96, 96),
  local_scale: Sequence[float] = (0.05, 0.4),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
  method: str = "bicubic",
  flip: float = 0.5,
  jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
  jitter_probability: Sequence[float] = (0.8, 0.8, 0.8),
  gray: Sequence[float] = (0.2, 0.2, 0.2),
  blur: Sequence[float] = (1.0, 0.1, 0.5),
  blur_sigma: Sequence[float] = (0.1, 2.0),
  blur_kernel: int = 13,
  solarize: Sequence[float] = (0.0, 0.2, 0.0),
  solarize_threshold: float = 0.5,
  boxes: bool = False,
) -> Views:
  """Two large views of each image and several small ones: `global` [b 2 size c] and, unless
  local_views is 0, `local` [b local_views local_size c]. Operations in the order of `two_views`.

  The defaults are DINO's (Caron et al. 2021, arXiv 2104.14294). SwAV (2006.09882): six local views,
  scale (.14, 1), local_scale (.05, .14), jitter (.8, .8, .8, .2), blur .5 and no solarise for all.
  DINOv2 (2304.07193): scale (.32, 1), local_scale (.05, .32), blur (0, .9, .5), blur_kernel 9.

  jitter_probability, gray, blur, solarize: one probability for the first global view, the second
  and the local ones. blur_kernel: pixels, odd; 13 is three deviations of the widest blur (Pillow,
  which DINO and SwAV blur with, does not cut); 0: a tenth of each view's height. boxes: the leaf of
  `Views`, too.
  """
  each = dict(jitter_probability=jitter_probability, gray=gray, blur=blur, solarize=solarize)
  _probabilities(each, flip, 3, "first global, second global and local views")
  size, local_size = _size(size), _size(local_size)
  if local_views < 0:
    raise ValueError(f"local_views {local_views}: 0 or more are needed")
  if local_views and (local_size[0] > size[0] or local_size[1] > size[1]):
    raise ValueError(f"local_size {local_size} is larger than the global views' size {size}")
  sides, scales = (size, size, local_size), (scale, scale, local_scale)
  crops = []
  for i, values in enumerate(zip(*each.values())):
    kernel = colour_lib.kernel_size(sides[i], blur_kernel)
    shared: dict[str, Any] = dict(sigma=blur_sigma, kernel=kernel, threshold=solarize_threshold)
    chosen: dict[str, Any] = dict(zip(each, values))
    if i < 2 or local_views:
      colour = Colour(jitter, **chosen, **shared)
      crops.append(_crop(sides[i], scales[i], ratio, method, flip, colour))
  local = {"local": (crops[2],) * local_views} if local_views else {}
  return Views({"global": (crops[0], crops[1])} | local, boxes)


def _probabilities(each: Mapping[str, Sequence[float]], flip: float, count: int, what: str) -> None:
  for name, values in each.items():
    if len(values) != count or not all(0 <= p <= 1 for p in values):
      raise ValueError(f"{name} {tuple(values)}: one probability for each of the {what} is needed")
  if not 0 <= flip <= 1:
    raise ValueError(f"flip {flip}: a probability from 0 to 1 is needed")


def _crop(size, scale, ratio, method, flip: float, colour: Colour) -> View:
  """Inception crop, colours, flip with a probability; draws what it needs from one key."""
  size = _size(size)
  _range("scale", scale)
  _range("ratio", ratio)
  _method(method)
  colour_lib.check(colour, size)
  changes = colour_lib.changes(colour)

  def draw(key):
    tf = load()
    u = tf.random.stateless_uniform([4 * TRIES + 1 + colour_lib.DRAWS], key, alg="philox")
    crop = tf.cast(tf.reshape(u[: 4 * TRIES], [4, TRIES]), tf.float64)
    drawn = {"crop": crop, "flip": u[4 * TRIES] < flip}
    return drawn | (colour_lib.draw(u[4 * TRIES + 1 :], colour) if changes else {})

  def window(height, width, drawn):
    return inception_window(height, width, drawn["crop"], scale, ratio)

  def finish(part, drawn):
    # Mirrored while resizing: a reverse of its own took 0.06 ms of 0.8.
    mirrored = drawn["flip"] if flip else False
    image = resize(part, size, method, rounded=not changes, mirrored=mirrored)
    if changes:
      image = colour_lib.alter(image, drawn, colour, part.dtype)
      image = to_dtype(image, part.dtype)
    return image

  def direct(part, drawn, out):
    numpy_resize(part, size, method, True, bool(flip) and bool(drawn["flip"]), out)

  return View(
    draw, applied(window, finish), size, colour_lib.needs_rgb(colour), window, finish,
    None if changes or math.prod(size) < LARGE else direct,
  )  # fmt: skip


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

  return View(lambda key: {}, finish, size, None, None, finish)


def applied(window, finish):
  """`View.apply` of a view of a window: (image [h w c], parameters) -> [size c]."""

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
