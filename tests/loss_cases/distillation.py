"""DINO, iBOT, MSN pair by pair, as published, in float64."""

import numpy as np

from loss_cases.assignment import cross_entropy, normalised, sinkhorn, softmax
from loss_cases.case import Case
from ssljax import losses


def dino(student, targets, temperature):
  total, terms = 0.0, 0
  for i, q in enumerate(targets):
    for j, s in enumerate(student):
      if i != j:
        total, terms = total + cross_entropy(q, s / temperature), terms + 1
  return total / terms


def views(rng, b, k=6):
  return {name: rng.normal(0, 1, (b, k)) for name in ("s0", "s1", "s2", "t0", "t1")}


def balanced(t0, t1, eps):
  both = sinkhorn(np.stack([t0, t1], 1), eps)
  return [both[:, 0], both[:, 1]]


def places(rng, b, m=5, k=6):
  weights = rng.uniform(0, 1, (b, m)) > 0.4
  weights[0] = False
  weights[1] = True
  return {
    "student": rng.normal(0, 1, (b, m, k)),
    "teacher": rng.normal(0, 1, (b, m, k)),
    "center": rng.normal(0, 1, k),
    "weights": weights,
  }


def over_places(errors, weights):
  return (errors * weights).sum(1) / np.maximum(weights.sum(1), 1)


def embeddings(rng, b, d=5, k=7):
  named = {name: rng.normal(0, 1, (b, d)) for name in ("z0", "z1", "targets")}
  return named | {"prototypes": rng.normal(0, 1, (k, d))}


def weighted_embeddings(rng, b):
  return embeddings(rng, b) | {"prior": rng.uniform(1, 2, 7), "weights": np.arange(b) < b - 2}


def msn(at, anchors, targets, prototypes, temperature, sharpening, n_iters, prior, weights=None):
  """`at`: the prototypes in the targets, where nothing flows."""
  prototypes, at = normalised(prototypes), normalised(at)
  weights = np.ones(len(targets)) if weights is None else weights * 1.0
  sharp = softmax(normalised(targets) @ at.T / temperature) ** (1 / sharpening)
  q = sinkhorn(np.log(sharp / sharp.sum(1, keepdims=True)), 1.0, n_iters, weights=weights)
  p = [softmax(normalised(z) @ prototypes.T / temperature) for z in anchors]
  error = np.mean([-(q * np.log(x)).sum(1) @ weights for x in p]) / weights.sum()
  mean = np.mean([weights @ x for x in p], 0) / weights.sum()
  return error + (mean * np.log(mean / prior)).sum()


def power_law(k, exponent):
  prior = np.arange(1, k + 1) ** -exponent
  return prior / prior.sum()


def msn_case(name, call, make=embeddings, prior=lambda: 1 / 7, fixed=("targets",), **options):
  """A case of MSN; `options` and `prior` go to the NumPy statement."""

  def stopped(at, z0, z1, targets, prototypes, weights=None, **others):
    z, share = [z0, z1], prior(**others)
    return msn(at["prototypes"], z, targets, prototypes, prior=share, weights=weights, **options)

  return Case(
    name,
    make,
    lambda z0, z1, **others: call([z0, z1], **others),
    lambda **arrays: stopped(arrays, **arrays),
    whole=("prototypes", "prior"),
    fixed=fixed,
    stopped=stopped,
  )


CASES = [
  Case(
    "dino_loss",
    lambda rng, b: views(rng, b) | {"center": rng.normal(0, 1, 6)},
    lambda s0, s1, s2, t0, t1, center: losses.dino_loss([s0, s1, s2], [t0, t1], center, 0.2, 0.3),
    lambda s0, s1, s2, t0, t1, center: dino(
      [s0, s1, s2], [softmax((t - center) / 0.3) for t in (t0, t1)], 0.2
    ),
    whole=("center",),
    fixed=("t0", "t1", "center"),
  ),
  Case(
    "dino_loss/sinkhorn",
    views,
    lambda s0, s1, s2, t0, t1: losses.dino_loss([s0, s1, s2], [t0, t1], None, 0.2, 0.3),
    lambda s0, s1, s2, t0, t1: dino([s0, s1, s2], balanced(t0, t1, 0.3), 0.2),
    fixed=("t0", "t1"),
  ),
  Case(
    "ibot_loss",
    places,
    lambda student, teacher, center, weights: losses.ibot_loss(
      student, teacher, center, 0.2, 0.3, weights
    ),
    lambda student, teacher, center, weights: over_places(
      cross_entropy(softmax((teacher - center) / 0.3), student / 0.2), weights
    ),
    whole=("center",),
    fixed=("teacher", "center"),
  ),
  Case(
    "ibot_loss/sinkhorn",
    places,
    lambda student, teacher, center, weights: losses.ibot_loss(
      student, teacher, None, 0.2, 0.3, weights
    ),
    lambda student, teacher, center, weights: over_places(
      cross_entropy(sinkhorn(teacher, 0.3, weights=weights * 1.0), student / 0.2), weights
    ),
    whole=("center",),
    fixed=("teacher",),
  ),
  Case(
    "update_center",
    lambda rng, b: {"center": rng.normal(0, 1, 4), "teacher": rng.normal(0, 1, (b, 4))},
    losses.update_center,
    lambda center, teacher: 0.9 * center + 0.1 * teacher.mean(0),
    whole=("center",),
    gradient=False,
  ),
  Case(
    "update_center/masked places",
    places,
    lambda student, teacher, center, weights: losses.update_center(center, teacher, 0.5, weights),
    lambda student, teacher, center, weights: 0.5 * center + 0.5 * teacher[weights].mean(0),
    whole=("center",),
    gradient=False,
  ),
  msn_case(
    "msn_loss",
    lambda z, **arrays: losses.msn_loss(z, **arrays, temperature=0.3),
    temperature=0.3, sharpening=0.25, n_iters=3,
  ),
  msn_case(
    "msn_loss/weights and prior",
    lambda z, **arrays: losses.msn_loss(z, **arrays, temperature=0.3, sharpening=0.5),
    weighted_embeddings,
    lambda prior: prior / prior.sum(),
    ("targets", "prior"),
    temperature=0.3, sharpening=0.5, n_iters=3,
  ),
  msn_case(
    "pmsn_loss",
    lambda z, **arrays: losses.pmsn_loss(z, **arrays, temperature=0.3, exponent=0.5),
    prior=lambda: power_law(7, 0.5), temperature=0.3, sharpening=0.25, n_iters=0,
  ),
]  # fmt: skip
