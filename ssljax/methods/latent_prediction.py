"""Latent prediction: from a part of an example, what a teacher says of the rest of it.

I-JEPA (Assran et al. 2023, 2301.08243): one context and four target blocks of `data.multiblock`,
predicted by a narrow transformer; the target is the teacher's last layer, each token normalised;
smooth L1. FlexPredict (Bar et al. 2023, 2308.00566): the same with `noise`.
data2vec 2.0 (Baevski et al. 2022, 2212.07525): many contexts of `data.multiblock.contexts`, one
pass of the teacher; predictor "convolution", `target_layers`, loss "l2", `class_weight`.
Latent MIM (Wei et al. 2024, 2407.15837), its loss and its targets: loss "info_nce", `teacher_sees`
"targets", one context of `data.multiblock.contexts`. Its gaps between patches, the layers after its
encoders, its decoder and its term of similarities (0 by default there) are not here.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, schedules, targets
from ssljax.models import tokens as tokens_lib
from ssljax.models.predictors import GridPredictor, PlacePredictor
from ssljax.models.views import evaluated
from ssljax.step import Method, example_keys

LOSSES: dict[str, Callable] = {
  "l1": losses.masked_l1,
  "l2": losses.masked_l2,
  "smooth_l1": losses.masked_smooth_l1,
  "info_nce": losses.patch_info_nce,
}
CHOICES = {
  "predictor": ("transformer", "convolution"),
  "loss": tuple(LOSSES),
  "teacher_sees": ("all", "targets"),
  "evaluate": ("teacher", "student"),
}


def latent_prediction(
  encoder,
  *,
  predictor: str = "transformer",
  predictor_width: int = 384,
  predictor_depth: int = 12,
  predictor_heads: int = 0,
  predictor_kernel: int = 3,
  predictor_groups: int = 16,
  noise: float = 0.0,
  target_layers: int = 0,
  loss: str = "smooth_l1",
  loss_beta: float = 1.0,
  loss_scale: float = 1.0,
  temperature: float = 0.2,
  class_weight: float = 0.0,
  teacher_momentum=0.996,
  teacher_sees: str = "all",
  evaluate: str = "teacher",
) -> Method:
  """A method of contexts `batch["context"]` int32 [b c k] and, from each of them, lists of places
  to predict `batch["targets"]` int32 [b c m t].

  Args:
    encoder: from `models/`, one that can see some places alone.
    predictor: "transformer" of `predictor_width`, _depth, _heads (0: the encoder's), or
      "convolution" on the grid of _width, _depth, _kernel, _groups.
    noise: standard deviation, drawn anew for each place. Of the transformer's queries in place of
      the mask token (FlexPredict; 0 is the learnt token), of what the convolution has at places
      that are not seen.
    target_layers: 0: the teacher's last layer; k: the mean of the outputs of its last k MLPs, each
      channel normalised over the tokens. Either is normalised token by token.
    loss: "smooth_l1" with `loss_beta`, "l1", "l2", or "info_nce": each prediction has to be nearer
      to the target of its place than to those of the other places of its example, by cosines over
      `temperature` T; predictions are standardised over places before, and the loss is times 2·T.
      Any is times `loss_scale`.
    class_weight: of the same loss between the class token of each context, before the predictor,
      and the mean of the target over all places.
    teacher_momentum: of the average of the encoder that is the teacher: a number, or a schedule of
      the step.
    teacher_sees: "all" places of an example, or the "targets" alone, of which there must be one
      list.
    evaluate: the encoder that `encode` runs, "teacher" or "student".

  Raises:
    ValueError: an unknown name, or parts that do not go together.
  """
  given = dict(predictor=predictor, loss=loss, teacher_sees=teacher_sees, evaluate=evaluate)
  _check(encoder, given, class_weight)
  if not 0 <= target_layers <= encoder.depth:
    raise ValueError(
      f"method.target_layers {target_layers} is not between 0 and the {encoder.depth} blocks"
    )
  momentum = schedules.moving(teacher_momentum)
  loss_fn = LOSSES[loss]
  if loss == "smooth_l1":
    loss_fn = functools.partial(loss_fn, beta=loss_beta)
  contrast, apart = loss == "info_nce", teacher_sees == "targets"
  if contrast:
    loss_fn = functools.partial(_contrast, temperature)
  sizes = predictor_width, predictor_depth
  on_grid = predictor == "convolution"
  head: GridPredictor | PlacePredictor
  if on_grid:
    shape = predictor_kernel, predictor_groups, encoder.dtype
    head = GridPredictor(*sizes, encoder.width, encoder.prefix, *shape)
  else:
    style = encoder.eps, encoder.init_kernels, encoder.scan, encoder.remat, encoder.dtype
    heads = predictor_heads or encoder.heads
    head = PlacePredictor(*sizes, heads, encoder.width, encoder.prefix, *style)

  def noise_shape(grid, m, t):
    """Of the noise of one context; None without noise."""
    if on_grid:
      return math.prod(grid), encoder.width
    return (m, t, encoder.width) if noise else None

  def init(rng, batch):
    x = jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32)
    grid = encoder.grid(x.shape[1:-1])
    k, (c, m, t) = batch["context"].shape[2], batch["targets"].shape[1:]
    if (contrast or apart) and (c, m) != (1, 1):
      raise ValueError(
        f'method.loss "info_nce" and method.teacher_sees "targets" need one list of targets, not'
        f" {c * m}: data.hidden=dict(name='ssljax.data.multiblock.contexts', clones=1)"
      )
    shape = noise_shape(grid, m, t)
    tokens = jnp.zeros((1, encoder.prefix + k, encoder.width))
    places = jnp.zeros((1, k), jnp.int32), jnp.zeros((1, m, t), jnp.int32)
    rngs = jax.random.split(rng, 2)
    made = head.init(rngs[1], tokens, grid, *places, shape and jnp.zeros((1, *shape)))
    params = {"encoder": encoder.init(rngs[0], x)["params"], "predictor": made["params"]}
    return params, jax.tree.map(jnp.copy, {"teacher": {"encoder": params["encoder"]}})

  def predict(params, batch, keys):
    """From each context: what is predicted at its targets [b c m t d], its first token [b c d]."""
    x, (b, c) = batch["image"], batch["context"].shape[:2]
    m, t = batch["targets"].shape[2:]
    fold = lambda a: a.reshape(b * c, *a.shape[2:])  # noqa: E731
    x = fold(jnp.broadcast_to(x[:, None], (b, c, *x.shape[1:])))
    context, places = fold(batch["context"]), fold(batch["targets"])
    keys = fold(jax.vmap(lambda key: jax.random.split(key, (c, 2)))(keys))
    seen = encoder.apply({"params": params["encoder"]}, x, keep=context, keys=keys[:, 0])["tokens"]
    grid = encoder.grid(x.shape[1:-1])
    shape = noise_shape(grid, m, t)
    drawn = shape and noise * jax.vmap(lambda key: jax.random.normal(key, shape))(keys[:, 1])
    pred = head.apply({"params": params["predictor"]}, seen, grid, context, places, drawn)
    return pred.reshape(b, c, m, t, -1), seen[:, 0].reshape(b, c, -1)

  def loss_and_stats(params, extra, batch, rng, step):
    pred, first = predict(params, batch, example_keys(rng, batch["index"]))
    b, d = len(pred), pred.shape[-1]
    places = batch["targets"].reshape(b, -1)
    teacher, keep = extra["teacher"]["encoder"], places if apart else None
    wanted, pooled = _target(encoder, teacher, batch["image"], target_layers, keep)
    there = wanted if apart else tokens_lib.take(wanted, places)
    value = loss_fn(pred.reshape(b, -1, d), there).mean()
    if class_weight:
      mean = jnp.broadcast_to(wanted.mean(1, keepdims=True), first.shape)
      value += class_weight * loss_fn(first, mean).mean()
    rows = {"pooled": jax.lax.stop_gradient(pooled)}
    return loss_scale * value, ({"rows": rows}, collapse.features(pooled))

  def update(params, extra, stats, step):
    online = {"encoder": params["encoder"]}
    return {"teacher": optax.incremental_update(online, extra["teacher"], 1.0 - momentum(step))}

  def encode(params, extra, batch, layers=()):
    weights = (extra["teacher"] if evaluate == "teacher" else params)["encoder"]
    return evaluated(encoder, weights, {}, batch["image"], layers)

  needs = ("image", "context", "targets", "index")
  return Method(init, loss_and_stats, update, encode, None, needs)


def _contrast(temperature: float, pred: jax.Array, wanted: jax.Array) -> jax.Array:
  """[b n d], [b n d] -> [b]"""
  return 2 * temperature * losses.patch_info_nce(pred, wanted, temperature, standardise=True)


def _target(encoder, params, x, layers: int, keep) -> tuple[jax.Array, jax.Array]:
  """What the teacher says of examples at every place, [b n d], and its mean before any
  normalisation, [b d]: a target that knows its place alone differs between tokens, not there.
  keep: the places that it sees and speaks of, [b n]; None is all."""
  last = tuple(range(-layers, 0))
  out = jax.lax.stop_gradient(encoder.apply({"params": params}, x, keep=keep, mlp_layers=last))
  seen = out["patches"]
  pooled = seen.astype(jnp.float32).mean(1)
  if layers:
    mlps = (out[f"mlp_{encoder.depth + i}"][:, encoder.prefix :] for i in last)
    seen = jnp.stack([targets.instance_normalise(mlp) for mlp in mlps]).mean(0)
  return targets.layer_normalise(seen), pooled


def _check(encoder, given: dict[str, str], class_weight: float) -> None:
  for argument, value in given.items():
    if value not in CHOICES[argument]:
      names = ", ".join(CHOICES[argument])
      raise ValueError(f"method.{argument} {value!r} is none of {names}")
  if encoder.patch is None or encoder.positions == "relative":
    raise ValueError(
      "latent prediction shows the encoder some places alone: it needs an encoder of patches whose"
      ' positions are not relative, such as vit with positions="sincos"'
    )
  if class_weight and given["loss"] == "info_nce":
    raise ValueError(
      f'method.class_weight {class_weight}: method.loss "info_nce" tells places apart, and the'
      " class token is one"
    )
  if class_weight and not encoder.class_token:
    raise ValueError(f"method.class_weight {class_weight} needs encoder.class_token=True")
