"""Linear probe: multinomial logistic regression on frozen features, fitted to its optimum."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.optimize

from ssljax.evals.features import Features, class_ids


class Fit(NamedTuple):
  """A probe on standardised features: kernel [d c], bias [c]; gradient = its largest entry."""

  kernel: np.ndarray
  bias: np.ndarray
  gradient: float
  iterations: int


def linear(
  train: Features,
  test: Features,
  *,
  l2: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
  held_out: float = 0.1,
  iterations: int = 300,
  tolerance: float = 1e-6,
  seed: int = 0,
) -> dict[str, float]:
  """Top-1 accuracy (0..1) of a linear classifier: train [n d], test [m d] -> {"linear/top1": …}.

  Minimises mean cross-entropy + l2/2 |kernel|^2 by full-batch L-BFGS on standardised features (mean
  and deviation of train). Every l2 is fitted on a part of train, strongest first, each from the
  last one's optimum; the one with the best accuracy on the other part (`held_out`, drawn by `seed`)
  is fitted again on all of train. "linear/gradient" tells how far from the optimum it stopped.

  Raises:
    ValueError: labels missing or useless (see `class_ids`), or fewer than 10 train examples.
  """
  classes, train_ids, test_ids = class_ids(train, test, "linear")
  if len(train_ids) < 10:
    raise ValueError(f"linear: needs at least 10 train examples, got {len(train_ids)}")
  if not 0 < held_out < 1 or not l2 or min(l2) <= 0:
    raise ValueError(f"linear: needs 0 < held_out < 1 and l2 above 0, got {held_out} and {l2}")
  mean, deviation = _moments(train.pooled)
  x = _standardised(train.pooled, mean, deviation)
  count = max(1, round(held_out * len(x)))
  order = np.random.default_rng(seed).permutation(len(x))
  held, fitted = np.sort(order[:count]), np.ones(len(x), np.float32)
  fitted[held] = 0
  problem = _problem(x, train_ids, len(classes))
  fit, paths = None, []
  for one in sorted(l2, reverse=True):
    fit = _optimum(problem, fitted, one, fit, iterations, tolerance)
    paths.append((_accuracy(fit, x[held], train_ids[held]), one, fit))
  # max keeps the first of equals: the strongest regularisation.
  _, chosen, fit = max(paths, key=lambda path: path[0])
  fit = _optimum(problem, np.ones_like(fitted), chosen, fit, iterations, tolerance)
  return {
    "linear/top1": _accuracy(fit, _standardised(test.pooled, mean, deviation), test_ids),
    "linear/train_top1": _accuracy(fit, x, train_ids),
    "linear/l2": float(chosen),
    "linear/gradient": fit.gradient,
  }


class _Problem(NamedTuple):
  loss: Callable  # (kernel [d c], bias [c], row weights [n]) -> summed loss, gradients; no penalty
  covariance: np.ndarray  # [d d] of the standardised features
  classes: int


def _problem(x: np.ndarray, ids: np.ndarray, classes: int, cells: int = 2**26) -> _Problem:
  """Puts x [n d] on the device in equal pieces whose logits have at most `cells` entries."""
  pieces = max(1, -(-len(x) * classes // cells))
  length = -(-len(x) // pieces)
  pad = pieces * length - len(x)
  rows = jnp.asarray(np.pad(x, ((0, pad), (0, 0))).reshape(pieces, length, -1))
  labels = jnp.asarray(np.pad(ids, (0, pad)).reshape(pieces, length), jnp.int32)

  def loss(kernel, bias, weight):
    weight = np.pad(weight, (0, pad)).reshape(pieces, length)
    parameters = (jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32))
    value, slopes = _loss(parameters, rows, labels, jnp.asarray(weight))
    return float(value), *(np.asarray(slope, np.float64) for slope in slopes)

  covariance = np.asarray(_covariance(rows), np.float64) / len(x)
  return _Problem(loss, covariance, classes)


@jax.jit
def _covariance(rows):
  def add(total, x):
    return total + jnp.matmul(x.T, x, precision="highest"), None

  return jax.lax.scan(add, jnp.zeros((rows.shape[-1],) * 2), rows)[0]


@jax.jit
def _loss(parameters, rows, labels, weight):
  """Weighted sum of cross-entropies and its gradient, piece by piece: rows [p n d] -> scalar."""

  def piece_loss(parameters, x, label, weight):
    kernel, bias = parameters
    logits = jnp.matmul(x, kernel, precision="highest") + bias
    right = jnp.take_along_axis(logits, label[:, None], 1)[:, 0]
    return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=1) - right))

  # The gradient is taken inside the scan, else the logits of every piece would be kept for it.
  def add(total, piece):
    new = jax.value_and_grad(piece_loss)(parameters, *piece)
    return jax.tree.map(jnp.add, total, new), None

  zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
  return jax.lax.scan(add, zero, (rows, labels, weight))[0]


def _optimum(
  problem: _Problem,
  weight: np.ndarray,
  l2: float,
  start: Fit | None,
  iterations: int,
  tolerance: float,
) -> Fit:
  """L-BFGS from `start`, in coordinates in which the problem is round.

  With H = covariance/c + l2, the curvature at equal probabilities, and H = R R^T, it searches
  R^T kernel: features with a few dominating directions need tens of steps instead of thousands.
  """
  width, classes = len(problem.covariance), problem.classes
  root = scipy.linalg.cholesky(problem.covariance / classes + l2 * np.eye(width), lower=True)
  root_bias, total = classes**-0.5, float(weight.sum())
  if start is None:
    start = Fit(np.zeros((width, classes)), np.zeros(classes), 0.0, 0)

  def split(point):
    point = point.reshape(width + 1, classes)
    kernel = scipy.linalg.solve_triangular(root, point[:-1], trans=1, lower=True)
    return kernel, point[-1] / root_bias

  def objective(point):
    kernel, bias = split(point)
    value, slope, slope_bias = problem.loss(kernel, bias, weight)
    slope = scipy.linalg.solve_triangular(root, slope / total + l2 * kernel, lower=True)
    value = value / total + l2 / 2 * float(np.sum(kernel**2))
    return value, np.concatenate([slope.ravel(), slope_bias / total / root_bias])

  first = np.concatenate([(root.T @ start.kernel).ravel(), start.bias * root_bias])
  # ftol: absolute below a loss of 1; 1e-8 stops short where the classes are separable. maxls: at
  # the resolution of float32 every further trial of a line search is in vain.
  options = {"maxiter": iterations, "gtol": tolerance, "ftol": 1e-9, "maxls": 5, "maxcor": 20}
  found = scipy.optimize.minimize(objective, first, jac=True, method="L-BFGS-B", options=options)
  kernel, bias = split(found.x)
  return Fit(kernel, bias, float(np.abs(found.jac).max()), int(found.nit))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  mean = x.mean(0, dtype=np.float64)
  deviation = x.std(0, dtype=np.float64)
  # A constant feature has a deviation of rounding errors: dividing by it would make noise of it.
  constant = deviation <= 1e-6 * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)
  return mean, np.where(constant, np.inf, deviation)


def _standardised(x: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
  """[n d] -> [n d] float32 of mean 0 and deviation 1; constant features become 0."""
  scaled = x - mean.astype(np.float32)
  scaled *= (1 / deviation).astype(np.float32)
  return scaled


def _accuracy(fit: Fit, x: np.ndarray, ids: np.ndarray) -> float:
  logits = x @ fit.kernel.astype(np.float32) + fit.bias.astype(np.float32)
  return float(np.mean(logits.argmax(1) == ids))
