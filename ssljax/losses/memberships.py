"""Losses on memberships: neighbours that agree, clusters that fill and span the space.

`b` examples, `k` clusters.
"""

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics
from ssljax.losses.pairs import kind

__all__ = (
  "divclust",
  "multi_label_cluster_loss",
  "neighbour_consistency",
  "rate_reduction",
  "scan_loss",
  "volmax_dcc",
)


def neighbour_consistency(
  p_anchor: jax.Array, p_neighbours: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """Neighbours in the same cluster: probabilities [b k], [b m k], weights [b m] -> [b].

  Formula: mean over the neighbours of -ln ⟨p, p_neighbour⟩, at most 100.
  Source: SCAN, Van Gansbeke et al. 2020, 2005.12320, first term.
  Tested: NumPy; torch binary_cross_entropy with target 1.
  weights (numbers or bool) say which neighbours there are; an example without any has loss 0. In
  float32 the logarithm ends at -87.3, its gradient there is 0. Neighbours are mined once, by cosine
  of self-supervised features; SCAN's lists hold the image itself too.

  >>> losses.neighbour_consistency(jnp.eye(3), jnp.full((3, 5, 3), 1 / 3)).shape
  (3,)
  """
  p_anchor, p_neighbours, weights = arguments.read(
    p_anchor=(p_anchor, "b k"),
    p_neighbours=(p_neighbours, "b m k"),
    weights=(weights, f"?b m:{kind(weights)}"),
  )
  if weights is not None:
    # where before anything else: padding may hold anything.
    p_neighbours = jnp.where(weights[:, :, None] != 0, p_neighbours, 0.0)
  same = jnp.einsum("bk,bmk->bm", p_anchor, p_neighbours)
  # Probabilities that do not sum to exactly 1 may have a product above 1.
  same = jnp.clip(same, jnp.finfo(same.dtype).tiny, 1.0)
  return numerics.mean(-jnp.maximum(jnp.log(same), -100.0), weights, axis=-1)


def scan_loss(
  p_anchor: jax.Array,
  p_neighbour: jax.Array,
  entropy_weight: float = 5.0,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Neighbours agree, clusters are balanced: [b k], [b k] -> loss, (consistency, entropy).

  Formula: -mean ln ⟨p_i, p_neighbour(i)⟩ - w · H(mean of p_anchor).
  Source: SCAN, Van Gansbeke et al. 2020, 2005.12320.
  Tested: NumPy; torch binary_cross_entropy; golden value; known minimum -w ln k.
  Takes probabilities (softmax of a head), scalars out; several heads: one call each, losses summed.
  The entropy is of the anchors alone, its p at least 1e-8; it is too small where b is not far above
  k. The original picks the best head with entropy_weight 1. weights: [b], 0 is padding.

  >>> loss, (consistency, entropy) = losses.scan_loss(jnp.eye(4), jnp.eye(4), entropy_weight=5.0)
  >>> bool(abs(loss + 5 * np.log(4)) < 1e-5)
  True
  """
  p_anchor, p_neighbour, weights = arguments.read(
    p_anchor=(p_anchor, "b k"),
    p_neighbour=(p_neighbour, "b k"),
    weights=(weights, f"?b:{kind(weights)}"),
  )
  weights = jnp.ones_like(p_anchor[:, 0]) if weights is None else weights
  p_anchor = jnp.where(weights[:, None] != 0, p_anchor, 0.0)
  agreement = neighbour_consistency(p_anchor, p_neighbour[:, None, :], weights[:, None])
  consistency = numerics.mean(agreement, weights)
  mean = numerics.mean(p_anchor, jnp.broadcast_to(weights[:, None], p_anchor.shape), axis=0)
  entropy = jnp.where((weights != 0).any(), numerics.entropy(mean, 1e-8), 0.0)
  return consistency - entropy_weight * entropy, (consistency, entropy)


def rate_reduction(
  z: jax.Array, membership: jax.Array, eps: float = 0.5, eps_squared: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Coding rates of all and of the clusters: [b d], memberships [b k] -> R, R_c.

  Formula: R = ½ logdet(I + d/(b·eps) zᵀz); R_c = Σ_j t_j/(2b) logdet(I + d/(t_j·eps) zᵀΠ_j z),
    Π_j = diag(membership_j), t_j = Σ membership_j + 1e-8.
  Source: MCR², Yu et al. 2020, 2006.08558; CPP, Chu et al. 2023, 2306.05272.
  Tested: NumPy; torch logdet; golden values; R = R_c for one cluster.
  The loss is R_c - R. The released code does not square eps, the paper does: eps_squared. z is not
  normalised here; both use unit rows. Memberships of CPP: Sinkhorn of the cluster logits.

  >>> rate, parts = losses.rate_reduction(jnp.eye(4), jnp.eye(4), eps=0.5)
  >>> bool(rate > parts)
  True
  """
  z, membership = arguments.read(z=(z, "b d"), membership=(membership, "b k"))
  arguments.positive(eps=eps)
  b, d = z.shape
  scale = d / (eps**2 if eps_squared else eps)
  sizes = membership.sum(0) + 1e-8
  inside = jnp.einsum("bk,bd,be->kde", membership, z, z) * (scale / sizes)[:, None, None]
  grams = jnp.concatenate([scale / b * (z.T @ z)[None], inside])
  logdets = jnp.linalg.slogdet(jnp.eye(d, dtype=z.dtype) + grams)[1]
  return logdets[0] / 2, (sizes * logdets[1:]).sum() / (2 * b)


def divclust(assignments: jax.Array, threshold: float | jax.Array) -> jax.Array:
  """Several clusterings that differ: soft assignments [b m k] of m clusterings -> scalar.

  Formula: Σ over ordered pairs of clusterings of relu(mean_i max_j S_ij - threshold), S the cosines
    of their columns over the batch.
  Source: DivClust, Metaxas et al. 2023, 2304.01042.
  Tested: NumPy; golden value; m(m-1)(1 - threshold) for equal hard clusterings; 0 for orthogonal.
  The batch is the first axis (the original has the clusterings there). The threshold moves outside:
  every 20 steps ×0.99 where the mean NMI of the clusterings is above its goal, else ×1.01, in
  [0, 1]. A learnt or scheduled threshold may be an array.

  >>> float(losses.divclust(jnp.stack([jnp.eye(3), jnp.eye(3)], axis=1), threshold=0.5))
  1.0
  """
  (assignments,) = arguments.read(assignments=(assignments, "b m k"))
  columns = numerics.normalise(assignments, axis=0)
  similar = jnp.einsum("bmi,bnj->mnij", columns, columns).max(-1).mean(-1)
  others = ~jnp.eye(len(similar), dtype=bool)
  return jnp.where(others, jax.nn.relu(similar - threshold), 0.0).sum()


def volmax_dcc(
  memberships: jax.Array,
  link: jax.Array,
  pairs: jax.Array,
  same: jax.Array,
  weight: float = 1e-3,
  eps: float = 1e-5,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Clusters from pairs, of large volume: F [b k], B [k k], pairs [p 2], same [p] -> loss, parts.

  Formula: mean BCE(F_i B F_jᵀ, same) - weight · log det(FᵀF + eps·I); parts = (BCE, log det).
  Source: VolMaxDCC, Nguyen et al. 2023, 2305.19391.
  Tested: NumPy; golden values.
  F are softmax memberships; B is the sigmoid of learnt numbers that start at ±1, close to
  the identity; `pairs` are rows of F; same (0/1, bool, or a probability) may be noisy. Link
  probabilities are kept in [1e-6, 1 - 1e-6]. The original has eps 0 (-inf where a cluster is empty)
  and takes F of another batch than the pairs. weight: 1e-3 for CIFAR-10, 1e-2 for ImageNet-10.

  >>> f, pairs = jnp.eye(3), jnp.array([[0, 0], [0, 1]])
  >>> loss, (bce, logdet) = losses.volmax_dcc(f, jnp.eye(3), pairs, jnp.array([True, False]))
  >>> float(bce) < 1e-5
  True
  """
  memberships, link, pairs, same = arguments.read(
    memberships=(memberships, "b k"),
    link=(link, "k k"),
    pairs=(pairs, "p 2:int"),
    same=(same, f"p:{kind(same)}"),
  )
  same = same.astype(memberships.dtype)
  one, two = memberships[pairs[:, 0]], memberships[pairs[:, 1]]
  p = jnp.clip(jnp.einsum("pk,kl,pl->p", one, link, two), 1e-6, 1 - 1e-6)
  bce = -(same * jnp.log(p) + (1 - same) * jnp.log1p(-p)).mean()
  gram = memberships.T @ memberships + eps * jnp.eye(len(link), dtype=link.dtype)
  logdet = jnp.linalg.slogdet(gram)[1]
  return bce - weight * logdet, (bce, logdet)


def multi_label_cluster_loss(
  scores: jax.Array, pos_mask: jax.Array, neg_mask: jax.Array
) -> jax.Array:
  """Several nearest clusters are positive: scores [b k], masks [b k] -> [b].

  Formula: ln(1 + Σ_negatives e^s) + ln(1 + Σ_positives e^-s).
  Source: MLCD, An et al. 2024, 2407.17331.
  Tested: NumPy; golden value.
  Scores are scaled cosines (with a margin, as in partial-class training). Two sums, not one
  softmax: positives do not compete. neg_mask is the sample of negatives; clusters in neither mask
  do not count, an example without any has loss 0.

  >>> losses.multi_label_cluster_loss(jnp.zeros((2, 4)), jnp.eye(2, 4) > 0, jnp.eye(2, 4) < 1).shape
  (2,)
  """
  scores, pos_mask, neg_mask = arguments.read(
    scores=(scores, "b k"), pos_mask=(pos_mask, "b k:bool"), neg_mask=(neg_mask, "b k:bool")
  )
  negative = jax.nn.softplus(numerics.logsumexp(scores, neg_mask))
  return negative + jax.nn.softplus(numerics.logsumexp(-scores, pos_mask))
