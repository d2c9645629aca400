"""Losses of cells, pairs and groups, against loops over cells."""

import math
from functools import partial

import numpy as np

from loss_cases.case import Case
from ssljax import losses


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def lse(x):
  x = np.asarray(x)
  return x.max() + np.log(np.exp(x - x.max()).sum())


def grid_match(a, b):
  out = np.zeros(a.shape[:2], int)
  for i, u in np.ndindex(*a.shape[:2]):
    out[i, u] = max(range(b.shape[1]), key=lambda v: unit(a[i, u]) @ unit(b[i, v]))
  return out


def maps(rng, b, n=5, d=4, e=6, m=7):
  return {
    "q_map": rng.normal(size=(b, n, d)),
    "k_map": rng.normal(size=(b, n, d)),
    "q_feat": rng.normal(size=(b, n, e)),
    "k_feat": rng.normal(size=(b, n, e)),
    "queue": rng.normal(size=(m, d)),
  }


def dense(q_map, k_map, q_feat, k_feat, queue, tau, weights=None):
  match = grid_match(q_feat, k_feat)
  b, n, _ = q_map.shape
  weights = np.ones((b, n)) if weights is None else weights
  loss = np.zeros((b, n))
  for i, u in np.ndindex(b, n):
    q = unit(q_map[i, u])
    logits = np.array([q @ unit(k_map[i, match[i, u]]), *(unit(queue) @ q)]) / tau
    loss[i, u] = lse(logits) - logits[0]
  total = weights.sum(1)
  return (loss * weights).sum(1) / np.where(total == 0, 1, total)


def some_cells(rng, b, n=5):
  weights = rng.random((b, n))
  weights[1], weights[2, 1:] = 0.0, 0.0
  return weights


def patches(predictions, targets, tau, mask=None, standardise=False):
  out = np.zeros(len(targets))
  for i in range(len(targets)):
    chosen = np.arange(targets.shape[1]) if mask is None else np.flatnonzero(mask[i])
    if not len(chosen):
      continue
    p, t = predictions[i, chosen], unit(targets[i, chosen])
    if standardise:
      deviation = p.std(0, ddof=1) if len(p) > 1 else 0.0
      p = (p - p.mean(0)) / (deviation + 1e-4)
    if len(chosen) > 1:
      logits = unit(p) @ t.T / tau
      out[i] = np.mean([lse(row) - row[j] for j, row in enumerate(logits)])
  return out


def two_maps(rng, b, n=5, d=4):
  return {"predictions": rng.normal(size=(b, n, d)), "targets": rng.normal(size=(b, n, d))}


def pixel_consistency(q, k, mask):
  out = np.zeros(len(q))
  for i, u, v in np.ndindex(*mask.shape):
    if mask[i].any():
      out[i] -= mask[i, u, v] * (unit(q[i, u]) @ unit(k[i, v])) / mask[i].sum()
  return out


def pairs_of_cells(rng, b):
  mask = rng.random((b, 5, 6)) < 0.3
  mask[1] = False
  return {"q": rng.normal(size=(b, 5, 4)), "k": rng.normal(size=(b, 6, 4)), "mask": mask}


def soft_sort(values, steepness):
  """One row at a time, the network as a list of swaps; each swap is a matrix."""
  n = values.shape[-1]
  ordered, places = np.zeros_like(values), np.zeros((*values.shape, n))
  for row in range(len(values)):
    x, total = values[row].copy(), np.eye(n)
    for layer in range(n):
      swap = np.eye(n)
      for a in range(layer % 2, n - 1, 2):
        c = 0.5 + math.atan(steepness * (x[a + 1] - x[a])) / math.pi
        swap[a : a + 2, a : a + 2] = [[c, 1 - c], [1 - c, c]]
      x, total = swap @ x, total @ swap
    ordered[row], places[row] = x, total
  return ordered, places


def group_similarities(anchors, positives, negatives, n_neg):
  out = []
  for i, anchor in enumerate(unit(anchors)):
    far = sorted(anchor @ unit(negatives[j]) for j in range(len(anchors)) if j != i)
    out.append(far[len(far) - n_neg :] + sorted(unit(positives[i]) @ anchor))
  return np.array(out)


def group_ordering(similarities, n_neg, steepness=1.0):
  """Both binary cross-entropies, over all inputs, as published."""
  _, places = soft_sort(similarities, steepness)
  is_positive = np.arange(similarities.shape[1]) >= n_neg
  loss = 0.0
  for ranks, target in ((is_positive, is_positive), (~is_positive, ~is_positive)):
    mass = places[:, :, ranks].sum(-1)
    loss -= np.where(target, np.log(mass), np.log(1 - mass)).mean(1) / 2
  return loss


def equivariance(z1, z2, groups):
  z1, z2 = unit(z1), unit(z2)
  out = np.zeros(len(z1))
  for i, j in np.ndindex(len(z1), len(z1)):
    if i != j and groups[i] == groups[j]:
      out[i] += 2 * (z1[i] @ z1[j] - z2[i] @ z2[j]) ** 2
  return out


def relation(logits, targets, gamma, alpha):
  p = 1 / (1 + np.exp(-logits))
  p_t = targets * p + (1 - targets) * (1 - p)
  bce = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
  return (targets * alpha + (1 - targets) * (1 - alpha)) * (1 - p_t) ** gamma * bce


def triplets(rng, p, d=4):
  return {k: rng.normal(size=(p, d)) for k in "apn"}


def triplet(a, p, n, margin, soft=False, distance="euclidean"):
  measure = {
    "euclidean": lambda x, y: np.linalg.norm(x - y, axis=1),
    "squared": lambda x, y: ((x - y) ** 2).sum(1),
    "cosine": lambda x, y: 1 - (unit(x) * unit(y)).sum(1),
  }[distance]
  near, far = measure(a, p), measure(a, n)
  if soft:
    return (np.exp(near) / (np.exp(near) + np.exp(far))) ** 2
  return np.maximum(near - far + margin, 0)


CASES = [
  Case(
    "grid_match",
    lambda rng, b: {"a": rng.normal(size=(b, 5, 4)), "b": rng.normal(size=(b, 7, 4))},
    losses.grid_match,
    grid_match,
    gradient=False,
  ),
  Case(
    "dense_info_nce",
    maps,
    lambda **a: losses.dense_info_nce(**a, temperature=0.2),
    lambda **a: dense(**a, tau=0.2),
    whole=("queue",),
    fixed=("k_map", "q_feat", "k_feat", "queue"),
  ),
  Case(
    "dense_info_nce/weights",
    lambda rng, b: maps(rng, b) | {"weights": some_cells(rng, b) > 0.4},
    lambda **a: losses.dense_info_nce(**a, temperature=0.3),
    lambda **a: dense(**a, tau=0.3),
    whole=("queue",),
    fixed=("k_map", "q_feat", "k_feat", "queue"),
  ),
  Case(
    "patch_info_nce",
    two_maps,
    lambda predictions, targets: losses.patch_info_nce(predictions, targets, 0.2),
    lambda predictions, targets: patches(predictions, targets, 0.2),
    fixed=("targets",),
  ),
  Case(
    "patch_info_nce/mask, standardised",
    lambda rng, b: two_maps(rng, b) | {"mask": some_cells(rng, b) > 0.4},
    lambda predictions, targets, mask: losses.patch_info_nce(
      predictions, targets, 0.2, mask, standardise=True
    ),
    lambda predictions, targets, mask: patches(predictions, targets, 0.2, mask, True),
    fixed=("targets",),
  ),
  Case(
    "pixel_consistency",
    pairs_of_cells,
    losses.pixel_consistency,
    pixel_consistency,
    fixed=("k",),
  ),
  Case(
    "pixel_consistency/weights",
    lambda rng, b: pairs_of_cells(rng, b) | {"mask": rng.random((b, 5, 6))},
    losses.pixel_consistency,
    pixel_consistency,
    fixed=("k",),
  ),
  Case(
    "differentiable_sort",
    lambda rng, b: {"values": rng.normal(size=(b, 6))},
    lambda values: losses.differentiable_sort(values, 3.0),
    lambda values: soft_sort(values, 3.0),
  ),
  Case(
    "differentiable_sort/odd",
    lambda rng, b: {"values": rng.normal(size=(b, 5))},
    losses.differentiable_sort,
    lambda values: soft_sort(values, 1.0),
  ),
  Case(
    "group_similarities",
    lambda rng, b: {
      "anchors": rng.normal(size=(b, 4)),
      "positives": rng.normal(size=(b, 3, 4)),
      "negatives": rng.normal(size=(b, 4)),
    },
    lambda anchors, positives, negatives: losses.group_similarities(
      anchors, positives, negatives, 4
    ),
    lambda anchors, positives, negatives: group_similarities(anchors, positives, negatives, 4),
    fixed=("positives", "negatives"),
  ),
  Case(
    "group_ordering_loss",
    lambda rng, b: {"similarities": rng.uniform(-1, 1, (b, 7))},
    lambda similarities: losses.group_ordering_loss(similarities, 5),
    lambda similarities: group_ordering(similarities, 5),
  ),
  Case(
    "group_ordering_loss/steep",
    lambda rng, b: {"similarities": rng.uniform(-1, 1, (b, 4))},
    lambda similarities: losses.group_ordering_loss(
      similarities, 3, partial(losses.differentiable_sort, steepness=10.0)
    ),
    lambda similarities: group_ordering(similarities, 3, 10.0),
  ),
  Case(
    "pairwise_equivariance",
    lambda rng, b: {"z1": rng.normal(size=(b, 4)), "z2": rng.normal(size=(b, 4))},
    # Runs of the batch: no permutation.
    lambda z1, z2: losses.pairwise_equivariance(z1, z2, groups=2),
    lambda z1, z2: equivariance(z1, z2, np.arange(len(z1)) // (len(z1) // 2)),
    rows=False,
  ),
  Case(
    "pairwise_equivariance/ids",
    lambda rng, b: {
      "z1": rng.normal(size=(b, 4)),
      "z2": rng.normal(size=(b, 4)),
      "groups": rng.integers(0, 3, b),
    },
    losses.pairwise_equivariance,
    equivariance,
  ),
  Case(
    "relation_bce_focal",
    lambda rng, b: {"logits": rng.normal(0, 3, b), "targets": np.arange(b) % 2},
    lambda logits, targets: losses.relation_bce_focal(logits, targets),
    lambda logits, targets: relation(logits, targets, 2.0, 0.5),
  ),
  Case(
    "relation_bce_focal/soft targets",
    lambda rng, b: {"logits": rng.normal(0, 3, b), "targets": rng.random(b)},
    lambda logits, targets: losses.relation_bce_focal(logits, targets, 0.7, 0.25),
    lambda logits, targets: relation(logits, targets, 0.7, 0.25),
  ),
  Case(
    "triplet", triplets, lambda **a: losses.triplet(**a, margin=0.5), partial(triplet, margin=0.5)
  ),
  Case(
    "triplet/squared, soft",
    triplets,
    lambda **a: losses.triplet(**a, margin=0.5, soft=True, distance="squared"),
    partial(triplet, margin=0.5, soft=True, distance="squared"),
  ),
  Case(
    "triplet/cosine",
    triplets,
    lambda **a: losses.triplet(**a, margin=0.2, distance="cosine"),
    partial(triplet, margin=0.2, distance="cosine"),
  ),
  Case(
    "weighted_triplet",
    triplets,
    lambda **a: losses.weighted_triplet(**a, margin=0.3, gamma=0.7),
    lambda a, p, n: np.maximum(0.3 + 0.7 * ((a - p) ** 2).sum(1) - ((a - n) ** 2).sum(1), 0),
  ),
]
