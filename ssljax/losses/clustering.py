"""Deep clustering by labels: pseudo-labels and where they come from, and losses on memberships.

`b` examples, `k` clusters, `n` the examples of a whole data set. Losses on distances to centroids
are in centroids.py.
"""

import math

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics
from ssljax.losses.pairs import kind

__all__ = (
  "cdc_calibration",
  "cluster_ce",
  "confident_self_label",
  "divclust",
  "instance_ce",
  "multi_label_cluster_loss",
  "neighbour_consistency",
  "rate_reduction",
  "scan_loss",
  "select_by_class_confidence",
  "sinkhorn_full",
  "volmax_dcc",
)


def cluster_ce(logits: jax.Array, ids: jax.Array, weights: jax.Array | None = None) -> jax.Array:
  """Cross-entropy with cluster ids: [b k], ids [b], weights [b] -> [b].

  Formula: -w_i log softmax(logits_i)[id_i] · b / Σ w.
  Source: DeepCluster, Caron et al. 2018, 1807.05520; weights: ODC, Zhan et al. 2020, 2006.10645.
  Tested: NumPy; torch cross_entropy (ignore_index, class weights).
  The mean over the batch is Σ w·ce / Σ w. A negative id counts as weight 0 (DeepCluster-v2 marks
  images without a cluster by -100). DeepCluster-v2 divides cosines by temperature 0.1 before; ODC's
  weights are proportional to 1/√(size of the cluster). Ids change their meaning with each k-means:
  make the head anew, or copy the centroids into it.

  >>> losses.cluster_ce(jnp.zeros((2, 4)), jnp.array([1, -1])).shape
  (2,)
  """
  logits, ids, weights = arguments.read(
    logits=(logits, "b k"), ids=(ids, "b:int"), weights=(weights, f"?b:{kind(weights)}")
  )
  weights = jnp.where(ids >= 0, 1 if weights is None else weights, 0).astype(logits.dtype)
  counts = weights != 0
  # where before anything else: rows that do not count may hold anything.
  logits, ids = jnp.where(counts[:, None], logits, 0.0), jnp.where(counts, ids, 0)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids)
  share = weights.mean()
  return losses * weights / jnp.where(share == 0, 1.0, share)


def instance_ce(logits: jax.Array, idx: jax.Array, smoothing: float = 0.8) -> jax.Array:
  """Every example its own class, with label smoothing: [b n], idx [b] -> [b].

  Formula: -(1 - s) log p[idx] - s/n Σ_j log p_j, p = softmax(logits).
  Source: DIET, Balestriero 2023, 2302.10260.
  Tested: NumPy; torch cross_entropy with label_smoothing.
  idx is the place of the example in the data set: stable, also after filtering.

  >>> losses.instance_ce(jnp.zeros((2, 10)), jnp.array([3, 7])).shape
  (2,)
  """
  logits, idx = arguments.read(logits=(logits, "b n"), idx=(idx, "b:int"))
  if isinstance(smoothing, (int, float)) and not 0 <= smoothing <= 1:
    raise ValueError(f"smoothing must be between 0 and 1, not {smoothing!r}")
  hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, idx)
  return (1 - smoothing) * hard - smoothing * jax.nn.log_softmax(logits).mean(-1)


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


def _entropy(p: jax.Array, floor: float) -> jax.Array:
  """-Σ p ln p with p at least `floor`: [k] -> scalar."""
  p = jnp.maximum(p, floor)
  return -(p * jnp.log(p)).sum()


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
  entropy = jnp.where((weights != 0).any(), _entropy(mean, 1e-8), 0.0)
  return consistency - entropy_weight * entropy, (consistency, entropy)


def confident_self_label(
  p: jax.Array, threshold: float = 0.99
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Labels of confident examples: probabilities [b k] -> mask [b], labels [b], weights [b].

  Formula: mask = max p > threshold; label = argmax p; weight = mask · Σ mask / (mask of its label).
  Source: SCAN, Van Gansbeke et al. 2020, 2005.12320, self-labelling.
  Tested: NumPy; with cluster_ce: torch cross_entropy with class weights.
  p is of the weak view. The weights balance the classes: the mean of
  `cluster_ce(logits_of_the_strong_view, labels, weights)` is SCAN's loss; 0 where nothing is
  confident (the original raises). No gradient.

  >>> mask, labels, weights = losses.confident_self_label(jnp.array([[1.0, 0.0], [0.4, 0.6]]))
  >>> mask.tolist(), labels.tolist(), weights.tolist()
  ([True, False], [0, 1], [1.0, 0.0])
  """
  (p,) = arguments.read(p=(p, "b k"))
  p = jax.lax.stop_gradient(p)
  mask, labels = p.max(-1) > threshold, p.argmax(-1)
  counts = (jax.nn.one_hot(labels, p.shape[1], dtype=p.dtype) * mask[:, None]).sum(0)
  # An example that counts has a count of at least 1.
  return mask, labels, jnp.where(mask, mask.sum() / jnp.maximum(counts, 1.0)[labels], 0.0)


def sinkhorn_full(
  log_p: jax.Array, sharpness: float, tolerance: float, max_iterations: int = 1000
) -> tuple[jax.Array, jax.Array]:
  """Self-labels of a data set by transport: log-probabilities [n k] -> labels [n], plan [n k].

  Formula: plan = diag(u) p^sharpness diag(v), row sums 1/n, column sums 1/k; label = argmax.
  Source: SeLa, Asano et al. 2020, 1911.05371.
  Tested: NumPy (direct scaling in float64); golden labels; marginals.
  sharpness is SeLa's λ: 25 for ImageNet, 10 for CIFAR. As there, columns and rows are scaled in
  turn until Σ_i |u_i/u_i' - 1| <= tolerance (0.1; CIFAR 0.01), looked at in every tenth turn, and
  at most max_iterations times. Rows sum to 1/n exactly, columns as far as it converged. Computed
  with logarithms, so that float32 serves where the original needs float64, but rounding alone keeps
  the sum near 1e-6·n: raise the tolerance with n. sharpness·log_p below -1e4 counts as -1e4. Equal
  cluster sizes are wrong for long tails. No gradient.

  >>> labels, plan = losses.sinkhorn_full(jnp.log(jnp.full((4, 2), 0.5)), 10.0, 0.1)
  >>> plan.sum(0).tolist()
  [0.5, 0.5]
  """
  (log_p,) = arguments.read(log_p=(log_p, "n k"))
  arguments.positive(sharpness=sharpness, tolerance=tolerance, max_iterations=max_iterations)
  scores = jax.lax.stop_gradient(jnp.maximum(sharpness * log_p, -1e4))
  n, k = scores.shape

  def turn(state):
    i, _, rows, error = state
    columns = -math.log(k) - jax.nn.logsumexp(scores + rows[:, None], axis=0)
    new = -math.log(n) - jax.nn.logsumexp(scores + columns, axis=1)
    error = jnp.where(i % 10 == 0, jnp.abs(jnp.expm1(rows - new)).sum(), error)
    return i + 1, columns, new, error

  def going(state):
    return (state[0] < max_iterations) & (state[3] > tolerance)

  error = jnp.full((), jnp.inf, scores.dtype)
  start = (0, jnp.zeros_like(scores[0]), jnp.full_like(scores[:, 0], -math.log(n)), error)
  _, columns, rows, _ = jax.lax.while_loop(going, turn, start)
  log_plan = scores + columns + rows[:, None]
  return log_plan.argmax(-1), jnp.exp(log_plan)


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


def cdc_calibration(
  cal_logits: jax.Array,
  cluster_probs: jax.Array,
  mini_ids: jax.Array,
  n_mini: int,
  entropy_weight: float,
) -> jax.Array:
  """A calibration head taught by mini-clusters: [b k], [b k], ids [b] below n_mini -> scalar.

  Formula: mean CE(t, cal_logits) + w Σ_k q_k ln q_k; t the mean of cluster_probs in the example's
    mini-cluster, q the mean of softmax(cal_logits).
  Source: CDC, Jia et al. 2024, 2403.02998.
  Tested: NumPy; soft cross-entropy where every example is its own mini-cluster and w is 0.
  Nothing flows into cluster_probs; the original feeds the calibration head detached features.
  mini_ids are of k-means on the batch (500 centroids of 1000 images). Ids outside are not taught.

  >>> ids = jnp.array([0, 0, 1, 1])
  >>> losses.cdc_calibration(jnp.zeros((4, 3)), jnp.eye(4, 3), ids, 2, 1.0).shape
  ()
  """
  cal_logits, cluster_probs, mini_ids = arguments.read(
    cal_logits=(cal_logits, "b k"),
    cluster_probs=(cluster_probs, "b k"),
    mini_ids=(mini_ids, "b:int"),
  )
  arguments.positive(n_mini=n_mini)
  own = jax.nn.one_hot(mini_ids, n_mini, dtype=cal_logits.dtype)
  means = own.T @ cluster_probs / jnp.maximum(own.sum(0), 1.0)[:, None]
  target = jax.lax.stop_gradient(own @ means)
  cross = numerics.mean(numerics.cross_entropy(cal_logits, target), own.sum(-1))
  mean = jax.nn.softmax(cal_logits).mean(0)
  return cross - entropy_weight * _entropy(mean, float(jnp.finfo(mean.dtype).tiny))


def select_by_class_confidence(p: jax.Array, per_class: int) -> tuple[jax.Array, jax.Array]:
  """The surest examples of every class: probabilities [b k] -> selected [b], labels [b].

  Formula: of the per_class examples with the largest p_c the first ⌊per_class · mean of max p⌋, for
    every class c; label = argmax p.
  Source: CDC, Jia et al. 2024, 2403.02998.
  Tested: NumPy.
  An example may be selected for a class that is not its label, as in the original. p comes from the
  calibration head and the weak view; per_class is 100 there, of 1000 images. No gradient.

  >>> selected, labels = losses.select_by_class_confidence(jnp.eye(4, 2), per_class=1)
  >>> selected.tolist()
  [True, True, False, False]
  """
  (p,) = arguments.read(p=(p, "b k"))
  arguments.positive(per_class=per_class)
  p = jax.lax.stop_gradient(p)
  order = jax.lax.top_k(p.T, min(per_class, len(p)))[1]
  count = jnp.floor(per_class * p.max(-1)[order].mean(-1))
  chosen = jnp.arange(order.shape[1]) < count[:, None]
  return jnp.zeros(len(p), bool).at[order].max(chosen), p.argmax(-1)


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
