"""Losses of cells of maps: matched by features, by place, or given."""

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics, pairs
from ssljax.losses.redundancy import Parts, vicreg_parts, weigh

__all__ = (
  "dense_info_nce",
  "grid_match",
  "patch_info_nce",
  "pixel_consistency",
  "vicregl",
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
  return jnp.einsum("bnd,bmd->bnm", a, b, precision=numerics.EXACT)


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
  others = jnp.einsum("bnd,md->bnm", q, queue, precision=numerics.EXACT)
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


def vicregl(
  g1: jax.Array,
  g2: jax.Array,
  m1: jax.Array,
  m2: jax.Array,
  pos1: jax.Array,
  pos2: jax.Array,
  alpha: float = 0.75,
  matches: tuple[int, int] = (20, 20),
  similarity_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 1.0,
  eps: float = 1e-4,
  feature_matches: tuple[int, int] | None = None,
) -> tuple[jax.Array, Parts]:
  """VICReg of views and matched cells: [b d] ×2, [b n c], [b m c], [b n 2], [b m 2] -> [], parts.

  Formula: alpha · global + (1 - alpha) · (features + locations) / 2, each a VICReg with both of its
    scales 0.5; cells are matched to the nearest in features, and to the nearest in the image.
  Source: VICRegL, Bardes et al. 2022, 2210.01571.
  Tested: NumPy; lightly VICRegLLoss.

  `pos` are the cells' centres in coordinates of the whole image (mind flips). Of map 1 the
  matches[0] nearest pairs are kept, of map 2 the matches[1] (the paper: 20 for a large view, 4 for
  a small one; all where there are fewer cells); both directions are averaged. feature_matches: the
  same for pairs in features, where it is another number; the authors' code keeps all. Variance and
  covariance are over the batch, rank by rank of the kept cells in the order of the map, as in the
  authors' code; lightly orders them by distance. This averages features and locations, the
  authors' code and lightly add them: make their sum of the parts `global`, `features` and
  `locations`, which are not weighted by alpha.

  >>> g, m, pos = jnp.eye(4), jnp.ones((4, 9, 3)), jnp.ones((4, 9, 2))
  >>> sorted(losses.vicregl(g, g, m, m, pos, pos)[1])
  ['features', 'global', 'locations']
  """
  g1, g2, m1, m2, pos1, pos2 = arguments.read(
    g1=(g1, "b d"),
    g2=(g2, "b d"),
    m1=(m1, "b n c"),
    m2=(m2, "b m c"),
    pos1=(pos1, "b n 2"),
    pos2=(pos2, "b m 2"),
  )
  arguments.at_least(2, g1=g1)
  in_features = matches if feature_matches is None else feature_matches
  for name, kept in (("matches", matches), ("feature_matches", in_features)):
    arguments.positive(**{f"{name}[{i}]": count for i, count in enumerate(kept)})

  def term(a: jax.Array, b: jax.Array) -> jax.Array:
    parts = vicreg_parts(a, b, 0.5, 0.5, eps)
    return weigh(parts, similarity_weight, variance_weight, covariance_weight)

  def both_ways(a: jax.Array, b: jax.Array, kept: tuple[int, int]) -> jax.Array:
    """Cells of both maps with their partners; a and b are what decides who is near whom."""
    one = term(*_nearest(a, b, m1, m2, kept[0]))
    return (one + term(*_nearest(b, a, m2, m1, kept[1]))) / 2

  parts = {
    "global": term(g1, g2),
    "features": both_ways(m1, m2, in_features),
    "locations": both_ways(pos1, pos2, matches),
  }
  local = (parts["features"] + parts["locations"]) / 2
  return alpha * parts["global"] + (1 - alpha) * local, parts


def _nearest(
  a: jax.Array, b: jax.Array, cells_a: jax.Array, cells_b: jax.Array, kept: int
) -> tuple[jax.Array, jax.Array]:
  """The `kept` cells of a that are nearest to one of b, in the order of the map, and those of b."""
  a, b = jax.lax.stop_gradient((a, b))
  # Exact products: bfloat16's eight bits tell no neighbours among places between 0 and 1.
  square = jnp.square(a).sum(-1)[:, :, None] + jnp.square(b).sum(-1)[:, None, :] - 2 * _cells(a, b)
  partner = square.argmin(-1)
  # top_k takes the earlier of two equal cells.
  _, chosen = jax.lax.top_k(-square.min(-1), min(kept, a.shape[1]))
  chosen = jnp.sort(chosen, -1)
  partner = jnp.take_along_axis(partner, chosen, 1)
  return (
    jnp.take_along_axis(cells_a, chosen[:, :, None], 1),
    jnp.take_along_axis(cells_b, partner[:, :, None], 1),
  )
