"""Clusters of the whole data set, made anew every epoch, predicted from all views.

DeepCluster-v2 (Caron et al. 2020, 2006.09882): spherical k-means on the projections that the last
epoch has left in a bank, a clustering for each of several sets of centroids, which serve as
prototypes without gradient until the next. The original gathers its first bank in a pass without
training: `optimizer.freeze` ("encoder", "projector") over the first epoch does so here, where an
example without a cluster so far has the centroid that is nearest to it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssljax import collapse, losses
from ssljax.models.heads import Projector, unit
from ssljax.models.norms import running, with_statistics
from ssljax.models.views import evaluated, see, view_keys, why_whole
from ssljax.step import Method, coupled, example_keys

ROWS = 8192  # of the bank, compared with all centroids at a time


class Parts(NamedTuple):
  """What the functions of the method share. `clusters`: how many, of each set of centroids by its
  name; `every` is in steps."""

  encoder: Any
  projector: Projector
  examples: int
  clusters: dict[str, int]
  every: int
  iterations: int
  temperature: float


def deepcluster(
  encoder,
  batch_size: int,
  *,
  examples: int,
  projector: tuple[int, ...] = (2048, 128),
  projector_norm: str = "batch",
  clusters: tuple[int, ...] = (3000, 3000, 3000),
  every: int = 0,
  iterations: int = 10,
  temperature: float = 0.1,
  batch_norm: str = "global",
) -> Method:
  """A method of views `batch["global"]` [b u h w c] and, where there are any, `batch["local"]`, of
  examples whose `batch["index"]` is below `examples`.

  Args:
    examples: in the data set: rows of the bank of each global view, [u examples d] float32.
    projector, projector_norm: widths of its layers and the norm between them, of `models.heads`'
      Projector; its output is made unit.
    clusters: how many, for each set of centroids; set i clusters global view i mod u.
    every: steps from one clustering to the next; 0 is an epoch, examples / batch_size.
    iterations: of k-means, from rows of the bank drawn at random.
    temperature: of the predictions.
    batch_norm: of the encoder under `accum`: "global" needs the whole batch, "microbatch" takes
      each microbatch's own.

  Raises:
    ValueError: an unknown name, or numbers that do not go together.
  """
  _check(batch_size, examples, projector, clusters, every, iterations, batch_norm)
  every = every or max(examples // batch_size, 1)
  head = Projector(projector, projector_norm, dtype=encoder.dtype)
  sets = {f"set_{i}": count for i, count in enumerate(clusters)}
  parts = Parts(
    encoder=encoder, projector=head, examples=examples, clusters=sets, every=every,
    iterations=iterations, temperature=temperature,
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  whole = why_whole(encoder, batch_norm)
  loss = coupled(embed, couple)
  return Method(init, loss, update, encode, None, ("global", "index"), embed, couple, whole)


def _init(parts: Parts, rng, batch):
  encoder, sets, width = parts.encoder, parts.clusters, parts.projector.sizes[-1]
  x = jnp.zeros((1, *batch["global"].shape[2:]), jnp.float32)
  rngs = jax.random.split(rng, 4)
  made = {"encoder": encoder.init(rngs[0], x)}
  z = jnp.zeros(jax.eval_shape(encoder.apply, made["encoder"], x)["pooled"].shape)
  made["projector"] = parts.projector.init(rngs[1], z)
  extra: dict[str, Any] = {"stats": {k: v.get("batch_stats", {}) for k, v in made.items()}}
  extra["bank"] = jnp.zeros((batch["global"].shape[1], parts.examples, width))
  extra["labels"] = {name: jnp.full(parts.examples, -1, jnp.int32) for name in sets}
  keys = jax.random.split(rngs[2], len(sets))
  start = (jax.random.normal(key, (k, width)) for key, k in zip(keys, sets.values()))
  extra["centroids"] = {name: unit(c) for name, c in zip(sets, start)}
  extra["key"] = jax.random.key_data(rngs[3])
  return {name: variables["params"] for name, variables in made.items()}, extra


def _embed(parts: Parts, params, extra, batch, rng, step):
  """Pooled features {"large": [b u d], "small": [b v d]}."""
  keys = view_keys(example_keys(rng, batch["index"]), batch)
  stats, u, z = running(extra, "encoder"), batch["global"].shape[1], {}
  for name, leaf, k in (("large", "global", keys[:, :u]), ("small", "local", keys[:, u:])):
    if leaf in batch:
      out, stats = see(parts.encoder, params["encoder"], stats, batch[leaf], keys=k)
      z[name] = out["pooled"]
  rows = {"pooled": z["large"][:, 0]}
  return z, jax.lax.stop_gradient({"mean": {"encoder": stats}, "rows": rows})


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  """The mean over the sets of centroids of the loss of all views."""
  large, index = z["large"].shape[1], batch["index"]
  x = jnp.concatenate([z[name] for name in ("large", "small") if name in z], axis=1)
  given = params["projector"], running(extra, "projector")
  projected, stats = with_statistics(parts.projector, *given, x, train=True)
  projected, errors = unit(projected), []
  signs: dict[str, Any] = {}
  for i, name in enumerate(parts.clusters):
    scores = projected @ jax.lax.stop_gradient(extra["centroids"][name]).T
    labels = _labels(scores[:, i % large], extra["labels"][name][index])
    flat = scores.reshape(-1, scores.shape[-1]) / parts.temperature
    errors.append(losses.cluster_ce(flat, jnp.repeat(labels, scores.shape[1])).mean())
    # The labels, one-hot: how many clusters a batch has.
    signs = signs or collapse.assignments(jax.nn.one_hot(labels, scores.shape[-1]))
  rows = {"keys": projected[:, :large], "index": index}
  signs |= collapse.features(projected[:, :large])
  kept = {"mean": {"projector": stats}, "rows": rows}
  return sum(e / len(errors) for e in errors), (jax.lax.stop_gradient(kept), signs)


def _labels(scores: jax.Array, known: jax.Array) -> jax.Array:
  """Labels [b] as they are known or, where they are -1, the nearest by scores [b k]."""
  return jnp.where(known < 0, scores.argmax(-1), known)


def _update(parts: Parts, params, extra, stats, step):
  new, rows = dict(extra), stats["rows"]
  if "stats" in extra:
    new["stats"] = {k: stats["mean"].get(k, {}) for k in extra["stats"]}
  keys = jnp.swapaxes(rows["keys"], 0, 1).astype(jnp.float32)
  new["bank"] = extra["bank"].at[:, rows["index"]].set(keys)
  cluster = lambda: _clustered(parts, extra["key"], new["bank"], step)  # noqa: E731
  keep = lambda: (extra["centroids"], extra["labels"])  # noqa: E731
  due = (step + 1) % parts.every == 0
  new["centroids"], new["labels"] = jax.lax.cond(due, cluster, keep)
  return new


def _clustered(parts: Parts, key, bank, step) -> tuple[dict, dict]:
  """Centroids [k d] and labels [n] of each set, of a bank [u n d]."""
  rng = jax.random.fold_in(jax.random.wrap_key_data(key), step)
  made, sets = {}, parts.clusters
  for i, (name, key) in enumerate(zip(sets, jax.random.split(rng, len(sets)))):
    x = bank[i % len(bank)]
    made[name] = spherical_kmeans(key, x, sets[name], parts.iterations)
  return {n: c for n, (c, _) in made.items()}, {n: labels for n, (_, labels) in made.items()}


def _encode(parts: Parts, params, extra, batch, layers=()):
  stats = running(extra, "encoder")
  return evaluated(parts.encoder, params["encoder"], stats, batch["image"], layers)


def spherical_kmeans(
  rng: jax.Array, x: jax.Array, k: int, iterations: int
) -> tuple[jax.Array, jax.Array]:
  """Unit centroids of unit rows: [n d] -> [k d], and the cluster of each row: int32 [n].

  Rows go to the centroid of largest cosine, centroids to the direction of their rows' mean; one
  without rows stays. Rows of zeros do not count and have cluster -1. It begins at k rows drawn
  without replacement from the others.
  """
  there = jnp.any(x != 0, axis=-1)
  drawn = jnp.where(there, jax.random.uniform(rng, x.shape[:1]), -1.0)
  centroids = x[jax.lax.top_k(drawn, k)[1]]

  def nearest(centroids):
    # In parts: of ImageNet's rows and 3,000 centroids all cosines would be 15 GB.
    return jax.lax.map(lambda row: (centroids @ row).argmax(), x, batch_size=ROWS)

  def one(_, centroids):
    labels = nearest(centroids)
    sums = jax.ops.segment_sum(x, labels, k)
    counts = jax.ops.segment_sum(there.astype(x.dtype), labels, k)
    return unit(jnp.where(counts[:, None] > 0, sums, centroids))

  centroids = jax.lax.fori_loop(0, iterations, one, centroids)
  return centroids, jnp.where(there, nearest(centroids), -1).astype(jnp.int32)


def _check(batch_size, examples, projector, clusters, every, iterations, batch_norm) -> None:
  if batch_norm not in ("global", "microbatch"):
    raise ValueError(f"method.batch_norm {batch_norm!r} is none of global, microbatch")
  if batch_size < 2:
    raise ValueError("batch_size 1: the projector's batch norm needs two examples or more")
  if not projector:
    raise ValueError("method.projector needs one layer or more: the last is the centroids' width")
  if not clusters or min(clusters) < 2 or max(clusters) > examples:
    raise ValueError(
      f"method.clusters {tuple(clusters)} must name sets of 2 to method.examples, {examples}"
    )
  if every < 0 or iterations < 1:
    raise ValueError(f"method.every {every} must be 0 or more, method.iterations {iterations} 1")
