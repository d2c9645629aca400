"""Clusters of the whole data set, made anew every epoch, predicted from all views.

DeepCluster-v2 (Caron et al. 2020, 2006.09882): spherical k-means on the projections that the last
epoch has left in a bank, a clustering for each of several sets of centroids, which serve as
prototypes without gradient until the next. The original gathers its first bank in a pass without
training: `optimizer.freeze` ("encoder", "projector") over the first epoch does so here, where an
example without a cluster so far has the centroid that is nearest to it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssljax import collapse, losses
from ssljax.models.heads import Projector, unit
from ssljax.models.norms import running, with_statistics
from ssljax.models.views import evaluated, see, view_keys, why_whole
from ssljax.step import Method, coupled, example_keys

ROWS = 8192  # of the bank, compared with all centroids at a time


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
  sets = [f"set_{i}" for i in range(len(clusters))]

  def init(rng, batch):
    x = jnp.zeros((1, *batch["global"].shape[2:]), jnp.float32)
    rngs = jax.random.split(rng, 4)
    made = {"encoder": encoder.init(rngs[0], x)}
    z = jnp.zeros(jax.eval_shape(encoder.apply, made["encoder"], x)["pooled"].shape)
    made["projector"] = head.init(rngs[1], z)
    extra: dict[str, Any] = {"stats": {k: v.get("batch_stats", {}) for k, v in made.items()}}
    extra["bank"] = jnp.zeros((batch["global"].shape[1], examples, projector[-1]))
    extra["labels"] = {name: jnp.full(examples, -1, jnp.int32) for name in sets}
    keys = jax.random.split(rngs[2], len(sets))
    start = (jax.random.normal(key, (k, projector[-1])) for key, k in zip(keys, clusters))
    extra["centroids"] = {name: unit(c) for name, c in zip(sets, start)}
    extra["key"] = jax.random.key_data(rngs[3])
    return {name: variables["params"] for name, variables in made.items()}, extra

  def embed(params, extra, batch, rng, step):
    """Pooled features {"large": [b u d], "small": [b v d]}."""
    keys = view_keys(example_keys(rng, batch["index"]), batch)
    stats, u, z = running(extra, "encoder"), batch["global"].shape[1], {}
    for name, leaf, k in (("large", "global", keys[:, :u]), ("small", "local", keys[:, u:])):
      if leaf in batch:
        out, stats = see(encoder, params["encoder"], stats, batch[leaf], keys=k)
        z[name] = out["pooled"]
    rows = {"pooled": z["large"][:, 0]}
    return z, jax.lax.stop_gradient({"mean": {"encoder": stats}, "rows": rows})

  def couple(params, extra, z, batch, rng, step):
    large, index = z["large"].shape[1], batch["index"]
    x = jnp.concatenate([z[name] for name in ("large", "small") if name in z], axis=1)
    given = params["projector"], running(extra, "projector")
    projected, stats = with_statistics(head, *given, x, train=True)
    projected, value, signs = unit(projected), 0.0, {}
    for i, name in enumerate(sets):
      scores = projected @ jax.lax.stop_gradient(extra["centroids"][name]).T
      known = extra["labels"][name][index]
      labels = jnp.where(known < 0, scores[:, i % large].argmax(-1), known)
      flat = scores.reshape(-1, scores.shape[-1]) / temperature
      errors = losses.cluster_ce(flat, jnp.repeat(labels, scores.shape[1]))
      value += errors.mean() / len(sets)
      # The labels, one-hot: how many clusters a batch has.
      signs = signs or collapse.assignments(jax.nn.one_hot(labels, scores.shape[-1]))
    rows = {"keys": projected[:, :large], "index": index}
    signs |= collapse.features(projected[:, :large])
    return value, (jax.lax.stop_gradient({"mean": {"projector": stats}, "rows": rows}), signs)

  def update(params, extra, stats, step):
    new, rows = dict(extra), stats["rows"]
    if "stats" in extra:
      new["stats"] = {k: stats["mean"].get(k, {}) for k in extra["stats"]}
    keys = jnp.swapaxes(rows["keys"], 0, 1).astype(jnp.float32)
    new["bank"] = extra["bank"].at[:, rows["index"]].set(keys)

    def cluster():
      rng = jax.random.fold_in(jax.random.wrap_key_data(extra["key"]), step)
      made = {}
      for i, (name, key) in enumerate(zip(sets, jax.random.split(rng, len(sets)))):
        bank = new["bank"][i % len(new["bank"])]
        made[name] = spherical_kmeans(key, bank, clusters[i], iterations)
      return {n: c for n, (c, _) in made.items()}, {n: labels for n, (_, labels) in made.items()}

    keep = lambda: (extra["centroids"], extra["labels"])  # noqa: E731
    new["centroids"], new["labels"] = jax.lax.cond((step + 1) % every == 0, cluster, keep)
    return new

  def encode(params, extra, batch, layers=()):
    return evaluated(encoder, params["encoder"], running(extra, "encoder"), batch["image"], layers)

  whole = why_whole(encoder, batch_norm)
  loss = coupled(embed, couple)
  return Method(init, loss, update, encode, None, ("global", "index"), embed, couple, whole)


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
