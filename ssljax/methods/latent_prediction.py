"""Latent prediction: from a part of an example, what a teacher says of the rest of it.

I-JEPA (Assran et al. 2023, 2301.08243): one context and four target blocks of `data.multiblock`,
predicted by a narrow transformer; the target is the teacher's last layer, each token normalised;
smooth L1. FlexPredict (Bar et al. 2023, 2308.00566): the same with `noise`.
data2vec 2.0 (Baevski et al. 2022, 2212.07525): many contexts of `data.multiblock.contexts`, one
pass of the teacher; predictor "convolution", `target_layers`, loss "l2", `class_weight`.
Latent MIM (Wei et al. 2024, 2407.15837): patches of `data.gapped_crop`, one context of
`data.multiblock.contexts`; a projector after both encoders, predictor "cued", loss "info_nce",
`teacher_sees` "targets", `similarity_weight` (there 0 by default, .1 in the published command). Its
teacher moves before the step, here after it: the same sequence, its momentum one step late.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ssljax import collapse, losses, schedules, targets
from ssljax.models import contexts
from ssljax.models import tokens as tokens_lib
from ssljax.models.heads import unit
from ssljax.models.views import evaluated
from ssljax.step import Method, coupled, example_keys

LOSSES: dict[str, Callable] = {
  "l1": losses.masked_l1,
  "l2": losses.masked_l2,
  "smooth_l1": losses.masked_smooth_l1,
  "info_nce": losses.patch_info_nce,
}
CHOICES = {
  "predictor": ("transformer", "convolution", "cued"),
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
  similarity_weight: float = 0.0,
  similarity_goal=0.5,
  projector: tuple[int, ...] = (),
  teacher_momentum=0.996,
  teacher_sees: str = "all",
  evaluate: str = "teacher",
) -> Method:
  """A method of contexts `batch["context"]` int32 [b c k] and, from each of them, lists of places
  to predict `batch["targets"]` int32 [b c m t].

  Args:
    encoder: from `models/`, one that can see some places alone.
    predictor: "transformer" or "cued" (Latent MIM's: self- and cross-attention) of
      `predictor_width`, _depth, _heads (0: the encoder's), or "convolution" on the grid of _width,
      _depth, _kernel, _groups.
    noise: standard deviation, drawn anew for each place. Of the transformer's queries in place of
      the mask token (FlexPredict; 0 is the learnt token), of what the convolution has at places
      that are not seen.
    target_layers: 0: the teacher's last layer; k: the mean of the outputs of its last k MLPs, each
      channel normalised over the tokens. Either is normalised token by token, unless there is a
      `projector`, whose output is the target.
    loss: "smooth_l1" with `loss_beta`, "l1", "l2", or "info_nce": each prediction has to be nearer
      to the target of its place than to those of the other places of its example, by cosines over
      `temperature` T; predictions are standardised over places before, and the loss is times 2·T.
      Any is times `loss_scale`.
    class_weight: of the same loss between the class token of each context, before the predictor,
      and the mean of the target over all places.
    similarity_weight: of (mean - goal)², for two means over the batch: of the cosines of all pairs
      of predictions of an example, each with itself included, and of all pairs of places that were
      seen. similarity_goal: a number, or a schedule of the step.
    projector: widths of linear layers without bias after both encoders, each with a layer norm and,
      between them, GELU; () is none. Predictor, loss and similarities are of what it makes.
    teacher_momentum: of the average of encoder and projector that is the teacher: a number, or a
      schedule of the step.
    teacher_sees: "all" places of an example, or the "targets" alone, of which there must be one
      list.
    evaluate: the encoder that `encode` runs, "teacher" or "student".

  Raises:
    ValueError: an unknown name, or parts that do not go together.
  """
  given = dict(predictor=predictor, loss=loss, teacher_sees=teacher_sees, evaluate=evaluate)
  _check(encoder, given, class_weight, noise, target_layers, projector)
  momentum, goal = schedules.moving(teacher_momentum), schedules.moving(similarity_goal)
  contrast, apart = loss == "info_nce", teacher_sees == "targets"
  loss_fn = LOSSES[loss]
  if loss == "smooth_l1":
    loss_fn = functools.partial(loss_fn, beta=loss_beta)
  elif contrast:
    loss_fn = functools.partial(_contrast, temperature)
  tower = contexts.Projected(encoder, projector)
  sizes = predictor_width, predictor_depth, predictor_heads, predictor_kernel, predictor_groups
  head = contexts.beside(encoder, predictor, *sizes, tower.width)

  def init(rng, batch):
    lists = math.prod(batch["targets"].shape[1:3])
    if (contrast or apart) and lists != 1:
      raise ValueError(
        f'method.loss "info_nce" and method.teacher_sees "targets" need one list of targets, not'
        f" {lists}: data.hidden=dict(name='ssljax.data.multiblock.contexts', clones=1)"
      )
    params = contexts.init(tower, head, rng, batch, noise)
    online = {name: x for name, x in params.items() if name != "predictor"}
    return params, {"teacher": jax.tree.map(jnp.copy, online)}

  def target(teacher, x, keep):
    """At the places `keep` that the teacher sees, or at all: [b n d]; its pooled features [b d],
    before any normalisation: what knows its place alone differs between tokens, not there."""
    maps, pooled = tower.taught(teacher, x, target_layers, keep)
    if target_layers:
      maps = [targets.instance_normalise(one) for one in maps]
    mean = jnp.stack(maps).mean(0)
    return mean if projector else targets.layer_normalise(mean), pooled

  def embed(params, extra, batch, rng, step):
    """Of each example its loss and similarities [b], the teacher's pooled features [b d]."""
    keys = example_keys(rng, batch["index"])
    pred, seen = contexts.predict(tower, head, params, batch, keys, noise)
    b, d = len(pred), tower.width
    places, pred = batch["targets"].reshape(b, -1), pred.reshape(b, -1, d)
    keep = places if apart else None
    wanted, pooled = target(extra["teacher"], batch["image"], keep)
    z = {"loss": loss_fn(pred, wanted if apart else tokens_lib.take(wanted, places))}
    if class_weight:
      first = seen[:, :, 0]
      mean = jnp.broadcast_to(wanted.mean(1, keepdims=True), first.shape)
      z["loss"] += class_weight * loss_fn(first, mean)
    if similarity_weight:
      z["similarity_predicted"] = _alike(pred)
      z["similarity_seen"] = _alike(seen[:, :, encoder.prefix :].reshape(b, -1, d))
    return z | {"pooled": pooled}, {"rows": {"pooled": pooled}}

  def couple(params, extra, z, batch, rng, step):
    value = loss_scale * z["loss"].mean()
    means = {name: x.mean() for name, x in z.items() if name.startswith("similarity")}
    for mean in means.values():
      value += similarity_weight * jnp.square(mean - goal(step))
    return value, ({}, means | collapse.features(z["pooled"]))

  def update(params, extra, stats, step):
    online = {name: params[name] for name in extra["teacher"]}
    return {"teacher": optax.incremental_update(online, extra["teacher"], 1.0 - momentum(step))}

  def encode(params, extra, batch, layers=()):
    weights = (extra["teacher"] if evaluate == "teacher" else params)["encoder"]
    return evaluated(encoder, weights, {}, batch["image"], layers)

  needs = ("image", "context", "targets", "index")
  # The mean of losses alone needs no second pass over microbatches.
  parts = (embed, couple) if similarity_weight else (None, None)
  return Method(init, coupled(embed, couple), update, encode, None, needs, *parts)


def _contrast(temperature: float, pred: jax.Array, wanted: jax.Array) -> jax.Array:
  """[b n d], [b n d] -> [b]"""
  return 2 * temperature * losses.patch_info_nce(pred, wanted, temperature, standardise=True)


def _alike(x: jax.Array) -> jax.Array:
  """The mean cosine of all pairs of vectors, each with itself included: [b n d] -> [b]."""
  return jnp.square(unit(x).mean(1)).sum(-1)


def _check(encoder, given, class_weight: float, noise: float, layers: int, projector: tuple):
  for argument, value in given.items():
    if value not in CHOICES[argument]:
      names = ", ".join(CHOICES[argument])
      raise ValueError(f"method.{argument} {value!r} is none of {names}")
  wrong = (
    (
      encoder.patch is None or encoder.positions == "relative",
      "latent prediction shows the encoder some places alone: it needs an encoder of patches whose"
      ' positions are not relative, such as vit with positions="sincos"',
    ),
    (
      class_weight and given["loss"] == "info_nce",
      f'method.class_weight {class_weight}: method.loss "info_nce" tells places apart, and the'
      " class token is one",
    ),
    (
      class_weight and not encoder.class_token,
      f"method.class_weight {class_weight} needs encoder.class_token=True",
    ),
    (
      encoder.patch and not 0 <= layers <= encoder.depth,
      f"method.target_layers {layers} is not between 0 and the {encoder.depth} blocks",
    ),
    (
      projector and layers,
      f"method.target_layers {layers} or method.projector: the target is what the projector makes"
      " of the last layer",
    ),
    (
      noise and given["predictor"] == "cued",
      f'method.noise {noise}: the queries of method.predictor "cued" have none; set it to 0',
    ),
  )
  for found, words in wrong:
    if found:
      raise ValueError(words)
