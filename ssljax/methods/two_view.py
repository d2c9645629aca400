"""Two views of each example, and one loss between their projections.

SimCLR (Chen et al. 2020, 2002.05709): loss `nt_xent`, target "online", `norm_views` "together".
Barlow Twins (Zbontar et al. 2021, 2103.03230): loss `barlow_twins`, target "online".
VICReg (Bardes, Ponce and LeCun 2022, 2105.04906): loss `vicreg`, target "online".
MoCo v2 (Chen et al. 2020, 2003.04297): loss `info_nce_queue`, target "teacher", one direction. Its
keys are not shuffled between devices: batch norm is over the global batch, which leaks nothing.
BYOL (Grill et al. 2020, 2006.07733): loss `normalized_l2`, scale 2 (the sum of both directions),
target "teacher" with a predictor. Its teacher starts as the student, not from other random weights.
SimSiam (Chen and He 2021, 2011.10566): loss `negative_cosine`, target "stopped" with a predictor.
MoCo v3 (Chen, Xie and He 2021, 2104.02057): loss `info_nce_inbatch`, scale 4·temperature (2·T times
the sum of both directions), target "teacher" with a predictor. The teacher moves after the step,
not before: the same sequence, its momentum one step late.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, schedules
from ssljax.models.heads import Projector
from ssljax.step import Method, coupled, example_keys

CHOICES = {
  "target": ("online", "stopped", "unstopped", "teacher"),
  "norm_views": ("apart", "together"),
  "batch_norm": ("global", "microbatch"),
}
# Loss -> how many it tells one example apart from, itself included: (batch, queue) -> count. Its
# value is the logarithm where all similarities are alike.
CANDIDATES: dict[Callable, Callable] = {
  losses.nt_xent: lambda b, queue: 2 * b - 1,
  losses.info_nce: lambda b, queue: b,
  losses.info_nce_inbatch: lambda b, queue: b,
  losses.info_nce_queue: lambda b, queue: queue + 1,
}


class Parts(NamedTuple):
  """What the functions of the method share; `student` and `taught` are the views that student and
  teacher must see, `directions` the pairs (student's view, view it is compared with)."""

  encoder: Any
  heads: dict[str, Any]
  run: Callable
  loss: Callable
  loss_scale: float
  target: str
  directions: tuple[tuple[int, int], ...]
  student: tuple[int, ...]
  taught: tuple[int, ...]
  momentum: Callable
  queue: int


def two_view(
  encoder,
  batch_size: int,
  *,
  loss: Callable,
  loss_scale: float = 1.0,
  projector: tuple[int, ...] = (2048, 128),
  projector_norm: str = "batch",
  projector_last: str = "none",
  projector_bias: str = "auto",
  predictor: tuple[int, ...] = (),
  predictor_norm: str = "batch",
  predictor_last: str = "none",
  predictor_bias: str = "auto",
  target: str = "online",
  symmetric: bool = True,
  momentum=0.996,
  queue: int = 0,
  norm_views: str = "apart",
  batch_norm: str = "global",
) -> Method:
  """A method of two views, `batch["views"]` [b 2 h w c].

  Args:
    encoder: from `models/`.
    loss: (z1, z2) -> [b] or a number, perhaps with a dict of its terms; with a queue (z1, z2,
      queue). z are projections [b d], or predictions where there is a `predictor`. What needs unit
      vectors normalises them itself.
    loss_scale: factor on the mean loss.
    projector, predictor: widths of the layers; () is none. _norm, _last, _bias: of `models.heads`'
      Projector: between the layers, after the last one, and which layers have a bias.
    target: what the loss compares the projections of one view with. "online": those of the other
      view, gradients flow into both. "stopped": the same without gradients. "unstopped": as
      "stopped", but gradients flow into both where the loss lets them; with a loss that only
      attracts this collapses. "teacher": projections by an average of encoder and projector, which
      moves by `momentum` (a number, or a schedule of the step) after each step and has batch-norm
      statistics of its own.
    symmetric: the mean of both directions; False: the first view is compared with the second. An
      "online" target has one direction only.
    queue: number of keys of earlier batches for the loss; this batch's enter after the step.
    norm_views: batch norm sees each view "apart", as where a network is called once a view, or all
      "together", as in SimCLR.
    batch_norm: of the encoder under `accum`. "global": over the whole batch, which no accumulation
      can give; "microbatch": over each microbatch.

  Raises:
    ValueError: an unknown name, or parts that do not go together.
  """
  _check(dict(target=target, norm_views=norm_views, batch_norm=batch_norm))
  directions = ((0, 1), (1, 0)) if symmetric and target != "online" else ((0, 1),)
  _check_parts(batch_size, target, predictor, queue, len(directions))
  _check_loss(loss, bool(queue))
  head = functools.partial(Projector, dtype=encoder.dtype)
  heads = {
    "projector": head(projector, projector_norm, projector_last, projector_bias),
    "predictor": head(predictor, predictor_norm, predictor_last, predictor_bias),
  }
  student = (0, 1) if symmetric or target != "teacher" else (0,)
  taught = (0, 1) if symmetric else (1,)
  run = functools.partial(_run, norm_views == "together")
  parts = Parts(
    encoder, heads, run, loss, loss_scale, target, directions, student, taught,
    schedules.moving(momentum), queue,
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  whole = ""
  if getattr(encoder, "batch_norm", False) and batch_norm == "global":
    whole = (
      "the encoder's batch norm sees the whole batch;"
      ' method.batch_norm="microbatch" gives each microbatch its own statistics'
    )
  return Method(
    init, coupled(embed, couple), update, encode, None, ("views", "index"), embed, couple, whole,
    _chance(parts, batch_size),
  )  # fmt: skip


def _init(parts: Parts, rng, batch):
  encoder = parts.encoder
  x = jnp.zeros((2, *batch["views"].shape[2:]), jnp.float32)
  rngs = jax.random.split(rng, 4)
  made = {"encoder": encoder.init(rngs[0], x)}
  z = jnp.zeros(jax.eval_shape(encoder.apply, made["encoder"], x)["pooled"].shape)
  width = z.shape[-1]
  for key, (name, head) in zip(rngs[1:], parts.heads.items()):
    made[name] = head.init(key, z, train=False)
    z = jnp.zeros(jax.eval_shape(head.apply, made[name], z).shape)
    width = z.shape[-1] if name == "projector" else width
  params = {name: variables.get("params", {}) for name, variables in made.items()}
  extra: dict[str, Any] = {}
  extra["stats"] = {name: variables.get("batch_stats", {}) for name, variables in made.items()}
  if parts.target == "teacher":
    extra["teacher"] = {k: params[k] for k in ("encoder", "projector")}
    extra["teacher_stats"] = {k: extra["stats"][k] for k in ("encoder", "projector")}
  if parts.queue:
    extra["queue"] = _unit(jax.random.normal(rngs[3], (parts.queue, width)))
    extra["position"] = jnp.zeros((), jnp.int32)
  return params, jax.tree.map(jnp.copy, extra)


def _embed(parts: Parts, params, extra, batch, rng, step):
  """Pooled features {"student": [b s d], "teacher": [b t d]} of the views that each sees."""
  views = batch["views"]
  keys = jax.vmap(lambda key: jax.random.split(key, 2))(example_keys(rng, batch["index"]))
  z, mean = {}, {}

  def see(place, weights, which):
    x, k = views[:, jnp.array(which)], keys[:, jnp.array(which)]
    stats = extra[place]["encoder"]
    out, mean[f"{place}/encoder"] = parts.run(parts.encoder, weights["encoder"], stats, x, keys=k)
    return out["pooled"]

  z["student"] = see("stats", params, parts.student)
  if parts.target == "teacher":
    z["teacher"] = see("teacher_stats", extra["teacher"], parts.taught)
  return z, jax.lax.stop_gradient({"mean": mean, "rows": {"pooled": z["student"][:, 0]}})


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  teacher, mean = parts.target == "teacher", {}

  def through(name, x, place="stats", weights=params):
    given = weights[name], extra[place][name]
    out, mean[f"{place}/{name}"] = parts.run(parts.heads[name], *given, x, train=True)
    return out

  projected = through("projector", z["student"])
  online = through("predictor", projected)
  wanted = projected
  if teacher:
    wanted = through("projector", z["teacher"], "teacher_stats", extra["teacher"])
  if parts.target in ("stopped", "teacher"):
    wanted = jax.lax.stop_gradient(wanted)
  memory = (extra["queue"],) if parts.queue else ()
  found = []
  for i, j in parts.directions:
    pair = online[:, parts.student.index(i)], wanted[:, parts.taught.index(j) if teacher else j]
    found.append(_value(parts.loss(*pair, *memory)))
  value, metrics = jax.tree.map(lambda *x: sum(x) / len(x), *found)
  stats = {"mean": mean, "rows": {"keys": wanted} if parts.queue else {}}
  spread = collapse.features(projected[:, 0])
  return parts.loss_scale * value, (jax.lax.stop_gradient(stats), metrics | spread)


def _update(parts: Parts, params, extra, stats, step):
  new = dict(extra)
  for place in {"stats", "teacher_stats"} & set(extra):
    new[place] = {k: stats["mean"][f"{place}/{k}"] for k in extra[place]}
  if parts.target == "teacher":
    online = {name: params[name] for name in extra["teacher"]}
    step_size = 1.0 - parts.momentum(step)
    new["teacher"] = optax.incremental_update(online, extra["teacher"], step_size)
  if parts.queue:
    keys = stats["rows"]["keys"]
    keys = _unit(keys.reshape(-1, keys.shape[-1]))
    new["queue"], new["position"] = losses.enqueue(extra["queue"], keys, extra["position"])
  return new


def _encode(parts: Parts, params, extra, batch, layers=()):
  encoder = parts.encoder
  # A checkpoint keeps no empty parts: an encoder without batch norm has no statistics there.
  variables = _variables(params["encoder"], extra.get("stats", {}).get("encoder", {}))
  out = encoder.apply(variables, batch["image"], layers=layers)
  out.pop("tokens", None)
  return out | {k: v[:, encoder.prefix :] for k, v in out.items() if k.startswith("layer_")}


def _chance(parts: Parts, batch_size: int) -> float:
  """The loss where every pair is equally similar; 0 where the loss does not tell pairs apart."""
  count = CANDIDATES.get(getattr(parts.loss, "func", parts.loss))
  return parts.loss_scale * math.log(count(batch_size, parts.queue)) if count else 0.0


def _run(together: bool, module, params, stats, x, **given):
  """A module in training mode on views [b v …] -> its output, leaves [b v …], and new statistics.

  Per-view arguments among `given` are [b v …], too. Where views are apart, the running statistics
  take one step a view, as a network that is called once a view.
  """
  b, v = x.shape[:2]
  arrays = {k: a for k, a in given.items() if isinstance(a, jax.Array)}
  fixed = {k: a for k, a in given.items() if k not in arrays}

  def apply(stats, x, arrays):
    variables = _variables(params, stats)
    out, new = module.apply(variables, x, **arrays, **fixed, mutable=["batch_stats"])
    return out, new.get("batch_stats", stats)

  if together or not stats:  # (b v): nothing moves between devices; without statistics the same
    flat = jax.tree.map(lambda a: a.reshape(b * v, *a.shape[2:]), (x, arrays))
    out, stats = apply(stats, *flat)
    return jax.tree.map(lambda a: a.reshape(b, v, *a.shape[1:]), out), stats
  outs = []
  for i in range(v):
    out, stats = apply(stats, *jax.tree.map(lambda a: a[:, i], (x, arrays)))  # noqa: B023
    outs.append(out)
  return jax.tree.map(lambda *a: jnp.stack(a, axis=1), *outs), stats


def _value(found) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean of a loss, and its terms where it tells them."""
  value, terms = found if isinstance(found, tuple) else (found, {})
  if not isinstance(terms, dict):
    raise ValueError("method.loss must return a number, [b], or either with a dict of its terms")
  return jnp.mean(value), {name: jnp.mean(term) for name, term in terms.items()}


def _variables(params, stats) -> dict[str, Any]:
  return {"params": params} | ({"batch_stats": stats} if stats else {})


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _check(given: dict[str, str]) -> None:
  for argument, value in given.items():
    if value not in CHOICES[argument]:
      names = ", ".join(CHOICES[argument])
      raise ValueError(f"method.{argument} {value!r} is none of {names}")


def _check_loss(loss: Any, queue: bool) -> None:
  if not callable(loss):
    example = "dict(name='ssljax.losses.nt_xent', temperature=.1)"
    raise ValueError(
      f"method.loss must be a function's name and arguments, {example}, not {loss!r}"
    )
  given = "two views and a queue" if queue else "two views"
  try:
    inspect.signature(loss).bind(*(None,) * (3 if queue else 2))
  except TypeError as error:
    raise ValueError(f"method.loss is called with {given}: {error}") from None


def _check_parts(batch_size: int, target: str, predictor: tuple, queue: int, directions: int):
  if batch_size < 2:
    raise ValueError("batch_size 1: a loss between the examples of a batch needs two or more")
  if predictor and target == "online":
    raise ValueError('method.predictor needs method.target "stopped" or "teacher"')
  if queue and target != "teacher":
    raise ValueError('method.queue needs method.target "teacher"')
  if queue and queue < batch_size * directions:
    raise ValueError(f"method.queue {queue} is smaller than the {batch_size * directions} new keys")
