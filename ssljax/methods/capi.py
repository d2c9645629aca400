"""CAPI (Darcet et al. 2025, 2502.08769): a teacher's patches are assigned to clusters that are
learnt beside, and the student predicts the assignments at places it does not see.

Assignments are balanced over the batch at each place by itself, so that clusters cannot code the
position. The clustering layer has a loss of its own and should have an optimizer of its own,
`optim.adamw_apart` with apart=("clustering",).
"""

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, schedules
from ssljax.models import tokens as tokens_lib
from ssljax.models.heads import Prototypes, unit
from ssljax.models.predictors import CrossPredictor
from ssljax.models.views import evaluated
from ssljax.step import Method, coupled, example_keys


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
  head = Prototypes(clusters, "use", dtype=encoder.dtype)

  def init(rng, batch):
    if batch["context"].shape[1] != 1 or batch["targets"].shape[1:3] != (1, 1):
      raise ValueError(
        "CAPI has one context and one list of targets: use"
        " data.hidden=dict(name='ssljax.data.multiblock.rolled')"
      )
    x = jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32)
    k, t = batch["context"].shape[-1], batch["targets"].shape[-1]
    rngs = jax.random.split(rng, 4)
    tokens = jnp.zeros((1, encoder.prefix + k, encoder.width))
    places = jnp.zeros((1, k), jnp.int32), jnp.zeros((1, t), jnp.int32)
    args = tokens, encoder.grid(x.shape[1:-1]), *places
    params = {
      "encoder": encoder.init(rngs[0], x)["params"],
      "predictor": predictor.init(rngs[1], *args)["params"],
      "head": head.init(rngs[2], jnp.zeros((1, width)))["params"] | {"gain": jnp.ones(clusters)},
      "clustering": {
        "kernel": jax.random.normal(rngs[3], (encoder.width, clusters)),
        "bias": jnp.zeros(clusters),
      },
    }
    return params, jax.tree.map(jnp.copy, {"teacher": {"encoder": params["encoder"]}})

  def embed(params, extra, batch, rng, step):
    """{"student": [b t d] at the targets, "teacher": [b n d] at every place}."""
    x, context, places = batch["image"], batch["context"][:, 0], batch["targets"][:, 0, 0]
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(example_keys(rng, batch["index"]))
    seen = encoder.apply({"params": params["encoder"]}, x, keep=context, keys=keys[:, 0])["tokens"]
    args = seen, encoder.grid(x.shape[1:-1]), context, places, keys[:, 1]
    pred = predictor.apply({"params": params["predictor"]}, *args)
    taught = encoder.apply({"params": extra["teacher"]["encoder"]}, x)["patches"]
    pooled = jax.lax.stop_gradient(taught.astype(jnp.float32).mean(1))
    return {"student": pred, "teacher": jax.lax.stop_gradient(taught)}, {"rows": {"pooled": pooled}}

  def couple(params, extra, z, batch, rng, step):
    taught = jax.lax.stop_gradient(z["teacher"])
    layer, gain = params["clustering"], params["head"]["gain"]
    kernel = layer["kernel"].astype(encoder.dtype)
    scores = jnp.matmul(
      unit(taught).astype(encoder.dtype), kernel, preferred_element_type=jnp.float32
    )
    scores += layer["bias"]
    assigned = losses.positionwise_sinkhorn(scores, sinkhorn_temperature, sinkhorn_steps)
    logits = gain * head.apply({"params": {"kernel": params["head"]["kernel"]}}, unit(z["student"]))
    wanted = tokens_lib.take(assigned, batch["targets"][:, 0, 0])
    metrics = {
      "prediction": losses.soft_ce(logits, wanted, student_temperature).mean(),
      "clustering": losses.soft_ce(scores, assigned, cluster_temperature).mean(),
    }
    value = metrics["prediction"] + metrics["clustering"]
    metrics |= collapse.assignments(assigned)
    return value, ({}, metrics | collapse.features(taught.astype(jnp.float32).mean(1)))

  def update(params, extra, stats, step):
    online = {"encoder": params["encoder"]}
    return {"teacher": optax.incremental_update(online, extra["teacher"], rate(step))}

  def encode(params, extra, batch, layers=()):
    weights = (extra["teacher"] if evaluate == "teacher" else params)["encoder"]
    return evaluated(encoder, weights, {}, batch["image"], layers)

  needs = ("image", "context", "targets", "index")
  return Method(init, coupled(embed, couple), update, encode, None, needs, embed, couple)


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
