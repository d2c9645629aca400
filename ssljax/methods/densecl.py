"""MoCo of whole views and, beside it, of the places of their maps.

DenseCL (Wang et al. 2021, 2011.09157): a place of one view is to find, among keys of other images,
the projection of that place of the other view whose features are nearest to its own. Views are
flipped and cropped for themselves, nobody says which places are the same. The second queue holds
means of maps, one an image. The teacher moves after the step, not before: the same sequence, its
momentum one step late; keys are not shuffled, as batch norm is over the global batch.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, schedules
from ssljax.models.heads import Projector, unit
from ssljax.models.norms import running
from ssljax.models.views import evaluated, see, why_whole
from ssljax.step import Method, example_keys

HEADS = ("projector", "dense")


class Parts(NamedTuple):
  """What the functions of the method share; `heads` are one of each of `HEADS`."""

  encoder: Any
  heads: dict[str, Projector]
  temperature: float
  dense_weight: float
  dense_from: int
  momentum: Callable
  queue: int


def densecl(
  encoder,
  batch_size: int,
  *,
  projector: tuple[int, ...] = (2048, 128),
  dense_projector: tuple[int, ...] = (2048, 128),
  temperature: float = 0.2,
  dense_weight: float = 0.5,
  dense_from: int = 0,
  momentum=0.999,
  queue: int = 65536,
  batch_norm: str = "global",
) -> Method:
  """A method of two views, `batch["views"]` [b 2 h w c]: the first asks, the second has the keys.

  Args:
    projector, dense_projector: widths of the layers on pooled features and on each place's.
    temperature: of both losses.
    dense_weight: of the loss of places; that of whole views has the rest. 0 is MoCo v2.
    dense_from: before this step whole views have it all.
    momentum: of the teacher, an average of encoder and projectors, moved after each step: a number,
      or a schedule of the step.
    queue: keys of earlier batches, of whole views and as many of maps. The scores of places are
      [b n queue] float32: 3.3 GB for 256 images of 49 places and 65,536 keys.
    batch_norm: of the encoder under `accum`: "global" needs the whole batch, "microbatch" takes
      each microbatch's own.

  Raises:
    ValueError: an unknown name, or numbers that do not go together.
  """
  _check(batch_size, projector, dense_projector, dense_weight, queue, batch_norm)
  sizes = dict(zip(HEADS, (projector, dense_projector)))
  heads = {name: Projector(s, "none", dtype=encoder.dtype) for name, s in sizes.items()}
  moved = schedules.moving(momentum)
  parts = Parts(
    encoder=encoder, heads=heads, temperature=temperature, dense_weight=dense_weight,
    dense_from=dense_from, momentum=moved, queue=queue,
  )  # fmt: skip
  init, loss, update, encode = (
    functools.partial(f, parts) for f in (_init, _loss, _update, _encode)
  )
  made = Method(init, loss, update, encode, None, ("views", "index"))
  return made._replace(whole=why_whole(encoder, batch_norm), chance=math.log(queue + 1))


def _init(parts: Parts, rng, batch):
  encoder, heads = parts.encoder, parts.heads
  rngs = jax.random.split(rng, 5)
  x = jnp.zeros((1, *batch["views"].shape[2:]), jnp.float32)
  made = encoder.init(rngs[0], x)
  out = jax.eval_shape(encoder.apply, made, x)
  params = {"encoder": made["params"]}
  for key, name, leaf in zip(rngs[1:3], HEADS, ("pooled", "patches")):
    params[name] = heads[name].init(key, jnp.zeros(out[leaf].shape))["params"]
  extra: dict[str, Any] = {"teacher": dict(params), "queue": {}}
  if "batch_stats" in made:
    stats = {"encoder": made["batch_stats"]}
    extra |= {"stats": stats, "teacher_stats": stats}
  for key, name in zip(rngs[3:], HEADS):
    rows = jax.random.normal(key, (parts.queue, heads[name].sizes[-1]))
    extra["queue"][name] = unit(rows)
  extra["position"] = jnp.zeros((), jnp.int32)
  return params, jax.tree.map(jnp.copy, extra)


def _loss(parts: Parts, params, extra, batch, rng, step):
  """The loss of whole views and of places: the first view asks, the teacher sees the second."""
  keys = jax.vmap(lambda key: jax.random.split(key, 1))(example_keys(rng, batch["index"]))
  first, second = batch["views"][:, :1], batch["views"][:, 1:]
  own, stats = _seen(parts, params, running(extra, "encoder"), first, keys=keys)
  teacher_stats = running(extra, "encoder", "teacher_stats")
  # Of an encoder with batch norm keys are the sign of training; in others they drop paths.
  training = {"keys": keys} if teacher_stats else {}
  taught, teacher_stats = jax.lax.stop_gradient(
    _seen(parts, extra["teacher"], teacher_stats, second, **training)
  )
  pooled, patches, q, q_map = own
  _, other, k, k_map = taught
  queue, heat = extra["queue"], parts.temperature
  whole = losses.info_nce_queue(q, k, queue["projector"], heat).mean()
  dense = losses.dense_info_nce(q_map, k_map, patches, other, queue["dense"], heat).mean()
  weight = jnp.where(step < parts.dense_from, 0.0, parts.dense_weight)
  rows = {"pooled": pooled, "projector": unit(k), "dense": unit(k_map.mean(1))}
  mean = {"stats": {"encoder": stats}, "teacher_stats": {"encoder": teacher_stats}}
  metrics = {"whole": whole, "dense": dense} | collapse.features(q)
  stats = jax.lax.stop_gradient({"mean": mean, "rows": rows})
  return (1 - weight) * whole + weight * dense, (stats, metrics)


def _seen(parts: Parts, params, stats, view, **keys):
  """Of one view [b 1 h w c] features [b d], [b n d], their projections [b e], [b n e], and running
  statistics after it."""
  out, stats = see(parts.encoder, params["encoder"], stats, view, **keys)
  pooled, patches = out["pooled"][:, 0], out["patches"][:, 0]
  given = zip(HEADS, (pooled, patches))
  z, z_map = (parts.heads[name].apply({"params": params[name]}, x) for name, x in given)
  return (pooled, patches, z, z_map), stats


def _update(parts: Parts, params, extra, stats, step):
  new, rows = dict(extra), stats["rows"]
  for name in {"stats", "teacher_stats"} & set(extra):
    new[name] = stats["mean"][name]
  online = {name: params[name] for name in extra["teacher"]}
  new["teacher"] = optax.incremental_update(online, extra["teacher"], 1.0 - parts.momentum(step))
  at, new["queue"] = extra["position"], {}
  for name in HEADS:
    new["queue"][name], new["position"] = losses.enqueue(extra["queue"][name], rows[name], at)
  return new


def _encode(parts: Parts, params, extra, batch, layers=()):
  stats = running(extra, "encoder")
  return evaluated(parts.encoder, params["encoder"], stats, batch["image"], layers)


def _check(batch_size, projector, dense_projector, dense_weight, queue, batch_norm) -> None:
  if batch_norm not in ("global", "microbatch"):
    raise ValueError(f"method.batch_norm {batch_norm!r} is none of global, microbatch")
  if not projector or not dense_projector:
    raise ValueError("method.projector and method.dense_projector need one layer or more")
  if not 0 <= dense_weight <= 1:
    raise ValueError(f"method.dense_weight {dense_weight} is not between 0 and 1")
  if queue < batch_size:
    raise ValueError(f"method.queue {queue} is smaller than the {batch_size} new keys")
