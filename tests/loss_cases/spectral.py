"""Whitening, spectra and densities: W-MSE, MMCR, SSL-EY, entropies, LDReg, SIGReg, KoLeo."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import sqrtm
from scipy.special import iv

from loss_cases.case import Case
from loss_cases.redundancy import one, one_weighted, pair, unit, weighted
from ssljax import losses

KEY = 7
WHITENING = 1e-3  # in float32 an inverse root multiplies rounding by the condition number


def narrow(rng, b):
  """Fewer features than rows, correlated."""
  mix = np.eye(3) + 0.3 * rng.normal(0, 1, (3, 3))
  z1, z2 = pair(rng, b, 3)
  return {"z1": z1 @ mix, "z2": z2 @ mix}


def narrow_one(rng, b):
  return {"x": narrow(rng, b)["z1"]}


def iter_norm(x, groups=1, iterations=5, eps=1e-5):
  out = []
  for part in np.split(x, groups, 1):
    c = part - part.mean(0)
    sigma = c.T @ c / len(c) + eps * np.eye(c.shape[1])
    scaled, root = sigma / np.trace(sigma), np.eye(c.shape[1])
    for _ in range(iterations):
      root = (3 * root - np.linalg.matrix_power(root, 3) @ scaled) / 2
    out.append(c @ root / np.sqrt(np.trace(sigma)))
  return np.concatenate(out, 1)


def iter_norm_exact(x):
  """What many iterations come to: the symmetric inverse root."""
  c = x - x.mean(0)
  return c @ np.linalg.inv(sqrtm(c.T @ c / len(c) + 1e-5 * np.eye(c.shape[1])).real)


def cholesky_whiten(x, eps=0.0):
  c = np.cov(x.T)
  factor = np.linalg.cholesky((1 - eps) * c + eps * np.eye(len(c)))
  return (np.linalg.inv(factor) @ (x - x.mean(0)).T).T


def w_mse(*views, size=None, eps=0.0, order=None):
  b = len(views[0])
  order, total = np.arange(b) if order is None else order, np.zeros(b)
  for rows in np.split(order, b // (size or b)):
    whitened = [unit(cholesky_whiten(z[rows], eps)) for z in views]
    for i, u in enumerate(whitened):
      for v in whitened[i + 1 :]:
        total[rows] += 2 - 2 * (u * v).sum(1)
  return total / (len(views) * (len(views) - 1) / 2)


def shuffled(rng, b):
  """Sub-batches of half the batch, above twice two features."""
  z1, z2 = pair(rng, b, 2)
  return {"z1": z1, "z2": z2, "order": rng.permutation(b)}


def views(rng, b):
  return {"z": rng.normal(0, 1, (b, 3, 4)) + rng.normal(0, 1, (b, 1, 4))}


def nuclear(matrix):
  return np.linalg.svd(matrix, compute_uv=False).sum()


def mmcr(z, weight=0.0):
  z = unit(z)
  return weight * np.mean([nuclear(rows) for rows in z]) - nuclear(z.mean(1))


def ssl_ey(z1, z2):
  b = len(z1)
  c1, c2 = z1 - z1.mean(0), z2 - z2.mean(0)
  between, within = 2 * c1.T @ c2 / (b - 1), (c1.T @ c1 + c2.T @ c2) / (b - 1)
  return -2 * np.trace(between) + np.trace(within @ within)


def von_neumann_entropy(x):
  values = np.linalg.svd(unit(x) / np.sqrt(len(x)), compute_uv=False) ** 2
  return -(values * np.log(values)).sum()


def normal_cdf(z):
  return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def max_entropy_marginals(z, weight=2.0, squash=sigmoid, eps=1e-7):
  s = squash(z)
  b, d = s.shape
  m = round(b**0.5)
  entropies = []
  for column in np.sort(s, 0).T:
    spacings = [column[i + m] - column[i] for i in range(b - m)]
    entropies.append(np.mean([np.log((b + 1) / m * gap + eps) for gap in spacings]))
  c = np.cov(s.T)
  return weight * ((c**2).sum() - (np.diag(c) ** 2).sum()) / d - np.mean(entropies)


def log_normaliser(d, kappa):
  nu = d / 2 - 1
  return d / 2 * np.log(2 * np.pi) + np.log(iv(nu, kappa)) - nu * np.log(kappa)


def er_entropy(z, kappa=10.0, form="expectation"):
  z = unit(z)
  density = np.exp(kappa * z @ z.T).mean(1) / np.exp(log_normaliser(z.shape[1], kappa))
  h = -np.log(density)
  weight = np.exp(-h) / np.exp(-h).sum()
  return h.mean() if form == "average" else (weight * h).sum()


def er_reconstruction(z1, z2, kappa=10.0):
  return log_normaliser(z1.shape[1], kappa) - kappa * (unit(z1) * unit(z2)).sum(1)


def referred(rng, b):
  return {"x": rng.normal(0, 1, (b, 4)), "reference": rng.normal(0, 1, (12, 4))}


def ldreg(x, reference, neighbours=4, alpha=0.01, eps=1e-4):
  k, values = min(neighbours, len(reference) - 2), []
  for row in x:
    r = np.sort(np.linalg.norm(reference - row, axis=1))
    mean = np.mean(r[1:k])
    values.append(-alpha * abs(np.log(mean / (r[k] - mean + eps))))
  return np.array(values)


def directions(d, number):
  """Drawn in float32 in every type, so that the statement can have the same."""
  drawn = np.float64(jax.random.normal(jax.random.key(KEY), (d, number), jnp.float32))
  return drawn / np.linalg.norm(drawn, axis=0)


def sigreg(z, number=32, knots=17, t_max=3.0):
  if z.ndim == 3:
    return np.mean([sigreg(z[:, v], number, knots, t_max) for v in range(z.shape[1])])
  t = np.linspace(0, t_max, knots)
  values = []
  for x in (z @ directions(z.shape[1], number)).T:
    error = np.abs(np.exp(1j * np.outer(t, x)).mean(1) - np.exp(-(t**2) / 2)) ** 2
    values.append(len(z) * 2 * np.trapezoid(error * np.exp(-(t**2) / 2), t))
  return np.mean(values)


def lejepa(z, number_of_global, weight=0.05):
  centre = z[:, :number_of_global].mean(1, keepdims=True)
  parts = {"sigreg": sigreg(z), "invariance": ((z - centre) ** 2).mean()}
  return weight * parts["sigreg"] + (1 - weight) * parts["invariance"], parts


def koleo(x, eps=1e-8):
  x, values = unit(x), []
  for i, row in enumerate(x):
    others = np.delete(x, i, 0)
    nearest = others[(others @ row).argmax()]
    values.append(-np.log(np.linalg.norm(row - nearest + eps) + eps))
  return np.array(values)


def koleo_weights(x, weights):
  out = np.zeros(len(x))
  out[weights] = koleo(x[weights])
  return out


def key():
  return jax.random.key(KEY)


CASES = [
  Case(
    "iter_norm",
    one("x"),
    losses.iter_norm,
    iter_norm,
  ),
  Case(
    "iter_norm/groups",
    lambda rng, b: {"x": pair(rng, b, 6)[0]},
    lambda x: losses.iter_norm(x, 2, 3),
    lambda x: iter_norm(x, 2, 3),
  ),
  Case(
    "iter_norm/exact",
    narrow_one,
    lambda x: losses.iter_norm(x, iterations=20),
    iter_norm_exact,
    rtol=WHITENING,
  ),
  Case("cholesky_whiten", narrow_one, losses.cholesky_whiten, cholesky_whiten, rtol=WHITENING),
  Case(
    "cholesky_whiten/shrunk",
    one("x"),
    lambda x: losses.cholesky_whiten(x, 0.1),
    lambda x: cholesky_whiten(x, 0.1),
    rtol=WHITENING,
  ),
  Case(
    "w_mse",
    narrow,
    lambda z1, z2: losses.w_mse([z1, z2]),
    lambda z1, z2: w_mse(z1, z2),
    rtol=WHITENING,
  ),
  Case(
    "w_mse/sub-batches",
    shuffled,
    lambda z1, z2, order: losses.w_mse([z1, z2], len(z1) // 2, 0.05, order),
    lambda z1, z2, order: w_mse(z1, z2, size=len(z1) // 2, eps=0.05, order=order),
    rows=False,  # `order` speaks of the rows by number
    rtol=WHITENING,
  ),
  Case(
    "w_mse/three views",
    narrow,
    lambda z1, z2: losses.w_mse([z1, z2, z1 + z2**2], eps=0.01),
    lambda z1, z2: w_mse(z1, z2, z1 + z2**2, eps=0.01),
    rtol=WHITENING,
  ),
  Case("mmcr", views, losses.mmcr, mmcr),
  Case("mmcr/local", views, lambda z: losses.mmcr(z, 0.1), lambda z: mmcr(z, 0.1)),
  Case("ssl_ey", narrow, losses.ssl_ey, ssl_ey),
  Case("von_neumann_entropy", one("x"), losses.von_neumann_entropy, von_neumann_entropy),
  Case(
    "von_neumann_entropy/wide",
    lambda rng, b: {"x": pair(rng, b, 20)[0]},
    losses.von_neumann_entropy,
    von_neumann_entropy,
  ),
  Case(
    "max_entropy_marginals",
    one("z"),
    lambda z: losses.max_entropy_marginals(z, 2.0),
    max_entropy_marginals,
  ),
  Case(
    "max_entropy_marginals/normal",
    one("z"),
    lambda z: losses.max_entropy_marginals(z, 20.0, "normal", 1e-3),
    lambda z: max_entropy_marginals(z, 20.0, normal_cdf, 1e-3),
  ),
  Case("er_entropy", one("z"), losses.er_entropy, er_entropy),
  Case(
    "er_entropy/average",
    one("z"),
    lambda z: losses.er_entropy(z, 3.0, "average"),
    lambda z: er_entropy(z, 3.0, "average"),
  ),
  Case(
    "er_reconstruction",
    lambda rng, b: {k: v for k, v in weighted(rng, b).items() if k != "weights"},
    losses.er_reconstruction,
    er_reconstruction,
  ),
  Case(
    "ldreg",
    referred,
    lambda x, reference: losses.ldreg(x, reference, neighbours=4),
    ldreg,
    whole=("reference",),
    fixed=("reference",),
  ),
  Case(
    "sigreg",
    one("z"),
    lambda z: losses.sigreg(z, key(), 32),
    sigreg,
  ),
  Case(
    "sigreg/views",
    views,
    lambda z: losses.sigreg(z, key(), 16, 9, 2.0),
    lambda z: sigreg(z, 16, 9, 2.0),
  ),
  Case(
    "sigreg/weights",
    one_weighted("z"),
    lambda z, weights: losses.sigreg(z, key(), 32, weights=weights),
    lambda z, weights: sigreg(z[weights]),
  ),
  Case(
    "lejepa",
    views,
    lambda z: losses.lejepa(z, key(), global_views=2, directions=32),
    lambda z: lejepa(z, 2),
  ),
  Case(
    "lejepa/all views",
    views,
    lambda z: losses.lejepa(z, key(), 0.02, directions=32),
    lambda z: lejepa(z, 3, 0.02),
  ),
  Case("koleo", one("x"), losses.koleo, koleo),
  Case("koleo/weights", one_weighted("x"), losses.koleo, koleo_weights),
]
