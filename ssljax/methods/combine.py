"""Combinators: a method in, a method out."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssljax.step import Method, coupled, example_keys

IMAGES = ("image", "views", "global", "local")
VIEWED = (*IMAGES, "boxes")  # what recipes of views make


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
  made = (*(VIEWED if views else ()), *(("hidden",) if hidden else ()))
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


def with_probe(method: Method, classes: int) -> Method:
  """The method with a linear probe of `batch["label"]` [b] that learns along with it.

  The probe sees the pooled features of the training step, each example's made zero mean and unit
  deviation, without gradient: the method's losses and gradients are what they are without it, and
  `loss` among the metrics stays the method's own. New are `probe_loss` and `probe_top1`, in 0…1, of
  the batch before the step, and `params["probe"]`, which needs an optimizer of its own
  (`groups.beside`). `grad_norm` counts the probe's gradient, too.
  """

  def init(rng, batch):
    params, extra = method.init(rng, batch)
    _, (stats, _) = jax.eval_shape(method.loss, params, extra, dict(batch), rng, 0)
    if "pooled" not in stats.get("rows", {}):
      raise ValueError(
        'the method offers no features to a probe: stats["rows"]["pooled"] is missing'
      )
    width = stats["rows"]["pooled"].shape[-1]
    probe = {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
    return params | {"probe": probe}, extra

  def judged(params, found, pooled, batch):
    """What a loss returned, and the probe's added to it."""
    value, (stats, metrics) = found
    loss, top1 = _probe(params["probe"], jax.lax.stop_gradient(pooled), batch["label"])
    return value + loss, (stats, metrics | {"loss": value, "probe_loss": loss, "probe_top1": top1})

  def loss(params, extra, batch, rng, step):
    found = method.loss(params, extra, batch, rng, step)
    return judged(params, found, found[1][0]["rows"]["pooled"], batch)

  needs = (*method.needs, "label")
  if method.embed is None or method.couple is None:
    return method._replace(init=init, loss=loss, needs=needs)
  inner_embed, inner_couple = method.embed, method.couple

  def embed(params, extra, batch, rng, step):
    z, stats = inner_embed(params, extra, batch, rng, step)
    return {"z": z, "pooled": stats["rows"]["pooled"]}, stats

  def couple(params, extra, z, batch, rng, step):
    found = inner_couple(params, extra, z["z"], batch, rng, step)
    return judged(params, found, z["pooled"], batch)

  loss = coupled(embed, couple)
  return method._replace(init=init, loss=loss, needs=needs, embed=embed, couple=couple)


def _probe(params: dict, x: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy and accuracy of a linear layer on features [b d]."""
  x = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6)
  scores = x @ params["kernel"] + params["bias"]
  loss = optax.softmax_cross_entropy_with_integer_labels(scores, label).mean()
  return loss, jnp.mean((scores.argmax(-1) == label).astype(jnp.float32))
