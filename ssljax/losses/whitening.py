"""Whitening of a batch: by iterations, by Cholesky's factor, and as a loss."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics

__all__ = (
  "cholesky_whiten",
  "iter_norm",
  "w_mse",
)


def iter_norm(x: jax.Array, groups: int = 1, iterations: int = 5, eps: float = 1e-5) -> jax.Array:
  """Whitening by Newton's iteration, within groups of features: [b d] -> [b d].

  Formula: (x - mean) Σ^(-1/2), Σ = covariance over b + eps·I; P ← (3P - P³ Σ/tr Σ) / 2 from I,
    then P / sqrt(tr Σ).
  Source: Iterative normalization, Huang et al. 2019, 1904.03441; in VIbCReg, 2109.00783.
  Tested: NumPy; the exact inverse root after many iterations.

  Five iterations whiten the large directions only. Statistics are of this batch; a constant
  feature becomes 0.

  >>> losses.iter_norm(jnp.ones((4, 6)), groups=2).shape
  (4, 6)
  """
  (x,) = arguments.read(x=(x, "b d"))
  b, d = x.shape
  if groups < 1 or d % groups:
    raise ValueError(f"groups must divide the width {d}, not {groups}")
  centred = (x - x.mean(0)).reshape(b, groups, d // groups)
  same = jnp.eye(d // groups, dtype=x.dtype)
  sigma = jnp.einsum("bgc,bgd->gcd", centred, centred, precision=numerics.EXACT) / b + eps * same
  trace = jnp.trace(sigma, axis1=1, axis2=2)[:, None, None]

  # Coupled, with `product` = Σ/tr Σ · P carried along: alone, P drifts off and ends in NaN.
  root, product = jnp.broadcast_to(same, sigma.shape), sigma / trace
  for _ in range(iterations):
    factor = 1.5 * same - 0.5 * jnp.matmul(root, product, precision=numerics.EXACT)
    root = jnp.matmul(factor, root, precision=numerics.EXACT)
    product = jnp.matmul(product, factor, precision=numerics.EXACT)
  root = root * jax.lax.rsqrt(trace)
  return jnp.einsum("gcd,bgd->bgc", root, centred, precision=numerics.EXACT).reshape(b, d)


def cholesky_whiten(x: jax.Array, eps: float = 0.0) -> jax.Array:
  """Whitening by the Cholesky factor of the covariance: [b d] -> [b d].

  Formula: L⁻¹ (x - mean), L Lᵀ = (1 - eps) C + eps·I, C the covariance over b - 1.
  Source: W-MSE, Ermolov et al. 2021, 2007.06346.
  Tested: NumPy; lightly Whitening2d.

  Not the whitening of PCA or ZCA: it is the same for every scaling of single features, and not
  for rotations. A singular covariance gives finite numbers, because 4·d times the machine epsilon
  is added to the diagonal of the correlation matrix; a constant feature becomes 0.

  >>> losses.cholesky_whiten(jnp.asarray([[0.0], [2.0]])).round(4)  # ± sqrt(1/2)
  Array([[-0.7071],
         [ 0.7071]], dtype=float32)

  Raises:
    ValueError: eps is 0 and there are not more rows than features: no covariance to invert.
  """
  (x,) = arguments.read(x=(x, "b d"))
  b, d = x.shape
  if b < 2 or (eps == 0 and b <= d):
    raise ValueError(f"x must have more rows than features, or eps be above 0, not {b} and {d}")
  centred = x - x.mean(0)
  # L of D R D is D L of R: one jitter fits all features of the correlation-like R.
  variance = (1 - eps) * jnp.square(centred).sum(0) / (b - 1) + eps
  varies = variance > 0
  deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 1.0)
  unit = centred / deviation
  same = jnp.eye(d, dtype=x.dtype)
  covariance = (1 - eps) * jnp.matmul(unit.T, unit, precision=numerics.EXACT) / (b - 1)
  jitter = 4 * d * jnp.finfo(x.dtype).eps
  ridge = jitter + eps / variance if eps else jitter
  factor = jnp.linalg.cholesky(covariance + ridge * same)
  return jax.scipy.linalg.solve_triangular(factor, unit.T, lower=True).T


def w_mse(
  views: Sequence[jax.Array],
  size: int | None = None,
  eps: float = 0.0,
  order: jax.Array | None = None,
) -> jax.Array:
  """Distance of whitened views on the sphere: views of [b d], order [b] -> [b].

  Formula: mean over pairs of views of 2 - 2 cos(v_i, v_j), v the rows whitened by their Cholesky
    factor within sub-batches of `size`.
  Source: W-MSE, Ermolov et al. 2021, 2007.06346.
  Tested: NumPy; lightly WMSELoss; golden values.

  `order` is a permutation of the rows (jax.random.permutation(key, b)), the same for all views;
  sub-batches are taken along it. Without `size` the batch is one of them. Both sides get a
  gradient. `size` should be twice d or more.

  >>> z = jax.random.normal(jax.random.key(0), (8, 2))
  >>> losses.w_mse([z, z * jnp.asarray([2.0, 3.0])], size=4).shape  # 0: scaling is whitened away
  (8,)
  """
  if len(views) < 2:
    raise ValueError(f"views must be at least 2, not {len(views)}")
  named = {f"views[{i}]": (view, "b d") for i, view in enumerate(views)}
  *read, order = arguments.read(**named, order=(order, "?b:int"))
  b, d = read[0].shape
  size = b if size is None else size
  if size < 1 or b % size:
    raise ValueError(f"size must divide the batch of {b}, not {size}")

  def whitened(z: jax.Array) -> jax.Array:
    z = z if order is None else z[order]
    parts = jax.vmap(lambda part: cholesky_whiten(part, eps))(z.reshape(b // size, size, d))
    z = parts.reshape(b, d)
    return numerics.normalise(z if order is None else z[jnp.argsort(order)])

  units = [whitened(z) for z in read]
  pairs = [(u, v) for i, u in enumerate(units) for v in units[i + 1 :]]
  return jnp.stack([jnp.square(u - v).sum(1) for u, v in pairs]).mean(0)
