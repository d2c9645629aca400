"""A teacher's features as targets."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = (
  "average_layers",
  "instance_normalise",
  "l2_normalise",
  "layer_normalise",
  "phi_s",
  "phi_s_matrix",
  "standardise",
)


def _widen(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def layer_normalise(x: jax.Array, eps: float = 1e-5, ddof: int = 0) -> jax.Array:
  """Layer norm without parameters over the last axis: [… d] -> float32 [… d].

  Formula: (x - mean)/√(variance + eps), over d.
  Source: the targets of data2vec, Baevski et al. 2022, 2202.03555, and of I-JEPA, 2301.08243.
  Tested: NumPy; torch layer_norm.

  eps is the 1e-5 of functional layer norm, not the encoder's 1e-6. dBOT (Liu et al. 2022,
  2209.03917) standardises with the variance over d-1 (ddof=1) and eps 1e-6.

  >>> targets.layer_normalise(jnp.array([[1.0, 3.0]])).round(2).tolist()
  [[-1.0, 1.0]]
  """
  x = _widen(x)
  x -= x.mean(-1, keepdims=True)
  variance = jnp.square(x).sum(-1, keepdims=True) / (x.shape[-1] - ddof)
  return x * jax.lax.rsqrt(variance + eps)


def instance_normalise(x: jax.Array, eps: float = 1e-5) -> jax.Array:
  """Each channel over an example's tokens: [b n d] -> float32 [b n d].

  Formula: (x - mean)/√(variance + eps), over n.
  Source: data2vec for audio, Baevski et al. 2022, 2202.03555; data2vec 2.0, Baevski et al. 2022,
    2212.07525.
  Tested: NumPy; torch instance_norm.

  >>> targets.instance_normalise(jnp.array([[[1.0], [3.0]]])).round(2).tolist()
  [[[-1.0], [1.0]]]
  """
  x = _widen(x)
  x -= x.mean(-2, keepdims=True)
  return x * jax.lax.rsqrt(jnp.square(x).mean(-2, keepdims=True) + eps)


def average_layers(
  layers: Sequence[jax.Array], eps: float = 1e-5, norm: str = "layer"
) -> jax.Array:
  """The target of data2vec for images: k × [b n d] -> [b n d].

  Formula: LN(mean over the k layers of norm(layer)); LN, and norm "layer": over channels, norm
    "instance": `instance_normalise`, each channel over the tokens; neither has parameters.
  Source: data2vec, Baevski et al. 2022, 2202.03555 (layer); data2vec 2.0, 2212.07525 (instance).
  Tested: NumPy; torch layer_norm, instance_norm.

  Each layer is normalised, the k layers are averaged, and the average is normalised once more, as
  in the published commands; `layers` are the top k blocks' outputs (6 for images). eps is the 1e-5
  of the original's functional layer norm, not the encoder's 1e-6.

  >>> targets.average_layers([jnp.ones((4, 9, 2)), jnp.zeros((4, 9, 2))]).shape
  (4, 9, 2)
  """
  kinds = {"layer": layer_normalise, "instance": instance_normalise}
  if norm not in kinds:
    raise ValueError(f"norm must be one of {', '.join(kinds)}, not {norm!r}")
  mean = jnp.stack([kinds[norm](x, eps) for x in layers]).mean(0)
  return layer_normalise(mean, eps)


def l2_normalise(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """Unit length over the last axis: [… d] -> float32 [… d]; a zero vector stays zero.

  Formula: x / max(‖x‖, eps).
  Source: the normalised regression of BYOL, Grill et al. 2020, 2006.07733.
  Tested: NumPy; torch normalize.

  >>> targets.l2_normalise(jnp.array([[0.0, 4.0]])).tolist()
  [[0.0, 1.0]]
  """
  x = _widen(x)
  square = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, max(eps**2, 1e-37)))


def standardise(
  x: jax.Array,
  mean: jax.Array,
  variance: jax.Array,
  momentum: float | jax.Array = 0.99,
  eps: float = 1e-6,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Each channel by running statistics: [… d], [d], [d] -> [… d] and the new (mean, variance).

  Formula: m' = momentum·m + (1 - momentum)·batch mean, v' likewise; y = (x - m')/√(v' + eps).
  Source: the plain standardisation that PHI-S is compared with, Ranzinger et al. 2024, 2410.01680.
  Tested: NumPy; torch batch_norm.

  No gradient. Statistics are over all leading axes and biased; start them at 0 and 1. momentum=1
  keeps given statistics as they are (estimated beforehand); momentum=0 uses the batch's alone.

  >>> y, (mean, _) = targets.standardise(jnp.array([[1.0], [3.0]]), jnp.zeros(1), jnp.ones(1), 0.0)
  >>> y.round(2).tolist(), mean.tolist()
  ([[-1.0], [1.0]], [2.0])
  """
  x, mean, variance = _widen(x), _widen(mean), _widen(variance)
  if mean.shape != x.shape[-1:] or variance.shape != x.shape[-1:]:
    raise ValueError(
      f"mean and variance must be [d] of x: {mean.shape}, {variance.shape}, {x.shape}"
    )
  axes = tuple(range(x.ndim - 1))
  mean = momentum * mean + (1 - momentum) * x.mean(axes)
  variance = momentum * variance + (1 - momentum) * x.var(axes)
  y = (x - mean) * jax.lax.rsqrt(variance + eps)
  return jax.lax.stop_gradient((y, (mean, variance)))


def phi_s(x: jax.Array, mean: jax.Array, matrix: jax.Array) -> jax.Array:
  """PHI-standardised features: [… d], [d], [d d] -> [… d], every channel of variance 1.

  Formula: y = matrix·(x - mean), matrix = H·Uᵀ/√mean(λ) from `phi_s_matrix`.
  Source: PHI-S, Ranzinger et al. 2024, 2410.01680.
  Tested: NumPy; unit variances, invertible.

  One scale for all directions, unlike whitening. The matrix is a rotation times a number c, so back
  is x = matrixᵀ·y/c² + mean with c² = (matrix²).sum()/d. Statistics are taken once per teacher.

  >>> targets.phi_s(jnp.ones((4, 2)), jnp.zeros(2), targets.phi_s_matrix(jnp.eye(2))).shape
  (4, 2)
  """
  x, mean, matrix = _widen(x), _widen(mean), _widen(matrix)
  if mean.shape != x.shape[-1:] or matrix.shape != 2 * x.shape[-1:]:
    raise ValueError(
      f"mean, matrix must be [d], [d d] of x: {mean.shape}, {matrix.shape}, {x.shape}"
    )
  return (x - mean) @ matrix.T


def phi_s_matrix(covariance: jax.Array) -> jax.Array:
  """The matrix of PHI-S from a teacher's covariance: [d d] -> [d d], no gradient.

  Formula: H·Uᵀ/√mean(λ), covariance = U·diag(λ)·Uᵀ, H a Hadamard matrix over √d.
  Source: PHI-S, Ranzinger et al. 2024, 2410.01680.
  Tested: NumPy; unit variances; orthogonal rows of H for usual widths to 1664.

  Eigenvalues fall; an eigenvector's largest component is positive. d must be 1, 2 or a size that
  Sylvester's and Paley's constructions reach (64, 384, 768, 1024, 1152, 1280, 1408, 1664 …); which
  Hadamard matrix it is turns the target and leaves an L2 loss as it is.

  >>> targets.phi_s_matrix(jnp.eye(2)).shape
  (2, 2)
  """
  covariance = _widen(covariance)
  d = covariance.shape[-1]
  if covariance.shape != (d, d):
    raise ValueError(f"covariance must have shape [d d], not {covariance.shape}")
  values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(covariance))
  values, vectors = values[::-1], vectors[:, ::-1]
  largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(0)[None], 0)
  vectors = jnp.where(largest < 0, -vectors, vectors)
  hadamard = jnp.asarray(_hadamard(d), covariance.dtype)
  return hadamard @ vectors.T * jax.lax.rsqrt(jnp.maximum(values.mean() * d, 1e-30))


def _hadamard(d: int) -> np.ndarray:
  """A matrix of ±1 with orthogonal rows: [d d], as int8.

  Raises:
    ValueError: neither construction reaches this size.
  """
  two = np.array([[1, 1], [1, -1]], np.int8)
  core, doubled = d, np.ones((1, 1), np.int8)
  while True:
    small = np.ones((1, 1), np.int8) if core == 1 else _paley(core)
    if small is not None:
      return np.kron(doubled, small)
    if core % 2:
      raise ValueError(f"no Hadamard matrix of width {d} is known here: choose another width")
    core, doubled = core // 2, np.kron(doubled, two)


def _paley(size: int) -> np.ndarray | None:
  """Paley's Hadamard matrix from the squares modulo a prime, or None."""
  for q, symmetric in ((size - 1, False), (size // 2 - 1, True)):
    prime = q > 2 and all(q % i for i in range(2, int(q**0.5) + 1))
    if prime and (q % 4 == 1) == symmetric and size % 4 == 0:
      break
  else:
    return None
  squares = {i * i % q for i in range(1, q)}
  character = np.array([0, *(1 if i in squares else -1 for i in range(1, q))], np.int8)
  jacobsthal = character[(np.arange(q)[:, None] - np.arange(q)) % q]
  bordered = np.zeros((q + 1, q + 1), np.int8)
  bordered[0, 1:], bordered[1:, 0] = 1, 1 if symmetric else -1
  bordered[1:, 1:] = jacobsthal
  one = np.eye(q + 1, dtype=np.int8)
  if not symmetric:
    return one + bordered
  pair, other = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
  return np.kron(bordered, pair) + np.kron(one, other)
