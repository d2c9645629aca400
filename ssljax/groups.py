"""Parameters with rates of their own, frozen for a while, or kept on the sphere."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssljax.schedules import Schedule

# Path of parameters, "predictor" or "encoder/stem" -> what is different for those under it.
Groups = Mapping[str, Mapping[str, Any]]
CHANGES = ("factor", "hold", "weight_decay", "decay_vectors")
# What an encoder has before its blocks.
FIRST = ("stem", "cls_token", "registers", "positions", "relative_bias")


def arranged(
  make: Callable,
  schedule: Schedule,
  weight_decay: float | Schedule,
  groups: Groups | None = None,
  freeze: tuple[str, ...] = (),
  freeze_steps: int = 0,
  freeze_by: str = "gradient",
  unit: tuple[str, ...] = (),
) -> optax.GradientTransformation:
  """`make(rate, decay)`, an optimizer, with groups of its own (`grouped`) and parameters that are
  held (`held`)."""

  def from_step(first):
    # Shifted in here, so that what `grouped` gives a group is shifted, too.
    def shifted(rate, decay, **changes):
      return make(_later(rate, first), _later(decay, first), **changes)

    return grouped(shifted, schedule, weight_decay, groups)

  return held(from_step, freeze, freeze_steps, freeze_by, unit)


def grouped(
  make: Callable, schedule: Schedule, weight_decay: float | Schedule, groups: Groups | None
) -> optax.GradientTransformation:
  """`make(schedule, weight_decay)`, with other arguments for parameters under some paths.

  groups: {path: changes}, e.g. {"predictor": {"hold": 0}, "encoder/stem": {"factor": 0}}; the
  longest path that fits decides. "factor" multiplies the rate, 0 freezes; "hold": the rate stays
  what the schedule gives at this step; "weight_decay" and "decay_vectors" take the place of the
  others'.

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
    others = {k: v for k, v in changes.items() if k == "decay_vectors"}
    parts[path] = optax.set_to_zero() if frozen else make(*given, **others)
  # Labels are keys of the state, whose leaves are saved by their paths.
  label = {path: path.replace("/", ".") or "rest" for path in parts}
  return optax.partition(
    {label[path]: part for path, part in parts.items()},
    lambda params: jax.tree.map(label.get, _paths_of(params, tuple(groups))),
  )


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


def beside(
  tx: optax.GradientTransformation, **others: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`tx` for all parameters but the parts that are named, which have an optimizer of their own."""
  return optax.partition(
    {"rest": tx, **others}, lambda params: {k: k if k in others else "rest" for k in params}
  )


def unit_columns(words: tuple[str, ...]) -> optax.GradientTransformation:
  """Turns updates u of the matrices p [d k] so named into those that lead to unit columns of p + u;
  the last part of an optimizer."""

  def update(updates, state, params=None):
    def one(chosen, u, p):
      length = jnp.linalg.norm(p + u, axis=0, keepdims=True)
      return (p + u) / jnp.maximum(length, 1e-12) - p if chosen else u

    return jax.tree.map(one, named_like(params, words, "unit"), updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def limited(name: str, low: float, high: float) -> optax.GradientTransformation:
  """Keeps parameters of a name (the last part of their path) between two numbers: what a step
  would add is cut. It comes last in a chain."""

  def update(updates, state, params=None):
    def one(path, u, p):
      return jnp.clip(p + u, low, high) - p if path[-1].key == name else u

    return jax.tree_util.tree_map_with_path(one, updates, params), state

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
