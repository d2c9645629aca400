"""Optimizers from a config: optax transformations that know which parameters decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssljax.groups import Groups, arranged, layered, limited
from ssljax.schedules import Schedule

# Vectors that PyTorch stores as [1 1 d] or [k 1] and therefore decays under the rule "all but
# tensors of one dimension"; here they are [d], so they are named.
TOKENS = ("cls_token", "mask_token", "last_layer_gain")


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
  decay_vectors: bool = False,
  clip: float = 0.0,
  clip_by: str = "global",
  layer_decay: float = 1.0,
  stem_rate: float = 1.0,
  groups: Groups | None = None,
  freeze: tuple[str, ...] = (),
  freeze_steps: int = 0,
  freeze_by: str = "gradient",
  unit: tuple[str, ...] = (),
  limits: tuple = (),
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2017, 1711.05101), decay multiplied by the learning rate.

  Args:
    weight_decay: a number, or a schedule of the step.
    no_decay: names of parameters that do not decay, besides the one-dimensional ones.
    decay_vectors: decay these, too (MoCo v3).
    clip: largest norm of the gradient; 0 means none. PyTorch divides by norm + 1e-6, as here;
      optax's own clip divides by the norm.
    clip_by: the norm of all ("global"), of each top-level part, such as encoder and head ("part":
      DINOv2), or of each tensor ("tensor": DINO, iBOT).
    limits: (name, low, high) of parameters that are put back between two numbers after each step,
      such as ("log_scale", 0.0, 4.6052) of CLIP.
    layer_decay, stem_rate: factors on the rates of the encoder, see `groups.layered`.
    groups, freeze, freeze_steps, freeze_by, unit: see `groups.grouped` and `groups.held`.
  """
  if clip_by not in CLIPS:
    raise ValueError(f"optimizer.clip_by {clip_by!r} is none of {', '.join(CLIPS)}")

  def make(rate, decay, decay_vectors=decay_vectors):
    mask = None if decay_vectors else lambda params: decayed(params, tuple(no_decay))
    tx = optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=mask)
    factors = layered(layer_decay, stem_rate)
    return tx if layer_decay == stem_rate == 1.0 else optax.chain(tx, factors)

  tx = arranged(make, schedule, weight_decay, groups, freeze, freeze_steps, freeze_by, unit)
  parts = [CLIPS[clip_by](clip)] if clip else []
  parts += [tx, *(limited(*limit) for limit in limits)]
  return optax.chain(*parts) if len(parts) > 1 else tx


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
  groups: Groups | None = None,
  freeze: tuple[str, ...] = (),
  freeze_steps: int = 0,
  unit: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """Stochastic gradient descent with momentum; the decay is part of the gradient, as in PyTorch.

  decay_vectors: decay biases and norms, too (MoCo and SimSiam do). clip: as in `adamw`. groups,
  freeze, freeze_steps, unit: see `groups.grouped` and `groups.held`.
  """

  def make(rate, decay, decay_vectors=decay_vectors):
    mask = None if decay_vectors else decayed
    return optax.chain(optax.add_decayed_weights(decay, mask), optax.sgd(rate, momentum, nesterov))

  tx = arranged(make, schedule, weight_decay, groups, freeze, freeze_steps, unit=unit)
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
  groups: Groups | None = None,
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
    groups, freeze, freeze_steps, unit: see `groups.grouped` and `groups.held`.
  """
  vectors = lambda params: jax.tree.map(lambda d: not d, decayed(params))  # noqa: E731

  def make(rate, decay, decay_vectors=adapt_vectors):
    adapted = lambda params: jax.tree.map(lambda d: d or decay_vectors, decayed(params))  # noqa: E731
    ratio = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), adapted)
    if clip_trust:
      ratio = optax.masked(_clipped_trust(rate, trust), adapted)
    step = optax.scale_by_learning_rate(rate)
    if vector_rate != 1.0:
      step = optax.chain(optax.masked(optax.scale(vector_rate), vectors), step)
    trace = optax.trace(momentum)
    tail = (step, trace) if rate_inside else (trace, step)
    return optax.chain(optax.add_decayed_weights(decay, adapted), ratio, *tail)

  return arranged(make, schedule, weight_decay, groups, freeze, freeze_steps, unit=unit)
