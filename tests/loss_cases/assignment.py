"""Sinkhorn's forms by products, as published, in float64; cross-entropies on assignments."""

import numpy as np

from loss_cases.case import Case
from ssljax import losses


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def cross_entropy(targets, logits):
  return -(targets * np.log(softmax(logits))).sum(-1)


def sinkhorn(scores, eps, n_iters=3, marginal=None, weights=None):
  q = np.exp(scores / eps).reshape(-1, scores.shape[-1])
  b, k = q.shape
  marginal = np.ones(k) if marginal is None else marginal
  weights = np.ones(b) if weights is None else weights.reshape(-1)
  for _ in range(n_iters):
    q = q / (weights @ q) * marginal / marginal.sum()
    q = q / q.sum(1, keepdims=True)
  return (q / q.sum(1, keepdims=True)).reshape(scores.shape)


def multi_sinkhorn(scores, eps, properties, floor, n_iters=3):
  b, k = scores.shape
  scale = np.where(np.arange(k) < k - properties, 0.25, 1.0)
  a = np.exp(scale[:, None, None] * scores / eps)
  a = a / a.sum()
  for _ in range(n_iters):
    a = a * (b / k) / (a.sum(1, keepdims=True) + floor)
    a = a / (a.sum(0, keepdims=True) + floor)
    a = a / (a.sum(2, keepdims=True) + floor)
  a = a / a.sum(2, keepdims=True)
  total = a[-properties:].sum(0)
  low, high = total.min(1, keepdims=True), total.max(1, keepdims=True)
  return (total - low) / (high - low)


def partial_plan(logits, mass, gamma, eps, rounds):
  b, k = logits.shape
  kernel = np.concatenate([softmax(logits) ** (1 / eps), np.ones((b, 1))], 1)
  share = np.append(np.full(k, mass / k), 1 - mass)
  right = np.full(k + 1, 1 / (k + 1))
  for _ in range(rounds):
    left = 1 / b / (kernel @ right)
    right = share / (kernel.T @ left)
    right[:-1] **= gamma / (gamma + eps)
  return (b * left[:, None] * kernel * right)[:, :-1]


def swapped(logits, codes, where, temperature):
  total = 0.0
  for i, code in zip(where, codes):
    others = [x for j, x in enumerate(logits) if j != i]
    total = total + sum(cross_entropy(code, x / temperature) for x in others) / len(others)
  return total / len(codes)


def normalised(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cosines(rng, *shape):
  return rng.uniform(-1, 1, shape)


def three_views(rng, b, k=7):
  scores = {f"s{i}": cosines(rng, b, k) for i in range(3)}
  return scores | {f"q{i}": softmax(5 * cosines(rng, b, k)) for i in range(2)}


def share(k):
  return np.arange(1.0, k + 1)


CASES = [
  Case(
    "sinkhorn_knopp",
    lambda rng, b: {"scores": cosines(rng, b, 5)},
    lambda scores: losses.sinkhorn_knopp(scores, 0.1),
    lambda scores: sinkhorn(scores, 0.1),
    gradient=False,
  ),
  Case(
    "sinkhorn_knopp/views marginal weights",
    lambda rng, b: {
      "scores": cosines(rng, b, 3, 5), "marginal": share(5),
      "weights": rng.uniform(0, 1, (b, 3)) * (rng.uniform(0, 1, (b, 3)) > 0.3),
    },
    lambda scores, marginal, weights: losses.sinkhorn_knopp(scores, 0.2, 4, marginal, weights),
    lambda scores, marginal, weights: sinkhorn(scores, 0.2, 4, marginal, weights),
    whole=("marginal",),
    gradient=False,
  ),
  Case(
    "positionwise_sinkhorn",
    lambda rng, b: {"scores": cosines(rng, b, 4, 5)},
    lambda scores: losses.positionwise_sinkhorn(scores, 0.1),
    lambda scores: np.stack([sinkhorn(scores[:, i], 0.1) for i in range(4)], 1),
    gradient=False,
  ),
  Case(
    "positionwise_sinkhorn/marginal weights",
    lambda rng, b: {
      "scores": cosines(rng, b, 4, 5), "marginal": share(5),
      "weights": rng.uniform(0, 1, (b, 4)) > 0.3,
    },
    lambda scores, **others: losses.positionwise_sinkhorn(scores, 0.1, **others),
    lambda scores, marginal, weights: np.stack(
      [sinkhorn(scores[:, i], 0.1, 3, marginal, weights[:, i] * 1.0) for i in range(4)], 1
    ),
    whole=("marginal",),
    gradient=False,
  ),
  Case(
    "multi_sinkhorn",
    lambda rng, b: {"scores": cosines(rng, b, 6)},
    lambda scores: losses.multi_sinkhorn(scores, 0.1, properties=2),
    lambda scores: multi_sinkhorn(scores, 0.1, 2, 1e-5),
    gradient=False,
  ),
  Case(
    "multi_sinkhorn/no floor",
    lambda rng, b: {"scores": cosines(rng, b, 6)},
    lambda scores: losses.multi_sinkhorn(scores, 0.5, properties=3, floor=0.0),
    lambda scores: multi_sinkhorn(scores, 0.5, 3, 0.0),
    gradient=False,
  ),
  Case(
    "partial_ot_plan",
    lambda rng, b: {"logits": 4 * cosines(rng, b, 5)},
    lambda logits: losses.partial_ot_plan(logits, 0.6, tolerance=0.0, max_iters=60),
    lambda logits: partial_plan(logits, 0.6, 1.0, 0.1, 60),
    gradient=False,
    rtol=1e-4,  # scores of -80: float32 holds their exponential to 1e-5
  ),
  Case(
    "partial_ot_plan/traced mass",
    lambda rng, b: {"logits": cosines(rng, b, 5), "mass": np.float64(0.3)},
    lambda logits, mass: losses.partial_ot_plan(logits, mass, 0.5, 0.2, 0.0, 100),
    lambda logits, mass: partial_plan(logits, mass, 0.5, 0.2, 100),
    whole=("mass",),
    gradient=False,
    rtol=1e-4,
  ),
  Case(
    "soft_ce",
    lambda rng, b: {"logits": cosines(rng, b, 4, 5), "targets": softmax(cosines(rng, b, 4, 5))},
    lambda logits, targets: losses.soft_ce(logits, targets, 0.3),
    lambda logits, targets: cross_entropy(targets, logits / 0.3).mean(1),
    fixed=("targets",),
  ),
  Case(
    "soft_ce/weights",
    lambda rng, b: {
      "logits": cosines(rng, b, 5), "targets": softmax(cosines(rng, b, 5)),
      "weights": np.arange(b) % 2 > 0, "temperature": np.float64(0.5),
    },
    losses.soft_ce,
    lambda logits, targets, weights, temperature: (
      cross_entropy(targets, logits / temperature) * weights
    ),
    fixed=("targets",),
    whole=("temperature",),
  ),
  Case(
    "swapped_ce",
    lambda rng, b: three_views(rng, b),
    lambda s0, s1, s2, q0, q1: losses.swapped_ce([s0, s1, s2], [q0, q1]),
    lambda s0, s1, s2, q0, q1: swapped([s0, s1, s2], [q0, q1], (0, 1), 0.1),
    fixed=("q0", "q1"),
  ),
  Case(
    "swapped_ce/other views",
    lambda rng, b: three_views(rng, b),
    lambda s0, s1, s2, q0, q1: losses.swapped_ce([s0, s1, s2], [q0, q1], 0.5, (2, 0)),
    lambda s0, s1, s2, q0, q1: swapped([s0, s1, s2], [q0, q1], (2, 0), 0.5),
    fixed=("q0", "q1"),
  ),
]  # fmt: skip
