"""CAPI (Darcet et al. 2025, 2502.08769): a teacher's patches are assigned to clusters that are
learnt beside, and the student predicts the assignments at places it does not see.

Assignments are balanced over the batch at each place by itself, so that clusters cannot code the
position. The clustering layer has a loss of its own and should have an optimizer of its own,
`optim.adamw_apart` with apart=("clustering",).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, schedules
from ssljax.models import tokens as tokens_lib
from ssljax.models.heads import Prototypes, unit
from ssljax.models.predictors import CrossPredictor
from ssljax.models.views import evaluated
from ssljax.step import Method, coupled, example_keys


class Parts(NamedTuple):
  """What the functions of the method share. `heat`s are temperatures; `rate` is what the teacher
  takes of the student."""

  encoder: Any
  predictor: CrossPredictor
  head: Prototypes
  heat: float
  cluster_heat: float
  sinkhorn_heat: float
  sinkhorn_steps: int
  rate: Callable
  evaluate: str


def capi(
  encoder,
  batch_size: int,
  total_steps: int,
  *,
  clusters: int = 16384,
  predictor_width: int = 0,
  predictor_depth: int = 12,
  predictor_heads: int = 0,
  student_temperature: float = 0.12,
  cluster_temperature: float = 0.12,
  sinkhorn_temperature: float = 0.06,
  sinkhorn_steps: int = 3,
  teacher_rate: float = 1e-3,
  teacher_warmup: int = 0,
  evaluate: str = "teacher",
) -> Method:
  """A method of one context `batch["context"]` int32 [b 1 k] and one list of places to predict
  `batch["targets"]` int32 [b 1 1 t], as of `data.multiblock.rolled`.

  Args:
    encoder: from `models/`, one that can see some places alone.
    clusters: of the teacher's patches, and outputs of the student's head.
    predictor_width, _depth, _heads: of the predictor; 0: the encoder's.
    student_temperature, cluster_temperature: of the softmax that the assignments are compared with,
      the student's and the clustering layer's.
    sinkhorn_temperature, sinkhorn_steps: of the assignments.
    teacher_rate, teacher_warmup: what the teacher takes of the student after a step: nothing at
      first, `teacher_rate` after so many steps, then down to nothing along a cosine.
    evaluate: the encoder that `encode` runs, "teacher" or "student".

  Raises:
    ValueError: an unknown name, or an encoder without patches or with relative positions.
  """
  _check(encoder, batch_size, evaluate)
  rate = schedules.warmup_cosine(
    total_steps, batch_size, base=teacher_rate, per=0, warmup_steps=teacher_warmup
  )
  width = predictor_width or encoder.width
  predictor = CrossPredictor(
    width, predictor_depth, predictor_heads or encoder.heads, encoder.prefix, encoder.eps,
    encoder.init_kernels, encoder.drop_path, encoder.remat, encoder.dtype,
  )  # fmt: skip
  parts = Parts(
    encoder=encoder, predictor=predictor, head=Prototypes(clusters, "use", dtype=encoder.dtype),
    heat=student_temperature, cluster_heat=cluster_temperature, sinkhorn_heat=sinkhorn_temperature,
    sinkhorn_steps=sinkhorn_steps, rate=rate, evaluate=evaluate,
  )  # fmt: skip
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  needs = ("image", "context", "targets", "index")
  return Method(init, coupled(embed, couple), update, encode, None, needs, embed, couple)


def _init(parts: Parts, rng, batch):
  if batch["context"].shape[1] != 1 or batch["targets"].shape[1:3] != (1, 1):
    raise ValueError(
      "CAPI has one context and one list of targets: use"
      " data.hidden=dict(name='ssljax.data.multiblock.rolled')"
    )
  encoder, predictor, head = parts.encoder, parts.predictor, parts.head
  x = jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32)
  k, t = batch["context"].shape[-1], batch["targets"].shape[-1]
  rngs = jax.random.split(rng, 4)
  tokens = jnp.zeros((1, encoder.prefix + k, encoder.width))
  places = jnp.zeros((1, k), jnp.int32), jnp.zeros((1, t), jnp.int32)
  args = tokens, encoder.grid(x.shape[1:-1]), *places
  z, gain = jnp.zeros((1, predictor.width)), {"gain": jnp.ones(head.count)}
  params = {
    "encoder": encoder.init(rngs[0], x)["params"],
    "predictor": predictor.init(rngs[1], *args)["params"],
    "head": head.init(rngs[2], z)["params"] | gain,
    "clustering": {
      "kernel": jax.random.normal(rngs[3], (encoder.width, head.count)),
      "bias": jnp.zeros(head.count),
    },
  }
  return params, jax.tree.map(jnp.copy, {"teacher": {"encoder": params["encoder"]}})


def _embed(parts: Parts, params, extra, batch, rng, step):
  """{"student": [b t d] at the targets, "teacher": [b n d] at every place}."""
  encoder, variables = parts.encoder, {"params": params["encoder"]}
  x, context, places = batch["image"], batch["context"][:, 0], batch["targets"][:, 0, 0]
  keys = jax.vmap(lambda key: jax.random.split(key, 2))(example_keys(rng, batch["index"]))
  seen = encoder.apply(variables, x, keep=context, keys=keys[:, 0])["tokens"]
  args = seen, encoder.grid(x.shape[1:-1]), context, places, keys[:, 1]
  pred = parts.predictor.apply({"params": params["predictor"]}, *args)
  taught = encoder.apply({"params": extra["teacher"]["encoder"]}, x)["patches"]
  pooled = jax.lax.stop_gradient(taught.astype(jnp.float32).mean(1))
  return {"student": pred, "teacher": jax.lax.stop_gradient(taught)}, {"rows": {"pooled": pooled}}


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  """The losses of the student's predictions and of the clustering that they are held to."""
  taught = jax.lax.stop_gradient(z["teacher"])
  scores = _clustered(params["clustering"], taught, parts.encoder.dtype)
  assigned = losses.positionwise_sinkhorn(scores, parts.sinkhorn_heat, parts.sinkhorn_steps)
  kernel, gain = params["head"]["kernel"], params["head"]["gain"]
  logits = gain * parts.head.apply({"params": {"kernel": kernel}}, unit(z["student"]))
  wanted = tokens_lib.take(assigned, batch["targets"][:, 0, 0])
  metrics = {
    "prediction": losses.soft_ce(logits, wanted, parts.heat).mean(),
    "clustering": losses.soft_ce(scores, assigned, parts.cluster_heat).mean(),
  }
  value = metrics["prediction"] + metrics["clustering"]
  metrics |= collapse.assignments(assigned)
  return value, ({}, metrics | collapse.features(taught.astype(jnp.float32).mean(1)))


def _clustered(layer, patches: jax.Array, dtype) -> jax.Array:
  """Scores of the clusters, float32: [b n d] -> [b n k]."""
  kernel = layer["kernel"].astype(dtype)
  patches = unit(patches).astype(dtype)
  return jnp.matmul(patches, kernel, preferred_element_type=jnp.float32) + layer["bias"]


def _update(parts: Parts, params, extra, stats, step):
  online = {"encoder": params["encoder"]}
  return {"teacher": optax.incremental_update(online, extra["teacher"], parts.rate(step))}


def _encode(parts: Parts, params, extra, batch, layers=()):
  weights = (extra["teacher"] if parts.evaluate == "teacher" else params)["encoder"]
  return evaluated(parts.encoder, weights, {}, batch["image"], layers)


def _check(encoder, batch_size: int, evaluate: str) -> None:
  if evaluate not in ("teacher", "student"):
    raise ValueError(f"method.evaluate {evaluate!r} is none of teacher, student")
  if batch_size < 2:
    raise ValueError("batch_size 1: assignments are balanced over the batch")
  if encoder.patch is None or encoder.positions == "relative":
    raise ValueError(
      "CAPI shows the encoder some places alone: it needs an encoder of patches whose positions are"
      ' not relative, such as vit with positions="sincos"'
    )
