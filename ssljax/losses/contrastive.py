"""Contrastive losses over the batch: InfoNCE in general, and its named forms of two views.

`weights: [b]` of these losses say how much an example counts as a negative (numbers or bool): 0 is
padding, nobody's negative, with loss 0; the mean of a padded batch divides by their sum.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics, pairs

__all__ = (
  "debiased_nce",
  "decoupled_nce",
  "hardness_weighted_nce",
  "info_nce",
  "info_nce_inbatch",
  "kernel_info_nce",
  "nt_xent",
)


def info_nce(
  anchors: jax.Array,
  keys: jax.Array,
  temperature: float | jax.Array,
  positives: jax.Array | None = None,
  queue: jax.Array | None = None,
  negatives: jax.Array | None = None,
  weights: jax.Array | None = None,
  queue_weights: jax.Array | None = None,
  gamma: float | jax.Array | None = None,
) -> jax.Array:
  """InfoNCE in general: anchors [b d], keys [m d] -> [b]; the named forms are cases of it.

  Formula: -Σ_j t_ij log(K_ij / (Σ_j w_ij K_ij + Σ_queue w K + Σ_negatives K)),
    K = exp(cosine/T), or exp(-‖a - b‖^gamma / T) of unit vectors.
  Source: CPC, van den Oord et al. 2018, 1807.03748.
  Tested: NumPy; torch cross_entropy (places, soft targets, weights); golden value.
  positives: None, key i belongs to anchor i and m = b; integers [b], the place of the key (-1: no
  positive, loss 0); bool [b m], shared equally; floats [b m], targets t as they are.
  queue: [q d], negatives of all; negatives: [b s d], each anchor's own. weights: [b m], how much a
  key counts in the denominator: 0 removes it (the anchor itself, a false negative; the positive,
  which is the decoupled loss). queue_weights: [q] or [b q]. temperature may be learnt.
  gamma 2 is the Gaussian kernel, 1 the Laplacian. Gradients flow into all arrays.

  >>> losses.info_nce(jnp.eye(4), jnp.eye(8)[:, :4], 0.1, positives=jnp.arange(4)).shape
  (4,)
  """
  pairs.check_temperature(temperature=temperature)
  paired = positives is None
  matrix = not paired and getattr(positives, "ndim", 1) == 2
  anchors, keys, queue, negatives, positives, weights = arguments.read(
    anchors=(anchors, "b d"),
    keys=(keys, "b d" if paired else "m d"),
    queue=(queue, "?q d"),
    negatives=(negatives, "?b s d"),
    positives=(positives, f"?b m:{pairs.kind(positives)}" if matrix else "?b:int"),
    weights=(weights, f"?b {'b' if paired else 'm'}:{pairs.kind(weights)}"),
  )
  if gamma is not None:
    arguments.positive(gamma=gamma)
  anchors, keys = numerics.normalise(anchors), numerics.normalise(keys)
  weights = None if weights is None else weights.astype(anchors.dtype)
  more = pairs.memory(anchors, queue, negatives, queue_weights, temperature, gamma)
  logits = pairs.similarities(anchors, keys, temperature, gamma)
  if matrix:
    return _of_targets(logits, positives, weights, more)
  place = jnp.arange(len(keys)) if paired else positives
  matching = pairs.matches(
    anchors, keys if paired else keys[jnp.clip(place, 0, len(keys) - 1)], temperature, gamma
  )
  return _of_places(logits, matching, place, weights, more)


def _of_places(
  logits: jax.Array,
  matching: jax.Array,
  place: jax.Array,
  weights: jax.Array | None,
  more: jax.Array,
) -> jax.Array:
  """Positives as places: log(Σ exp(rest - positive) + w), exact where the loss is small."""
  m = logits.shape[1]
  rest = jnp.logaddexp(pairs.mass(logits, jnp.arange(m) != place[:, None], weights), more)
  own = jnp.zeros_like(matching)
  if weights is not None:
    at = jnp.clip(place, 0, m - 1)[:, None]
    own = pairs.log(jnp.take_along_axis(weights, at, axis=1)[:, 0])
  valid = (place >= 0) & (place < m) & (pairs.exists(rest) | pairs.exists(own))
  return jnp.where(valid, jnp.logaddexp(rest - matching, own), 0.0)


def _of_targets(
  logits: jax.Array, targets: jax.Array, weights: jax.Array | None, more: jax.Array
) -> jax.Array:
  """Positives as a matrix: Σ_j t_ij (log denominator_i - logit_ij)."""
  if not jnp.issubdtype(targets.dtype, jnp.floating):
    count = targets.astype(bool).sum(-1, keepdims=True)
    targets = targets.astype(bool) / jnp.maximum(count, 1).astype(logits.dtype)
  total = jnp.logaddexp(pairs.mass(logits, jnp.ones((), bool), weights), more)
  loss = (targets * (total[:, None] - logits)).sum(-1)
  return jnp.where(pairs.exists(total), loss, 0.0)


def nt_xent(
  z1: jax.Array, z2: jax.Array, temperature: float | jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """NT-Xent of two views: [b d], [b d] -> [b].

  Formula: mean over the two anchors of an example of -log(exp(s_ij/T) / Σ_{k≠i} exp(s_ik/T)),
    s the cosine, j the other view, k all 2b - 1 other rows.
  Source: SimCLR, Chen et al. 2020, 2002.05709.
  Tested: NumPy; lightly NTXentLoss; optax ntxent; golden value.
  The official SimCLR code reports the sum of the two directions, twice this mean.

  >>> losses.nt_xent(jnp.eye(4), jnp.eye(4), temperature=0.5).shape
  (4,)
  """
  z1, z2, weights = pairs.read(temperature, weights, z1=z1, z2=z2)
  matching = pairs.matches(z1, z2, temperature)
  one, two = pairs.negatives(pairs.blocks(z1, z2, temperature), weights)
  loss = jax.nn.softplus(one - matching) + jax.nn.softplus(two - matching)
  return pairs.keep(0.5 * loss, weights)


def info_nce_inbatch(
  q: jax.Array,
  k: jax.Array,
  temperature: float | jax.Array,
  symmetric: bool = False,
  weights: jax.Array | None = None,
) -> jax.Array:
  """InfoNCE against the keys of the batch, without gradient into them: [b d], [b d] -> [b].

  Formula: -log(exp(q_i·k_i/T) / Σ_j exp(q_i·k_j/T)) of unit vectors; symmetric: mean of that and
    of -log(exp(q_i·k_i/T) / Σ_j exp(q_j·k_i/T)).
  Source: MoCo v3, Chen et al. 2021, 2104.02057.
  Tested: NumPy; torch cross_entropy; golden values.
  MoCo v3 itself reports 2T times the *sum* over its two directions, (q1, k2) and (q2, k1): the
  factor 2T keeps the size of the gradient over temperatures. Where keys get a gradient
  (predictions in NNCLR), take `info_nce`.

  >>> losses.info_nce_inbatch(jnp.eye(4), jnp.eye(4), temperature=0.2).shape
  (4,)
  """
  q, k, weights = pairs.read(temperature, weights, q=q, k=k)
  k = jax.lax.stop_gradient(k)
  matching = pairs.matches(q, k, temperature)
  logits = pairs.similarities(q, k, temperature)
  there = pairs.others(len(q))
  loss = jax.nn.softplus(pairs.mass(logits, there, weights) - matching)
  if symmetric:
    down = None if weights is None else weights[:, None]
    back = jax.nn.softplus(pairs.mass(logits, there, down, axis=0) - matching)
    loss = 0.5 * (loss + back)
  return pairs.keep(loss, weights)


def decoupled_nce(
  z1: jax.Array,
  z2: jax.Array,
  temperature: float | jax.Array,
  sigma: float | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Decoupled contrastive loss, DCL, or DCLW with `sigma`: [b d], [b d] -> [b].

  Formula: mean over the two anchors of -v_i s_ij/T + log Σ_{k≠i,j} exp(s_ik/T); v = 1, in DCLW
    v_i = 2 - b·softmax_i(s_ij/sigma), the softmax over the batch, without gradient.
  Source: Decoupled contrastive learning, Yeh et al. 2022, 2110.06848.
  Tested: NumPy; lightly DCLLoss and DCLWLoss; golden values.
  NT-Xent without its positive in the denominator: NT-Xent of an anchor is softplus of this. It
  can be negative; a batch of one has no negatives and loss 0.

  >>> losses.decoupled_nce(jnp.eye(4), jnp.eye(4), temperature=0.1, sigma=0.5).shape
  (4,)
  """
  arguments.positive(sigma=sigma)
  z1, z2, weights = pairs.read(temperature, weights, z1=z1, z2=z2)
  matching = pairs.matches(z1, z2, temperature)
  one, two = pairs.negatives(pairs.blocks(z1, z2, temperature), weights)
  if sigma is not None:
    count = jnp.ones_like(matching) if weights is None else weights
    similarity = jax.lax.stop_gradient(pairs.matches(z1, z2, sigma))
    share = jnp.exp(similarity - pairs.mass(similarity, jnp.ones((), bool), count))
    matching = matching * (2.0 - count.sum() * share)
  # The mass of no negatives is very low, not a loss.
  loss = jnp.where(pairs.exists(one), 0.5 * (one + two) - matching, 0.0)
  return pairs.keep(loss, weights)


def debiased_nce(
  z1: jax.Array,
  z2: jax.Array,
  temperature: float | jax.Array,
  tau_plus: float,
  beta: float | jax.Array = 0.0,
  positives: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Debiased contrastive loss, and with `beta` its hard negatives (HCL): [b d], [b d] -> [b].

  Formula: mean over the two anchors of -log(p / (p + N·g)), p = exp(s_ij/T), N = 2b - 2,
    g = max((r - tau_plus·p) / (1 - tau_plus), exp(-1/T)), r = Σ n^(1+beta) / Σ n^beta over the
    negatives n = exp(s_ik/T).
  Source: Debiased contrastive learning, Chuang et al. 2020, 2007.00224; HCL, Robinson et al. 2021,
    2010.04592.
  Tested: NumPy; golden values (tau_plus 0 and beta 0 is NT-Xent).
  tau_plus: probability that a random example is of the anchor's class, in [0, 1). positives:
  [b m d], m more views of each example; then the p subtracted from r is the mean over partner and
  them. Computed in logarithms: the formula itself overflows float32 below T = 0.01.

  >>> losses.debiased_nce(jnp.eye(4), jnp.eye(4), temperature=0.5, tau_plus=0.1, beta=1.0).shape
  (4,)
  """
  if isinstance(tau_plus, (int, float)) and not 0 <= tau_plus < 1:
    raise ValueError(f"tau_plus must be a probability in [0, 1), not {tau_plus!r}")
  if isinstance(beta, (int, float)) and not 0 <= beta < float("inf"):
    raise ValueError(f"beta must be a number from 0 up, not {beta!r}")
  arguments.read(z1=(z1, "b d"), positives=(positives, "?b m d"))
  z1, z2, weights = pairs.read(temperature, weights, z1=z1, z2=z2)
  matching = pairs.matches(z1, z2, temperature)
  blocks = pairs.blocks(z1, z2, temperature)

  def times(power: Any) -> tuple[jax.Array, jax.Array]:
    return pairs.negatives(jax.tree.map(lambda s: power * s, blocks), weights)

  present = jnp.ones_like(matching) if weights is None else weights
  count = pairs.log(2.0 * (present.sum() - present))
  loss = jnp.zeros_like(matching)
  for z, above, below in zip((z1, z2), times(1.0 + beta), times(beta)):
    prior = pairs.log(jnp.asarray(tau_plus, z.dtype)) + _more(z, matching, positives, temperature)
    lowest = pairs.scaled(jnp.full_like(matching, -1.0), temperature)
    unbiased = _log_difference(above - below, prior) - jnp.log1p(-tau_plus)
    rest = count + jnp.maximum(unbiased, lowest)
    loss += jnp.where(pairs.exists(count), jax.nn.softplus(rest - matching), 0.0)
  return pairs.keep(0.5 * loss, weights)


def _more(
  z: jax.Array, matching: jax.Array, positives: jax.Array | None, temperature: Any
) -> jax.Array:
  """log of the mean of exp(s/T) over partner and further positives: [b]."""
  if positives is None:
    return matching
  unit = numerics.normalise(arguments.widen(positives))
  logits = pairs.similarities(z, unit, temperature)
  both = jnp.logaddexp(numerics.logsumexp(logits), matching)
  return both - jnp.log(jnp.asarray(1.0 + logits.shape[1], z.dtype))


def _log_difference(x: jax.Array, y: jax.Array) -> jax.Array:
  """log(exp(x) - exp(y)); very low, gradient 0, where y is not below x."""
  some = y < x
  gap = jnp.where(some, y - x, -1.0)
  return jnp.where(some, x + jnp.log(-jnp.expm1(gap)), jnp.finfo(x.dtype).min / 4)


def kernel_info_nce(
  z1: jax.Array,
  z2: jax.Array,
  gamma: float | jax.Array,
  temperature: float | jax.Array,
  eps: float = 1e-6,
  weights: jax.Array | None = None,
) -> jax.Array:
  """NT-Xent with the kernel exp(-‖a - b‖^gamma / T) of unit vectors: [b d], [b d] -> [b].

  Formula: mean over the two anchors of -log(K_ij / Σ_{k≠i} K_ik), j the other view.
  Source: Kernel-InfoNCE, Tan et al. 2023, 2303.15103.
  Tested: NumPy; golden values (gamma 2, T is NT-Xent with T/2).
  gamma 2 is the Gaussian kernel, 1 the Laplacian; distances below `eps` count as `eps`, where the
  gradient is 0 (the slope of ‖·‖^gamma at 0 is infinite for gamma < 1).

  >>> losses.kernel_info_nce(jnp.eye(4), jnp.eye(4), gamma=1.0, temperature=0.5).shape
  (4,)
  """
  arguments.positive(gamma=gamma, eps=eps)
  z1, z2, weights = pairs.read(temperature, weights, z1=z1, z2=z2)
  matching = pairs.matches(z1, z2, temperature, gamma, eps)
  one, two = pairs.negatives(pairs.blocks(z1, z2, temperature, gamma, eps), weights)
  loss = jax.nn.softplus(one - matching) + jax.nn.softplus(two - matching)
  return pairs.keep(0.5 * loss, weights)


def hardness_weighted_nce(
  a: jax.Array,
  b: jax.Array,
  scale: float | jax.Array,
  alpha: float = 0.5,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Symmetric InfoNCE in which harder negatives weigh more: [b d], [b d] -> [b].

  Formula: mean over rows and columns of -log(exp(S·c_ii) / (exp(S·c_ii) + Σ_{j≠i} exp(S·c_ij +
    alpha·c'_ij))), c the cosine, c' the same without gradient.
  Source: LLaVE, Lan et al. 2025, 2503.04812.
  Tested: NumPy; golden values (alpha 0 is CLIP's loss).
  scale multiplies (1/temperature; 1/0.07 in CLIP). alpha is per unit of cosine, not per logit.

  >>> losses.hardness_weighted_nce(jnp.eye(4), jnp.eye(4), scale=5.0, alpha=1.0).shape
  (4,)
  """
  arguments.positive(scale=scale)
  if not isinstance(scale, (int, float)):
    arguments.read(scale=(scale, ""))
  a, b, weights = pairs.read(1.0, weights, a=a, b=b)
  scale = pairs.capped(scale, a.dtype)
  cosines = pairs.products(a, b)
  hardness = alpha * jax.lax.stop_gradient(cosines)
  matching = scale * (a * b).sum(-1)
  there = pairs.others(len(a))
  down = None if weights is None else weights[:, None]
  rows = pairs.mass(scale * cosines + hardness, there, weights)
  columns = pairs.mass(scale * cosines + hardness, there, down, axis=0)
  loss = jax.nn.softplus(rows - matching) + jax.nn.softplus(columns - matching)
  return pairs.keep(0.5 * loss, weights)
