"""A teacher's features as targets, in float64."""

import numpy as np

from loss_cases.case import Case
from ssljax import targets


def layer_norm(x, eps=1e-5, ddof=0):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=ddof, keepdims=True) + eps)


def over_tokens(x):
  return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def average(layers):
  return layer_norm(np.mean([layer_norm(x) for x in layers], 0))


def standardise(x, mean, variance, momentum, eps=1e-6):
  flat = x.reshape(-1, x.shape[-1])
  mean = momentum * mean + (1 - momentum) * flat.mean(0)
  variance = momentum * variance + (1 - momentum) * flat.var(0)
  return (x - mean) / np.sqrt(variance + eps), (mean, variance)


def hadamard_4():
  """Paley's matrix from the squares modulo 3: 1 is one, 2 is none."""
  return np.array([[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]])


def phi_matrix(covariance):
  values, vectors = np.linalg.eigh(covariance)
  order = np.argsort(-values)
  vectors = vectors[:, order]
  vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(4)])
  return hadamard_4() / 2 @ vectors.T / np.sqrt(values.mean())


def spread(rng, b):
  """A covariance whose eigenvalues are far apart."""
  rotation = np.linalg.qr(rng.normal(0, 1, (4, 4)))[0]
  return {"covariance": rotation @ np.diag([4.0, 2.0, 1.0, 0.25]) @ rotation.T}


def tokens(rng, b):
  return {"x": rng.normal(1, 2, (b, 5, 6))}


CASES = [
  Case("layer_normalise", tokens, targets.layer_normalise, layer_norm),
  Case(
    "layer_normalise/ddof",
    tokens,
    lambda x: targets.layer_normalise(x, 1e-6, ddof=1),
    lambda x: layer_norm(x, 1e-6, 1),
  ),
  Case(
    "instance_normalise",
    tokens,
    targets.instance_normalise,
    over_tokens,
  ),
  Case(
    "average_layers",
    lambda rng, b: {f"x{i}": rng.normal(i, 1 + i, (b, 5, 6)) for i in range(3)},
    lambda **layers: targets.average_layers(list(layers.values())),
    lambda **layers: average(list(layers.values())),
  ),
  Case(
    "average_layers/instance",
    lambda rng, b: {f"x{i}": rng.normal(i, 1 + i, (b, 5, 6)) for i in range(3)},
    lambda **layers: targets.average_layers(list(layers.values()), norm="instance"),
    lambda **layers: layer_norm(np.mean([over_tokens(x) for x in layers.values()], 0), 1e-5),
  ),
  Case(
    "l2_normalise",
    tokens,
    targets.l2_normalise,
    lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True),
  ),
  Case(
    "standardise",
    lambda rng, b: tokens(rng, b) | {"mean": rng.normal(0, 1, 6), "variance": rng.uniform(1, 2, 6)},
    lambda x, mean, variance: targets.standardise(x, mean, variance, 0.7),
    lambda x, mean, variance: standardise(x, mean, variance, 0.7),
    whole=("mean", "variance"),
    gradient=False,
  ),
  Case(
    "phi_s",
    lambda rng, b: (
      tokens(rng, b) | {"mean": rng.normal(0, 1, 6), "matrix": rng.normal(0, 1, (6, 6))}
    ),
    targets.phi_s,
    lambda x, mean, matrix: np.einsum("ij,bnj->bni", matrix, x - mean),
    whole=("mean", "matrix"),
  ),
  Case(
    "phi_s_matrix",
    spread,
    targets.phi_s_matrix,
    phi_matrix,
    whole=("covariance",),
    gradient=False,
  ),
]
