"""Latent prediction: from a part of an example, what a teacher says of the rest of it.

I-JEPA (Assran et al. 2023, 2301.08243): one context and four target blocks of `data.multiblock`,
predicted by a narrow transformer; the target is the teacher's last layer, each token normalised;
smooth L1. FlexPredict (Bar et al. 2024, 2308.00566): the same with `position_noise`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, schedules, targets
from ssljax.models import tokens as tokens_lib
from ssljax.models.predictors import PlacePredictor
from ssljax.step import Method, example_keys

LOSSES: dict[str, Callable] = {
  "l1": losses.masked_l1,
  "l2": losses.masked_l2,
  "smooth_l1": losses.masked_smooth_l1,
}
CHOICES = {
  "loss": tuple(LOSSES),
  "evaluate": ("teacher", "student"),
}


def latent_prediction(
  encoder,
  *,
  predictor_width: int = 384,
  predictor_depth: int = 12,
  predictor_heads: int = 0,
  position_noise: float = 0.0,
  loss: str = "smooth_l1",
  loss_beta: float = 1.0,
  teacher_momentum=0.996,
  evaluate: str = "teacher",
) -> Method:
  """A method of contexts `batch["context"]` int32 [b c k] and, from each of them, lists of places
  to predict `batch["targets"]` int32 [b c m t].

  Args:
    encoder: from `models/`, one that can see some places alone.
    predictor_width, _depth, _heads: of the predictor's transformer; heads 0: the encoder's.
    position_noise: standard deviation of the noise that stands for the mask token in a query, drawn
      anew for each place; 0 is I-JEPA's learnt token.
    loss: "smooth_l1" with `loss_beta`, "l1" or "l2".
    teacher_momentum: of the average of the encoder that sees the whole example: a number, or a
      schedule of the step.
    evaluate: the encoder that `encode` runs, "teacher" (the paper's choice) or "student".

  Raises:
    ValueError: an unknown name, or an encoder without patches or with relative positions.
  """
  _check(encoder, dict(loss=loss, evaluate=evaluate))
  momentum = schedules.moving(teacher_momentum)
  loss_fn = LOSSES[loss]
  if loss == "smooth_l1":
    loss_fn = functools.partial(loss_fn, beta=loss_beta)
  predictor = PlacePredictor(
    predictor_width, predictor_depth, predictor_heads or encoder.heads, encoder.width,
    encoder.prefix, encoder.eps, encoder.init_kernels, encoder.scan, encoder.remat, encoder.dtype,
  )  # fmt: skip

  def init(rng, batch):
    x = jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32)
    places = {k: jnp.zeros(batch[k].shape[2:], jnp.int32)[None] for k in ("context", "targets")}
    tokens = jnp.zeros((1, encoder.prefix + places["context"].shape[1], encoder.width))
    noise = jnp.zeros((*places["targets"].shape, encoder.width)) if position_noise else None
    rngs = jax.random.split(rng, 2)
    args = tokens, encoder.grid(x.shape[1:-1]), places["context"], places["targets"], noise
    params = {
      "encoder": encoder.init(rngs[0], x)["params"],
      "predictor": predictor.init(rngs[1], *args)["params"],
    }
    return params, jax.tree.map(jnp.copy, {"teacher": {"encoder": params["encoder"]}})

  def predict(params, batch, keys):
    """What is predicted at the targets of each context: [b c m t d]."""
    x, (b, c, k) = batch["image"], batch["context"].shape
    m, t = batch["targets"].shape[2:]
    context, places = batch["context"].reshape(b * c, k), batch["targets"].reshape(b * c, m, t)
    x = jnp.broadcast_to(x[:, None], (b, c, *x.shape[1:])).reshape(b * c, *x.shape[1:])
    keys = jax.vmap(lambda key: jax.random.split(key, (c, 2)))(keys).reshape(b * c, 2)
    seen = encoder.apply({"params": params["encoder"]}, x, keep=context, keys=keys[:, 0])
    noise = None
    if position_noise:
      shape = m, t, encoder.width
      draw = lambda key: position_noise * jax.random.normal(key, shape)  # noqa: E731
      noise = jax.vmap(draw)(keys[:, 1])
    args = seen["tokens"], encoder.grid(x.shape[1:-1]), context, places, noise
    pred = predictor.apply({"params": params["predictor"]}, *args)
    return pred.reshape(b, c, m, t, -1)

  def loss_and_stats(params, extra, batch, rng, step):
    pred = predict(params, batch, example_keys(rng, batch["index"]))
    seen = encoder.apply({"params": extra["teacher"]["encoder"]}, batch["image"])
    seen = jax.lax.stop_gradient(seen)
    b, d = len(pred), pred.shape[-1]
    places = batch["targets"].reshape(b, -1)
    wanted = tokens_lib.take(targets.layer_normalise(seen["patches"]), places)
    # Of whole examples: a target that knows its place alone is spread over tokens, and collapsed.
    metrics = collapse.features(seen["patches"].astype(jnp.float32).mean(1))
    return loss_fn(pred.reshape(b, -1, d), wanted).mean(), ({}, metrics)

  def update(params, extra, stats, step):
    online = {"encoder": params["encoder"]}
    return {"teacher": optax.incremental_update(online, extra["teacher"], 1.0 - momentum(step))}

  def encode(params, extra, batch, layers=()):
    weights = (extra["teacher"] if evaluate == "teacher" else params)["encoder"]
    out = encoder.apply({"params": weights}, batch["image"], layers=layers)
    out.pop("tokens")
    return out | {k: v[:, encoder.prefix :] for k, v in out.items() if k.startswith("layer_")}

  needs = ("image", "context", "targets", "index")
  return Method(init, loss_and_stats, update, encode, None, needs)


def _check(encoder, given: dict[str, str]) -> None:
  for argument, value in given.items():
    if value not in CHOICES[argument]:
      names = ", ".join(CHOICES[argument])
      raise ValueError(f"method.{argument} {value!r} is none of {names}")
  if encoder.patch is None or encoder.positions == "relative":
    raise ValueError(
      "latent prediction shows the encoder some places alone: it needs an encoder of patches whose"
      ' positions are not relative, such as vit with positions="sincos"'
    )
