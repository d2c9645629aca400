"""Combinators: a method in, a method out."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssljax.step import Method, example_keys

IMAGES = ("image", "views", "global", "local")


def normalised(method: Method, mean: Sequence[float], std: Sequence[float]) -> Method:
  """The method on images [… c] as the data source has them: uint8 is scaled to 0…1, then
  mean and deviation per channel are taken out, in float32, inside the step.

  `reconstruct` answers on the 0…1 scale (or the source's own, if that is no integer type).
  """
  centre, spread = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

  def scaled(x):
    top = jnp.iinfo(x.dtype).max if jnp.issubdtype(x.dtype, jnp.integer) else 1
    return (jnp.asarray(x, jnp.float32) / top - centre) / spread

  def shaped(batch):  # shapes alone have no values to scale
    return {k: jnp.zeros(v.shape) if k in IMAGES else v for k, v in batch.items()}

  def on(batch):
    return {k: scaled(v) if k in IMAGES else v for k, v in batch.items()}

  def reconstruct(params, extra, batch, rng, step):
    return method.reconstruct(params, extra, on(batch), rng, step) * spread + centre

  embed, couple = method.embed, method.couple
  if embed is not None and couple is not None:
    method = method._replace(
      embed=lambda params, extra, batch, *rest: embed(params, extra, on(batch), *rest),
      couple=lambda params, extra, z, batch, *rest: couple(params, extra, z, on(batch), *rest),
    )
  return method._replace(
    init=lambda rng, batch: method.init(rng, shaped(batch)),
    loss=lambda params, extra, batch, rng, step: method.loss(params, extra, on(batch), rng, step),
    encode=lambda params, extra, batch, layers=(): method.encode(params, extra, on(batch), layers),
    reconstruct=reconstruct if method.reconstruct else None,
  )


def viewed(method: Method, views: Any = None, hidden: Callable | None = None) -> Method:
  """The method trained on raw examples: views and hidden places are made inside the step.

  Args:
    views: `draw(key)` and `apply(image [h w c], drawn) -> leaves`, which take the place of `image`.
    hidden: key -> bool [n].

  What is drawn belongs to (seed, step, index). `init`, `encode` and `reconstruct` are the method's
  own: they take batches as the method sees them.
  """

  def on(inner):
    def outer(params, extra, batch, rng, step):
      return inner(params, extra, make_views(batch, rng, views, hidden), rng, step)

    return outer

  # Not `couple`: it meets the examples as what `embed` made of them.
  given = {"loss", "embed"} & {name for name in method._fields if getattr(method, name) is not None}
  made = (*(IMAGES if views else ()), *(("hidden",) if hidden else ()))
  needs = {"image", "index", *(key for key in method.needs if key not in made)}
  inside = {name: on(getattr(method, name)) for name in given}
  return method._replace(needs=tuple(sorted(needs)), **inside)


def make_views(batch: dict, rng: jax.Array, views: Any, hidden: Callable | None) -> dict:
  """The batch with views made of `image`, and hidden places drawn; see `viewed`."""

  def keys(name):
    return example_keys(jax.random.fold_in(rng, zlib.crc32(name.encode())), batch["index"])

  made = dict(batch)
  if views is not None:
    image = made.pop("image")
    made |= jax.vmap(lambda key, x: views.apply(x, views.draw(key)))(keys("views"), image)
  if hidden is not None:
    made["hidden"] = jax.vmap(hidden)(keys("hidden"))
  return made
