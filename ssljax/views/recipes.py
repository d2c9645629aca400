"""Recipes of views, under the names and with the arguments of those in `ssljax.data.views`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssljax.views import colour
from ssljax.views.crop import TRIES, inception_window, resize_window, unit_scale


class View(NamedTuple):
  """Views of one image, drawn and made inside the step.

  `draw(key) -> parameters`; `apply(image [h w c], parameters) -> {"image": float32 [size c]}` or
  `{"views": [v size c]}`, integers on the 0…1 scale. `colour`: needs RGB.
  """

  draw: Callable
  apply: Callable
  colour: bool = False


def keep() -> View:
  """No change: for arrays that have the right size."""
  return View(lambda key: {}, lambda image, drawn: {"image": unit_scale(image)})


def crop_flip(
  *,
  size: Sequence[int] = (224, 224),
  scale: Sequence[float] = (0.2, 1.0),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
  method: str = "bicubic",
  flip: bool = True,
  jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
) -> View:
  """Inception crop, flip, colour jitter: see `ssljax.data.views.crop_flip`."""
  size = _size(size)

  def draw(key):
    u = jax.random.uniform(key, (4 * TRIES + 9,))
    crop, rest = u[: 4 * TRIES].reshape(4, TRIES), u[4 * TRIES :]
    return {"crop": crop, "flip": rest[0], "colour": rest[1:]}

  def apply(image, drawn):
    mirrored = drawn["flip"] < 0.5 if flip else None
    image = cropped(image, drawn["crop"], mirrored, size, scale, ratio, method)
    return {"image": colour.jitter(image, drawn["colour"], jitter) if any(jitter) else image}

  return View(draw, apply, any(jitter))


def cropped(image, u, mirrored, size, scale, ratio, method):
  """The random crop of [h w c], resized and mirrored: float32 [size c]."""
  window = inception_window(*image.shape[:2], u, scale, ratio)
  part = resize_window(unit_scale(image), window, size, method, mirrored)
  # Bicubic weights swing over: integers cannot, floats on their own scale may.
  return jnp.clip(part, 0.0, 1.0) if jnp.issubdtype(image.dtype, jnp.integer) else part


def _size(size) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else tuple(int(s) for s in size)
