"""Optimizers from a config: optax transformations that know which parameters decay."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssljax.schedules import Schedule

# Vectors that PyTorch stores as [1 1 d] and therefore decays under the rule "all but tensors of one
# dimension"; here they are [d], so they are named.
TOKENS = ("cls_token", "mask_token")
# Path of parameters, "predictor" or "encoder/stem" -> what is different for those under it.
Groups = Mapping[str, Mapping[str, float]]
CHANGES = ("factor", "hold", "weight_decay")


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
  decay_vectors: bool = False,
  clip: float = 0.0,
  groups: Groups | None = None,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2017, 1711.05101), decay multiplied by the learning rate.

  Args:
    no_decay: names of parameters that do not decay, besides the one-dimensional ones.
    decay_vectors: decay these, too (MoCo v3).
    clip: largest global norm of the gradient; 0 means none. PyTorch divides by norm + 1e-6, as
      here; optax's own clip divides by the norm.
    groups: see `grouped`.
  """

  def make(rate, decay):
    mask = None if decay_vectors else lambda params: decayed(params, tuple(no_decay))
    return optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=mask)

  tx = grouped(make, schedule, weight_decay, groups)
  return optax.chain(clip_global_norm(clip), tx) if clip else tx


def grouped(
  make: Callable, schedule: Schedule, weight_decay: float, groups: Groups | None
) -> optax.GradientTransformation:
  """`make(schedule, weight_decay)`, with other arguments for parameters under some paths.

  groups: {path: changes}, e.g. {"predictor": {"hold": 0}, "encoder/stem": {"factor": 0}}; the
  longest path that fits decides. "factor" multiplies the rate, 0 freezes; "hold": the rate stays
  what the schedule gives at this step; "weight_decay" takes the place of the others'.

  Raises:
    ValueError: an unknown change, or a path with no parameter under it.
  """
  if not groups:
    return make(schedule, weight_decay)
  for path, changes in groups.items():
    if unknown := [key for key in changes if key not in CHANGES]:
      known = ", ".join(CHANGES)
      raise ValueError(f"optimizer.groups.{path}: {', '.join(unknown)} is none of {known}")
  parts = {"": make(schedule, weight_decay)}
  for path, changes in groups.items():
    frozen = changes.get("factor", 1.0) == 0
    given = _moved(schedule, changes), changes.get("weight_decay", weight_decay)
    parts[path] = optax.set_to_zero() if frozen else make(*given)
  # Labels are keys of the state, whose leaves are saved by their paths.
  label = {path: path.replace("/", ".") or "rest" for path in parts}
  return optax.partition(
    {label[path]: part for path, part in parts.items()},
    lambda params: jax.tree.map(label.get, _paths_of(params, tuple(groups))),
  )


def beside(
  tx: optax.GradientTransformation, **others: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`tx` for all parameters but the parts that are named, which have an optimizer of their own."""
  return optax.partition(
    {"rest": tx, **others}, lambda params: {k: k if k in others else "rest" for k in params}
  )


def _moved(schedule: Schedule, changes: Mapping[str, float]) -> Schedule:
  """The rate of a group."""
  factor, hold = changes.get("factor", 1.0), changes.get("hold")
  return lambda step: factor * schedule(step if hold is None else hold)


def _paths_of(params: Any, paths: tuple[str, ...]) -> Any:
  """For each leaf the longest of the paths that it lies under, or ""."""
  used = set()

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/") + "/"
    found = max((p for p in paths if name.startswith(f"{p}/")), key=len, default="")
    used.add(found)
    return found

  tree = jax.tree_util.tree_map_with_path(one, params)
  if lost := [path for path in paths if path not in used]:
    raise ValueError(f"optimizer.groups: no parameter lies under {', '.join(lost)}")
  return tree


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
  groups: Groups | None = None,
) -> optax.GradientTransformation:
  """Stochastic gradient descent with momentum; the decay is part of the gradient, as in PyTorch.

  decay_vectors: decay biases and norms, too (MoCo and SimSiam do). clip: as in `adamw`. groups:
  see `grouped`.
  """
  mask = None if decay_vectors else decayed

  def make(rate, decay):
    return optax.chain(optax.add_decayed_weights(decay, mask), optax.sgd(rate, momentum, nesterov))

  tx = grouped(make, schedule, weight_decay, groups)
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
  groups: Groups | None = None,
) -> optax.GradientTransformation:
  """LARS (You et al. 2017, 1708.03888); one-dimensional leaves neither decay nor adapt.

  Args:
    trust: step of a leaf is trust·‖p‖/‖g + decay·p‖ times its gradient.
    clip_trust: at most the gradient itself, min(ratio/rate, 1), as solo-learn on CIFAR. It needs
      the rate, so that the ratio is capped at the rate of the step.
    rate_inside: the momentum holds rate·ratio·g (SimCLR, optax) instead of ratio·g (BYOL, MoCo v3,
      Barlow Twins, VICReg). The two differ only while the rate moves.
    vector_rate: factor on the rate of one-dimensional leaves (Barlow Twins: .0048 for .2).
    groups: see `grouped`.
  """
  adapted = lambda params: decayed(params)  # noqa: E731
  vectors = lambda params: jax.tree.map(lambda d: not d, decayed(params))  # noqa: E731

  def make(rate, decay):
    ratio = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), adapted)
    if clip_trust:
      ratio = optax.masked(_clipped_trust(rate, trust), adapted)
    step = optax.scale_by_learning_rate(rate)
    if vector_rate != 1.0:
      step = optax.chain(optax.masked(optax.scale(vector_rate), vectors), step)
    trace = optax.trace(momentum)
    tail = (step, trace) if rate_inside else (trace, step)
    return optax.chain(optax.add_decayed_weights(decay, decayed), ratio, *tail)

  return grouped(make, schedule, weight_decay, groups)
