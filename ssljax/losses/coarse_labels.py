"""Contrastive losses that know coarse labels, whose classes are to be told apart within."""

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics, pairs
from ssljax.losses.labelled import supcon

__all__ = (
  "maskcon_targets",
  "sbcl",
  "soft_info_nce_queue",
  "subclass_masks",
)


def maskcon_targets(
  k: jax.Array,
  queue: jax.Array,
  queue_labels: jax.Array,
  labels: jax.Array,
  temperature: float | jax.Array,
  weight: float | jax.Array = 1.0,
) -> jax.Array:
  """Soft targets over the own key and the queue: [b d], [m d], [m], [b] -> [b 1+m], sum 1.

  Formula: w·(1, t)/(1 + Σt) + (1-w)·(1, 0), t_j = [same label]·exp((s_j - max s)/T), s cosine of
    key and queue, max over the entries of the same label.
  Source: MaskCon, Feng and Patras 2023, 2303.12756.
  Tested: NumPy; golden row.
  No gradient. The own key stands first. Without a queue entry of the same label the target is the
  own key (the published code gives NaN there and fills the queue first).

  >>> losses.maskcon_targets(
  ...   jnp.eye(2), jnp.eye(2), jnp.array([0, 0]), jnp.array([0, 1]), 0.05)[1].tolist()
  [1.0, 0.0, 0.0]
  """
  pairs.check_temperature(temperature=temperature)
  if isinstance(weight, (int, float)) and not 0 <= weight <= 1:
    raise ValueError(f"weight must be between 0 and 1, not {weight!r}")
  k, queue, queue_labels, labels = arguments.read(
    k=(k, "b d"),
    queue=(queue, "m d"),
    queue_labels=(queue_labels, "m:int"),
    labels=(labels, "b:int"),
  )
  same = labels[:, None] == queue_labels[None]
  similarity = pairs.products(numerics.normalise(k), numerics.normalise(queue))
  best = jnp.where(same, similarity, -1.0).max(1, initial=-1.0, keepdims=True)
  gap = jnp.minimum(similarity - best, 0.0)
  near = jnp.where(same, jnp.exp(pairs.scaled(gap, temperature)), 0.0)
  key = jnp.ones((k.shape[0], 1), k.dtype)
  own = jnp.concatenate([key, jnp.zeros_like(near)], 1)
  soft = jnp.concatenate([key, near], 1) / (1 + near.sum(1, keepdims=True))
  return jax.lax.stop_gradient(weight * soft + (1 - weight) * own)


def soft_info_nce_queue(
  q: jax.Array,
  k: jax.Array,
  queue: jax.Array,
  queue_labels: jax.Array,
  labels: jax.Array,
  temperature: float | jax.Array,
  target_temperature: float | jax.Array,
  weight: float | jax.Array = 1.0,
) -> jax.Array:
  """MaskCon: InfoNCE with soft targets in a labelled queue: [b d] ×2, [m d], [m], [b] -> [b].

  Formula: -Σ_j t_j log softmax_j(q·(k, queue)/T), t = maskcon_targets(k, queue, …), cosines.
  Source: MaskCon, Feng and Patras 2023, 2303.12756.
  Tested: NumPy; torch cross_entropy; weight 0 equals MoCo.
  No gradient to k and queue. Published: temperature 0.1, target_temperature 0.05 (sharper than the
  first), weight 1 for labels alone and 0 for none. Queue and queue_labels move together.

  >>> q, queue, labels = jnp.eye(2), jnp.ones((3, 2)), jnp.array([0, 1])
  >>> losses.soft_info_nce_queue(q, q, queue, jnp.array([0, 1, 1]), labels, 0.1, 0.05).shape
  (2,)
  """
  pairs.check_temperature(temperature=temperature, target_temperature=target_temperature)
  q, k, queue = arguments.read(q=(q, "b d"), k=(k, "b d"), queue=(queue, "m d"))
  targets = maskcon_targets(k, queue, queue_labels, labels, target_temperature, weight)
  q, k, queue = (numerics.normalise(x) for x in (q, k, queue))
  k, queue = jax.lax.stop_gradient((k, queue))
  logits = jnp.concatenate([(q * k).sum(-1, keepdims=True), pairs.products(q, queue)], 1)
  return numerics.cross_entropy(pairs.scaled(logits, temperature), targets)


def subclass_masks(classes: jax.Array, subclasses: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Who shares the subclass, and who the class alone: [b], [b] -> two [b b] bool.

  Formula: same subclass; same class and not same subclass, or itself.
  Source: SBCL, Hou et al. 2023, 2306.15925.
  Tested: NumPy.
  The diagonal of the second stands for the other views of the same example. A row whose class has
  one subclass in the batch is empty there, as in the paper; the published code keeps the own views
  as positives in it.

  >>> own, others = losses.subclass_masks(jnp.array([0, 0, 1]), jnp.array([0, 1, 2]))
  >>> own.sum(1).tolist(), others.sum(1).tolist()
  ([1, 1, 1], [2, 2, 0])
  """
  classes, subclasses = arguments.read(classes=(classes, "b:int"), subclasses=(subclasses, "b:int"))
  same = classes[:, None] == classes[None]
  own = same & (subclasses[:, None] == subclasses[None])
  others = same & ~own
  itself = jnp.eye(classes.size, dtype=bool)
  return own, others | (itself & others.any(1, keepdims=True))


def sbcl(
  z: jax.Array,
  labels: jax.Array,
  subclasses: jax.Array,
  temperature: float | jax.Array,
  gamma: float = 0.25,
  base_temperature: float | None = 0.07,
  class_temperature: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Subclass-balanced contrastive loss: [b v d], classes [b], subclasses [b] -> [b].

  Formula: T/base · supcon(subclass) + gamma · supcon(class without the own subclass, own views
    kept, T_class).
  Source: SBCL, Hou et al. 2023, 2306.15925.
  Tested: NumPy; one subclass a class equals supcon.
  The second term has the own subclass neither above nor below the line, but for the own views.
  class_temperature [b]: each anchor's, from the density of its class (default the temperature).
  Published: temperature 0.1, gamma 0.25, subclasses by k-means every 10 epochs, as many in class c
  as n_c // max(smallest n, 10), at least 1. The published factor T/base is on the first term alone.

  >>> z, labels = jnp.eye(4)[:, None].repeat(2, 1), jnp.array([0, 0, 1, 1])
  >>> losses.sbcl(z, labels, jnp.array([0, 1, 2, 2]), 0.1).shape
  (4,)
  """
  own, others = subclass_masks(labels, subclasses)
  first = supcon(z, None, temperature, base_temperature, own, weights=weights)
  apart = ~own | jnp.eye(own.shape[0], dtype=bool)
  second = supcon(z, None, temperature, None, others, class_temperature, apart, weights)
  return first + gamma * second
