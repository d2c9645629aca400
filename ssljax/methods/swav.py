"""Assignments to prototypes swapped between views: SwAV (Caron et al. 2020, 2006.09882).

The codes of each global view, balanced over the batch by Sinkhorn, are predicted from all other
views. The original normalises the prototypes after every step: `prototypes_unit` "start" with
`optimizer.unit` ("prototypes",), and `optimizer.freeze` holds them for the first steps. Sums over
prototypes are global, over all devices, and nothing overflows: Sinkhorn works with logarithms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssljax import collapse, losses, names
from ssljax.models.heads import Projector, Prototypes, unit
from ssljax.models.norms import running, with_statistics
from ssljax.models.views import evaluated, see_all, view_keys, why_whole
from ssljax.step import Method, coupled, example_keys

CHOICES = {"prototypes_unit": ("start", "use"), "batch_norm": ("global", "microbatch")}


class Parts(NamedTuple):
  """What the functions of the method share. `eps` and `iterations` are Sinkhorn's."""

  encoder: Any
  projector: Projector
  prototypes: Any
  temperature: float
  eps: float
  iterations: int
  queue: int
  queue_from: int


def swav(
  encoder,
  batch_size: int,
  *,
  projector: tuple[int, ...] = (2048, 128),
  projector_norm: str = "batch",
  prototypes: int = 3000,
  prototypes_unit: str = "use",
  temperature: float = 0.1,
  eps: float = 0.05,
  iterations: int = 3,
  queue: int = 0,
  queue_from: int = 0,
  batch_norm: str = "global",
) -> Method:
  """A method of views `batch["global"]` [b u h w c] and, where there are any, `batch["local"]`.

  Args:
    encoder: from `models/`.
    projector, projector_norm: widths of its layers and the norm between them, of `models.heads`'
      Projector; its output is made unit.
    prototypes, prototypes_unit: how many, and whether they are unit at the "start" (the optimizer
      keeps them so: optimizer.unit) or made so in "use" (solo-learn).
    temperature: of the predictions. eps, iterations: of Sinkhorn.
    queue: embeddings of earlier batches, for each global view apart, that are balanced with this
      batch; it fills from step `queue_from` on and counts as soon as it is full.
    batch_norm: of the encoder under `accum`: "global" needs the whole batch, "microbatch" takes
      each microbatch's own.

  Raises:
    ValueError: an unknown name, a batch of one, fewer than two prototypes, a queue smaller than a
      batch.
  """
  names.choices(dict(prototypes_unit=prototypes_unit, batch_norm=batch_norm), CHOICES)
  _check(batch_size, projector, prototypes, queue)
  parts = Parts(
    encoder=encoder, projector=Projector(projector, projector_norm, dtype=encoder.dtype),
    prototypes=Prototypes(prototypes, prototypes_unit, dtype=encoder.dtype),
    temperature=temperature, eps=eps, iterations=iterations, queue=queue, queue_from=queue_from,
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  whole = why_whole(encoder, batch_norm)
  loss = coupled(embed, couple)
  return Method(init, loss, update, encode, None, ("global", "index"), embed, couple, whole)


def _init(parts: Parts, rng, batch):
  encoder, width = parts.encoder, parts.projector.sizes[-1]
  x = jnp.zeros((1, *batch["global"].shape[2:]), jnp.float32)
  rngs = jax.random.split(rng, 3)
  made = {"encoder": encoder.init(rngs[0], x)}
  z = jnp.zeros(jax.eval_shape(encoder.apply, made["encoder"], x)["pooled"].shape)
  made["projector"] = parts.projector.init(rngs[1], z)
  made["prototypes"] = parts.prototypes.init(rngs[2], jnp.zeros((1, width)))
  params = {name: variables["params"] for name, variables in made.items()}
  extra: dict[str, Any] = {"stats": {k: v.get("batch_stats", {}) for k, v in made.items()}}
  if parts.queue:
    extra["queue"] = jnp.zeros((batch["global"].shape[1], parts.queue, width))
    extra["position"], extra["filled"] = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
  return params, extra


def _embed(parts: Parts, params, extra, batch, rng, step):
  """Pooled features of global and local views: {"large": [b u d], "small": [b v d]}."""
  keys = view_keys(example_keys(rng, batch["index"]), batch)
  own = params["encoder"], running(extra, "encoder")
  pooled, _, stats = see_all(parts.encoder, *own, batch, keys)
  kept = {"mean": {"encoder": stats}, "rows": {"pooled": pooled[:, 0]}}
  large = batch["global"].shape[1]
  z = {"large": pooled[:, :large], "small": pooled[:, large:]}
  return z, jax.lax.stop_gradient(kept)


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  given = params["projector"], running(extra, "projector")
  pooled, large = jnp.concatenate([z["large"], z["small"]], axis=1), z["large"].shape[1]
  projected, stats = with_statistics(parts.projector, *given, pooled, train=True)
  projected = unit(projected)
  weights = {"params": params["prototypes"]}
  scores = parts.prototypes.apply(weights, projected)
  codes = [
    _codes(parts, scores[:, i], _remembered(parts.prototypes, weights, extra, i))
    for i in range(large)
  ]
  value = losses.swapped_ce(jnp.unstack(scores, axis=1), codes, parts.temperature).mean()
  rows = {"keys": projected[:, :large]} if parts.queue else {}
  stats = {"mean": {"projector": stats}, "rows": rows}
  signs = collapse.features(projected[:, :large]) | collapse.assignments(jnp.stack(codes))
  return value, (jax.lax.stop_gradient(stats), signs)


def _remembered(head, weights, extra, view) -> tuple[jax.Array, jax.Array] | None:
  """Scores [m k] of the queue of one view by the prototypes of today, and whether they count."""
  if "queue" not in extra:
    return None
  return head.apply(weights, extra["queue"][view]), extra["filled"] == extra["queue"].shape[1]


def _codes(parts: Parts, scores, remembered) -> jax.Array:
  """Balanced assignments of one view [b k], together with the queue's where it counts."""
  given = parts.eps, parts.iterations
  if remembered is None:
    return losses.sinkhorn_knopp(scores, *given)
  earlier, counts = remembered
  rows = jnp.concatenate([jnp.broadcast_to(counts, earlier.shape[:1]), jnp.ones(len(scores), bool)])
  both = losses.sinkhorn_knopp(jnp.concatenate([earlier, scores]), *given, weights=rows)
  return both[len(earlier) :]


def _update(parts: Parts, params, extra, stats, step):
  new = dict(extra)
  if "stats" in extra:
    new["stats"] = {k: stats["mean"].get(k, {}) for k in extra["stats"]}
  if parts.queue:
    keys, at = jnp.swapaxes(stats["rows"]["keys"], 0, 1), extra["position"]
    full, position = jax.vmap(losses.enqueue, (0, 0, None))(extra["queue"], keys, at)
    begun = step >= parts.queue_from
    new["queue"] = jnp.where(begun, full, extra["queue"])
    new["position"] = jnp.where(begun, position[0], at)
    filled = jnp.minimum(extra["filled"] + keys.shape[1], parts.queue)
    new["filled"] = jnp.where(begun, filled, extra["filled"])
  return new


def _encode(parts: Parts, params, extra, batch, layers=()):
  stats = running(extra, "encoder")
  return evaluated(parts.encoder, params["encoder"], stats, batch["image"], layers)


def _check(batch_size: int, projector: tuple, prototypes: int, queue: int) -> None:
  if batch_size < 2:
    raise ValueError("batch_size 1: assignments are balanced between two examples or more")
  if not projector:
    raise ValueError("method.projector needs one layer or more: the last is the prototypes' width")
  if prototypes < 2:
    raise ValueError(f"method.prototypes {prototypes}: an assignment needs two or more")
  if queue and queue < batch_size:
    raise ValueError(f"method.queue {queue} is smaller than a batch, {batch_size}")
