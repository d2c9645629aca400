"""Views matched to a slow teacher's distributions over prototypes.

DINO (Caron et al. 2021, 2104.14294): the student sees all views, the teacher the two global ones.
iBOT (Zhou et al. 2021, 2111.07832): `patch_weight` 1, and places of the student's global views are
hidden. Its patch centre is the mean over all places.
DINOv2 (Oquab et al. 2023, 2304.07193): `patch_head` "separate", `patch_center` "hidden",
`koleo_weight` .1, `balance` "sinkhorn" in the large recipe; encoders with registers. KoLeo and
Sinkhorn see the global batch, where the original's KoLeo sees one device's part.
AttMask (Kakogeorgiou et al. 2022, 2203.12719): iBOT with `hide` "attended" (its High) or
"attended_hint" (its Hint).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, names, schedules
from ssljax.models import tokens as tokens_lib
from ssljax.models.heads import DINOHead
from ssljax.models.norms import running, with_statistics
from ssljax.models.views import attended, evaluated, merged, see, see_all, view_keys, why_whole
from ssljax.step import Method, coupled, example_keys

CHOICES = {
  "balance": ("center", "sinkhorn"),
  "patch_head": ("shared", "separate"),
  "patch_center": ("all", "hidden"),
  "batch_norm": ("global", "microbatch"),
  "hide": ("drawn", "attended", "attended_hint"),
}
# AttMask-Hint shows .1 · r of all places again, r uniform in .1 … .5.
HINT = (0.01, 0.05)


class Parts(NamedTuple):
  """What the functions of the method share. `on_patches` is the head of patches, "" where they have
  no loss; `koleo_weight` is None where it is 0; `heat` is a temperature."""

  encoder: Any
  heads: dict[str, DINOHead]
  on_patches: str
  hidden_count: int
  hide: str
  balance: str
  patch_center: str
  center_momentum: float
  momentum: Callable
  heat: float
  teacher_heat: Callable
  patch_heat: Callable
  patch_weight: Callable
  koleo_weight: Callable | None


def self_distillation(
  encoder,
  batch_size: int,
  hidden_count: int = 0,
  *,
  prototypes: int = 65536,
  head_hidden: int = 2048,
  head_bottleneck: int = 256,
  head_layers: int = 3,
  head_norm: str = "none",
  head_gain: str = "fixed",
  head_start: str = "normal",
  balance: str = "center",
  center_momentum: float = 0.9,
  momentum=0.996,
  student_temperature: float = 0.1,
  teacher_temperature=0.04,
  patch_weight: float = 0.0,
  patch_head: str = "shared",
  patch_prototypes: int = 0,
  patch_temperature=0.0,
  patch_center: str = "all",
  hide: str = "drawn",
  koleo_weight: float = 0.0,
  batch_norm: str = "global",
) -> Method:
  """A method of views `batch["global"]` [b 2 h w c] and, where there are any, `batch["local"]`
  [b v h' w' c]; with patches also `batch["hidden"]` bool [b 2 n].

  Args:
    encoder: from `models/`.
    hidden_count: the most places that `batch["hidden"]` hides in a view.
    prototypes: outputs of the head; the loss begins near their logarithm.
    head_hidden, head_bottleneck, head_layers, head_norm, head_gain, head_start: of
      `models.heads.DINOHead`.
    balance: of the teacher's scores: "center" (a running mean is taken off, which moves by
      `center_momentum` after the loss) or "sinkhorn".
    momentum: of the teacher, an average of encoder and heads, moved after each step. This, the
      teacher's temperatures and the weights are numbers or schedules of the step.
    patch_weight: of the loss at hidden places, against the teacher's at the same places of the same
      view; 0 is DINO.
    patch_head: "shared" with the views' head, or "separate" with `patch_prototypes` outputs (0: as
      many).
    patch_temperature: the teacher's for patches; 0 is the same as for views.
    patch_center: mean over "all" places (iBOT) or the "hidden" ones (DINOv2).
    hide: "drawn" (`batch["hidden"]` as it comes), "attended" (as many places as it hides, but those
      that the teacher's class token attends to most) or "attended_hint" (of these a few of the
      first tenth are shown). AttMask draws how many once a batch, here every view has its own.
    koleo_weight: of the spread of the global views' pooled features, a sum over both.
    batch_norm: of the encoder under `accum`: "global" needs the whole batch, "microbatch" takes
      each microbatch's own.

  Raises:
    ValueError: an unknown name, or parts that do not go together.
  """
  given = dict(balance=balance, patch_head=patch_head, patch_center=patch_center)
  names.choices(given | dict(batch_norm=batch_norm, hide=hide), CHOICES)
  patches, couples = bool(patch_weight), bool(koleo_weight) or balance != "center"
  couples |= head_norm != "none"
  counts = prototypes, patch_prototypes, patch_head
  _check(encoder, batch_size, hidden_count, counts, patches, couples, hide)
  apart = patches and patch_head == "separate"
  outs = {"head": prototypes} | ({"patch_head": patch_prototypes or prototypes} if apart else {})
  sizes = head_hidden, head_bottleneck, head_layers, head_norm
  rest: dict[str, Any] = dict(gain=head_gain, start=head_start, dtype=encoder.dtype)
  heads = {name: DINOHead(out, *sizes, **rest) for name, out in outs.items()}
  moving = schedules.moving
  parts = Parts(
    encoder=encoder, heads=heads, on_patches=[*heads][-1] if patches else "",
    hidden_count=hidden_count, hide=hide, balance=balance, patch_center=patch_center,
    center_momentum=center_momentum, momentum=moving(momentum), heat=student_temperature,
    teacher_heat=moving(teacher_temperature),
    patch_heat=moving(patch_temperature or teacher_temperature), patch_weight=moving(patch_weight),
    koleo_weight=moving(koleo_weight) if koleo_weight else None,
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  whole = why_whole(encoder, batch_norm)
  needs = ("global", "index", *(("hidden",) if patches else ()))
  made = Method(init, coupled(embed, couple), update, encode, None, needs, whole=whole)
  # With centres alone every example has a loss of its own: plain microbatches hold fewer scores.
  return made._replace(embed=embed, couple=couple) if couples else made


def _init(parts: Parts, rng, batch):
  encoder, patches = parts.encoder, parts.on_patches
  if patches and batch["hidden"].ndim != 3:
    raise ValueError(
      "the places of both global views are hidden apart: use"
      " data.hidden=dict(name='ssljax.data.masking.view_blocks')"
    )
  x = jnp.zeros((1, *batch["global"].shape[2:]), jnp.float32)
  rngs = jax.random.split(rng, 3)
  made = {"encoder": encoder.init(rngs[0], x)}
  z = jnp.zeros(jax.eval_shape(encoder.apply, made["encoder"], x)["pooled"].shape)
  for key, (name, head) in zip(rngs[1:], parts.heads.items()):
    made[name] = head.init(key, z)
  params = {name: variables["params"] for name, variables in made.items()}
  stats = {name: variables.get("batch_stats", {}) for name, variables in made.items()}
  extra = {"teacher": dict(params)}
  if any(stats.values()):
    extra |= {"stats": stats, "teacher_stats": stats}
  if parts.balance == "center":
    extra["center"] = {"views": jnp.zeros(parts.heads["head"].out)}
    if patches:
      extra["center"]["patches"] = jnp.zeros(parts.heads[patches].out)
  if patches:
    params["mask_token"] = jnp.zeros(encoder.width)
  return params, jax.tree.map(jnp.copy, extra)


def _embed(parts: Parts, params, extra, batch, rng, step):
  """Features of the views, {"student": [b v d], "teacher": [b 2 d]}; with patches which are
  "hidden" [b 2 n], "patches" [b 2 m d] there, and "teacher_patches" at these or all places."""
  keys = view_keys(example_keys(rng, batch["index"]), batch)
  teacher_stats = running(extra, "encoder", "teacher_stats")
  # Of an encoder with batch norm keys are the sign of training; in others they drop paths.
  training = {"keys": keys[:, :2]} if teacher_stats else {}
  teacher = extra["teacher"]["encoder"], teacher_stats, batch["global"]
  asked = {"attention_layers": (-1,)} if parts.hide != "drawn" else None
  taught, teacher_stats = see(parts.encoder, *teacher, asked, **training)
  given, token = {}, {}
  if parts.on_patches:
    hidden = batch["hidden"]
    if parts.hide != "drawn":
      reveal = HINT if parts.hide == "attended_hint" else ()
      hidden = attended(parts.encoder, taught, hidden, keys[:, :2], reveal)
    given, token = {"hidden": hidden}, {"mask_token": params["mask_token"]}
  own = params["encoder"], running(extra, "encoder"), batch, keys
  pooled, out, stats = see_all(parts.encoder, *own, token, **given)
  z = {"student": pooled, "teacher": taught["pooled"]}
  if parts.on_patches:
    places = tokens_lib.split_hidden(hidden, parts.hidden_count)[1]
    z["patches"] = tokens_lib.take(out["patches"], places)
    z["hidden"] = hidden.astype(jnp.float32)  # z is differentiated, and may hold no bool
    whole = parts.balance == "center" and parts.patch_center == "all"
    wanted = taught["patches"]
    z["teacher_patches"] = wanted if whole else tokens_lib.take(wanted, places)
  mean = {"stats/encoder": stats, "teacher_stats/encoder": teacher_stats}
  return z, jax.lax.stop_gradient({"mean": mean, "rows": {"pooled": pooled[:, 0]}})


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  """The loss of what `_embed` made: of views, of patches and of the views' spread."""
  value, signs, mean = _of_views(parts, params, extra, z, step)
  metrics = {"dino": value}
  if parts.on_patches:
    metrics["ibot"], more = _of_patches(parts, params, extra, z, step)
    mean |= more
    value = value + parts.patch_weight(step) * metrics["ibot"]
  if parts.koleo_weight:
    spread = [losses.koleo(x).mean() for x in jnp.unstack(z["student"][:, :2], axis=1)]
    metrics["koleo"] = sum(spread)
    value = value + parts.koleo_weight(step) * metrics["koleo"]
  metrics |= collapse.features(z["student"][:, :2]) | signs
  return value, ({"mean": jax.lax.stop_gradient(mean)}, metrics)


def _of_views(parts: Parts, params, extra, z, step):
  """The loss of "student" [b v d] against "teacher" [b 2 d], the signs of collapse in what the
  teacher assigns, and means for `update`."""
  center, heat = extra.get("center", {}).get("views"), parts.teacher_heat(step)
  student, teacher, mean = _scores(parts, params, extra, "head", z["student"], z["teacher"])
  lists = jnp.unstack(student, axis=1), jnp.unstack(teacher, axis=1)
  value = losses.dino_loss(*lists, center, parts.heat, heat).mean()
  if center is not None:
    mean["center/views"] = teacher.mean((0, 1))
  return value, collapse.assignments(_assigned(teacher, center, heat)), mean


def _of_patches(parts: Parts, params, extra, z, step):
  """The loss of "patches" [b 2 m d] against "teacher_patches" [b 2 m d] or, where the centre is of
  all places, [b 2 n d], at the "hidden" ones [b 2 n], and means for `update`."""
  name, center = parts.on_patches, extra.get("center", {}).get("patches")
  given = z["patches"], z["teacher_patches"]
  student, wanted, mean = _scores(parts, params, extra, name, *given)
  hidden = z["hidden"] > 0
  places = tokens_lib.split_hidden(hidden, parts.hidden_count)[1]
  counts = jnp.take_along_axis(hidden, places, axis=-1)
  if center is not None:
    mean["center/patches"] = _sums(wanted, None if parts.patch_center == "all" else counts)
  wanted = tokens_lib.take(wanted, places) if wanted.shape[2] > places.shape[2] else wanted
  args = center, parts.heat, parts.patch_heat(step), merged(counts)
  return losses.ibot_loss(merged(student), merged(wanted), *args).mean(), mean


def _scores(parts: Parts, params, extra, name, own, taught):
  """What a head says of features [… d], the student's and the teacher's: [… k], [… k], and the
  running statistics of both after it."""
  student = params[name], running(extra, name), own
  teacher = extra["teacher"][name], running(extra, name, "teacher_stats"), taught
  scores, stats = with_statistics(parts.heads[name], *student, train=True)
  wanted, teacher_stats = with_statistics(parts.heads[name], *teacher, train=True)
  mean = {f"stats/{name}": stats, f"teacher_stats/{name}": teacher_stats}
  return scores, jax.lax.stop_gradient(wanted), mean


def _update(parts: Parts, params, extra, stats, step):
  mean, new = stats["mean"], dict(extra)
  for place in {"stats", "teacher_stats"} & set(extra):
    new[place] = {k: mean[f"{place}/{k}"] for k in extra[place]}
  online = {name: params[name] for name in extra["teacher"]}
  new["teacher"] = optax.incremental_update(online, extra["teacher"], 1.0 - parts.momentum(step))
  if "center" in extra:
    momentum = parts.center_momentum
    new["center"] = {"views": _moved(extra, "views", momentum, mean["center/views"])}
    if parts.on_patches:
      new["center"]["patches"] = _moved(extra, "patches", momentum, *mean["center/patches"])
  return new


def _encode(parts: Parts, params, extra, batch, layers=()):
  stats = running(extra, "encoder")
  return evaluated(parts.encoder, params["encoder"], stats, batch["image"], layers)


def _sums(scores: jax.Array, counts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Mean over the views of the sum at the places that count, and of their number: [k], []. Unlike
  the mean over these places, both may be averaged over microbatches."""
  if counts is None:
    return scores.mean((0, 1, 2)), jnp.ones(())
  counts = counts.astype(scores.dtype)
  return jnp.einsum("bvm,bvmk->k", counts, scores) / counts.size, counts.mean()


def _moved(extra, name, momentum, total, share=1.0) -> jax.Array:
  """A centre [k] on its way to the mean of scores, of what `_sums` says of them."""
  weights = jnp.reshape(jnp.asarray(share, total.dtype), (1,))
  mean = total[None] / jnp.maximum(weights, 1e-12)
  return losses.update_center(extra["center"][name], mean, momentum, weights)


def _assigned(teacher, center, temperature) -> jax.Array:
  """What the teacher's scores [b u k] become, for the signs of collapse."""
  if center is None:
    return losses.sinkhorn_knopp(teacher, temperature)
  return jax.nn.softmax((teacher - center) / temperature)


def _check(encoder, batch_size, hidden_count, counts, patches, couples, hide):
  prototypes, patch_prototypes, patch_head = counts
  if prototypes < 2 or patch_prototypes == 1 or patch_prototypes < 0:
    raise ValueError(
      f"method.prototypes {prototypes}, method.patch_prototypes {patch_prototypes}: a distribution"
      " needs two or more"
    )
  if patch_prototypes and patch_head == "shared":
    raise ValueError('method.patch_prototypes needs method.patch_head "separate"')
  if couples and batch_size < 2:
    raise ValueError("batch_size 1: Sinkhorn, KoLeo and batch norm need two examples or more")
  if patches and getattr(encoder, "patch", None) is None:
    raise ValueError("method.patch_weight hides patches: it needs an encoder of patches, as vit")
  if patches and not hidden_count:
    raise ValueError(
      "method.patch_weight needs places that are hidden:"
      " data.hidden=dict(name='ssljax.data.masking.view_blocks')"
    )
  if hidden_count and not patches:
    raise ValueError("data.hidden hides places that method.patch_weight 0 does not predict")
  if hide != "drawn" and not (patches and encoder.class_token):
    raise ValueError(
      f'method.hide "{hide}" needs method.patch_weight and an encoder with class_token=True'
    )
