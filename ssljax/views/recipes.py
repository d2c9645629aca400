"""Recipes of views, under the names and with the arguments of those in `ssljax.data.views`, which
checks the arguments."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssljax.views import colour as colour_lib
from ssljax.views.colour import Colour
from ssljax.views.crop import TRIES, inception_window, resize_window, unit_scale


class View(NamedTuple):
  """A view of one image: `draw(key) -> parameters`, `apply(image [h w c], parameters) -> float32
  [size c]`, integers on the 0…1 scale. `window(h, w, parameters) -> y, x, height, width` is the
  part of the image that is used."""

  draw: Callable
  apply: Callable
  window: Callable


class Views(NamedTuple):
  """The views of each example: what each leaf of the batch is made of.

  A tuple of views is stacked, [v size c], a single one is not: {"image": a}, {"views": (a, b)},
  {"global": (a, b), "local": (c,) * 8}. `boxes`: see `ssljax.data.views.Views`.
  """

  leaves: Mapping[str, Any]
  boxes: bool = False

  def each(self) -> list[View]:
    """All views, leaf by leaf."""
    groups = [[v] if isinstance(v, View) else v for v in self.leaves.values()]
    return [view for group in groups for view in group]

  def draw(self, key: jax.Array) -> tuple:
    """Parameters of each view. The first has the example's own key, the others keys beside it."""
    return tuple(
      view.draw(jax.random.fold_in(key, n) if n else key) for n, view in enumerate(self.each())
    )

  def apply(self, image: jax.Array, drawn: tuple) -> dict[str, jax.Array]:
    """Image [h w c] -> the leaves of one example."""
    rest = iter(drawn)
    made = {
      leaf: views.apply(image, next(rest))
      if isinstance(views, View)
      else _stacked(views, image, [next(rest) for _ in views])
      for leaf, views in self.leaves.items()
    }
    if self.boxes:
      sides = image.shape[:2]
      made["boxes"] = jnp.stack([_box(*pair, *sides) for pair in zip(self.each(), drawn)])
    return made


def _box(view: View, drawn: dict, height: int, width: int) -> jax.Array:
  """Where a view lies in an image of these sides, [4]; see `ssljax.data.views.Views`."""
  y, x, h, w = view.window(height, width, drawn)
  left, right = jnp.where(drawn["flip"], x + w, x), jnp.where(drawn["flip"], x, x + w)
  return jnp.stack([y, left, y + h, right]) / max(height, width)


def _stacked(views: Sequence[View], image: jax.Array, drawn: Sequence[dict]) -> jax.Array:
  """Several views of an image: [v size c]. Eight of one kind are compiled like one."""
  if len(set(views)) == 1:
    together = jax.tree.map(lambda *each: jnp.stack(each), *drawn)
    return jax.vmap(lambda one: views[0].apply(image, one))(together)
  return jnp.stack([view.apply(image, one) for view, one in zip(views, drawn)])


def keep() -> Views:
  """No change: for arrays that have the right size."""
  whole = View(
    lambda key: {}, lambda image, drawn: unit_scale(image), lambda h, w, drawn: (0, 0, h, w)
  )
  return Views({"image": whole})


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
) -> Views:
  """Inception crop, flip, colours: `image` [size c]. See `ssljax.data.views.crop_flip`."""
  kernel = colour_lib.kernel_size(_size(size)) if blur else 1
  colour = Colour(jitter, jitter_probability, gray, blur, kernel=kernel)
  return Views({"image": _crop(size, scale, ratio, method, 0.5 if flip else 0.0, colour)})


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
  """Two views of each image: `views` [2 size c]; inception crop, jitter, grey, blur, solarise,
  flip. See `ssljax.data.views.two_views`."""
  each = dict(jitter_probability=jitter_probability, gray=gray, blur=blur, solarize=solarize)
  kernel = colour_lib.kernel_size(_size(size), blur_kernel)
  shared: dict[str, Any] = dict(sigma=blur_sigma, kernel=kernel, threshold=solarize_threshold)
  pair: list[Any] = [dict(zip(each, values)) for values in zip(*each.values())]
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
  """Two large views and several small ones: `global` [2 size c] and `local` [local_views
  local_size c]. See `ssljax.data.views.multi_crop`."""
  each = dict(jitter_probability=jitter_probability, gray=gray, blur=blur, solarize=solarize)
  sides, scales = (_size(size), _size(size), _size(local_size)), (scale, scale, local_scale)
  crops = []
  for i, values in enumerate(zip(*each.values())):
    kernel = colour_lib.kernel_size(sides[i], blur_kernel)
    shared: dict[str, Any] = dict(sigma=blur_sigma, kernel=kernel, threshold=solarize_threshold)
    chosen: dict[str, Any] = dict(zip(each, values))
    colour = Colour(jitter, **chosen, **shared)
    crops.append(_crop(sides[i], scales[i], ratio, method, flip, colour))
  local = {"local": (crops[2],) * local_views} if local_views else {}
  return Views({"global": (crops[0], crops[1])} | local, boxes)


def _crop(size, scale, ratio, method, flip: float, colour: Colour) -> View:
  """Inception crop, flip with a probability, colours; draws what it needs from one key."""
  size = _size(size)

  def draw(key):
    u = jax.random.uniform(key, (4 * TRIES + 1 + colour_lib.DRAWS,))
    crop, rest = u[: 4 * TRIES].reshape(4, TRIES), u[4 * TRIES :]
    return {"crop": crop, "flip": rest[0] < flip} | colour_lib.draw(rest[1:], colour)

  def window(height, width, drawn):
    return inception_window(height, width, drawn["crop"], scale, ratio)

  def apply(image, drawn):
    mirrored = drawn["flip"] if flip else None
    part = window(*image.shape[:2], drawn)
    part = resize_window(unit_scale(image), part, size, method, mirrored)
    part = colour_lib.alter(part, drawn, colour)
    # Bicubic weights swing over: integers cannot, floats on their own scale may.
    return jnp.clip(part, 0.0, 1.0) if jnp.issubdtype(image.dtype, jnp.integer) else part

  return View(draw, apply, window)


def _size(size) -> tuple[int, int]:
  height, width = (size, size) if isinstance(size, int) else size
  return int(height), int(width)
