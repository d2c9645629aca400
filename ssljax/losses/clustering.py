"""Deep clustering by labels: pseudo-labels and where they come from.

`b` examples, `k` clusters, `n` the examples of a whole data set. Losses on distances to centroids
are in centroids.py, those on memberships in memberships.py.
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
  "instance_ce",
  "select_by_class_confidence",
  "sinkhorn_full",
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
  return cross - entropy_weight * numerics.entropy(mean, float(jnp.finfo(mean.dtype).tiny))


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
