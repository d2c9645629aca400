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
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2017, 1711.05101), decay multiplied by the learning rate.

  Args:
    no_decay: names of parameters that do not decay, besides the one-dimensional ones.
    clip: largest global norm of the gradient; 0 means none. PyTorch divides by norm + 1e-6, as
      here; optax's own clip divides by the norm.
  """
  tx = optax.adamw(
    schedule, b1, b2, eps, weight_decay=weight_decay, mask=lambda p: decayed(p, tuple(no_decay))
  )
  return optax.chain(clip_global_norm(clip), tx) if clip else tx


def clip_global_norm(limit: float) -> optax.GradientTransformation:
  """Scales all gradients by min(1, limit / (global norm + 1e-6)), the factor of PyTorch."""

  def update(updates, state, params=None):
    del params
    scale = jnp.minimum(1.0, limit / (optax.global_norm(updates) + 1e-6))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
