"""Clustering by distances to centroids: cases with independent NumPy statements."""

import itertools

import numpy as np

from loss_cases.case import Case
from loss_cases.clustering import D, K, probabilities, softmax, unit
from ssljax import losses


def student_t(z, centroids, alpha=1.0):
  q = np.zeros((len(z), len(centroids)))
  for i, j in itertools.product(range(len(z)), range(len(centroids))):
    q[i, j] = (1 + ((z[i] - centroids[j]) ** 2).sum() / alpha) ** (-(alpha + 1) / 2)
  return q / q.sum(1, keepdims=True)


def sharpened(q):
  p = q**2 / q.sum(0)
  return p / p.sum(1, keepdims=True)


def balanced(p):
  t = p / np.sqrt(p.sum(0))
  return t / t.sum(1, keepdims=True)


def kl(p, q):
  return (p * np.log(p / q)).sum(1)


def tell(z, w):
  entries = np.full((len(z), len(w)), 2 * 0.5)
  for i, row in enumerate(unit(z)):
    products = w @ row
    entries[i, products.argmax()] -= products.max()
  return entries.mean(1)


def clam(x, prototypes, mask):
  v = np.where(mask, 0.0, x)
  for _ in range(3):
    move = np.zeros_like(v)
    for i in range(len(v)):
      near = softmax(-0.75 * ((prototypes - v[i]) ** 2).sum(1))
      move[i] = sum(a * (c - v[i]) for a, c in zip(near, prototypes))
    v = v + 0.3 * mask * move
  return (mask * (v - x) ** 2).mean(1), v


def best_order(f, targets):
  """Another solver: trying all permutations ends at a batch of 8."""
  from scipy.optimize import linear_sum_assignment

  return linear_sum_assignment(-unit(f) @ unit(targets).T)[1].astype(np.int32)


def clusters(rng, b):
  return {"z": rng.normal(size=(b, D)), "centroids": rng.normal(size=(K, D))}


CASES = [
  Case("student_t_assign", clusters, losses.student_t_assign, student_t, whole=("centroids",)),
  Case(
    "student_t_assign/alpha",
    clusters,
    lambda **arrays: losses.student_t_assign(**arrays, alpha=2.5),
    lambda **arrays: student_t(**arrays, alpha=2.5),
    whole=("centroids",),
  ),
  Case(
    "dec_target",
    lambda rng, b: {"q": probabilities(rng, b, K)},
    losses.dec_target,
    sharpened,
    fixed=("q",),
    gradient=False,
  ),
  Case(
    "dec_kl",
    lambda rng, b: clusters(rng, b) | {"target": probabilities(rng, b, K)},
    losses.dec_kl,
    lambda z, centroids, target: kl(target, student_t(z, centroids)),
    whole=("centroids",),
    fixed=("target",),
  ),
  *(
    Case(
      f"depict_target/{kind}",
      lambda rng, b: {"p": probabilities(rng, b, K)},
      lambda p, kind=kind: losses.depict_target(p, kind=kind),
      numpy,
      fixed=("p",),
      gradient=False,
    )
    for kind, numpy in {"paper": balanced, "code": lambda p: sharpened(p)}.items()
  ),
  Case(
    "tell",
    lambda rng, b: {"z": rng.normal(size=(b, D)), "w": unit(rng.normal(size=(K, D)))},
    lambda z, w: losses.tell(z, w, alpha=0.5),
    tell,
    whole=("w",),
  ),
  Case(
    "clam_loss",
    lambda rng, b: {
      "x": rng.normal(size=(b, D)),
      "prototypes": rng.normal(size=(K, D)),
      "mask": rng.random((b, D)) < 0.4,
    },
    lambda **arrays: losses.clam_loss(**arrays, beta=1.5, alpha=0.3, steps=3),
    clam,
    whole=("prototypes",),
  ),
  Case(
    "noise_target_assignment",
    lambda rng, b: {"f": rng.normal(size=(b, D)), "targets": rng.normal(size=(b, D))},
    losses.noise_target_assignment,
    best_order,
    fixed=("f", "targets"),
    gradient=False,
    rows=False,  # the places of the targets move too; a test of its own
  ),
  Case(
    "noise_target_loss",
    lambda rng, b: {"f": rng.normal(size=(b, D)), "targets": rng.normal(size=(b, D))},
    losses.noise_target_loss,
    lambda f, targets: 0.5 * ((unit(f) - unit(targets)) ** 2).sum(1),
    fixed=("targets",),
  ),
]
