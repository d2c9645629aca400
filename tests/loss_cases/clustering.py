"""Deep clustering: cases with independent NumPy statements, mostly loops over the examples."""

import itertools

import numpy as np

from loss_cases.case import Case
from ssljax import losses

K, D = 4, 5


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def probabilities(rng, *shape):
  return softmax(rng.normal(0, 2, shape))


# Labels.


def cluster_ce(logits, ids, weights=None):
  out = np.zeros(len(ids))
  w = np.ones(len(ids)) if weights is None else weights.astype(float)
  w = np.where(ids < 0, 0.0, w)
  for i in range(len(ids)):
    if ids[i] >= 0:
      out[i] = -w[i] * np.log(softmax(logits[i])[ids[i]])
  return out * len(ids) / w.sum() if w.sum() else out


def some_ids(rng, b):
  ids = rng.integers(0, K, b)
  ids[1] = -100
  return ids


def instance_ce(logits, idx):
  n = logits.shape[1]
  target = np.full_like(logits, 0.8 / n)
  target[np.arange(len(idx)), idx] += 0.2
  return -(target * np.log(softmax(logits))).sum(-1)


def neighbour_consistency(p_anchor, p_neighbours, weights=None):
  out = []
  for i, p in enumerate(p_anchor):
    terms = [-np.log(p @ q) for q in p_neighbours[i]]
    w = np.ones(len(terms)) if weights is None else weights[i].astype(float)
    out.append((w * terms).sum() / w.sum() if w.sum() else 0.0)
  return np.array(out)


def neighbour_weights(rng, b):
  weights = rng.random((b, 3)) < 0.6
  weights[2] = False
  return weights


def scan(p_anchor, p_neighbour, weights=None):
  w = np.ones(len(p_anchor)) if weights is None else weights
  w = w / w.sum()
  consistency = -(w * np.log((p_anchor * p_neighbour).sum(-1))).sum()
  mean = (w[:, None] * p_anchor).sum(0)
  entropy = -(mean * np.log(mean)).sum()
  return consistency - 5 * entropy, (consistency, entropy)


def confident(p):
  mask, labels = p.max(-1) > 0.5, p.argmax(-1)
  weights = np.zeros(len(p))
  for i in np.flatnonzero(mask):
    weights[i] = mask.sum() / (mask & (labels == labels[i])).sum()
  return mask, labels.astype(np.int32), weights


def sela(log_p):
  """The original's iteration on p^λ itself, in float64."""
  n, k = log_p.shape
  p = np.exp(log_p) ** 2
  c, error, i = np.full(n, 1 / n), np.inf, 0
  while error > 1e-3:
    r = 1 / k / (p.T @ c)
    new = 1 / n / (p @ r)
    if i % 10 == 0:
      error = np.abs(c / new - 1).sum()
    c, i = new, i + 1
  plan = c[:, None] * p * r
  return plan.argmax(1).astype(np.int32), plan


def calibration(cal_logits, cluster_probs, mini_ids):
  loss = 0.0
  for i, logits in enumerate(cal_logits):
    target = cluster_probs[mini_ids == mini_ids[i]].mean(0)
    loss -= (target * np.log(softmax(logits))).sum() / len(cal_logits)
  mean = softmax(cal_logits).mean(0)
  return loss + 0.7 * (mean * np.log(mean)).sum()


def select(p):
  chosen = np.zeros(len(p), bool)
  for c in range(p.shape[1]):
    order = np.argsort(-p[:, c], kind="stable")[:3]
    chosen[order[: int(p[order].max(-1).mean() * 3)]] = True
  return chosen, p.argmax(-1).astype(np.int32)


# Memberships.


def mlcd(scores, pos_mask, neg_mask):
  negative = [np.log1p(np.exp(s[m]).sum()) for s, m in zip(scores, neg_mask)]
  positive = [np.log1p(np.exp(-s[m]).sum()) for s, m in zip(scores, pos_mask)]
  return np.array(negative) + np.array(positive)


def some_masks(rng, b):
  scores = rng.normal(0, 3, (b, 6))
  positive = scores >= np.sort(scores, axis=1)[:, -2:-1]
  negative = ~positive & (rng.random((b, 6)) < 0.7)
  positive[0] = negative[0] = False
  return {"scores": scores, "pos_mask": positive, "neg_mask": negative}


def divclust(assignments):
  columns = assignments / np.linalg.norm(assignments, axis=0)
  total = 0.0
  for one, two in itertools.permutations(range(assignments.shape[1]), 2):
    total += max(0.0, (columns[:, one].T @ columns[:, two]).max(1).mean() - 0.3)
  return total


def volmax(memberships, link, pairs, same):
  p = np.array([memberships[i] @ link @ memberships[j] for i, j in pairs])
  bce = -np.where(same, np.log(p), np.log(1 - p)).mean()
  gram = memberships.T @ memberships + 1e-5 * np.eye(K)
  return bce - 0.01 * np.log(np.linalg.det(gram)), (bce, np.log(np.linalg.det(gram)))


def rates(eps):
  def numpy(z, membership):
    b, d = z.shape
    rate = 0.5 * np.log(np.linalg.det(np.eye(d) + d / (b * eps) * z.T @ z))
    parts = 0.0
    for pi in membership.T:
      t = pi.sum() + 1e-8
      inside = z.T @ np.diag(pi) @ z
      parts += t / (2 * b) * np.log(np.linalg.det(np.eye(d) + d / (t * eps) * inside))
    return rate, parts

  return numpy


def points(rng, b):
  return {"z": unit(rng.normal(size=(b, D))), "membership": probabilities(rng, b, 3)}


CASES = [
  Case(
    "cluster_ce",
    lambda rng, b: {"logits": rng.normal(0, 2, (b, K)), "ids": some_ids(rng, b)},
    lambda logits, ids: losses.cluster_ce(logits, ids),
    cluster_ce,
  ),
  Case(
    "cluster_ce/weights",
    lambda rng, b: {
      "logits": rng.normal(0, 2, (b, K)),
      "ids": some_ids(rng, b),
      "weights": rng.integers(0, 3, b),
    },
    losses.cluster_ce,
    cluster_ce,
  ),
  Case(
    "instance_ce",
    lambda rng, b: {"logits": rng.normal(0, 2, (b, 11)), "idx": rng.permutation(11)[:1].repeat(b)},
    lambda logits, idx: losses.instance_ce(logits, idx, smoothing=0.8),
    instance_ce,
  ),
  Case(
    "neighbour_consistency",
    lambda rng, b: {
      "p_anchor": probabilities(rng, b, K),
      "p_neighbours": probabilities(rng, b, 3, K),
    },
    lambda **arrays: losses.neighbour_consistency(**arrays),
    neighbour_consistency,
  ),
  Case(
    "neighbour_consistency/weights",
    lambda rng, b: {
      "p_anchor": probabilities(rng, b, K),
      "p_neighbours": probabilities(rng, b, 3, K),
      "weights": neighbour_weights(rng, b),
    },
    losses.neighbour_consistency,
    neighbour_consistency,
  ),
  Case(
    "scan_loss",
    lambda rng, b: {"p_anchor": probabilities(rng, b, K), "p_neighbour": probabilities(rng, b, K)},
    lambda **arrays: losses.scan_loss(**arrays, entropy_weight=5.0),
    scan,
  ),
  Case(
    "scan_loss/weights",
    lambda rng, b: {
      "p_anchor": probabilities(rng, b, K),
      "p_neighbour": probabilities(rng, b, K),
      "weights": 1 + rng.integers(0, 2, b),
    },
    lambda **arrays: losses.scan_loss(**arrays, entropy_weight=5.0),
    scan,
  ),
  Case(
    "confident_self_label",
    lambda rng, b: {"p": probabilities(rng, b, K)},
    lambda p: losses.confident_self_label(p, threshold=0.5),
    confident,
    fixed=("p",),
    gradient=False,
  ),
  Case(
    "sinkhorn_full",
    lambda rng, b: {"log_p": np.log(softmax(rng.normal(size=(b, K))))},
    lambda log_p: losses.sinkhorn_full(log_p, 2.0, 1e-3),
    sela,
    fixed=("log_p",),
    gradient=False,
  ),
  Case(
    "cdc_calibration",
    lambda rng, b: {
      "cal_logits": rng.normal(size=(b, K)),
      "cluster_probs": probabilities(rng, b, K),
      "mini_ids": rng.integers(0, 3, b),
    },
    lambda **arrays: losses.cdc_calibration(**arrays, n_mini=3, entropy_weight=0.7),
    calibration,
    fixed=("cluster_probs",),
  ),
  Case(
    "select_by_class_confidence",
    lambda rng, b: {"p": probabilities(rng, b, K)},
    lambda p: losses.select_by_class_confidence(p, per_class=3),
    select,
    fixed=("p",),
    gradient=False,
    low=None,  # ties of rounded probabilities
  ),
  Case("multi_label_cluster_loss", some_masks, losses.multi_label_cluster_loss, mlcd),
  Case(
    "divclust",
    lambda rng, b: {"assignments": softmax(rng.normal(size=(b, 3, K)))},
    lambda assignments: losses.divclust(assignments, threshold=0.3),
    divclust,
  ),
  Case(
    "volmax_dcc",
    lambda rng, b: {
      "memberships": probabilities(rng, b, K),
      "link": 1 / (1 + np.exp(-rng.normal(size=(K, K)))),
      "pairs": rng.integers(0, b, (2 * b, 2)),
      "same": rng.random(2 * b) < 0.5,
    },
    lambda **arrays: losses.volmax_dcc(**arrays, weight=0.01),
    volmax,
    whole=("link",),
    rows=False,  # pairs are places in the batch
  ),
  Case(
    "rate_reduction",
    points,
    lambda **arrays: losses.rate_reduction(**arrays, eps=0.5),
    rates(0.5),
  ),
  Case(
    "rate_reduction/eps_squared",
    points,
    lambda **arrays: losses.rate_reduction(**arrays, eps=0.5, eps_squared=True),
    rates(0.25),
  ),
]
