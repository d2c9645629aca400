"""Losses of cells, pairs and groups: what is compared is matched or given, not labelled."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics, pairs

__all__ = (
  "dense_info_nce",
  "differentiable_sort",
  "grid_match",
  "group_ordering_loss",
  "group_similarities",
  "pairwise_equivariance",
  "patch_info_nce",
  "pixel_consistency",
  "relation_bce_focal",
  "triplet",
  "weighted_triplet",
)


def grid_match(a: jax.Array, b: jax.Array) -> jax.Array:
  """For every cell of a the most similar cell of b: [b n d], [b m d] -> indices [b n].

  Formula: argmax over m of the cosine.
  Source: DenseCL, Wang et al. 2021, 2011.09157.
  Tested: NumPy; lightly select_most_similar.
  Of equally similar cells the first.

  >>> losses.grid_match(jnp.eye(3)[None], jnp.eye(3)[None, ::-1]).tolist()
  [[2, 1, 0]]
  """
  a, b = arguments.read(a=(a, "b n d"), b=(b, "b m d"))
  a, b = jax.lax.stop_gradient((numerics.normalise(a), numerics.normalise(b)))
  return _cells(a, b).argmax(-1)


def _cells(a: jax.Array, b: jax.Array) -> jax.Array:
  """Inner products of the cells of two maps: [b n d], [b m d] -> [b n m]."""
  return jnp.einsum("bnd,bmd->bnm", a, b, precision=pairs.FULL)


def dense_info_nce(
  q_map: jax.Array,
  k_map: jax.Array,
  q_feat: jax.Array,
  k_feat: jax.Array,
  queue: jax.Array,
  temperature: float | jax.Array,
  weights: jax.Array | None = None,
) -> jax.Array:
  """InfoNCE of matched cells: maps [b n d] ×2, features [b n e] ×2, queue [m d] -> [b].

  Formula: mean over cells u of -log(exp(q_u·k_v/T) / (exp(q_u·k_v/T) + Σ_m exp(q_u·queue_m/T))),
    v = grid_match(q_feat, k_feat) at u, cosines.
  Source: DenseCL, Wang et al. 2021, 2011.09157.
  Tested: NumPy; lightly select_most_similar with torch cross_entropy.
  No gradient but to q_map. Traps: cells are matched by encoder features, not by projections; the
  queue holds pooled keys, one an image, not cells. weights [b n]: cells that count. The logits are
  [b n m]: 0.8 G numbers at 256 images of 49 cells and a queue of 65,536.

  >>> cells, queue = jnp.ones((2, 9, 4)), jnp.eye(4)
  >>> losses.dense_info_nce(cells, cells, cells, cells, queue, 0.2).shape
  (2,)
  """
  pairs.check_temperature(temperature=temperature)
  q_map, k_map, q_feat, k_feat, queue, weights = arguments.read(
    q_map=(q_map, "b n d"),
    k_map=(k_map, "b k d"),
    q_feat=(q_feat, "b n e"),
    k_feat=(k_feat, "b k e"),
    queue=(queue, "m d"),
    weights=(weights, f"?b n:{pairs.kind(weights)}"),
  )
  if weights is not None:
    # where, before anything else: cells that do not count may hold anything, NaN too.
    q_map = jnp.where(weights[..., None] > 0, q_map, 0.0)
  q, k, queue = (numerics.normalise(x) for x in (q_map, k_map, queue))
  k = jnp.take_along_axis(k, grid_match(q_feat, k_feat)[..., None], axis=1)
  k, queue = jax.lax.stop_gradient((k, queue))
  others = jnp.einsum("bnd,md->bnm", q, queue, precision=pairs.FULL)
  logits = pairs.scaled(jnp.concatenate([(q * k).sum(-1, keepdims=True), others], -1), temperature)
  loss = numerics.logsumexp(logits) - logits[..., 0]
  return numerics.mean(loss, weights, axis=1)


def patch_info_nce(
  predictions: jax.Array,
  targets: jax.Array,
  temperature: float | jax.Array,
  mask: jax.Array | None = None,
  standardise: bool = False,
) -> jax.Array:
  """InfoNCE among the patches of one image: [b n d], [b n d], mask [b n] bool -> [b].

  Formula: mean over patches i of -log(exp(s_ii/T) / Σ_j exp(s_ij/T)), s_ij the cosine of
    prediction i and target j.
  Source: Latent MIM, Wei et al. 2024, 2407.15837.
  Tested: NumPy; torch cross_entropy; equal patches give log n.
  No gradient to targets. mask: the patches that take part, as anchors and as negatives (default
  all). standardise: predictions first lose their mean over the patches of the image and are divided
  by their deviation (unbiased, plus 1e-4), a channel each, as in Latent MIM, which also multiplies
  the loss by 2T: the caller's job.

  >>> losses.patch_info_nce(jnp.ones((2, 5, 3)), jnp.ones((2, 5, 3)), 0.2).shape
  (2,)
  """
  pairs.check_temperature(temperature=temperature)
  predictions, targets, mask = arguments.read(
    predictions=(predictions, "b n d"), targets=(targets, "b n d"), mask=(mask, "?b n:bool")
  )
  mask = jnp.ones(targets.shape[:2], bool) if mask is None else mask
  predictions, targets = (jnp.where(mask[..., None], x, 0.0) for x in (predictions, targets))
  if standardise:
    predictions = _standardised(predictions, mask)
  targets = jax.lax.stop_gradient(numerics.normalise(targets))
  logits = pairs.scaled(_cells(numerics.normalise(predictions), targets), temperature)
  own = jnp.einsum("bnn->bn", logits)
  loss = numerics.logsumexp(logits, mask[:, None]) - own
  return numerics.mean(loss, mask, axis=1)


def _standardised(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean 0 and deviation 1 (unbiased, plus 1e-4) over the patches in `mask`: [b n d] -> [b n d]."""
  counts = jnp.broadcast_to(mask[..., None], x.shape)
  x = x - numerics.mean(x, counts, axis=1)[:, None]
  square = jnp.where(counts, jnp.square(x), 0.0).sum(1, keepdims=True)
  unbiased = square / jnp.maximum(counts.sum(1, keepdims=True) - 1, 1)
  return x / (numerics.square_root(unbiased) + 1e-4)


def pixel_consistency(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
  """Minus the mean cosine of pairs of cells: [b n d], [b m d], mask [b n m] -> [b].

  Formula: -Σ_uv mask_uv q_u·k_v / Σ_uv mask_uv, cosines.
  Source: PixPro, Xie et al. 2021, 2011.10043.
  Tested: NumPy; -1 for cells and themselves.
  No gradient to k. mask (bool or weights): pairs of cells whose centres are nearer than 0.7 of the
  larger cell's diagonal in the image. An image without pairs gives 0. The original has twice this,
  for both directions in turn (-4 at best), and adds 1e-6 to the count.

  >>> losses.pixel_consistency(jnp.ones((2, 9, 4)), jnp.ones((2, 9, 4)), jnp.ones((2, 9, 9))).shape
  (2,)
  """
  q, k, mask = arguments.read(
    q=(q, "b n d"), k=(k, "b m d"), mask=(mask, f"b n m:{pairs.kind(mask)}")
  )
  q, k = numerics.normalise(q), jax.lax.stop_gradient(numerics.normalise(k))
  return -numerics.mean(_cells(q, k), mask, axis=(1, 2))


def differentiable_sort(
  values: jax.Array, steepness: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Ascending order by an odd-even network of soft swaps: [… n] -> [… n], [… n n].

  Formula: n layers; neighbours (a, b) become (c·a + (1-c)·b, (1-c)·a + c·b),
    c = 1/2 + arctan(steepness·(b - a))/π.
  Source: Petersen et al. 2022, 2203.09630 (Cauchy swaps); Petersen et al. 2021, 2105.04019.
  Tested: NumPy; values of diffsort.
  The second output is the soft permutation: row = input, column = rank, rows and columns sum to 1;
  values @ permutation is the first. Depth and cost grow with n and n²: for short lists.

  >>> losses.differentiable_sort(jnp.array([3.0, 1.0]), steepness=1e4)[0].round(2).tolist()
  [1.0, 3.0]
  """
  pairs.check_temperature(steepness=steepness)
  (values,) = arguments.read(values=(values, "* n"))
  n = values.shape[-1]
  wires = jnp.arange(n)

  def layer(state: tuple[jax.Array, jax.Array], shift: jax.Array):
    x, places = state
    lower = (wires + shift) % 2 == 0
    partner = jnp.where(lower, wires + 1, wires - 1)
    partner = jnp.where((partner < 0) | (partner >= n), wires, partner)  # the ends may be alone
    gap = jnp.where(lower, x[..., partner] - x, x - x[..., partner])
    turn = jnp.arctan(steepness * gap) / math.pi
    # Both shares from the angle: 1 - stay would round a small share away.
    stay, leave = 0.5 + turn, 0.5 - turn
    x = stay * x + leave * x[..., partner]
    places = stay[..., None, :] * places + leave[..., None, :] * places[..., partner]
    return (x, places), None

  places = jnp.broadcast_to(jnp.eye(n, dtype=values.dtype), (*values.shape, n))
  return jax.lax.scan(layer, (values, places), wires % 2)[0]


def group_similarities(
  anchors: jax.Array, positives: jax.Array, negatives: jax.Array, n_neg: int
) -> jax.Array:
  """What GroCo sorts: anchors [b d], positives [b p d], negatives [b d] -> cosines [b n_neg+p].

  Formula: the n_neg largest cosines with negatives of other rows, ascending; then those with the
    own positives, ascending.
  Source: GroCo, Shvetsova et al. 2023, 2301.02009.
  Tested: NumPy; golden value (through group_ordering_loss).
  No gradient but to anchors. negatives are the same view as the anchors, in the original the
  anchors themselves; row i is left out for anchor i.

  >>> losses.group_similarities(jnp.eye(4), jnp.ones((4, 2, 4)), jnp.eye(4), n_neg=3).shape
  (4, 5)
  """
  anchors, positives, negatives = arguments.read(
    anchors=(anchors, "b d"), positives=(positives, "b p d"), negatives=(negatives, "b d")
  )
  b = anchors.shape[0]
  if not 1 <= n_neg < b:
    raise ValueError(f"n_neg must be from 1 to {b - 1}, the rows but one, not {n_neg!r}")
  anchors = numerics.normalise(anchors)
  fixed = jax.lax.stop_gradient((numerics.normalise(positives), numerics.normalise(negatives)))
  near = jnp.einsum("bd,bpd->bp", anchors, fixed[0], precision=pairs.FULL)
  far = jnp.where(jnp.eye(b, dtype=bool), -2.0, pairs.products(anchors, fixed[1]))
  return jnp.concatenate([jax.lax.top_k(far, n_neg)[0][:, ::-1], jnp.sort(near, 1)], 1)


def group_ordering_loss(
  similarities: jax.Array,
  n_neg: int,
  sorter: Callable[[jax.Array], tuple[jax.Array, jax.Array]] = differentiable_sort,
) -> jax.Array:
  """GroCo: all negatives should rank below all positives: [b n_neg+p] -> [b].

  Formula: mean over inputs of -log(probability that an input ranks in its own group), from the
    soft permutation of the sorter.
  Source: GroCo, Shvetsova et al. 2023, 2301.02009.
  Tested: NumPy; golden value.
  similarities as of group_similarities, negatives first. The rows of the permutation sum to 1, so
  the two binary cross-entropies of the original are this one value twice. Steeper:
  sorter=functools.partial(differentiable_sort, steepness=10.0). The logarithm ends at the smallest
  normal number (87 in float32; 100 in torch).

  >>> losses.group_ordering_loss(jnp.array([[-1.0, 0.0, 1.0]]), n_neg=2).shape
  (1,)
  """
  (similarities,) = arguments.read(similarities=(similarities, "b n"))
  n = similarities.shape[1]
  if not 1 <= n_neg < n:
    raise ValueError(f"n_neg must be from 1 to {n - 1}, the columns but one, not {n_neg!r}")
  places = sorter(similarities)[1]
  below = places[:, :n_neg, :n_neg].sum(-1)
  above = places[:, n_neg:, n_neg:].sum(-1)
  right = jnp.concatenate([below, above], 1)
  return -jnp.log(jnp.clip(right, jnp.finfo(right.dtype).tiny, 1.0)).mean(1)


def pairwise_equivariance(z1: jax.Array, z2: jax.Array, groups: int | jax.Array = 1) -> jax.Array:
  """CARE's term, equal angles in both views of a group: [b d], [b d] -> [b].

  Formula: 2 Σ_{j≠i, same group} (z1_i·z1_j - z2_i·z2_j)², cosines.
  Source: CARE, Gupta et al. 2023, 2306.13924.
  Tested: NumPy; golden value; 0 for a rotation.
  Examples of a group had the same augmentation, another one in each view. groups is their number,
  equal runs of the batch, or the group's number of each example [b]. Added to InfoNCE with a weight
  of 0.001 to 0.03. It is a sum over partners: larger groups, larger values.

  >>> losses.pairwise_equivariance(jnp.eye(4), jnp.ones((4, 4)), groups=2).tolist()
  [2.0, 2.0, 2.0, 2.0]
  """
  z1, z2 = arguments.read(z1=(z1, "b d"), z2=(z2, "b d"))
  b = z1.shape[0]
  if isinstance(groups, int):
    if groups < 1 or b % groups:
      raise ValueError(f"groups must divide the batch of {b}, not {groups!r}")
    runs, same = (groups, b // groups), jnp.ones((b // groups,) * 2, bool)
  else:
    _, ids = arguments.read(z1=(z1, "b d"), groups=(groups, "b:int"))
    runs, same = (1, b), ids[:, None] == ids[None]
  z1, z2 = (numerics.normalise(z).reshape(*runs, -1) for z in (z1, z2))
  gap = _cells(z1, z1) - _cells(z2, z2)
  pairs = same & ~jnp.eye(runs[1], dtype=bool)
  return 2 * jnp.where(pairs, jnp.square(gap), 0.0).sum(-1).reshape(b)


def relation_bce_focal(
  logits: jax.Array, targets: jax.Array, gamma: float = 2.0, alpha: float = 0.5
) -> jax.Array:
  """Focal binary cross-entropy of pairs: logits [p], targets [p] -> [p].

  Formula: a·(1-p_t)^gamma·BCE(sigmoid(logits), targets), a = alpha for target 1, 1-alpha for 0,
    p_t the probability of the target.
  Source: relational reasoning, Patacchiola and Storkey 2020, 2006.05849; focal loss, Lin et al.
    2017, 1708.02002.
  Tested: NumPy; torchvision sigmoid_focal_loss; gamma 0 and alpha 0.5 give half of BCE.
  targets (bool, 0/1 or between): 1 for two views of one image. The original takes as many negatives
  as positives, by rolling the batch of the second view; a roll by 0 would make positives of them.

  >>> losses.relation_bce_focal(jnp.zeros(2), jnp.array([True, False])).shape
  (2,)
  """
  letters = f"p:{pairs.kind(targets)}"
  logits, targets = arguments.read(logits=(logits, "p"), targets=(targets, letters))
  if gamma < 0:
    raise ValueError(f"gamma must not be negative, not {gamma!r}")
  return optax.losses.sigmoid_focal_loss(
    logits, targets.astype(logits.dtype), alpha=alpha, gamma=gamma
  )


def triplet(
  a: jax.Array,
  p: jax.Array,
  n: jax.Array,
  margin: float,
  soft: bool = False,
  distance: str = "euclidean",
) -> jax.Array:
  """Anchors nearer to positives than to negatives: [p d] ×3 -> [p].

  Formula: max(0, d(a,p) - d(a,n) + margin); soft: (exp d(a,p) / (exp d(a,p) + exp d(a,n)))².
  Source: FaceNet, Schroff et al. 2015, 1503.03832; soft: Hoffer and Ailon 2015, 1412.6622.
  Tested: NumPy; golden value; optax triplet_margin_loss; torch triplet_margin_loss and
    triplet_margin_with_distance_loss.
  distance: "euclidean", "squared", or "cosine" (1 - cosine, the only one that normalises). The
  distance of equal rows is 0 with gradient 0; optax adds 1e-6 under the root and torch 1e-6 to the
  differences. soft has no margin. Which triplets to take is the caller's job.

  >>> losses.triplet(jnp.eye(2), jnp.eye(2), jnp.zeros((2, 2)), margin=1.5).tolist()
  [0.5, 0.5]
  """
  a, p, n = arguments.read(a=(a, "p d"), p=(p, "p d"), n=(n, "p d"))
  measures = {
    "euclidean": lambda x, y: numerics.square_root(jnp.square(x - y).sum(-1)),
    "squared": lambda x, y: jnp.square(x - y).sum(-1),
    "cosine": lambda x, y: 1 - numerics.cosine(x, y),
  }
  if distance not in measures:
    raise ValueError(f"distance must be one of {', '.join(measures)}, not {distance!r}")
  gap = measures[distance](a, p) - measures[distance](a, n)
  return jnp.square(jax.nn.sigmoid(gap)) if soft else jax.nn.relu(gap + margin)


def weighted_triplet(
  a: jax.Array, p: jax.Array, n: jax.Array, margin: float = 0.2, gamma: float = 1.0
) -> jax.Array:
  """Triplets of squared distances, the positive's weighted: [p d] ×3 -> [p].

  Formula: max(0, margin + gamma·|a-p|² - |a-n|²).
  Source: JULE, Yang et al. 2016, 1604.03628.
  Tested: NumPy; gamma 1 equals triplet of squared distances.
  JULE normalises its features first and takes 20 negatives a pair; this takes rows as they are.

  >>> losses.weighted_triplet(jnp.eye(2), jnp.eye(2), jnp.zeros((2, 2)), margin=1.5).tolist()
  [0.5, 0.5]
  """
  a, p, n = arguments.read(a=(a, "p d"), p=(p, "p d"), n=(n, "p d"))
  near, far = jnp.square(a - p).sum(-1), jnp.square(a - n).sum(-1)
  return jax.nn.relu(margin + gamma * near - far)
