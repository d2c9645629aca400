"""VICReg of views and of matched cells of their maps: VICRegL (Bardes, Ponce and LeCun 2022,
2210.01571).

A cell is brought near to the cell of the other view that lies nearest in the picture, and to the
one whose projection is nearest. As in the authors' code, the losses of both kinds of pairs are
added, and large views meet all others. How many pairs are kept is the paper's, so many of a large
view's map and so many of a small one's; the code takes 20 of the first and 4 of the second of any
two. Cells of mirrored views are where they are in the picture; the code forgets that unless
`--no-flip-grid 0` says otherwise, and lightly's grid ends a cell beyond the view. What the original
prints includes a classifier's cross-entropy, here `probe.rate`.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssljax import collapse, losses, names
from ssljax.models.heads import Projector
from ssljax.models.norms import running
from ssljax.models.views import evaluated, run_views, why_whole
from ssljax.step import Method, coupled, example_keys

HEADS = {"projector": "pooled", "map_projector": "patches"}  # and what of the encoder they see
CHOICES = {"batch_norm": ("global", "microbatch")}


class Parts(NamedTuple):
  """What the functions of the method share; `heads` are one of each of `HEADS`."""

  encoder: Any
  heads: dict[str, Projector]
  views: tuple[str, ...]
  alpha: float
  matches: tuple[int, int]
  feature_matches: tuple[int, int]
  weights: tuple[float, float, float]


def vicregl(
  encoder,
  batch_size: int,
  *,
  views: tuple[str, ...] = ("views",),
  projector: tuple[int, ...] = (8192, 8192, 8192),
  map_projector: tuple[int, ...] = (512, 512, 512),
  projector_norm: str = "batch",
  alpha: float = 0.75,
  matches: tuple[int, int] = (20, 4),
  feature_matches: tuple[int, int] = (0, 0),
  similarity_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 1.0,
  batch_norm: str = "global",
) -> Method:
  """A method of several views of each example and of where they lie, `batch["boxes"]` [b v 4].

  Args:
    encoder: from `models/`.
    views: leaves of the batch, [b v h w c] each: ("views",), or ("global", "local") for large and
      small views. Small views do not meet each other.
    projector, map_projector: widths of the layers on pooled features and on each cell's.
    projector_norm: of both; "batch" (ResNet) or "layer" (ConvNeXt).
    alpha: weight of whole views; the sum of both losses of cells weighs 1 - alpha.
    matches: pairs nearest in the picture that are kept of a large and of a small view's map.
    feature_matches: the same of pairs nearest in features; 0 keeps all, as the authors' code does,
      where the paper has as many as of the others.
    similarity_weight, variance_weight, covariance_weight: of every VICReg.
    batch_norm: of the encoder under `accum`: "global" needs the whole batch, "microbatch" takes
      each microbatch's own.

  Raises:
    ValueError: an unknown name, numbers that do not go together; in `init`, which sees the shapes,
      an encoder without a map, more matches than cells.
  """
  _check(batch_size, views, alpha, (*matches, *feature_matches), batch_norm)
  given = dict(norm=projector_norm, bias="hidden", dtype=encoder.dtype)
  heads = dict(zip(HEADS, (Projector(projector, **given), Projector(map_projector, **given))))
  parts = Parts(
    encoder=encoder, heads=heads, views=tuple(views), alpha=alpha, matches=matches,
    feature_matches=feature_matches,
    weights=(similarity_weight, variance_weight, covariance_weight),
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  whole = why_whole(encoder, batch_norm)
  needs = (*views, "boxes", "index")
  return Method(init, coupled(embed, couple), update, encode, None, needs, embed, couple, whole)


def _init(parts: Parts, rng, batch):
  encoder = parts.encoder
  for leaf, *counts in zip(parts.views, parts.matches, parts.feature_matches):
    _check_cells(leaf, counts, encoder.grid(batch[leaf].shape[2:]))
  rngs = jax.random.split(rng, 3)
  x = jnp.zeros((2, *batch[parts.views[0]].shape[2:]))
  made = {"encoder": encoder.init(rngs[0], x)}
  out = jax.eval_shape(encoder.apply, made["encoder"], x)
  for key, (name, leaf) in zip(rngs[1:], HEADS.items()):
    if leaf not in out:
      raise ValueError(f"vicregl needs {leaf!r} of the encoder, which gives {', '.join(out)}")
    made[name] = parts.heads[name].init(key, jnp.zeros(out[leaf].shape))
  params = {name: variables.get("params", {}) for name, variables in made.items()}
  stats = {name: variables.get("batch_stats", {}) for name, variables in made.items()}
  return params, jax.tree.map(jnp.copy, {"stats": stats})


def _embed(parts: Parts, params, extra, batch, rng, step):
  """Of each leaf of views: "pooled" [b v d], "patches" [b v n d], "places" [b v n 2]."""
  encoder, stats, z = parts.encoder, running(extra, "encoder"), {}
  counts = [batch[leaf].shape[1] for leaf in parts.views]
  drawn = jax.vmap(lambda key: jax.random.split(key, sum(counts)))
  keys = drawn(example_keys(rng, batch["index"]))
  for leaf, end, v in zip(parts.views, itertools.accumulate(counts), counts):
    mine, grid = slice(end - v, end), encoder.grid(batch[leaf].shape[2:])
    own = params["encoder"], stats, batch[leaf]
    out, stats = run_views(encoder, *own, keys=keys[:, mine])
    z[leaf] = {name: out[name] for name in HEADS.values()}
    z[leaf]["places"] = places(batch["boxes"][:, mine], grid)
  kept = {"mean": {"encoder": stats}, "rows": {"pooled": z[parts.views[0]]["pooled"][:, 0]}}
  return z, jax.lax.stop_gradient(kept)


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  seen, mean = _projected(parts, params, extra, z)
  found = _compared(seen, z[parts.views[0]]["pooled"].shape[1], parts.weights)
  local = found["features"] + found["locations"]
  value = parts.alpha * found["global"] + (1 - parts.alpha) * local
  metrics = found | collapse.features(seen[0]["projector"])
  return value, (jax.lax.stop_gradient({"mean": mean}), metrics)


def _projected(parts: Parts, params, extra, z) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """View by view the projections of its pooled features [b d] and its cells [b n d], its "places"
  [b n 2], how many cells to match; and the heads' running statistics after it."""
  seen: list[dict[str, Any]] = []
  mean = {name: running(extra, name) for name in HEADS}
  for leaf, near, alike in zip(parts.views, parts.matches, parts.feature_matches):
    made = {"places": z[leaf]["places"]}
    for name, source in HEADS.items():
      own = params.get(name, {}), mean[name], z[leaf][source]
      x, mean[name] = run_views(parts.heads[name], *own, train=True)
      made[name] = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    counts = {"near": near, "alike": alike or made["places"].shape[2]}
    one = [jax.tree.map(lambda x: x[:, i], made) for i in range(made["places"].shape[1])]  # noqa: B023
    seen += [view | counts for view in one]
  return seen, mean


def _update(parts: Parts, params, extra, stats, step):
  if "stats" not in extra:
    return extra
  return {"stats": {name: stats["mean"][name] for name in extra["stats"]}}


def _encode(parts: Parts, params, extra, batch, layers=()):
  stats = running(extra, "encoder")
  return evaluated(parts.encoder, params["encoder"], stats, batch["image"], layers)


def places(boxes: jax.Array, grid: Sequence[int]) -> jax.Array:
  """Centres (y, x) of the cells of views that lie in boxes (top, left, bottom, right), row by row,
  in the boxes' units: [… 4], (rows, columns) -> [… n 2]."""
  y, x = ((jnp.arange(count) + 0.5) / count for count in grid)
  share = jnp.stack(jnp.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
  first, last = boxes[..., None, :2], boxes[..., None, 2:]
  return first + share * (last - first)


def _compared(
  views: Sequence[Mapping[str, Any]], large: int, weights: tuple[float, float, float]
) -> dict[str, jax.Array]:
  """The three parts of the loss. Distances are means over ordered pairs whose first view is among
  the `large` first, so that two of these count twice; whole views' spread is the mean over views.
  """
  pairs = [
    (i, j, 2.0 if j < large else 1.0) for i in range(large) for j in range(i + 1, len(views))
  ]
  total, apart = sum(weight for *_, weight in pairs), jnp.zeros(())
  found = {"features": jnp.zeros(()), "locations": jnp.zeros(())}
  for i, j, weight in pairs:
    a, b = views[i], views[j]
    _, parts = losses.vicregl(
      a["projector"], b["projector"], a["map_projector"], b["map_projector"], a["places"],
      b["places"], 1.0, (a["near"], b["near"]), *weights, feature_matches=(a["alike"], b["alike"]),
    )  # fmt: skip
    found = {name: value + weight / total * parts[name] for name, value in found.items()}
    apart += weight / total * jnp.square(a["projector"] - b["projector"]).mean()
  whole = [view["projector"] for view in views]
  spread = jnp.stack([losses.variance_term(z) for z in whole]).mean()
  redundancy = jnp.stack([losses.covariance_term(z) for z in whole]).mean()
  found["global"] = weights[0] * apart + weights[1] * spread + weights[2] * redundancy
  return found


def _check(batch_size, views, alpha, counts, batch_norm) -> None:
  names.choices(dict(batch_norm=batch_norm), CHOICES)
  if batch_size < 2:
    raise ValueError("batch_size 1: the spread of a batch needs two examples or more")
  if len(views) not in (1, 2):
    raise ValueError(f'method.views {views}: ("views",) or ("global", "local")')
  if not 0 <= alpha <= 1:
    raise ValueError(f"method.alpha {alpha} is not between 0 and 1")
  if len(counts) != 4 or min(counts[:2]) < 1 or min(counts[2:]) < 0:
    raise ValueError(
      "method.matches and method.feature_matches: two numbers each, of a large and of a small view,"
      " at least 1 and at least 0"
    )


def _check_cells(leaf: str, counts: Sequence[int], grid: Sequence[int]) -> None:
  for name, count in zip(("matches", "feature_matches"), counts):
    if count > math.prod(grid):
      raise ValueError(
        f"method.{name} {count}: the map of a view in {leaf!r} has {' × '.join(map(str, grid))} ="
        f" {math.prod(grid)} cells"
      )
