"""Regression at hidden places, region maps, spectra."""

import jax
import numpy as np

from loss_cases.case import Case
from ssljax import losses


def mean(values, weights=None, over="example"):
  if weights is None:
    return values.mean(1)
  total = (values * weights).sum(1)
  return total / weights.sum(1) if over == "example" else total * len(values) / weights.sum()


def places(rng, b):
  """Deviation 2: errors on both sides of beta 1 and of beta 2."""
  return dict(pred=rng.normal(0, 2, (b, 5, 7)), target=rng.normal(0, 2, (b, 5, 7)))


def weighted(rng, b):
  return places(rng, b) | dict(weights=rng.uniform(0.2, 1, (b, 5)))


def hidden(rng, b):
  mask = rng.random((b, 5)) < 0.5
  mask[:, 0] = True
  return places(rng, b) | dict(weights=mask)


def smooth(e, beta=1.0):
  e = np.abs(e)
  return np.where(e < beta, 0.5 * e**2 / beta, e - 0.5 * beta)


def focal(e, alpha=0.2, gamma=1.0):
  return np.abs(e) * (2 / (1 + np.exp(-alpha * np.abs(e))) - 1) ** gamma


def numpy_of(error, over="example"):
  return lambda pred, target, weights=None: mean(error(pred - target).mean(-1), weights, over)


def regression(name, loss, error, **scalars):
  """One plain case, one with numbers as weights, one with a mask and the mean over the batch."""

  def short(**a):
    return loss(**a, **scalars)

  def batch(**a):
    return loss(**a, **scalars, over="batch")

  return [
    Case(name, places, short, numpy_of(error)),
    Case(f"{name}/weights", weighted, short, numpy_of(error)),
    Case(f"{name}/batch", hidden, batch, numpy_of(error, "batch")),
  ]


def values(rng, b):
  return dict(values=rng.normal(size=(b, 5)), weights=rng.random((b, 5)) + 0.1)


def maps(rng, b):
  arrays = {k: rng.normal(size=(b, 4, 6, 3)) for k in ("pred", "target")}
  return arrays | dict(weights=rng.choice([1.0, 10.0], (b, 4, 6, 1)))


def inpainting(pred, target, weights):
  error = ((pred - target) ** 2 * weights).sum((1, 2, 3)) / pred.shape[-1]
  return error / weights.sum((1, 2, 3))


def regions(rng, b):
  return dict(
    logits=rng.normal(0, 2, (b, 3, 5, 4)),
    regions=rng.random((b, 3, 5, 4)) < 0.4,
    weights=rng.random((b, 5)) + 0.1,
  )


def region_bce(logits, regions, weights, background=1.0, over="example"):
  p = 1 / (1 + np.exp(-logits))
  error = -np.where(regions, np.log(p), background * np.log(1 - p))
  return mean(error.mean((1, 3)), weights, over)


def images(rng, b):
  return {k: rng.normal(size=(b, 6, 4, 3)) for k in ("pred", "target")}


def with_matrix(rng, b):
  return images(rng, b) | dict(matrix=rng.random((6, 4, 3)))


def focal_frequency(pred, target, matrix=None, average=True, alpha=1.0):
  spectra = [np.fft.fft2(x, axes=(1, 2)) / np.sqrt(24) for x in (pred, target)]
  if average:
    spectra = [x.mean(0) for x in spectra]
  distance = np.abs(spectra[0] - spectra[1])
  if matrix is None:
    matrix = np.log(1 + distance**alpha)
    matrix = matrix / matrix.max()
  return (matrix * distance**2).mean((-3, -2, -1))


def focal_frequency_value(**options):
  """Its weight is a constant of the definition but moves with pred: no finite differences. The
  gradient is compared in the case with a given matrix."""
  stop = jax.lax.stop_gradient
  return lambda pred, target: losses.focal_frequency_loss(stop(pred), stop(target), **options)


def second_moment_uniformity(z):
  z = z / np.linalg.norm(z, axis=1, keepdims=True)
  return ((z @ z.T) ** 2).mean(1)


CASES = [
  Case("masked_mean", values, losses.masked_mean, mean),
  Case(
    "masked_mean/batch",
    values,
    lambda **a: losses.masked_mean(**a, over="batch"),
    lambda **a: mean(**a, over="batch"),
  ),
  *regression("masked_l1", losses.masked_l1, np.abs),
  *regression("masked_l2", losses.masked_l2, np.square),
  *regression("masked_smooth_l1", losses.masked_smooth_l1, smooth),
  Case(
    "masked_smooth_l1/beta_2",
    places,
    lambda **a: losses.masked_smooth_l1(**a, beta=2.0),
    numpy_of(lambda e: smooth(e, 2.0)),
  ),
  *regression("masked_focal_l1", losses.masked_focal_l1, focal),
  Case(
    "masked_focal_l1/gamma_half",
    places,
    lambda **a: losses.masked_focal_l1(**a, alpha=0.5, gamma=0.5),
    numpy_of(lambda e: focal(e, 0.5, 0.5)),
  ),
  Case("inpainting_l2", maps, losses.inpainting_l2, inpainting),
  Case("region_bce", regions, losses.region_bce, region_bce),
  Case(
    "region_bce/batch",
    regions,
    lambda **a: losses.region_bce(**a, background=0.3, over="batch"),
    lambda **a: region_bce(**a, background=0.3, over="batch"),
  ),
  Case("focal_frequency_loss", images, focal_frequency_value(), focal_frequency, gradient=False),
  Case(
    "focal_frequency_loss/examples",
    images,
    focal_frequency_value(average=False, alpha=0.5),
    lambda **a: focal_frequency(**a, average=False, alpha=0.5),
    gradient=False,
  ),
  Case(
    "focal_frequency_loss/matrix",
    with_matrix,
    losses.focal_frequency_loss,
    focal_frequency,
    whole=("matrix",),
    fixed=("matrix",),
  ),
  Case(
    "second_moment_uniformity",
    lambda rng, b: dict(z=rng.normal(size=(b, 5))),
    losses.second_moment_uniformity,
    second_moment_uniformity,
  ),
]
