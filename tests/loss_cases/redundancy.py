"""Agreement and decorrelation: SimSiam, BYOL, Barlow Twins, VICReg and its kin, TiCo."""

import numpy as np

from loss_cases.case import Case
from ssljax import losses

D = 5
COEFFICIENTS = (25.0, 25.0, 1.0)


def pair(rng, b, d=D):
  """Two views that agree in part; deviations on both sides of 1."""
  z = rng.normal(0, 1, (b, d)) * np.linspace(0.3, 2, d)
  return z, z + 0.5 * rng.normal(0, 1, (b, d))


def two(first, second):
  return lambda rng, b: dict(zip((first, second), pair(rng, b), strict=True))


def weighted(rng, b):
  """Bool weights: two rows are padding. Numbers are tested in tests/test_losses_redundancy.py."""
  z1, z2 = pair(rng, b)
  weights = np.ones(b, bool)
  weights[[1, b - 1]] = False
  return {"z1": z1, "z2": z2, "weights": weights}


def counted(numpy):
  """The statement for the rows that count."""
  return lambda z1, z2, weights: numpy(z1[weights], z2[weights])


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def off(matrix):
  return (matrix[~np.eye(len(matrix), dtype=bool)] ** 2).sum()


def negative_cosine(p, z):
  return -np.sum(unit(p) * unit(z), 1)


def normalized_l2(p, z):
  return 2 + 2 * negative_cosine(p, z)


def barlow_twins(z1, z2, weight=0.0051, eps=1e-5, scale=1.0):
  a, b = ((z - z.mean(0)) / np.sqrt(z.var(0) + eps) for z in (z1, z2))
  c = a.T @ b / len(a)
  return scale * (((1 - np.diag(c)) ** 2).sum() + weight * off(c))


def barlow_unbiased(z1, z2, weight=0.1):
  a, b = ((z - z.mean(0)) / (z.std(0, ddof=1) + 1e-5) for z in (z1, z2))
  c = a.T @ b / len(a)
  return ((1 - np.diag(c)) ** 2).sum() + weight * off(c)


def batch_barlow(p, z):
  c = unit(p) @ unit(z).T
  return ((1 - np.diag(c)) ** 2).sum() + 0.01 * off(c)


def variance_term(z, eps=1e-4):
  return np.mean(np.maximum(0, 1 - np.sqrt(z.var(0, ddof=1) + eps)))


def covariance_term(z):
  return off(np.atleast_2d(np.cov(z.T))) / z.shape[1]


def vicreg_parts(z1, z2, variance=0.5, covariance=1.0):
  return {
    "invariance": np.mean((z1 - z2) ** 2),
    "variance": variance * (variance_term(z1) + variance_term(z2)),
    "covariance": covariance * (covariance_term(z1) + covariance_term(z2)),
  }


def total(parts, weights=COEFFICIENTS):
  return np.dot(weights, [parts[k] for k in ("invariance", "variance", "covariance")])


def vicreg(z1, z2, variance=0.5, covariance=1.0):
  parts = vicreg_parts(z1, z2, variance, covariance)
  return total(parts), parts


def vibcreg(z1, z2):
  parts = vicreg_parts(z1, z2, 1.0)
  parts["covariance"] = sum(off(np.corrcoef(z.T)) / z.shape[1] ** 2 for z in (z1, z2))
  return total(parts, (25.0, 25.0, 200.0)), parts


def maps(rng, b):
  """Maps of 6 and of 4 cells, with the cells' places."""
  g1, g2 = pair(rng, b)
  return {
    "g1": g1,
    "g2": g2,
    "m1": rng.normal(0, 1, (b, 6, 3)),
    "m2": rng.normal(0, 1, (b, 4, 3)),
    "pos1": rng.uniform(0, 1, (b, 6, 2)),
    "pos2": rng.uniform(0, 1, (b, 4, 2)),
  }


def matched(a, b, cells_a, cells_b, kept):
  """One example: the kept cells of a nearest to b, in the order of the map, and their partners."""
  distance = np.linalg.norm(a[:, None] - b[None], axis=-1)
  chosen = np.sort(np.argsort(distance.min(1), kind="stable")[:kept])
  return cells_a[chosen], cells_b[distance.argmin(1)[chosen]]


def ranks(a, b, cells_a, cells_b, kept):
  """The mean of VICReg (both scales 0.5) over the ranks of the kept cells."""
  pairs = [matched(*arrays, kept) for arrays in zip(a, b, cells_a, cells_b)]
  left, right = (np.stack(side) for side in zip(*pairs))
  return np.mean([vicreg(left[:, i], right[:, i], 0.5, 0.5)[0] for i in range(left.shape[1])])


def vicregl(g1, g2, m1, m2, pos1, pos2, alpha=0.75, kept=(3, 2)):
  parts = {
    "global": vicreg(g1, g2, 0.5, 0.5)[0],
    "features": (ranks(m1, m2, m1, m2, kept[0]) + ranks(m2, m1, m2, m1, kept[1])) / 2,
    "locations": (ranks(pos1, pos2, m1, m2, kept[0]) + ranks(pos2, pos1, m2, m1, kept[1])) / 2,
  }
  local = (parts["features"] + parts["locations"]) / 2
  return alpha * parts["global"] + (1 - alpha) * local, parts


def remembered(rng, b):
  z1, z2 = pair(rng, b)
  root = rng.normal(0, 0.5, (D, D))
  return {"z1": z1, "z2": z2, "memory": root @ root.T / D}


def tico(z1, z2, memory):
  a = unit(z1)
  new = 0.9 * memory + 0.1 * a.T @ a / len(a)
  return 1 - (a * unit(z2)).sum(1) + 8 * np.einsum("bi,ij,bj->b", a, new, a), new


def tico_stopped(at, z1, z2, memory):
  """The new memory has no gradient."""
  a, new = unit(z1), tico(**at)[1]
  return 1 - (a * unit(z2)).sum(1) + 8 * np.einsum("bi,ij,bj->b", a, new, a), new


def alignment(x, y, alpha=2.0):
  return np.linalg.norm(unit(x) - unit(y), axis=1) ** alpha


def uniformity(x, t=2.0):
  x = unit(x)
  i, j = np.triu_indices(len(x), 1)
  return np.log(np.mean(np.exp(-t * ((x[i] - x[j]) ** 2).sum(1))))


def one(name):
  return lambda rng, b: {name: pair(rng, b)[0]}


def one_weighted(name):
  return lambda rng, b: {name: (a := weighted(rng, b))["z1"], "weights": a["weights"]}


CASES = [
  Case("negative_cosine", two("p", "z"), losses.negative_cosine, negative_cosine, fixed=("z",)),
  Case("normalized_l2", two("p", "z"), losses.normalized_l2, normalized_l2, fixed=("z",)),
  Case("barlow_twins", two("z1", "z2"), losses.barlow_twins, barlow_twins),
  Case(
    "barlow_twins/scaled",
    two("z1", "z2"),
    lambda z1, z2: losses.barlow_twins(z1, z2, 0.1, 1e-3, 0.024),
    lambda z1, z2: barlow_twins(z1, z2, 0.1, 1e-3, 0.024),
  ),
  Case(
    "barlow_twins/unbiased",
    two("z1", "z2"),
    lambda z1, z2: losses.barlow_twins(z1, z2, 0.1, unbiased=True),
    barlow_unbiased,
  ),
  Case("barlow_twins/weights", weighted, losses.barlow_twins, counted(barlow_twins)),
  Case("batch_barlow", two("p", "z"), losses.batch_barlow, batch_barlow, fixed=("z",)),
  Case("variance_term", one("z"), losses.variance_term, variance_term),
  Case(
    "variance_term/weights",
    one_weighted("z"),
    losses.variance_term,
    lambda z, weights: variance_term(z[weights]),
  ),
  Case("covariance_term", one("z"), losses.covariance_term, covariance_term),
  Case(
    "covariance_term/weights",
    one_weighted("z"),
    losses.covariance_term,
    lambda z, weights: covariance_term(z[weights]),
  ),
  Case("vicreg", two("z1", "z2"), losses.vicreg, vicreg),
  Case(
    "vicreg/solo",
    two("z1", "z2"),
    lambda z1, z2: losses.vicreg(z1, z2, variance_scale=1.0),
    lambda z1, z2: vicreg(z1, z2, 1.0),
  ),
  Case("vicreg/weights", weighted, losses.vicreg, counted(vicreg)),
  Case("vibcreg", two("z1", "z2"), losses.vibcreg, vibcreg),
  Case("vibcreg/weights", weighted, losses.vibcreg, counted(vibcreg)),
  Case(
    "vicregl",
    maps,
    lambda **arrays: losses.vicregl(**arrays, matches=(3, 2)),
    vicregl,
  ),
  Case(
    "tico",
    remembered,
    losses.tico,
    tico,
    whole=("memory",),
    fixed=("z2", "memory"),
    stopped=tico_stopped,
  ),
  Case("alignment", two("x", "y"), losses.alignment, alignment),
  Case(
    "alignment/1",
    two("x", "y"),
    lambda x, y: losses.alignment(x, y, 1.0),
    lambda x, y: alignment(x, y, 1.0),
  ),
  Case("uniformity", one("x"), losses.uniformity, uniformity),
  Case(
    "uniformity/weights",
    one_weighted("x"),
    lambda x, weights: losses.uniformity(x, 3.0, weights),
    lambda x, weights: uniformity(x[weights], 3.0),
  ),
]
