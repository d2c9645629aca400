"""Losses on a batch's spectrum or density: whitening, entropies, spread over the space."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics

__all__ = (
  "cholesky_whiten",
  "er_entropy",
  "er_reconstruction",
  "iter_norm",
  "koleo",
  "ldreg",
  "lejepa",
  "max_entropy_marginals",
  "mmcr",
  "sigreg",
  "ssl_ey",
  "von_neumann_entropy",
  "w_mse",
)

# Whitening and spectra amplify what TF32 and bfloat16 passes of accelerators would drop.
EXACT = jax.lax.Precision.HIGHEST


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
  sigma = jnp.einsum("bgc,bgd->gcd", centred, centred, precision=EXACT) / b + eps * same
  trace = jnp.trace(sigma, axis1=1, axis2=2)[:, None, None]

  # Coupled, with `product` = Σ/tr Σ · P carried along: alone, P drifts off and ends in NaN.
  root, product = jnp.broadcast_to(same, sigma.shape), sigma / trace
  for _ in range(iterations):
    factor = 1.5 * same - 0.5 * jnp.matmul(root, product, precision=EXACT)
    root = jnp.matmul(factor, root, precision=EXACT)
    product = jnp.matmul(product, factor, precision=EXACT)
  root = root * jax.lax.rsqrt(trace)
  return jnp.einsum("gcd,bgd->bgc", root, centred, precision=EXACT).reshape(b, d)


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
  covariance = (1 - eps) * jnp.matmul(unit.T, unit, precision=EXACT) / (b - 1)
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
  b = _at_least(2, z1=z1)
  c1, c2 = z1 - z1.mean(0), z2 - z2.mean(0)
  within = jnp.matmul(c1.T, c1, precision=EXACT) + jnp.matmul(c2.T, c2, precision=EXACT)
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
  spectrum = _eigenvalues(jnp.matmul(a.T, a, precision=EXACT) / b)
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
  moved = jnp.matmul(tangents[0], vectors, precision=EXACT)
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
  b, d = _at_least(2, z=z), z.shape[1]
  squashes = {"sigmoid": jax.nn.sigmoid, "normal": jax.scipy.stats.norm.cdf}
  if squash not in squashes:
    raise ValueError(f"squash must be one of {sorted(squashes)}, not {squash!r}")
  arguments.positive(eps=eps)
  s = squashes[squash](z)
  centred = s - s.mean(0)
  m = round(math.sqrt(b))
  ordered = jnp.sort(centred, 0)
  spacings = (ordered[m:] - ordered[:-m]) * (b + 1) / m
  covariance = jnp.matmul(centred.T, centred, precision=EXACT) / (b - 1)
  redundancy = jnp.square(jnp.where(jnp.eye(d, dtype=bool), 0.0, covariance)).sum() / d
  return covariance_weight * redundancy - jnp.log(spacings + eps).mean()


def er_entropy(z: jax.Array, concentration: float = 10.0, form: str = "expectation") -> jax.Array:
  """Entropy of a batch on the sphere by a von Mises-Fisher kernel: [b d] -> [], a value to raise.

  Formula: Σ_i w_i h_i, h_i = log(b · c) - log Σ_j exp(concentration · u_i·u_j), u = z/|z|, log c
    the kernel's normaliser; w = softmax(-h) ("expectation") or 1/b ("average").
  Source: ER, Rodríguez-Gálvez et al. 2023, 2307.10907.
  Tested: NumPy; golden values of both forms.

  The sum has the anchor itself. The ER loss is mean(er_reconstruction) - er_entropy, in which the
  normaliser cancels; the authors add 1e-7 to the Bessel function in it, which makes their printed
  value meaningless in many dimensions. Here it is exact.

  >>> losses.er_entropy(jnp.eye(4), 1.0) > losses.er_entropy(jnp.ones((4, 4)), 1.0)
  Array(True, dtype=bool)
  """
  (z,) = arguments.read(z=(z, "b d"))
  if form not in ("expectation", "average"):
    raise ValueError(f"form must be 'expectation' or 'average', not {form!r}")
  z = numerics.normalise(z)
  constant = _log_normaliser(z.shape[1], concentration) + math.log(z.shape[0])
  h = constant - jax.nn.logsumexp(concentration * jnp.matmul(z, z.T, precision=EXACT), axis=1)
  return h.mean() if form == "average" else (jax.nn.softmax(-h) * h).sum()


def er_reconstruction(z1: jax.Array, z2: jax.Array, concentration: float = 10.0) -> jax.Array:
  """Negative log-density of one view around the other on the sphere: [b d], [b d] -> [b].

  Formula: -concentration · cos(z1, z2) + log c, log c the von Mises-Fisher normaliser.
  Source: ER, Rodríguez-Gálvez et al. 2023, 2307.10907.
  Tested: NumPy; golden value.

  The normaliser is exact (see er_entropy).

  >>> print(f"{losses.er_reconstruction(jnp.eye(3), jnp.eye(3))[0]:.4f}")  # log(2π / 10)
  -0.4647
  """
  z1, z2 = arguments.read(z1=(z1, "b d"), z2=(z2, "b d"))
  constant = _log_normaliser(z1.shape[1], concentration)
  return constant - concentration * numerics.cosine(z1, z2)


def _log_normaliser(d: int, concentration: float) -> float:
  """log of (2π)^(d/2) I_{d/2-1}(κ) / κ^(d/2-1), by the series of I in logarithms."""
  if not isinstance(concentration, (int, float)):
    raise TypeError(f"concentration must be a number, not {type(concentration).__name__}")
  arguments.positive(concentration=concentration)
  if d < 2:
    raise ValueError(f"z must have at least 2 features: a sphere of {d} has no density")
  nu, half = d / 2 - 1, concentration / 2
  # Terms peak below κ/2 and fall faster than a Gaussian of that variance.
  terms = [
    (2 * k + nu) * math.log(half) - math.lgamma(k + 1) - math.lgamma(k + nu + 1)
    for k in range(int(half + 12 * math.sqrt(half)) + 40)
  ]
  top = max(terms)
  bessel = top + math.log(sum(math.exp(term - top) for term in terms))
  return 0.5 * d * math.log(2 * math.pi) + bessel - nu * math.log(concentration)


def ldreg(
  x: jax.Array,
  reference: jax.Array | None = None,
  neighbours: int = 64,
  alpha: float = 0.01,
  eps: float = 1e-4,
) -> jax.Array:
  """Raises the local intrinsic dimension around each feature: [b d], [m d] -> [b].

  Formula: -alpha · |log LID|, LID = a / (r_k - a + eps), r_0 ≤ r_1 ≤ … the distances to the
    reference, a the mean of r_1 … r_(k-1), k = min(neighbours, m - 2).
  Source: LDReg, Huang et al. 2024, 2401.10474.
  Tested: NumPy; golden values.

  The reference is the batch itself where none is given; it gets no gradient. The nearest point,
  r_0, is taken for the anchor itself and left out. An anchor whose neighbours are all at distance
  0 has no dimension: 0, with gradient 0. Meant for the encoder's features.

  >>> losses.ldreg(jnp.eye(6), neighbours=3).shape
  (6,)
  """
  other = x if reference is None else reference
  x, reference = arguments.read(x=(x, "b d"), reference=(other, "m d"))
  m = _at_least(4, reference=reference)
  if neighbours < 2:
    raise ValueError(f"neighbours must be at least 2, not {neighbours}")
  k = min(neighbours, m - 2)
  reference = jax.lax.stop_gradient(reference)
  centre = reference.mean(0)  # distances by scalar products lose less around 0
  x, reference = x - centre, reference - centre
  norms = jnp.square(x).sum(1)[:, None] + jnp.square(reference).sum(1)[None, :]
  square = norms - 2 * jnp.matmul(x, reference.T, precision=EXACT)
  nearest, _ = jax.lax.top_k(-square, k + 1)
  r = numerics.square_root(-nearest)
  a = r[:, 1:k].mean(1)
  rest = jnp.maximum(r[:, k] - a, 0.0) + eps
  some = (a > 0) & (rest > 0)
  lid = jnp.where(some, a, 1.0) / jnp.where(some, rest, 1.0)
  return -alpha * jnp.where(some, jnp.abs(jnp.log(lid)), 0.0)


def sigreg(
  z: jax.Array,
  key: jax.Array,
  directions: int = 1024,
  knots: int = 17,
  t_max: float = 3.0,
  weights: jax.Array | None = None,
) -> jax.Array:
  """How far a batch is from N(0, I), along random directions: [b … d], key -> [].

  Formula: mean over directions a of b Σ_k w_k [(mean_i cos t_k x_i - exp(-t_k²/2))² +
    (mean_i sin t_k x_i)²], x_i = a·z_i, t from 0 to t_max, w the doubled trapezoid's weights times
    exp(-t_k²/2).
  Source: LeJEPA, Balestriero and LeCun 2025, 2511.08544.
  Tested: NumPy; lightly SIGReg.

  Axes between b and d are views: the same directions, and the mean of their values. Around 1.05
  for N(0, I), whatever b is; 0.402 b for a batch of zeros, where the gradient is exactly 0. Give
  each step its own key. A row counts `weights` [b] times, 0 for padding, and b is their sum.

  >>> losses.sigreg(jnp.zeros((256, 4)), jax.random.key(0)).round(1)
  Array(102.9, dtype=float32)
  """
  (z,) = arguments.read(z=(z, "* b d"))
  (weights,) = arguments.read(weights=(arguments.numbers(weights), f"?{len(z)}"))
  if knots < 2 or directions < 1:
    raise ValueError(f"knots must be 2 or more and directions 1 or more, not {knots}, {directions}")
  arguments.positive(t_max=t_max)
  if weights is not None:
    weights = weights.reshape(-1, *[1] * (z.ndim - 1))
    z = jnp.where(weights != 0, z, 0.0)
  x = jnp.matmul(z, _unit_directions(key, z.shape[-1], directions, z.dtype), precision=EXACT)
  count = len(z) if weights is None else weights.sum()

  def mean(y: jax.Array) -> jax.Array:
    return (y if weights is None else weights * y).sum(0) / jnp.where(count == 0, 1, count)

  @jax.checkpoint  # one [b directions] at a time, not one for each knot
  def error(t: jax.Array) -> jax.Array:
    return jnp.square(mean(jnp.cos(t * x)) - jnp.exp(-t * t / 2)) + jnp.square(mean(jnp.sin(t * x)))

  t = jnp.linspace(0.0, t_max, knots, dtype=z.dtype)
  step = jnp.full(knots, 2 * t_max / (knots - 1), z.dtype).at[jnp.asarray([0, -1])].multiply(0.5)
  errors = jax.lax.map(error, t).reshape(knots, -1).mean(1)
  return count * (step * jnp.exp(-t * t / 2) * errors).sum()


def _unit_directions(key: jax.Array, d: int, number: int, dtype: Any) -> jax.Array:
  """Columns on the sphere: [d number]; the same for every type of the features."""
  normal = jax.random.normal(key, (d, number), jnp.float32).astype(dtype)
  return normal / jnp.linalg.norm(normal, axis=0)


def lejepa(
  z: jax.Array,
  key: jax.Array,
  weight: float = 0.05,
  global_views: int | None = None,
  directions: int = 1024,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Views towards their mean, and the batch towards N(0, I): [b v d], key -> [], parts.

  Formula: weight · SIGReg(z) + (1 - weight) · mean (c - z)², c the mean of an example's first
    `global_views` views (all of them where None).
  Source: LeJEPA, Balestriero and LeCun 2025, 2511.08544.
  Tested: NumPy; lightly LeJEPALoss.

  No teacher and no stop of gradients. The authors' minimal recipe has weight 0.02 and the mean of
  all views. SIGReg grows with b, so that `weight` depends on the batch. The parts `sigreg` and
  `invariance` are not weighted.

  >>> loss, parts = losses.lejepa(jnp.zeros((8, 2, 4)), jax.random.key(0))
  >>> sorted(parts)
  ['invariance', 'sigreg']
  """
  (z,) = arguments.read(z=(z, "b v d"))
  number = z.shape[1] if global_views is None else global_views
  if not 1 <= number <= z.shape[1]:
    raise ValueError(f"global_views must be 1 to {z.shape[1]}, not {number}")
  centre = z[:, :number].mean(1, keepdims=True)
  parts = {
    "sigreg": sigreg(z, key, directions),
    "invariance": jnp.square(centre - z).mean(),
  }
  return weight * parts["sigreg"] + (1 - weight) * parts["invariance"], parts


def koleo(x: jax.Array, eps: float = 1e-8, weights: jax.Array | None = None) -> jax.Array:
  """Spreads a batch by the distance to the nearest neighbour: [b d] -> [b].

  Formula: -log(||u_i - u_n + eps|| + eps), u = x/|x|, n the nearest other row.
  Source: Sablayrolles et al. 2019, 1806.03198; in DINOv2, Oquab et al. 2023, 2304.07193.
  Tested: NumPy; lightly KoLeoLoss.

  The gradient goes into both points. Equal rows give -log eps and a gradient of up to 1/eps. DINOv2
  takes neighbours on one device only; here the whole batch counts, so that the value falls as it
  grows. Rows of weight 0 are neither anchors nor neighbours and give 0, as does a row alone.

  >>> losses.koleo(jnp.eye(3)).round(4)  # -log sqrt 2
  Array([-0.3466, -0.3466, -0.3466], dtype=float32)
  """
  x, weights = arguments.read(x=(x, "b d"), weights=(arguments.numbers(weights), "?b"))
  b = _at_least(2, x=x)
  arguments.positive(eps=eps)
  counts = jnp.ones(b, bool) if weights is None else weights != 0
  x = numerics.normalise(jnp.where(counts[:, None], x, 0.0))
  near = jnp.matmul(x, x.T, precision=EXACT)
  allowed = counts[None, :] & ~jnp.eye(b, dtype=bool)
  neighbour = jnp.where(allowed, near, -2.0).argmax(1)
  distance = numerics.square_root(jnp.square(x - x[neighbour] + eps).sum(1))
  return jnp.where(counts & allowed.any(1), -jnp.log(distance + eps), 0.0)


def _at_least(number: int, **named: jax.Array) -> int:
  ((name, array),) = named.items()
  if len(array) < number:
    raise ValueError(f"{name} must have at least {number} rows, not {len(array)}")
  return len(array)
