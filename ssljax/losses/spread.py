"""Agreement of two views, and spread of features over the space."""

import math

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics
from ssljax.losses.redundancy import counted

__all__ = (
  "alignment",
  "er_entropy",
  "er_reconstruction",
  "koleo",
  "ldreg",
  "negative_cosine",
  "normalized_l2",
  "uniformity",
)


def negative_cosine(p: jax.Array, z: jax.Array) -> jax.Array:
  """Negative cosine of predictions and targets: [b d], [b d] -> [b].

  Formula: -cos(p, z), no gradient into z.
  Source: SimSiam, Chen and He 2021, 2011.10566.
  Tested: NumPy; lightly NegativeCosineSimilarity; golden value.

  SimSiam takes the mean of both directions, negative_cosine(p1, z2) and (p2, z1). A zero vector
  has cosine 0 with everything.

  >>> losses.negative_cosine(jnp.eye(2), jnp.ones((2, 2))).round(4)
  Array([-0.7071, -0.7071], dtype=float32)
  """
  p, z = arguments.read(p=(p, "b d"), z=(z, "b d"))
  return -numerics.cosine(p, jax.lax.stop_gradient(z))


def normalized_l2(p: jax.Array, z: jax.Array) -> jax.Array:
  """Squared distance of unit vectors: [b d], [b d] -> [b], from 0 to 4.

  Formula: ||p/|p| - z/|z| ||² = 2 - 2 cos(p, z), no gradient into z.
  Source: BYOL, Grill et al. 2020, 2006.07733.
  Tested: NumPy; lightly NegativeCosineSimilarity; golden value.

  BYOL adds (does not average) its two directions; the mean halves the learning rate.

  >>> losses.normalized_l2(jnp.eye(2), 3 * jnp.eye(2))
  Array([0., 0.], dtype=float32)
  """
  p, z = arguments.read(p=(p, "b d"), z=(z, "b d"))
  difference = numerics.normalise(p) - numerics.normalise(jax.lax.stop_gradient(z))
  return jnp.square(difference).sum(-1)


def alignment(x: jax.Array, y: jax.Array, alpha: float = 2.0) -> jax.Array:
  """Distance of positive pairs on the sphere: [b d], [b d] -> [b].

  Formula: ||x/|x| - y/|y| ||^alpha.
  Source: Alignment and uniformity, Wang and Isola 2020, 2005.10242.
  Tested: NumPy; lightly HypersphereLoss; golden value.

  Both sides get a gradient. It is 0 for equal vectors, whatever alpha.

  >>> losses.alignment(jnp.eye(2), 2 * jnp.eye(2))
  Array([0., 0.], dtype=float32)
  """
  x, y = arguments.read(x=(x, "b d"), y=(y, "b d"))
  arguments.positive(alpha=alpha)
  square = jnp.square(numerics.normalise(x) - numerics.normalise(y)).sum(-1)
  apart = square > 0
  return jnp.where(apart, jnp.where(apart, square, 1.0) ** (alpha / 2), 0.0)


def uniformity(x: jax.Array, t: float = 2.0, weights: jax.Array | None = None) -> jax.Array:
  """How evenly a batch covers the sphere; lower is more even: [b d] -> [].

  Formula: log mean_{i<j} exp(-t ||x_i/|x_i| - x_j/|x_j| ||²).
  Source: Alignment and uniformity, Wang and Isola 2020, 2005.10242.
  Tested: NumPy; lightly HypersphereLoss; golden value.

  A collapsed batch gives 0. Rows of weight 0 are left out; the size of other weights does not
  matter. No pair: 0.

  >>> losses.uniformity(jnp.ones((4, 3)))
  Array(0., dtype=float32)
  """
  x, weights = arguments.read(x=(x, "b d"), weights=(arguments.numbers(weights), "?b"))
  arguments.at_least(2, x=x)
  arguments.positive(t=t)
  x = numerics.normalise(counted(x, weights))
  norm = jnp.square(x).sum(1)
  square = jnp.maximum(norm[:, None] + norm[None, :] - 2 * x @ x.T, 0.0)
  pairs = ~jnp.eye(len(x), dtype=bool)
  if weights is not None:
    pairs &= (weights[:, None] != 0) & (weights[None, :] != 0)
  some = pairs.any()
  total = numerics.logsumexp(-t * square.reshape(-1), pairs.reshape(-1))
  return jnp.where(some, total - jnp.log(jnp.maximum(pairs.sum(), 1)), 0.0).astype(x.dtype)


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
  h = constant - jax.nn.logsumexp(
    concentration * jnp.matmul(z, z.T, precision=numerics.EXACT), axis=1
  )
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
  m = arguments.at_least(4, reference=reference)
  if neighbours < 2:
    raise ValueError(f"neighbours must be at least 2, not {neighbours}")
  k = min(neighbours, m - 2)
  reference = jax.lax.stop_gradient(reference)
  centre = reference.mean(0)  # distances by scalar products lose less around 0
  x, reference = x - centre, reference - centre
  norms = jnp.square(x).sum(1)[:, None] + jnp.square(reference).sum(1)[None, :]
  square = norms - 2 * jnp.matmul(x, reference.T, precision=numerics.EXACT)
  nearest, _ = jax.lax.top_k(-square, k + 1)
  r = numerics.square_root(-nearest)
  a = r[:, 1:k].mean(1)
  rest = jnp.maximum(r[:, k] - a, 0.0) + eps
  some = (a > 0) & (rest > 0)
  lid = jnp.where(some, a, 1.0) / jnp.where(some, rest, 1.0)
  return -alpha * jnp.where(some, jnp.abs(jnp.log(lid)), 0.0)


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
  b = arguments.at_least(2, x=x)
  arguments.positive(eps=eps)
  counts = jnp.ones(b, bool) if weights is None else weights != 0
  x = numerics.normalise(jnp.where(counts[:, None], x, 0.0))
  near = jnp.matmul(x, x.T, precision=numerics.EXACT)
  allowed = counts[None, :] & ~jnp.eye(b, dtype=bool)
  neighbour = jnp.where(allowed, near, -2.0).argmax(1)
  distance = numerics.square_root(jnp.square(x - x[neighbour] + eps).sum(1))
  return jnp.where(counts & allowed.any(1), -jnp.log(distance + eps), 0.0)
