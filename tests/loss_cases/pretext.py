"""Pretext classifications and terms on labelled features: cases with NumPy statements."""

import numpy as np

from loss_cases.case import Case
from loss_cases.clustering import D, softmax, unit
from ssljax import losses


def label_ce(logits, labels):
  return np.array([-np.log(softmax(row)[k]) for row, k in zip(logits, labels)])


def collapse(h, y):
  classes = [c for c in range(5) if (y == c).any()]
  means = {c: h[y == c].mean(0) for c in classes}
  within = np.mean([((x - means[c]) ** 2).sum() for x, c in zip(h, y)])
  centre = np.mean([means[c] for c in classes], axis=0)
  away = {c: unit(means[c] - centre) for c in classes}
  angles = [
    np.arccos(max(away[c] @ away[other] for other in classes if other != c)) for c in classes
  ]
  return 0.5 * within - 2.0 * np.mean(angles), (within, -np.mean(angles))


def inner_products(prepare):
  def numpy(h, y):
    h, out = prepare(h), np.zeros(len(h))
    for i in range(len(h)):
      for j in range(len(h)):
        if i != j:
          out[i] += max(0, 1 - h[i] @ h[j]) if y[i] == y[j] else abs(h[i] @ h[j])
    return out

  return numpy


def triplet(q, prototypes, y):
  out = []
  for x, c in zip(q, y):
    distances = np.linalg.norm(prototypes - x, axis=1)
    out.append(max(0.0, distances[c] - np.delete(distances, c).min() + 0.5))
  return np.array(out)


def labelled(rng, b):
  # Two of each: no class without an example, one of five absent.
  return {"h": rng.normal(size=(b, D)), "y": np.arange(b) % 4}


def classes(width, *names, below):
  def make(rng, b):
    return {"logits": rng.normal(0, 2, (b, width))} | {
      name: rng.integers(0, below[name], b) for name in names
    }

  return make


CASES = [
  Case(
    "rotation_ce",
    classes(4, "k", below={"k": 4}),
    losses.rotation_ce,
    lambda logits, k: label_ce(logits, k),
  ),
  Case(
    "local_rotation_ce",
    classes(16, "quadrant", "angle", below={"quadrant": 4, "angle": 4}),
    losses.local_rotation_ce,
    lambda logits, quadrant, angle: label_ce(logits, 4 * quadrant + angle),
  ),
  Case(
    "joint_label_ce",
    classes(12, "y", "t", below={"y": 3, "t": 4}),
    lambda logits, y, t: losses.joint_label_ce(logits, y, t, 4),
    lambda logits, y, t: label_ce(logits, 4 * y + t),
  ),
  Case(
    "jigsaw_ce",
    classes(10, "perm_id", below={"perm_id": 10}),
    losses.jigsaw_ce,
    lambda logits, perm_id: label_ce(logits, perm_id),
  ),
  Case(
    "relative_patch_ce",
    classes(8, "place", below={"place": 8}),
    losses.relative_patch_ce,
    lambda logits, place: label_ce(logits, place),
  ),
  Case(
    "nc_regulariser",
    labelled,
    lambda h, y: losses.nc_regulariser(h, y, 5, w_within=0.5, w_angle=2.0),
    collapse,
  ),
  Case("cip", labelled, lambda h, y: losses.cip(h, y), inner_products(unit)),
  Case(
    "cip/inner",
    labelled,
    lambda h, y: losses.cip(h, y, unit=False),
    inner_products(lambda h: h),
  ),
  Case(
    "proto_triplet",
    lambda rng, b: {
      "q": rng.normal(size=(b, D)),
      "prototypes": rng.normal(size=(3, D)),
      "y": rng.integers(0, 3, b),
    },
    lambda q, prototypes, y: losses.proto_triplet(q, prototypes, y, margin=0.5),
    triplet,
    whole=("prototypes",),
  ),
  Case(
    "spectral_norm_term",
    lambda rng, b: {"s": rng.normal(size=(b, b)) + 2 * np.eye(b)},
    losses.spectral_norm_term,
    lambda s: np.linalg.norm(s, 2),
    rows=False,  # a matrix of pairs; permuting rows alone changes nothing, tested on its own
  ),
]
