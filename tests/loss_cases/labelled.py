"""Losses that know labels, against loops over anchors."""

import numpy as np

from loss_cases.case import Case
from ssljax import losses


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def lse(x):
  x = np.asarray(x)
  return x.max() + np.log(np.exp(x - x.max()).sum())


def views(rng, b, v=2, d=5, classes=3):
  """Every class has several examples, but the last: one alone, without positives of other rows."""
  labels = np.concatenate([np.arange(b - 1) % (classes - 1), [classes - 1]])
  return {"z": rng.normal(size=(b, v, d)), "labels": labels}


def rows(rng, b, d=5):
  arrays = views(rng, b, 1, d)
  return arrays | {"z": arrays["z"][:, 0]}


def supervised(z, positive, tau, base=None, form="out", candidate=lambda i, j: True, counted=None):
  """Anchors (i, v); `positive` and `candidate` are questions about two examples."""
  z = unit(z if z.ndim == 3 else z[:, None])
  b, v, _ = z.shape
  tau, losses_ = np.broadcast_to(tau, b), np.zeros((b, v))
  counted = np.ones(b) if counted is None else counted
  for i, u in np.ndindex(b, v):
    near, everyone = [], []
    for j, w in np.ndindex(b, v):
      if (i, u) == (j, w) or not candidate(i, j) or not counted[i] or not counted[j]:
        continue
      everyone.append(z[i, u] @ z[j, w] / tau[i])
      if positive(i, j):
        near.append(everyone[-1])
    if near:
      share = np.mean(near) if form == "out" else lse(near)
      losses_[i, u] = (lse(everyone) - share) * (1 if base is None else tau[i] / base)
  return losses_.mean(1)


def same(labels):
  return lambda i, j: labels[i] == labels[j]


def free(rng, b):
  """Any positives and candidates, an anchor without positives, a padded row."""
  positives, candidates = rng.random((b, b)) < 0.4, rng.random((b, b)) < 0.8
  positives[0] = False
  return {
    "z": rng.normal(size=(b, 2, 4)),
    "positives": positives,
    "candidates": candidates,
    "tau": rng.uniform(0.2, 0.6, b),
    "weights": np.arange(b) != 2,
  }


def queue(rng, b, m=7, d=5):
  """The last label of the batch is nowhere in the queue."""
  return {
    "q": rng.normal(size=(b, d)),
    "k": rng.normal(size=(b, d)),
    "queue": rng.normal(size=(m, d)),
    "queue_labels": np.arange(m) % 3,
    "labels": np.arange(b) % 4,
  }


def keys(rng, b):
  return {k: x for k, x in queue(rng, b).items() if k != "q"}


def maskcon_targets(k, queue, queue_labels, labels, tau, w):
  targets = np.zeros((len(k), 1 + len(queue)))
  for i, key in enumerate(unit(k)):
    exps = np.exp(unit(queue) @ key / tau) * (queue_labels == labels[i])
    share = exps / exps.sum() if exps.any() else exps
    soft = np.concatenate([[1.0], share / share.max() if exps.any() else share])
    targets[i] = w * soft / soft.sum()
    targets[i, 0] += 1 - w
  return targets


def maskcon(q, k, queue, queue_labels, labels, tau, target_tau, w):
  targets = maskcon_targets(k, queue, queue_labels, labels, target_tau, w)
  q, k, queue = unit(q), unit(k), unit(queue)
  out = []
  for i in range(len(q)):
    logits = np.concatenate([[q[i] @ k[i]], queue @ q[i]]) / tau
    out.append(-(targets[i] * (logits - lse(logits))).sum())
  return np.array(out)


def subclass_masks(classes, subclasses):
  b = len(classes)
  own, others = np.zeros((b, b), bool), np.zeros((b, b), bool)
  for i in range(b):
    for j in range(b):
      if classes[i] == classes[j]:
        own[i, j] = subclasses[i] == subclasses[j]
        others[i, j] = not own[i, j]
    others[i, i] = others[i].any()
  return own, others


def subclasses(rng, b):
  """Two classes, the second of one subclass."""
  arrays = {"z": rng.normal(size=(b, 2, 4)), "labels": np.arange(b) % 2}
  return arrays | {"subclasses": np.where(arrays["labels"] == 0, np.arange(b) // 2 % 2, 2)}


def sbcl(z, labels, subclasses, tau, gamma, base, class_tau=None):
  own, others = subclass_masks(labels, subclasses)
  first = supervised(z, lambda i, j: own[i, j], tau, base)
  class_tau = tau if class_tau is None else class_tau
  return first + gamma * supervised(
    z, lambda i, j: others[i, j], class_tau, candidate=lambda i, j: i == j or not own[i, j]
  )


def look(z, labels, tau, k, queue=None, queue_labels=None, counted=None):
  z = unit(z)
  pool, names = (z, labels) if queue is None else (unit(queue), queue_labels)
  out = np.zeros(len(z))
  for i in range(len(z)):
    if counted is not None and not counted[i]:
      continue
    left = [j for j in range(len(pool)) if queue is not None or j != i]
    if queue is None and counted is not None:
      left = [j for j in left if counted[j]]
    left = sorted(left, key=lambda j: -z[i] @ pool[j])[:k]
    near = [z[i] @ pool[j] / tau for j in left if names[j] == labels[i]]
    if near:
      out[i] = lse([z[i] @ pool[j] / tau for j in left]) - lse(near)
  return out


def look_queue(rng, b):
  return {name: x for name, x in queue(rng, b).items() if name != "k"}


def multi_label(z, queue, targets, tau):
  p = 1 / (1 + np.exp(-unit(z) @ unit(queue).T / tau))
  return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(1)


CASES = [
  Case(
    "supcon",
    views,
    lambda z, labels: losses.supcon(z, labels, 0.1),
    lambda z, labels: supervised(z, same(labels), 0.1),
  ),
  Case(
    "supcon/one view",
    rows,
    lambda z, labels: losses.supcon(z, labels, 0.5, base_temperature=0.07),
    lambda z, labels: supervised(z, same(labels), 0.5, 0.07),
  ),
  Case(
    "supcon/free pairs",
    free,
    lambda z, positives, candidates, tau, weights: losses.supcon(
      z, None, 1.0, 0.07, positives, tau, candidates, weights
    ),
    lambda z, positives, candidates, tau, weights: supervised(
      z,
      lambda i, j: positives[i, j],
      tau,
      0.07,
      candidate=lambda i, j: candidates[i, j],
      counted=weights,
    ),
    # The masks are [b b]: the table would permute one of their axes only.
    rows=False,
  ),
  Case(
    "supcon/no labels",
    lambda rng, b: {"z": rng.normal(size=(b, 3, 4))},
    lambda z: losses.supcon(z, None, 0.2),
    lambda z: supervised(z, lambda i, j: i == j, 0.2),
  ),
  Case(
    "supcon_in",
    views,
    lambda z, labels: losses.supcon_in(z, labels, 0.1),
    lambda z, labels: supervised(z, same(labels), 0.1, form="in"),
  ),
  Case(
    "supcon_in/weights",
    lambda rng, b: rows(rng, b) | {"weights": (np.arange(b) != 1) * 2.0},
    lambda z, labels, weights: losses.supcon_in(z, labels, 0.3, weights=weights),
    lambda z, labels, weights: supervised(z, same(labels), 0.3, form="in", counted=weights),
    fixed=("weights",),
  ),
  Case(
    "maskcon_targets",
    keys,
    lambda k, queue, queue_labels, labels: losses.maskcon_targets(
      k, queue, queue_labels, labels, 0.2, 0.7
    ),
    lambda k, queue, queue_labels, labels: maskcon_targets(
      k, queue, queue_labels, labels, 0.2, 0.7
    ),
    whole=("queue", "queue_labels"),
    gradient=False,
  ),
  Case(
    "soft_info_nce_queue",
    queue,
    lambda **a: losses.soft_info_nce_queue(
      **a, temperature=0.1, target_temperature=0.05, weight=0.8
    ),
    lambda **a: maskcon(**a, tau=0.1, target_tau=0.05, w=0.8),
    whole=("queue", "queue_labels"),
    fixed=("k", "queue"),
  ),
  Case(
    "subclass_masks",
    lambda rng, b: {"classes": np.arange(b) % 3, "subclasses": rng.integers(0, 2, b)},
    losses.subclass_masks,
    subclass_masks,
    rows=False,  # [b b] outputs
    gradient=False,
  ),
  Case(
    "sbcl",
    subclasses,
    lambda z, labels, subclasses: losses.sbcl(z, labels, subclasses, 0.1),
    lambda z, labels, subclasses: sbcl(z, labels, subclasses, 0.1, 0.25, 0.07),
  ),
  Case(
    "sbcl/class temperature",
    lambda rng, b: subclasses(rng, b) | {"tau": rng.uniform(0.1, 0.3, b)},
    lambda z, labels, subclasses, tau: losses.sbcl(z, labels, subclasses, 0.2, 0.5, None, tau),
    lambda z, labels, subclasses, tau: sbcl(z, labels, subclasses, 0.2, 0.5, None, tau),
  ),
  Case(
    "look",
    rows,
    lambda z, labels: losses.look(z, labels, 0.1, k=4),
    lambda z, labels: look(z, labels, 0.1, 4),
  ),
  Case(
    "look/all, weights",
    lambda rng, b: rows(rng, b) | {"weights": np.arange(b) != 3},
    lambda z, labels, weights: losses.look(z, labels, 0.2, weights=weights),
    lambda z, labels, weights: look(z, labels, 0.2, len(z), counted=weights),
  ),
  Case(
    "look/queue",
    look_queue,
    lambda q, queue, queue_labels, labels: losses.look(q, labels, 0.2, 5, queue, queue_labels),
    lambda q, queue, queue_labels, labels: look(q, labels, 0.2, 5, queue, queue_labels),
    whole=("queue", "queue_labels"),
    fixed=("queue",),
  ),
  Case(
    "multi_label_bce",
    lambda rng, b: {
      "z": rng.normal(size=(b, 4)),
      "queue": rng.normal(size=(9, 4)),
      "targets": rng.random((b, 9)) < 0.3,
    },
    lambda z, queue, targets: losses.multi_label_bce(z, queue, targets, 0.2),
    lambda z, queue, targets: multi_label(z, queue, targets, 0.2),
    whole=("queue",),
    fixed=("queue",),
  ),
]
