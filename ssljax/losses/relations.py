"""Losses of pairs and groups: order, equivariance, relations, triplets."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics, pairs

__all__ = (
  "differentiable_sort",
  "group_ordering_loss",
  "group_similarities",
  "pairwise_equivariance",
  "relation_bce_focal",
  "triplet",
  "weighted_triplet",
)


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
  near = jnp.einsum("bd,bpd->bp", anchors, fixed[0], precision=numerics.EXACT)
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
  products = (jnp.einsum("bnd,bmd->bnm", z, z, precision=numerics.EXACT) for z in (z1, z2))
  gap = next(products) - next(products)
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
