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
DCL and DCLW (Yeh et al. 2022, 2110.06848): loss `decoupled_nce`, the second with sigma 0.5.
VIbCReg (Lee and Aune 2021, 2109.00783): loss `vibcreg`, projector_last "whiten".
W-MSE (Ermolov et al. 2021, 2007.06346): loss `w_mse`; `size` rows are whitened together.
SSL-EY (Chapman et al. 2023, 2310.01012): loss `ssl_ey`, target "online".
MMCR (Yerxa et al. 2023, 2303.03307): loss `mmcr`, target "teacher": half of each centroid is its.
SupCon (Khosla et al. 2020, 2004.11362): loss `supcon`, target "online"; needs labels.
TiCo (Zhu et al. 2022, 2206.10698): loss `tico`, target "teacher"; its covariance is in `extra`.
NNCLR (Dwibedi et al. 2021, 2104.14548): loss `nnclr`, target "stopped" with a predictor and a
queue of the first view's projections (`queued` "first").
MoCHi (Kalantidis et al. 2020, 2010.01028): MoCo v2 with loss `mochi`.
"""

import functools
import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssljax import called, collapse, losses, names, schedules
from ssljax.models.heads import Projector, unit
from ssljax.models.norms import running
from ssljax.models.views import evaluated, run_views, why_whole
from ssljax.step import Method, coupled, example_keys

CHOICES = {
  "target": ("online", "stopped", "unstopped", "teacher"),
  "norm_views": ("apart", "together"),
  "batch_norm": ("global", "microbatch"),
  "queued": ("all", "first"),
}
# Loss -> how many it tells one example apart from, itself included: (batch, queue, …) -> count. Its
# value is the logarithm where all similarities are alike.
CANDIDATES: dict[Callable, Callable] = {
  losses.nt_xent: lambda b, queue: 2 * b - 1,
  losses.debiased_nce: lambda b, queue: 2 * b - 1,
  losses.kernel_info_nce: lambda b, queue: 2 * b - 1,
  losses.decoupled_nce: lambda b, queue: 2 * b - 2,  # the pair itself is not below the line
  losses.supcon: lambda b, queue: 2 * b - 1,
  losses.info_nce: lambda b, queue: b + queue,
  losses.info_nce_inbatch: lambda b, queue: b,
  losses.nnclr: lambda b, queue: b,
  losses.info_nce_queue: lambda b, queue: queue + 1,
  losses.mochi: lambda b, queue, s=1024, s2=128: queue + 1 + s + s2,
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
  queued: str
  asked: tuple[str, ...]
  terms: Mapping[str, Mapping[str, Any]]


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
  projector_activation: str = "relu",
  whiten_groups: int = 64,
  predictor: tuple[int, ...] = (),
  predictor_norm: str = "batch",
  predictor_last: str = "none",
  predictor_bias: str = "auto",
  target: str = "online",
  symmetric: bool = True,
  momentum=0.996,
  queue: int = 0,
  queued: str = "all",
  norm_views: str = "apart",
  batch_norm: str = "global",
  terms: Mapping[str, Mapping[str, Any]] | None = None,
) -> Method:
  """A method of two views, `batch["views"]` [b 2 h w c].

  Args:
    encoder: from `models/`.
    loss: (z1, z2) -> [b] or a number, perhaps with a dict of its terms. z are projections [b d], or
      predictions where there is a `predictor`. What needs unit vectors normalises them itself. Its
      other parameters may be among `called.GIVEN` (queue, labels, …). One whose first parameter is
      `z` [b v d] or `views` is called once for all views, after them the teacher's.
    loss_scale: factor on the mean loss.
    projector, predictor: widths of the layers; () is none. _norm, _last, _bias, _activation: of
      `models.heads`' Projector: between the layers, after the last one, which layers have a bias.
    whiten_groups: groups of features, each whitened by itself, with projector_last "whiten".
    target: what the loss compares the projections of one view with. "online": those of the other
      view, gradients flow into both. "stopped": the same without gradients. "unstopped": as
      "stopped", but gradients flow into both where the loss lets them; with a loss that only
      attracts this collapses. "teacher": projections by an average of encoder and projector, which
      moves by `momentum` (a number, or a schedule of the step) after each step and has batch-norm
      statistics of its own.
    symmetric: the mean of both directions; False: the first view is compared with the second. An
      "online" target has one direction only.
    queue: number of keys of earlier batches for the loss; this batch's enter after the step.
    queued: what enters: the target's projections of "all" its views, or of the "first" alone.
    norm_views: batch norm sees each view "apart", as where a network is called once a view, or all
      "together", as in SimCLR.
    batch_norm: of the encoder under `accum`. "global": over the whole batch, which no accumulation
      can give; "microbatch": over each microbatch.
    terms: further losses of the student's views, {name: dict(name=…, weight=1, on="projected")} of
      a function of one array [b d] or two, on "projected" or "pooled" features; added to the scaled
      loss, logged by their names. dict(entropy=dict(name="ssljax.losses.er_entropy", weight=-1)).

  Raises:
    ValueError: an unknown name, or parts that do not go together.
  """
  given = dict(target=target, norm_views=norm_views, batch_norm=batch_norm, queued=queued)
  names.choices(given, CHOICES)
  directions = ((0, 1), (1, 0)) if symmetric and target != "online" else ((0, 1),)
  entering = 1 if queued == "first" or not symmetric and target == "teacher" else 2
  _check_parts(batch_size, target, predictor, queue, entering)
  called.check(loss, bool(queue))
  called.check_views(loss, target, bool(predictor), symmetric)
  head = functools.partial(Projector, dtype=encoder.dtype)
  ends = (projector_last, projector_bias, projector_activation)
  whiten = functools.partial(losses.iter_norm, groups=_groups(whiten_groups, projector, ends[0]))
  heads = {
    "projector": head(projector, projector_norm, *ends, whiten=whiten),
    "predictor": head(predictor, predictor_norm, predictor_last, predictor_bias),
  }
  student = (0, 1) if symmetric or target != "teacher" else (0,)
  taught = (0, 1) if symmetric else (1,)
  called.check_terms(terms or {}, len(student))
  run = functools.partial(run_views, together=norm_views == "together")
  parts = Parts(
    encoder=encoder, heads=heads, run=run, loss=loss, loss_scale=loss_scale, target=target,
    directions=directions, student=student, taught=taught, momentum=schedules.moving(momentum),
    queue=queue, queued=queued, asked=called.asked(loss), terms=terms or {},
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  needs = ("views", "index", *(("label",) if "labels" in called.asked(loss) else ()))
  return Method(
    init, coupled(embed, couple), update, encode, None, needs, embed, couple,
    why_whole(encoder, batch_norm), _chance(parts, batch_size),
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
    extra["queue"] = unit(jax.random.normal(rngs[3], (parts.queue, width)))
    extra["position"] = jnp.zeros((), jnp.int32)
  if "memory" in parts.asked:
    extra["memory"] = jnp.zeros((width, width))
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
  memory, found = extra.get("memory"), []
  for number, views in enumerate(_compared(parts, online, wanted)):
    key = jax.random.fold_in(jax.random.fold_in(rng, zlib.crc32(b"loss")), number)
    has = {"queue": extra.get("queue"), "memory": memory, "labels": batch.get("label")}
    has |= {"step": step, "p1": online[:, 0], "p2": online[:, -1]}
    has |= called.drawn(key, batch["index"])
    *value, memory = called.call(parts.loss, views, has)
    found.append(tuple(value))
  value, metrics = jax.tree.map(lambda *x: sum(x) / len(x), *found)
  if memory is not None:
    mean["memory"] = memory
  keys = wanted if parts.queued == "all" else wanted[:, :1]
  stats = {"mean": mean, "rows": {"keys": keys} if parts.queue else {}}
  places = {"pooled": z["student"], "projected": projected}
  more, named = called.added(parts.terms, places, metrics)
  metrics |= collapse.features(projected[:, 0]) | named
  return parts.loss_scale * value + more, (jax.lax.stop_gradient(stats), metrics)


def _compared(parts: Parts, online, wanted) -> list[list[jax.Array]]:
  """What each call of the loss compares, views of [b d]."""
  teacher = parts.target == "teacher"
  if "p1" in parts.asked:
    return [[wanted[:, 0], wanted[:, 1]]]
  if called.at_once(parts.loss):
    return [[*jnp.unstack(online, axis=1), *(jnp.unstack(wanted, axis=1) if teacher else ())]]
  return [
    [online[:, parts.student.index(i)], wanted[:, parts.taught.index(j) if teacher else j]]
    for i, j in parts.directions
  ]


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
    keys = unit(keys.reshape(-1, keys.shape[-1]))
    new["queue"], new["position"] = losses.enqueue(extra["queue"], keys, extra["position"])
  if "memory" in extra:
    new["memory"] = stats["mean"]["memory"]
  return new


def _encode(parts: Parts, params, extra, batch, layers=()):
  stats = running(extra, "encoder")
  return evaluated(parts.encoder, params["encoder"], stats, batch["image"], layers)


def _chance(parts: Parts, batch_size: int) -> float:
  """The loss where every pair is equally similar; 0 where the loss does not tell pairs apart."""
  loss = parts.loss
  count, given = CANDIDATES.get(getattr(loss, "func", loss)), getattr(loss, "keywords", {})
  if count is None or parts.terms:
    return 0.0
  sizes = {k: v for k, v in given.items() if k in inspect.signature(count).parameters}
  return parts.loss_scale * math.log(count(batch_size, parts.queue, **sizes))


def _groups(groups: int, projector: tuple[int, ...], last: str) -> int:
  if last == "whiten" and (not projector or projector[-1] % groups):
    width = projector[-1] if projector else "nothing"
    raise ValueError(f"method.whiten_groups {groups} must divide the projector's width, {width}")
  return groups


def _check_parts(batch_size: int, target: str, predictor: tuple, queue: int, entering: int):
  if batch_size < 2:
    raise ValueError("batch_size 1: a loss between the examples of a batch needs two or more")
  if predictor and target == "online":
    raise ValueError('method.predictor needs method.target "stopped" or "teacher"')
  if queue and target not in ("teacher", "stopped"):
    raise ValueError('method.queue needs method.target "teacher" or "stopped"')
  if queue and queue < batch_size * entering:
    raise ValueError(f"method.queue {queue} is smaller than the {batch_size * entering} new keys")
