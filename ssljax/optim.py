"""Optimizers from a config: optax transformations that know which parameters decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssljax.schedules import Schedule

# Vectors that PyTorch stores as [1 1 d] and therefore decays under the rule "all but tensors of one
# dimension"; here they are [d], so they are named.
TOKENS = ("cls_token", "mask_token")


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
  weight_decay: float = 0.05,
  no_decay: tuple[str, ...] = (),
  clip: float = 0.0,
  limits: tuple = (),
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2017, 1711.05101), decay multiplied by the learning rate.

  Args:
    no_decay: names of parameters that do not decay, besides the one-dimensional ones.
    clip: largest global norm of the gradient; 0 means none. PyTorch divides by norm + 1e-6, as
      here; optax's own clip divides by the norm.
    limits: (name, low, high) of parameters that are put back between two numbers after each step,
      such as ("log_scale", 0.0, 4.6052) of CLIP.
  """
  tx = optax.adamw(
    schedule, b1, b2, eps, weight_decay=weight_decay, mask=lambda p: decayed(p, tuple(no_decay))
  )
  parts = [clip_global_norm(clip)] if clip else []
  parts += [tx, *(limited(*limit) for limit in limits)]
  return optax.chain(*parts) if len(parts) > 1 else tx


def limited(name: str, low: float, high: float) -> optax.GradientTransformation:
  """Keeps parameters of a name (the last part of their path) between two numbers: what a step
  would add is cut. It comes last in a chain."""

  def update(updates, state, params=None):
    def one(path, u, p):
      return jnp.clip(p + u, low, high) - p if path[-1].key == name else u

    return jax.tree_util.tree_map_with_path(one, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


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


def sgd(
  schedule: Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 1e-4,
  decay_vectors: bool = True,
  clip: float = 0.0,
) -> optax.GradientTransformation:
  """Stochastic gradient descent with momentum; the decay is part of the gradient, as in PyTorch.

  decay_vectors: decay biases and norms, too (MoCo and SimSiam do). clip: as in `adamw`.
  """
  mask = None if decay_vectors else decayed
  parts = [optax.add_decayed_weights(weight_decay, mask), optax.sgd(schedule, momentum, nesterov)]
  return optax.chain(*([clip_global_norm(clip)] if clip else []), *parts)


def lars(
  schedule: Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 1e-6,
  trust: float = 1e-3,
  clip_trust: bool = False,
  rate_inside: bool = False,
  vector_rate: float = 1.0,
) -> optax.GradientTransformation:
  """LARS (You et al. 2017, 1708.03888); one-dimensional leaves neither decay nor adapt.

  Args:
    trust: step of a leaf is trust·‖p‖/‖g + decay·p‖ times its gradient.
    clip_trust: at most the gradient itself, min(ratio/rate, 1), as solo-learn on CIFAR. It needs
      the rate, so that the ratio is capped at the rate of the step.
    rate_inside: the momentum holds rate·ratio·g (SimCLR, optax) instead of ratio·g (BYOL, MoCo v3,
      Barlow Twins, VICReg). The two differ only while the rate moves.
    vector_rate: factor on the rate of one-dimensional leaves (Barlow Twins: .0048 for .2).
  """
  adapted = lambda params: decayed(params)  # noqa: E731
  ratio = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), adapted)
  if clip_trust:
    ratio = optax.masked(_clipped_trust(schedule, trust), adapted)
  rate = optax.scale_by_learning_rate(schedule)
  if vector_rate != 1.0:
    vectors = lambda params: jax.tree.map(lambda d: not d, decayed(params))  # noqa: E731
    rate = optax.chain(optax.masked(optax.scale(vector_rate), vectors), rate)
  trace = optax.trace(momentum)
  tail = (rate, trace) if rate_inside else (trace, rate)
  return optax.chain(optax.add_decayed_weights(weight_decay, decayed), ratio, *tail)
