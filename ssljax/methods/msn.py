"""Views with dropped patches matched to a slow teacher's distribution over learnt prototypes.

MSN (Assran et al. 2022, 2204.07141): the mean prediction is drawn towards all prototypes alike, and
Sinkhorn balances the targets. Dropped places are drawn for each example; the released code drops
the same ones in all of a device's batch. The released optimizer sums the prototypes' gradients over
devices, which Adam does not see; here the mean is global, as are the sums of the head's batch norm.
PMSN (Assran et al. 2022, 2210.07277): `prior_exponent` .25 and `iterations` 0, a power law in place
of equal shares, for data in which some things are rare.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, schedules
from ssljax.models import tokens as tokens_lib
from ssljax.models.heads import Projector, Prototypes, unit
from ssljax.models.norms import running, with_statistics
from ssljax.models.views import evaluated, see, view_keys
from ssljax.step import Method, coupled, example_keys


class Parts(NamedTuple):
  """What the functions of the method share. `loss`: (anchors, target [b d], prototypes [k d]) -> a
  number; `heat` is the targets' temperature."""

  encoder: Any
  hidden_count: int
  head: Projector
  prototypes: Prototypes
  loss: Callable
  heat: float
  momentum: Callable
  evaluate: str


def msn(
  encoder,
  batch_size: int,
  hidden_count: int,
  *,
  head: tuple[int, ...] = (2048, 2048, 256),
  head_norm: str = "batch",
  head_start: str = "normal",
  prototypes: int = 1024,
  temperature: float = 0.1,
  sharpening: float = 0.25,
  iterations: int = 3,
  prior_weight: float = 1.0,
  prior_exponent: float = 0.0,
  momentum=0.996,
  evaluate: str = "teacher",
) -> Method:
  """A method of views `batch["global"]` [b u h w c] and, where there are any, `batch["local"]`. The
  last global view is whole and the teacher's; from the others the places of `batch["hidden"]` bool
  [b n] are dropped. All but the last are the student's.

  Args:
    encoder: from `models/`, one that can see some places alone.
    hidden_count: number of hidden places.
    head: widths of its layers, GELU and `head_norm` ("batch" or "none") between them; head_start:
      of their kernels, see `models.heads.Projector`. Each size of views has its own batch norm.
    prototypes: how many; they and the head's output are made unit.
    temperature: of the predictions; the targets have temperature·sharpening.
    iterations: of Sinkhorn on the targets; 0 is none.
    prior_weight: of the mean prediction's distance from the prior, which gives prototype i the
      share (i+1)^-`prior_exponent`, normalised; 0 is equal shares.
    momentum: of the teacher, an average of encoder and head, moved after each step: a number, or a
      schedule of the step.
    evaluate: the encoder that `encode` runs, "teacher" or "student".

  Raises:
    ValueError: an unknown name, or parts that do not go together.
  """
  _check(encoder, batch_size, head, prototypes, evaluate)
  _check_balance(iterations, prior_exponent)
  balance: dict[str, Any] = dict(n_iters=iterations, prior_weight=prior_weight)
  if prior_exponent:
    balance["exponent"] = prior_exponent
  loss = functools.partial(
    losses.pmsn_loss if prior_exponent else losses.msn_loss,
    temperature=temperature, sharpening=sharpening, **balance,
  )  # fmt: skip
  projector = Projector(head, head_norm, activation="gelu", start=head_start, dtype=encoder.dtype)
  parts = Parts(
    encoder=encoder, hidden_count=hidden_count, head=projector, prototypes=Prototypes(prototypes),
    loss=loss, heat=temperature * sharpening, momentum=schedules.moving(momentum),
    evaluate=evaluate,
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  needs = ("global", "hidden", "index")
  return Method(init, coupled(embed, couple), update, encode, None, needs, embed, couple)


def _init(parts: Parts, rng, batch):
  if batch["global"].shape[1] < 2 or batch["hidden"].ndim != 2:
    raise ValueError(
      "msn needs two global views or more and one set of hidden places:"
      " data.hidden=dict(name='ssljax.data.masking.random', ratio=.15)"
    )
  x = jnp.zeros((1, *batch["global"].shape[2:]), jnp.float32)
  rngs = jax.random.split(rng, 3)
  params = {"encoder": parts.encoder.init(rngs[0], x)["params"]}
  made = parts.head.init(rngs[1], jnp.zeros((1, parts.encoder.width)))
  params["head"] = made["params"]
  extra: dict[str, Any] = {"teacher": dict(params)}
  if "batch_stats" in made:
    stats = {"head": made["batch_stats"]}
    extra |= {"stats": stats, "teacher_stats": stats}
  z = jnp.zeros((1, parts.head.sizes[-1]))
  params["prototypes"] = parts.prototypes.init(rngs[2], z)["params"]
  return params, jax.tree.map(jnp.copy, extra)


def _embed(parts: Parts, params, extra, batch, rng, step):
  """Pooled features: {"large": [b u-1 d], "small": [b v d], "teacher": [b 1 d]}."""
  encoder = parts.encoder
  own: tuple[Any, dict] = params["encoder"], {}
  keys = view_keys(example_keys(rng, batch["index"]), batch)
  large, target = batch["global"][:, :-1], batch["global"][:, -1:]
  u = large.shape[1]
  keep = tokens_lib.split_hidden(batch["hidden"], parts.hidden_count)[0]
  keep = jnp.broadcast_to(keep[:, None], (len(keep), u, keep.shape[1]))
  z = {"large": see(encoder, *own, large, keep=keep, keys=keys[:, :u])[0]["pooled"]}
  if "local" in batch:
    z["small"] = see(encoder, *own, batch["local"], keys=keys[:, u + 1 :])[0]["pooled"]
  teacher = see(encoder, extra["teacher"]["encoder"], {}, target)[0]["pooled"]
  z["teacher"] = jax.lax.stop_gradient(teacher)
  return z, {"rows": {"pooled": jax.lax.stop_gradient(z["large"][:, 0])}}


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  """The loss of what `_embed` made: all the student's views against the teacher's one."""
  anchors, target, mean = _projected(parts, params, extra, z)
  kernel = params["prototypes"]["kernel"]
  value = parts.loss(anchors, target, kernel.T)
  # Before Sinkhorn, which would spread even one prototype's examples over all.
  sharp = jax.nn.softmax(unit(target) @ unit(kernel, 0) / parts.heat)
  signs = collapse.features(z["large"]) | collapse.assignments(sharp)
  return value, ({"mean": jax.lax.stop_gradient(mean)}, signs)


def _projected(parts: Parts, params, extra, z):
  """Projections of what `_embed` made: a list of the student's views, [b d] each, the teacher's
  [b d], and the running statistics of both heads."""
  stats = running(extra, "head")
  anchors: list[jax.Array] = []
  for size in ("large", "small"):
    if size in z:
      out, stats = with_statistics(parts.head, params["head"], stats, z[size], train=True)
      anchors += jnp.unstack(out, axis=1)
  own = extra["teacher"]["head"], running(extra, "head", "teacher_stats")
  target, teacher_stats = with_statistics(parts.head, *own, z["teacher"], train=True)
  mean = {"stats": {"head": stats}, "teacher_stats": {"head": teacher_stats}}
  return anchors, jax.lax.stop_gradient(target[:, 0]), mean


def _update(parts: Parts, params, extra, stats, step):
  online = {name: params[name] for name in extra["teacher"]}
  teacher = optax.incremental_update(online, extra["teacher"], 1.0 - parts.momentum(step))
  return {"teacher": teacher} | {name: stats["mean"][name] for name in extra if name != "teacher"}


def _encode(parts: Parts, params, extra, batch, layers=()):
  weights = (extra["teacher"] if parts.evaluate == "teacher" else params)["encoder"]
  return evaluated(parts.encoder, weights, {}, batch["image"], layers)


def _check(encoder, batch_size: int, head: tuple, prototypes: int, evaluate: str) -> None:
  if evaluate not in ("teacher", "student"):
    raise ValueError(f"method.evaluate {evaluate!r} is none of teacher, student")
  if getattr(encoder, "patch", None) is None or encoder.positions == "relative":
    raise ValueError(
      "msn shows the encoder some places alone: it needs an encoder of patches whose positions are"
      ' not relative, such as vit with positions="learned"'
    )
  if batch_size < 2:
    raise ValueError("batch_size 1: Sinkhorn and batch norm need two examples or more")
  if not head:
    raise ValueError("method.head needs one layer or more: the last is the prototypes' width")
  if prototypes < 2:
    raise ValueError(f"method.prototypes {prototypes}: a distribution needs two or more")


def _check_balance(iterations: int, prior_exponent: float) -> None:
  if iterations < 0 or prior_exponent < 0:
    raise ValueError(
      f"method.iterations {iterations} and method.prior_exponent {prior_exponent}: 0 or more"
    )
  if iterations and prior_exponent:
    raise ValueError(
      f"method.iterations {iterations} balances the targets to equal shares, against the shares of"
      f" method.prior_exponent {prior_exponent}: set one of them to 0"
    )
