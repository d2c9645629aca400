"""LeJEPA (Balestriero and LeCun 2025, 2511.08544): views towards their mean, features towards an
isotropic Gaussian. No teacher, no predictor, no stop of gradients.

The regulariser compares the whole batch with N(0, I) along random directions, which are the step's:
the same for all views and all devices. Features of all views pass the projector together.
"""

import functools
import itertools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssljax import collapse, losses, names
from ssljax.models.heads import Projector
from ssljax.models.norms import running, with_statistics
from ssljax.models.views import evaluated, merged, why_whole
from ssljax.step import Method, coupled, example_keys

CHOICES = {"center": ("all", "first"), "batch_norm": ("global", "microbatch")}


class Parts(NamedTuple):
  """What the functions of the method share."""

  encoder: Any
  projector: Projector
  views: tuple[str, ...]
  weight: float
  directions: int
  center: str


def lejepa(
  encoder,
  batch_size: int,
  *,
  views: tuple[str, ...] = ("views",),
  projector: tuple[int, ...] = (2048, 2048, 128),
  projector_norm: str = "batch",
  projector_bias: str = "all",
  weight: float = 0.05,
  directions: int = 1024,
  center: str = "all",
  batch_norm: str = "global",
) -> Method:
  """A method of several views of each example.

  Args:
    encoder: from `models/`.
    views: leaves of the batch, [b v h w c] each: ("views",) or ("global", "local").
    projector, projector_norm, projector_bias: of `models.heads.Projector`.
    weight, directions: of the regulariser; the distance of the views weighs 1 - weight. The
      regulariser grows with the batch.
    center: the views come together at the mean of "all" of them (the authors' minimal recipe) or of
      the "first" leaf's alone (their recipe with global and local views).
    batch_norm: of the encoder under `accum`: "global" needs the whole batch, "microbatch" takes
      each microbatch's own.

  Raises:
    ValueError: an unknown name, or a single example in a batch.
  """
  _check(dict(center=center, batch_norm=batch_norm), batch_size)
  head = Projector(projector, projector_norm, bias=projector_bias, dtype=encoder.dtype)
  parts = Parts(
    encoder=encoder, projector=head, views=tuple(views), weight=weight, directions=directions,
    center=center,
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  whole = why_whole(encoder, batch_norm)
  needs = (*views, "index")
  return Method(init, coupled(embed, couple), update, encode, None, needs, embed, couple, whole)


def _init(parts: Parts, rng, batch):
  encoder = parts.encoder
  rngs = jax.random.split(rng, 2)
  x = jnp.zeros((2, *batch[parts.views[0]].shape[2:]))
  made = {"encoder": encoder.init(rngs[0], x)}
  z = jnp.zeros(jax.eval_shape(encoder.apply, made["encoder"], x)["pooled"].shape)
  made["projector"] = parts.projector.init(rngs[1], z, train=False)
  params = {name: variables.get("params", {}) for name, variables in made.items()}
  stats = {name: variables.get("batch_stats", {}) for name, variables in made.items()}
  return params, jax.tree.map(jnp.copy, {"stats": stats})


def _embed(parts: Parts, params, extra, batch, rng, step):
  """Pooled features of the views, {leaf: [b v d]}."""
  views, stats, z = parts.views, running(extra, "encoder"), {}
  counts = [batch[leaf].shape[1] for leaf in views]
  keys = example_keys(rng, batch["index"])
  keys = jax.vmap(lambda key: jax.random.split(key, sum(counts)))(keys)
  for leaf, end, v in zip(views, itertools.accumulate(counts), counts):
    # (b v): nothing moves between devices.
    x, k = (merged(a) for a in (batch[leaf], keys[:, end - v : end]))
    out, stats = with_statistics(parts.encoder, params["encoder"], stats, x, keys=k)
    z[leaf] = out["pooled"].reshape(-1, v, out["pooled"].shape[-1])
  kept = {"mean": {"stats/encoder": stats}, "rows": {"pooled": z[views[0]][:, 0]}}
  return z, jax.lax.stop_gradient(kept)


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  own = params["projector"], running(extra, "projector")
  pooled = jnp.concatenate([z[leaf] for leaf in parts.views], axis=1)
  projected, stats = with_statistics(parts.projector, *own, pooled, train=True)
  first = z[parts.views[0]].shape[1] if parts.center == "first" else None
  key = jax.random.fold_in(rng, zlib.crc32(b"directions"))
  value, terms = losses.lejepa(projected, key, parts.weight, first, parts.directions)
  mean = {"stats/projector": stats}
  return value, ({"mean": jax.lax.stop_gradient(mean)}, terms | collapse.features(pooled[:, 0]))


def _update(parts: Parts, params, extra, stats, step):
  return {"stats": {name: stats["mean"][f"stats/{name}"] for name in extra["stats"]}}


def _encode(parts: Parts, params, extra, batch, layers=()):
  stats = running(extra, "encoder")
  return evaluated(parts.encoder, params["encoder"], stats, batch["image"], layers)


def _check(given: dict[str, str], batch_size: int) -> None:
  names.choices(given, CHOICES)
  if batch_size < 2:
    raise ValueError("batch_size 1: the spread of a batch needs two examples or more")
