"""Regression at hidden places, region maps, spectra.

Letters: `b` examples, `m` places, `t` values a place, `h w c` a map, `k` regions. A loss is a mean
over the values of a place, then over the places (`masked_mean`). Originals take the second mean
over all hidden places of a batch: `over="batch"`. With as many hidden places in every example the
two agree in the mean over the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics

__all__ = (
  "focal_frequency_loss",
  "inpainting_l2",
  "masked_focal_l1",
  "masked_l1",
  "masked_l2",
  "masked_mean",
  "masked_smooth_l1",
  "region_bce",
  "second_moment_uniformity",
)


def masked_mean(
  values: jax.Array, weights: jax.Array | None = None, *, over: str = "example"
) -> jax.Array:
  """Mean over the places that count: [b m], weights [b m] -> [b].

  Formula: over="example": Σ_m w·v / Σ_m w; over="batch": b · Σ_m w·v / Σ_bm w.
  Source: MultiMAE, Bachmann et al. 2022, 2204.01678 (example); MAE, He et al. 2021, 2111.06377
    (batch).
  Tested: NumPy.

  The mean over the batch of the second is Σ w·v / Σ w over the whole batch, the reduction of MAE,
  SimMIM, BEiT and MaskFeat: an example with few hidden places counts less. weights are numbers or
  bool, all 1 by default; where they are all 0 the loss is 0 with zero gradient, also where values
  are not finite.

  >>> losses.masked_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[1, 0], [1, 1]])).tolist()
  [1.0, 6.0]
  """
  values, weights = arguments.read(
    values=(values, "b m"), weights=(arguments.numbers(weights), "?b m")
  )
  if over not in ("example", "batch"):
    raise ValueError(f'over must be "example" or "batch", not {over!r}')
  if weights is None:
    return values.sum(-1) / max(values.shape[1], 1)  # no places at all: 0, not 0/0
  if over == "example":
    return numerics.mean(values, weights, axis=-1)
  weights = weights.astype(values.dtype)
  count = weights.sum() / len(values)
  summed = (jnp.where(weights != 0, values, 0.0) * weights).sum(-1)
  return summed / jnp.where(count == 0, 1.0, count)


def _read(
  pred: Any, target: Any, weights: Any, letters: str = "b m t", of_weights: str = "?b m"
) -> tuple[Any, ...]:
  """Checked arrays; what does not count is 0, so that an infinity there has no gradient either."""
  pred, target, weights = arguments.read(
    pred=(pred, letters), target=(target, letters), weights=(arguments.numbers(weights), of_weights)
  )
  if weights is not None:
    some = weights if weights.ndim == pred.ndim else weights[..., None]
    pred, target = (jnp.where(some != 0, x, 0.0) for x in (pred, target))
  return pred, target, weights


def masked_l2(
  pred: jax.Array, target: jax.Array, weights: jax.Array | None = None, *, over: str = "example"
) -> jax.Array:
  """Squared error at hidden places: [b m t], [b m t], weights [b m] -> [b].

  Formula: masked_mean of mean_t (pred - target)².
  Source: MAE, He et al. 2021, 2111.06377; MaskFeat, Wei et al. 2021, 2112.09133 (over="batch").
  Tested: NumPy; torch; golden values (MAE with normalised and raw pixels); whole model against
    transformers' ViTMAEForPreTraining.

  Take the hidden places out first, or give all places and the mask as weights: it is the same.
  SparK adds 1e-8 to the number of places; MAE, MaskFeat and FCMAE add nothing.

  >>> losses.masked_l2(jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4))).tolist()
  [1.0, 1.0]
  """
  pred, target, weights = _read(pred, target, weights)
  return masked_mean(jnp.square(pred - target).mean(-1), weights, over=over)


def masked_l1(
  pred: jax.Array, target: jax.Array, weights: jax.Array | None = None, *, over: str = "example"
) -> jax.Array:
  """Absolute error at hidden places: [b m t], [b m t], weights [b m] -> [b].

  Formula: masked_mean of mean_t |pred - target|.
  Source: SimMIM, Xie et al. 2021, 2111.09886 (over="batch").
  Tested: NumPy; torch; golden value; whole model against transformers'
    ViTForMaskedImageModeling.

  SimMIM divides the sum over hidden pixels by their number plus 1e-5 and by the channels: the same
  to a relative 1e-5/count.

  >>> losses.masked_l1(jnp.ones((2, 3, 4)), -jnp.ones((2, 3, 4))).tolist()
  [2.0, 2.0]
  """
  pred, target, weights = _read(pred, target, weights)
  return masked_mean(jnp.abs(pred - target).mean(-1), weights, over=over)


def masked_smooth_l1(
  pred: jax.Array,
  target: jax.Array,
  beta: float = 1.0,
  weights: jax.Array | None = None,
  *,
  over: str = "example",
) -> jax.Array:
  """Smooth L1 at hidden places: [b m t], [b m t], weights [b m] -> [b].

  Formula: masked_mean of mean_t (0.5·e²/beta below |e| = beta, |e| - 0.5·beta above).
  Source: data2vec, Baevski et al. 2022, 2202.03555 (beta 2 for images).
  Tested: NumPy; torch smooth_l1_loss.

  The Huber loss is beta times this.

  >>> losses.masked_smooth_l1(jnp.full((1, 1, 2), 2.0), jnp.zeros((1, 1, 2)), beta=2.0).tolist()
  [1.0]
  """
  pred, target, weights = _read(pred, target, weights)
  arguments.positive(beta=beta)
  errors = optax.huber_loss(pred, target, delta=beta) / beta
  return masked_mean(errors.mean(-1), weights, over=over)


def masked_focal_l1(
  pred: jax.Array,
  target: jax.Array,
  weights: jax.Array | None = None,
  *,
  alpha: float = 0.2,
  gamma: float = 1.0,
  over: str = "example",
) -> jax.Array:
  """Absolute error that counts little where it is small: [b m t], [b m t], weights [b m] -> [b].

  Formula: masked_mean of mean_t |e|·(2σ(alpha·|e|) - 1)^gamma, e = pred - target.
  Source: A²MIM, Li et al. 2022, 2205.13943 (convolutional encoders); the weight from Yang et al.
    2021, 2102.09554.
  Tested: NumPy; torch.

  The weight is part of what is differentiated, as in the original. A²MIM divides by the number of
  hidden pixels plus 1e-5 and by the channels (over="batch" to a relative 1e-5/count), and its
  ResNet-50 counts visible places 1e-3: weights of 1 and 1e-3.

  >>> losses.masked_focal_l1(jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4))).shape
  (2,)
  """
  pred, target, weights = _read(pred, target, weights)
  arguments.positive(alpha=alpha, gamma=gamma)
  error = jnp.abs(pred - target)
  # tanh(x/2) = 2σ(x) - 1 without its cancellation. A power has no finite slope at 0 if gamma < 1.
  some = error > 0
  weight = jnp.tanh(0.5 * alpha * jnp.where(some, error, 1.0)) ** gamma
  return masked_mean((error * jnp.where(some, weight, 0.0)).mean(-1), weights, over=over)


def inpainting_l2(
  pred: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """Weighted squared error of maps: [b h w c], [b h w c], weights [b h w 1] -> [b].

  Formula: Σ_hw w·mean_c (pred - target)² / Σ_hw w.
  Source: Context Encoders, Pathak et al. 2016, 1604.07379.
  Tested: NumPy; torch.

  The original weighs the ring in which hole and context overlap 10 times, and divides by the number
  of pixels, not by the sum of the weights; it adds 0.001 of an adversarial term to 0.999 of this.

  >>> hole = jnp.zeros((2, 4, 4, 1)).at[:, 1:3, 1:3].set(1.0)
  >>> losses.inpainting_l2(jnp.ones((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3)), hole).tolist()
  [1.0, 1.0]
  """
  pred, target, weights = _read(pred, target, weights, "b h w c", "?b h w 1")
  errors = jnp.square(pred - target).mean(-1)
  weights = None if weights is None else weights.reshape(len(weights), -1)
  return masked_mean(errors.reshape(len(errors), -1), weights)


def region_bce(
  logits: jax.Array,
  regions: jax.Array,
  weights: jax.Array | None = None,
  *,
  background: float = 1.0,
  over: str = "example",
) -> jax.Array:
  """Binary cross-entropy of region maps: [b k m t], [b k m t], weights [b m] -> [b].

  Formula: masked_mean over places of mean_k mean_t BCE(σ(logits), regions).
  Source: R-MAE, Nguyen et al. 2023, 2306.05411 (over="batch").
  Tested: NumPy; torch binary_cross_entropy_with_logits.

  k regions an example (0 of them give 0), m patches of t pixels; regions are bool or numbers in
  0…1. background multiplies the error of pixels outside of a region; the mean still divides by all.

  >>> losses.region_bce(jnp.full((2, 5, 3, 4), 99.0), jnp.zeros((2, 5, 3, 4), bool)).tolist()
  [99.0, 99.0]
  """
  logits, regions, weights = arguments.read(
    logits=(logits, "b k m t"),
    regions=(arguments.numbers(regions), "b k m t"),
    weights=(arguments.numbers(weights), "?b m"),
  )
  arguments.positive(background=background)
  errors = optax.sigmoid_binary_cross_entropy(logits, regions)
  errors = jnp.where(regions == 0, background * errors, errors)
  # Not mean: k = 0 would be 0/0.
  return masked_mean(errors.mean(-1).sum(1) / max(errors.shape[1], 1), weights, over=over)


def focal_frequency_loss(
  pred: jax.Array,
  target: jax.Array,
  *,
  alpha: float = 1.0,
  average: bool = True,
  matrix: jax.Array | None = None,
) -> jax.Array:
  """Distance of spectra, weighted by itself: [b h w c], [b h w c] -> scalar; [b] without average.

  Formula: mean of w·d², d = |F(pred) - F(target)| of orthonormal 2-D Fourier transforms,
    w = sg(log(1 + d^alpha) / max log(1 + d^alpha)).
  Source: A²MIM, Li et al. 2022, 2205.13943; Focal Frequency Loss, Jiang et al. 2021, 2012.12821.
  Tested: NumPy; torch; golden values (with and without average).

  average=True, the original's setting, averages the spectra over the batch first: identical errors
  of opposite sign in two examples cancel, and the value is one for the batch. The largest d is that
  of the whole batch in both forms. matrix [h w c] (without average [b h w c]) replaces w.
  A²MIM adds 0.1 (ViT) or 0.5 (ResNet-50) of this to the spatial loss, with the visible part of the
  prediction replaced: jnp.where(hidden, pred, (stop_gradient(pred) + target) / 2).

  >>> losses.focal_frequency_loss(jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 3))).item()
  1.0
  """
  pred, target, matrix = arguments.read(
    pred=(pred, "b h w c"),
    target=(target, "b h w c"),
    matrix=(matrix, "?h w c" if average else "?b h w c"),
  )
  arguments.positive(alpha=alpha)
  # The transform is linear: that of the difference, and of its average.
  error = pred - target
  spectrum = jnp.fft.fft2(error.mean(0) if average else error, axes=(-3, -2), norm="ortho")
  square = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
  if matrix is None:
    distance = jax.lax.stop_gradient(square) ** (0.5 * alpha)
    matrix = jnp.log1p(distance)
    matrix = matrix / jnp.maximum(matrix.max(), jnp.finfo(matrix.dtype).tiny)
  return (jax.lax.stop_gradient(matrix) * square).mean((-3, -2, -1))


def second_moment_uniformity(z: jax.Array) -> jax.Array:
  """Penalty on features that point the same way: [b d] -> [b].

  Formula: mean over all j of the batch, i too, of cos(z_i, z_j)².
  Source: U-MAE, Zhang et al. 2022, 2210.08344.
  Tested: NumPy; golden value; 1/b for orthogonal features, 1 for identical ones.

  U-MAE adds 0.01 times this to MAE's loss, of the class token of the masked image. Its gradient
  reaches only the features of the own device; here it is that of the whole batch.

  >>> losses.second_moment_uniformity(jnp.eye(4)).tolist()
  [0.25, 0.25, 0.25, 0.25]
  """
  (z,) = arguments.read(z=(z, "b d"))
  z = numerics.normalise(z)
  # By the moments [d d]: no [b b], and only a sum over devices.
  moments = jnp.matmul(z.T, z, precision=numerics.EXACT) / len(z)
  return (jnp.matmul(z, moments, precision=numerics.EXACT) * z).sum(-1)
