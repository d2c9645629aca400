"""Combinators: a method in, a method out."""

from collections.abc import Sequence

import jax.numpy as jnp

from ssljax.step import Method

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
