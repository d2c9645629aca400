"""Contrastive losses that know labels: whose positives are a class or given pairs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics, pairs

__all__ = (
  "look",
  "multi_label_bce",
  "supcon",
  "supcon_in",
)


def supcon(
  z: jax.Array,
  labels: jax.Array | None,
  temperature: float | jax.Array,
  base_temperature: float | None = None,
  positives: jax.Array | None = None,
  per_anchor_temperature: jax.Array | None = None,
  candidates: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Supervised contrastive loss, mean outside the log: [b d] or [b v d], labels [b] -> [b].

  Formula: mean over v, -1/|P(i)| Σ_{p∈P(i)} log(exp(s_ip/T) / Σ_{a≠i} exp(s_ia/T)), s cosine;
    times T/base_temperature where that is given.
  Source: SupCon, Khosla et al. 2020, 2004.11362.
  Tested: NumPy; golden value; lightly NTXentLoss without labels; optax ntxent with one positive
    an anchor.
  Views stand on the second axis, so that the batch stays the first; all are anchors. labels None:
  an example's own views are its positives, which is SimCLR. positives [b b] bool (labels None then)
  says it freely, for all views of two examples; an anchor is never its own positive. candidates
  [b b] bool: who is in the sum below the line (default all). Rows of weight 0 (padding) are
  neither anchors nor anybody's positive or negative. An anchor without positives gives 0, and
  counts in a plain mean, as in the published code; other libraries leave it out.
  Trap: the published code prints T/0.07 times the plain value (1.43 at T 0.1), base_temperature
  does that. per_anchor_temperature [b] takes the place of the temperature.

  >>> z, labels = jnp.eye(4)[:, None].repeat(2, 1), jnp.array([0, 0, 1, 1])
  >>> losses.supcon(z, labels, 0.1).shape
  (4,)
  """
  pairs.check_temperature(temperature=temperature)
  arguments.positive(base_temperature=base_temperature)
  similarity, positive, candidate = _pairs(z, labels, positives, candidates, weights)
  each: Any = temperature
  if per_anchor_temperature is not None:
    _, temperature = arguments.read(
      z=(similarity, "b v n"), per_anchor_temperature=(per_anchor_temperature, "b")
    )
    each = jnp.asarray(temperature)[:, None, None]
  logits = pairs.scaled(similarity, each)
  log_share = logits - numerics.logsumexp(logits, candidate)[..., None]
  loss = -numerics.mean(log_share, positive, axis=-1).mean(1)
  return loss if base_temperature is None else loss * (temperature / base_temperature)


def supcon_in(
  z: jax.Array,
  labels: jax.Array | None,
  temperature: float | jax.Array,
  positives: jax.Array | None = None,
  candidates: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Supervised contrastive loss, sum inside the log: [b d] or [b v d], labels [b] -> [b].

  Formula: mean over v, -log(Σ_{p∈P(i)} exp(s_ip/T) / Σ_{a≠i} exp(s_ia/T)), s cosine.
  Source: SupCon, Khosla et al. 2020, 2004.11362 (form "in"); solo-learn, da Costa et al. 2022,
    2108.01775.
  Tested: NumPy; golden value; lightly NTXentLoss without labels.
  Arguments as for supcon. One near positive is enough to make it small: it is another loss than
  supcon, not another estimate of it (0.01 against 8.1 on the golden input).

  >>> losses.supcon_in(jnp.eye(4), jnp.array([0, 0, 1, 1]), 0.1).shape
  (4,)
  """
  pairs.check_temperature(temperature=temperature)
  similarity, positive, candidate = _pairs(z, labels, positives, candidates, weights)
  return _log_share(pairs.scaled(similarity, temperature), positive, candidate).mean(1)


def _log_share(logits: jax.Array, positive: jax.Array, candidate: jax.Array) -> jax.Array:
  """-log of the positives' share of the candidates; 0 without positives: [… n] -> […]."""
  loss = numerics.logsumexp(logits, candidate) - numerics.logsumexp(logits, positive)
  return jnp.where(positive.any(-1), loss, 0.0)


def _pairs(
  z: jax.Array,
  labels: jax.Array | None,
  positives: jax.Array | None,
  candidates: jax.Array | None,
  weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Cosines [b v b·v] of all views with all, who is a positive and who a candidate (bool)."""
  if labels is not None and positives is not None:
    raise ValueError("positives takes the place of labels: pass labels=None")
  z, labels, positives, candidates, weights = arguments.read(
    z=(z, "b d" if getattr(z, "ndim", 0) == 2 else "b v d"),
    labels=(labels, "?b:int"),
    positives=(positives, "?b b:bool"),
    candidates=(candidates, "?b b:bool"),
    weights=(weights, f"?b:{pairs.kind(weights)}"),
  )
  z = z if z.ndim == 3 else z[:, None]
  b, v, _ = z.shape
  own = jnp.eye(b, dtype=bool)
  if positives is None:
    positives = own if labels is None else labels[:, None] == labels[None]
  candidates = jnp.ones((b, b), bool) if candidates is None else candidates
  if weights is not None:
    there = weights > 0
    # where, before anything else: padding may hold anything, NaN too.
    z = jnp.where(there[:, None, None], z, 0.0)
    candidates = candidates & there[:, None] & there[None]
  z = numerics.normalise(z)

  def spread(mask: jax.Array) -> jax.Array:
    return jnp.broadcast_to(mask[:, None, :, None], (b, v, b, v))

  itself = spread(own) & jnp.eye(v, dtype=bool)[None, :, None]
  candidate = (spread(candidates) & ~itself).reshape(b, v, b * v)
  similarity = jnp.einsum("ivd,jwd->ivjw", z, z, precision=numerics.EXACT).reshape(b, v, b * v)
  return similarity, spread(positives).reshape(b, v, b * v) & candidate, candidate


def look(
  z: jax.Array,
  labels: jax.Array,
  temperature: float | jax.Array,
  k: int | None = None,
  queue: jax.Array | None = None,
  queue_labels: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Leave-one-out nearest neighbours: [b d], labels [b], perhaps queue [m d], [m] -> [b].

  Formula: -log(Σ_{j∈N(i), y_j=y_i} exp(s_ij/T) / Σ_{j∈N(i)} exp(s_ij/T)), s cosine, N(i) the k
    nearest without i.
  Source: LOOK, Feng et al. 2022, 2110.06014.
  Tested: NumPy; golden value; k None equals supcon_in.
  A class may have several modes: only near neighbours should share the label. Neighbours come from
  the batch, or from the queue alone (no gradient to it) where one is given; k None takes all. Ties
  with the k-th nearest count too. Trap: without a neighbour of its label an example gives 0, so k
  must be large enough to have one. Rows of weight 0 (padding) are nobody's neighbour and give 0.

  >>> losses.look(jnp.eye(4), jnp.array([0, 0, 1, 1]), 0.1, k=3).shape
  (4,)
  """
  pairs.check_temperature(temperature=temperature)
  if (queue is None) != (queue_labels is None):
    raise ValueError("queue and queue_labels come together")
  z, labels, queue, queue_labels, weights = arguments.read(
    z=(z, "b d"),
    labels=(labels, "b:int"),
    queue=(queue, "?m d"),
    queue_labels=(queue_labels, "?m:int"),
    weights=(weights, f"?b:{pairs.kind(weights)}"),
  )
  counted = jnp.ones(labels.shape, bool) if weights is None else weights > 0
  z = numerics.normalise(jnp.where(counted[:, None], z, 0.0))
  if queue is None:
    others, their_labels = z, labels
    near = ~jnp.eye(labels.size, dtype=bool) & counted[None] & counted[:, None]
  else:
    others, their_labels = jax.lax.stop_gradient(numerics.normalise(queue)), queue_labels
    near = jnp.broadcast_to(counted[:, None], (labels.size, queue_labels.size))
  most = their_labels.size - (queue is None)
  if k is not None and not 1 <= k <= most:
    raise ValueError(f"k must be from 1 to {most}, the neighbours there are, not {k!r}")
  similarity = pairs.products(z, others)
  if k is not None:
    ranked = jax.lax.stop_gradient(jnp.where(near, similarity, -2.0))
    near = near & (ranked >= jax.lax.top_k(ranked, k)[0][:, -1:])
  same = labels[:, None] == their_labels[None]
  return _log_share(pairs.scaled(similarity, temperature), near & same, near)


def multi_label_bce(
  z: jax.Array, queue: jax.Array, targets: jax.Array, temperature: float | jax.Array
) -> jax.Array:
  """Queue entries as binary classifiers: [b d], [m d], targets [b m] -> [b].

  Formula: mean over m of BCE(sigmoid(s/T), targets), s cosine.
  Source: MLS, Zhu et al. 2023, 2308.03286.
  Tested: NumPy; torch binary_cross_entropy_with_logits.
  No gradient to the queue. targets (bool or numbers in 0…1) are the nearest entries of a second
  queue of encoder features, filled in the same order. Trap: with few positives among many entries
  the mean is a mean over negatives.

  >>> losses.multi_label_bce(jnp.eye(2), jnp.eye(2), jnp.eye(2, dtype=bool), 0.2).shape
  (2,)
  """
  pairs.check_temperature(temperature=temperature)
  z, queue, targets = arguments.read(
    z=(z, "b d"), queue=(queue, "m d"), targets=(targets, f"b m:{pairs.kind(targets)}")
  )
  z, queue = numerics.normalise(z), jax.lax.stop_gradient(numerics.normalise(queue))
  logits = pairs.scaled(pairs.products(z, queue), temperature)
  loss = optax.losses.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype))
  return loss.mean(1)
