"""Losses on a batch's spectrum: nuclear norms, generalised eigenvalues, entropies."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics

__all__ = (
  "max_entropy_marginals",
  "mmcr",
  "ssl_ey",
  "von_neumann_entropy",
)


def mmcr(z: jax.Array, local_weight: float = 0.0) -> jax.Array:
  """Nuclear norms of centroids and of views: [b v d] -> [].

  Formula: local_weight · mean_i ||Z_i||_* - ||C||_*, Z_i the unit vectors of example i, C the
    centroids [b d].
  Source: MMCR, Yerxa et al. 2023, 2303.03307.
  Tested: NumPy; lightly MMCRLoss; golden values.

  From -sqrt(b · d) (or -b) at a tight frame to -sqrt(b) when all centroids are one unit vector;
  0 for opposite views. The teacher's views may stand beside the others on axis 1. At equal
  or zero singular values the gradient is one of the subgradients.

  >>> losses.mmcr(jnp.ones((4, 2, 3))).round(4)
  Array(-2., dtype=float32)
  """
  (z,) = arguments.read(z=(z, "b v d"))
  z = numerics.normalise(z)
  loss = -_nuclear_norm(z.mean(1))
  return loss + local_weight * _nuclear_norm(z).mean() if local_weight else loss


def _nuclear_norm(matrix: jax.Array) -> jax.Array:
  # Without vectors its gradient is U Vᵀ, finite whatever the singular values are.
  return jnp.linalg.svd(matrix, compute_uv=False).sum(-1)


def ssl_ey(z1: jax.Array, z2: jax.Array) -> jax.Array:
  """Canonical correlation of two views without whitening: [b d], [b d] -> [].

  Formula: -4 tr C12 + ||C11 + C22||², C the covariances over b - 1, the norm Frobenius'.
  Source: SSL-EY, Chapman et al. 2023, 2310.01012.
  Tested: NumPy; golden value.

  This is the authors' scalar for self-supervision; cca_zoo weights views by 1/2 and differs. A
  rotation of both embeddings leaves it.

  >>> losses.ssl_ey(jnp.ones((4, 3)), jnp.ones((4, 3)))
  Array(0., dtype=float32)
  """
  z1, z2 = arguments.read(z1=(z1, "b d"), z2=(z2, "b d"))
  b = arguments.at_least(2, z1=z1)
  c1, c2 = z1 - z1.mean(0), z2 - z2.mean(0)
  within = jnp.matmul(c1.T, c1, precision=numerics.EXACT) + jnp.matmul(
    c2.T, c2, precision=numerics.EXACT
  )
  return jnp.square(within / (b - 1)).sum() - 4 * (c1 * c2).sum() / (b - 1)


def von_neumann_entropy(x: jax.Array) -> jax.Array:
  """Entropy of the spectrum of a batch's autocorrelation: [b d] -> [], a value to raise.

  Formula: -Σ λ log λ, λ the eigenvalues of mean_i u_i u_iᵀ, u = x/|x|.
  Source: VNE, Kim et al. 2023, 2304.01434.
  Tested: NumPy; golden value.

  From 0 (one direction) to log min(b, d): a small batch caps it. Add -α times it to a loss, α
  well below 0.5, or +α to lower it. Equal and zero eigenvalues have finite gradients.

  >>> losses.von_neumann_entropy(jnp.eye(4)).round(4)  # log 4
  Array(1.3863, dtype=float32)
  """
  (x,) = arguments.read(x=(x, "b d"))
  x = numerics.normalise(x)
  b, d = x.shape
  # Both Gram matrices have the same eigenvalues besides zeros.
  a = x if d <= b else x.T
  spectrum = _eigenvalues(jnp.matmul(a.T, a, precision=numerics.EXACT) / b)
  some = spectrum > 1e-12
  return -jnp.where(some, spectrum * jnp.log(jnp.where(some, spectrum, 1.0)), 0.0).sum()


@jax.custom_jvp
def _eigenvalues(matrix: jax.Array) -> jax.Array:
  """Of a symmetric matrix; fit for functions that treat them all alike.

  jnp.linalg.eigvalsh gives NaN gradients at equal eigenvalues, because it derives the vectors too.
  """
  return jnp.linalg.eigvalsh(matrix)


@_eigenvalues.defjvp
def _eigenvalues_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Any, Any]:
  values, vectors = jnp.linalg.eigh(primals[0])
  moved = jnp.matmul(tangents[0], vectors, precision=numerics.EXACT)
  return values, (vectors * moved).sum(0)


def max_entropy_marginals(
  z: jax.Array, covariance_weight: float, squash: str = "sigmoid", eps: float = 1e-7
) -> jax.Array:
  """Entropy of each feature, plus decorrelation: [b d] -> [].

  Formula: covariance_weight · Σ_{i≠j} C_ij² / d - mean_d Ĥ_d of s = sigmoid(z), C the covariance
    over b - 1, Ĥ = mean_i log((b + 1)/m · (s_(i+m) - s_(i)) + eps), m = round(sqrt b), s_(i) in
    order.
  Source: E2MC, Chakraborty et al. 2024, 2411.15931.
  Tested: NumPy.

  Ĥ is at most near 0, that of the uniform distribution on (0, 1). `squash` is "sigmoid", or
  "normal" for the distribution function of N(0, 1), the authors' choice for embeddings on a
  sphere. Equal values are apart by 0; eps keeps the logarithm finite, with gradients up to b/eps.

  >>> print(f"{losses.max_entropy_marginals(jnp.zeros((4, 3)), 1.0):.2f}")  # -log 1e-7
  16.12
  """
  (z,) = arguments.read(z=(z, "b d"))
  b, d = arguments.at_least(2, z=z), z.shape[1]
  squashes = {"sigmoid": jax.nn.sigmoid, "normal": jax.scipy.stats.norm.cdf}
  if squash not in squashes:
    raise ValueError(f"squash must be one of {sorted(squashes)}, not {squash!r}")
  arguments.positive(eps=eps)
  s = squashes[squash](z)
  centred = s - s.mean(0)
  m = round(math.sqrt(b))
  ordered = jnp.sort(centred, 0)
  spacings = (ordered[m:] - ordered[:-m]) * (b + 1) / m
  covariance = jnp.matmul(centred.T, centred, precision=numerics.EXACT) / (b - 1)
  redundancy = jnp.square(jnp.where(jnp.eye(d, dtype=bool), 0.0, covariance)).sum() / d
  return covariance_weight * redundancy - jnp.log(spacings + eps).mean()
