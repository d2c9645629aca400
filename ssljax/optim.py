"""Optimizers from a config: optax transformations that know which parameters decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssljax.schedules import Schedule

# Vectors that PyTorch stores as [1 1 d] or [k 1] and therefore decays under the rule "all but
# tensors of one dimension"; here they are [d], so they are named.
TOKENS = ("cls_token", "mask_token", "last_layer_gain")
# What an encoder has before its blocks.
FIRST = ("stem", "cls_token", "registers", "positions", "relative_bias")


def decayed(params: Any, no_decay: tuple[str, ...] = ()) -> Any:
  """Which leaves weight decay touches: params -> a tree of bools.

  All but one-dimensional ones (biases, norms, layer scales), as in timm and MAE; class and mask
  tokens, registers, learned positions and relative-position tables are decayed. `no_decay` names
  leaves (the last part of their path) to leave out as well.
  """

  def one(path, leaf):
    name = path[-1].key
    return name not in no_decay and (leaf.ndim > 1 or name in TOKENS)

  return jax.tree_util.tree_map_with_path(one, params)


def adamw(
  schedule: Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float | Schedule = 0.05,
  no_decay: tuple[str, ...] = (),
  clip: float = 0.0,
  clip_by: str = "global",
  layer_decay: float = 1.0,
  stem_rate: float = 1.0,
  freeze: tuple[str, ...] = (),
  freeze_steps: int = 0,
  freeze_by: str = "gradient",
  unit: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2017, 1711.05101), decay multiplied by the learning rate.

  Args:
    weight_decay: a number, or a schedule of the step.
    no_decay: names of parameters that do not decay, besides the one-dimensional ones.
    clip: largest norm of the gradient; 0 means none. PyTorch divides by norm + 1e-6, as here;
      optax's own clip divides by the norm.
    clip_by: the norm of all ("global"), of each top-level part, such as encoder and head ("part":
      DINOv2), or of each tensor ("tensor": DINO, iBOT).
    layer_decay, stem_rate: factors on the rates of the encoder, see `layered`.
    freeze, freeze_steps, freeze_by, unit: see `held`.
  """

  def from_step(first):
    rate, decay = _later(schedule, first), _later(weight_decay, first)
    mask = lambda params: decayed(params, tuple(no_decay))  # noqa: E731
    tx = optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=mask)
    factors = layered(layer_decay, stem_rate)
    return tx if layer_decay == stem_rate == 1.0 else optax.chain(tx, factors)

  if clip_by not in CLIPS:
    raise ValueError(f"optimizer.clip_by {clip_by!r} is none of {', '.join(CLIPS)}")
  tx = held(from_step, freeze, freeze_steps, freeze_by, unit)
  return optax.chain(CLIPS[clip_by](clip), tx) if clip else tx


def layered(layer_decay: float, stem_rate: float = 1.0) -> optax.GradientTransformation:
  """Factors on the updates of an encoder of `depth` blocks: layer_decay^(depth - i) for block i
  (from 0), layer_decay^(depth + 1) for what comes before them, stem, tokens and positions, and 1
  for final norm and heads; the stem's is multiplied by `stem_rate` as well (DINOv2)."""

  def factor(depth, path):
    words = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    block = next((int(w.removeprefix("block_")) for w in words if w.startswith("block_")), None)
    if words[0] == "encoder" and block is not None:
      return layer_decay ** (depth - block)
    if words[-1] == "mask_token" or (words[0] == "encoder" and words[1] in FIRST):
      return layer_decay ** (depth + 1) * (stem_rate if "stem" in words else 1.0)
    return 1.0

  def update(updates, state, params=None):
    depth = len(params["encoder"].get("blocks", {}))
    if not depth:
      raise ValueError("optimizer.layer_decay needs an encoder of blocks, such as vit")
    one = lambda path, u: u * factor(depth, path)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def held(
  from_step: Callable[[int], optax.GradientTransformation],
  freeze: tuple[str, ...],
  freeze_steps: int,
  freeze_by: str = "gradient",
  unit: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """An optimizer some of whose parameters stay where they are for a while, or on the sphere.

  Args:
    from_step: first -> the optimizer as it is from that step of the run on.
    freeze, freeze_steps: parameters whose path contains one of these words do not move in the first
      steps. A gradient is clipped with the others before.
    freeze_by: "gradient": they have none, neither moments nor counter move (DINO, iBOT, SwAV);
      "rate": theirs is 0 while the moments gather (DINOv2).
    unit: matrices [d k] whose path contains one of these words have columns of length 1 after every
      step (SwAV's prototypes; `models.heads.Prototypes` with unit "start" begins so).

  Raises:
    ValueError: an unknown freeze_by, freeze without freeze_steps, words that name no parameter.
  """
  if freeze_by not in ("gradient", "rate"):
    raise ValueError(f"optimizer.freeze_by {freeze_by!r} is none of gradient, rate")
  if bool(freeze) != bool(freeze_steps) or freeze_steps < 0:
    raise ValueError(
      f"optimizer.freeze {tuple(freeze)} and optimizer.freeze_steps {freeze_steps} need each other"
    )
  tx = from_step(0)
  if freeze and freeze_by == "rate":
    still = lambda step: jnp.where(step < freeze_steps, 0.0, 1.0)  # noqa: E731
    which = lambda params: named_like(params, freeze, "freeze")  # noqa: E731
    tx = optax.chain(tx, optax.masked(optax.scale_by_schedule(still), which))
  elif freeze:
    started = lambda step: step >= freeze_steps  # noqa: E731
    later = optax.transforms.conditionally_mask(from_step(freeze_steps), started)

    def groups(params):
      found = named_like(params, freeze, "freeze")
      return jax.tree.map(lambda frozen: "frozen" if frozen else "free", found)

    tx = optax.partition({"frozen": later, "free": tx}, groups)
  return optax.chain(tx, unit_columns(unit)) if unit else tx


def unit_columns(words: tuple[str, ...]) -> optax.GradientTransformation:
  """Turns updates u of the matrices p [d k] so named into those that lead to unit columns of p + u;
  the last part of an optimizer."""

  def update(updates, state, params=None):
    def one(chosen, u, p):
      length = jnp.linalg.norm(p + u, axis=0, keepdims=True)
      return (p + u) / jnp.maximum(length, 1e-12) - p if chosen else u

    return jax.tree.map(one, named_like(params, words, "unit"), updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def named_like(params: Any, words: tuple[str, ...], key: str) -> Any:
  """Which leaves have one of these words in their path: params -> a tree of bools; `key` of the
  optimizer is named where none has."""

  def one(path, leaf):
    del leaf
    return any(word in jax.tree_util.keystr(path, simple=True, separator="/") for word in words)

  found = jax.tree_util.tree_map_with_path(one, params)
  if not any(jax.tree.leaves(found)):
    raise ValueError(f"optimizer.{key} {', '.join(words)} is in the name of no parameter")
  return found


def _later(value: Any, first: int) -> Any:
  """A schedule as it goes on from a step, for those who begin to count there; a number as it is."""
  return (lambda step: value(step + first)) if callable(value) else value


def _clipped_trust(schedule: Schedule, trust: float) -> optax.GradientTransformation:
  """Multiplies each leaf by min(trust·‖p‖/‖g‖ / rate, 1): never a longer step than without LARS."""

  def init(params):
    del params
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    rate = schedule(state.count)

    def one(g, p):
      length, size = jnp.linalg.norm(g.reshape(-1)), jnp.linalg.norm(p.reshape(-1))
      moved = (length > 0) & (size > 0) & (rate > 0)
      ratio = trust * size / jnp.where(moved, length * rate, 1.0)
      return g * jnp.where(moved, jnp.minimum(ratio, 1.0), 1.0)

    return jax.tree.map(one, updates, params), optax.ScaleByScheduleState(state.count + 1)

  return optax.GradientTransformation(init, update)


def clip_global_norm(limit: float) -> optax.GradientTransformation:
  """Scales all gradients by min(1, limit / (global norm + 1e-6)), the factor of PyTorch."""

  def update(updates, state, params=None):
    del params
    scale = jnp.minimum(1.0, limit / (optax.global_norm(updates) + 1e-6))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_part_norms(limit: float) -> optax.GradientTransformation:
  """Scales the gradients of every top-level part by min(1, limit / (its norm + 1e-6))."""
  one = clip_global_norm(limit)

  def update(updates, state, params=None):
    del params
    return {name: one.update(part, state)[0] for name, part in updates.items()}, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_tensor_norms(limit: float) -> optax.GradientTransformation:
  """Scales the gradient of every tensor by min(1, limit / (its norm + 1e-6))."""

  def one(g):
    return g * jnp.minimum(1.0, limit / (jnp.linalg.norm(g.reshape(-1)) + 1e-6)).astype(g.dtype)

  def update(updates, state, params=None):
    del params
    return jax.tree.map(one, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


CLIPS = {"global": clip_global_norm, "part": clip_part_norms, "tensor": clip_tensor_norms}


def sgd(
  schedule: Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 1e-4,
  decay_vectors: bool = True,
  clip: float = 0.0,
  freeze: tuple[str, ...] = (),
  freeze_steps: int = 0,
  unit: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """Stochastic gradient descent with momentum; the decay is part of the gradient, as in PyTorch.

  decay_vectors: decay biases and norms, too (MoCo and SimSiam do). clip: as in `adamw`. freeze,
  freeze_steps, unit: see `held`.
  """
  mask = None if decay_vectors else decayed

  def from_step(first):
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(decay, optax.sgd(_later(schedule, first), momentum, nesterov))

  tx = held(from_step, freeze, freeze_steps, unit=unit)
  return optax.chain(clip_global_norm(clip), tx) if clip else tx


def lars(
  schedule: Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 1e-6,
  trust: float = 1e-3,
  clip_trust: bool = False,
  rate_inside: bool = False,
  vector_rate: float = 1.0,
  adapt_vectors: bool = False,
  freeze: tuple[str, ...] = (),
  freeze_steps: int = 0,
  unit: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """LARS (You et al. 2017, 1708.03888); one-dimensional leaves neither decay nor adapt.

  Args:
    trust: step of a leaf is trust·‖p‖/‖g + decay·p‖ times its gradient.
    clip_trust: at most the gradient itself, min(ratio/rate, 1), as solo-learn on CIFAR. It needs
      the rate, so that the ratio is capped at the rate of the step.
    rate_inside: the momentum holds rate·ratio·g (SimCLR, optax) instead of ratio·g (BYOL, MoCo v3,
      Barlow Twins, VICReg). The two differ only while the rate moves.
    vector_rate: factor on the rate of one-dimensional leaves (Barlow Twins: .0048 for .2).
    adapt_vectors: one-dimensional leaves decay and adapt like the others (SwAV).
    freeze, freeze_steps, unit: see `held`.
  """
  adapted = lambda params: decayed(params)  # noqa: E731
  if adapt_vectors:
    adapted = lambda params: jax.tree.map(lambda leaf: True, params)  # noqa: E731

  def from_step(first):
    shifted = _later(schedule, first)
    ratio = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), adapted)
    if clip_trust:
      ratio = optax.masked(_clipped_trust(shifted, trust), adapted)
    rate = optax.scale_by_learning_rate(shifted)
    if vector_rate != 1.0:
      vectors = lambda params: jax.tree.map(lambda d: not d, decayed(params))  # noqa: E731
      rate = optax.chain(optax.masked(optax.scale(vector_rate), vectors), rate)
    trace = optax.trace(momentum)
    tail = (rate, trace) if rate_inside else (trace, rate)
    return optax.chain(optax.add_decayed_weights(weight_decay, adapted), ratio, *tail)

  return held(from_step, freeze, freeze_steps, unit=unit)
