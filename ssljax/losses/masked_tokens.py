"""Masked prediction of codes, and around it: codebooks, masked diffusion, ranks, colours.

Letters: `b` examples, `m` or `n` places, `k` codes or colours, `d` width, `v` vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics
from ssljax.losses.masked import masked_mean

__all__ = (
  "codebook_ce",
  "colorization_ce",
  "masked_diffusion_alpha",
  "masked_diffusion_ce",
  "masked_diffusion_weights",
  "quantise",
  "rank_loss",
  "update_codebook",
  "vq_commitment",
)


def codebook_ce(
  logits: jax.Array,
  codes: jax.Array,
  weights: jax.Array | None = None,
  *,
  smoothing: float = 0.0,
  over: str = "example",
) -> jax.Array:
  """Cross-entropy with codes of a tokenizer: [b m k], int [b m], weights [b m] -> [b].

  Formula: masked_mean over places of -(1-s)·log p(code) - s·mean_k log p(k), p softmax of logits.
  Source: BEiT, Bao et al. 2021, 2106.08254; MAGE, Li et al. 2022, 2211.09117 (smoothing 0.1).
  Tested: NumPy; torch cross_entropy with label_smoothing; ln k at equal logits.

  Both originals are over="batch": an example with few hidden places counts less. MAGE's vocabulary
  has more rows than codes: cut the logits to the codes before. Codes at places of weight 0 may be
  anything, -100 too.

  >>> codes = jnp.array([[3, 1], [0, 2]])
  >>> losses.codebook_ce(99 * jax.nn.one_hot(codes, 8), codes).tolist()
  [0.0, 0.0]
  """
  logits, codes = arguments.read(logits=(logits, "b m k"), codes=(codes, "b m:int"))
  if not 0 <= smoothing < 1:
    raise ValueError(f"smoothing must be in 0…1, 1 excluded, not {smoothing!r}")
  log_p = jax.nn.log_softmax(logits)
  at = jnp.clip(codes, 0, logits.shape[-1] - 1)[..., None]
  ce = -jnp.take_along_axis(log_p, at, axis=-1)[..., 0]
  if smoothing:
    ce = (1 - smoothing) * ce - smoothing * log_p.mean(-1)
  return masked_mean(ce, weights, over=over)


def quantise(
  z: jax.Array, codebook: jax.Array, *, normalise: bool = True
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
  """Nearest codes, straight through: [b n d], [k d] -> [b n d], int [b n], ([k d], [k]).

  Formula: code = argmin_k ‖z - e_k‖², quantised = z + sg(e_code - z); sums Σ z and counts by code.
  Source: BEiT v2, Peng et al. 2022, 2208.06366; VQ-VAE, van den Oord et al. 2017, 1711.00937.
  Tested: NumPy; golden codes and output; codes and output against transformers' Chameleon.

  normalise puts z on the unit sphere first (BEiT v2, whose codebook rows have length 1). The first
  of equally near codes is taken. The gradient passes to z as if nothing had happened, and none to
  the codebook: it moves by `update_codebook`, or by the loss of codebook[codes]. Sums and counts
  are over the whole batch; counts of 0 are unused codes.

  >>> quantised, codes, (sums, counts) = losses.quantise(jnp.eye(4)[None], jnp.eye(4)[::-1])
  >>> codes.tolist(), counts.tolist()
  ([[3, 2, 1, 0]], [1.0, 1.0, 1.0, 1.0])
  """
  z, codebook = arguments.read(z=(z, "b n d"), codebook=(codebook, "k d"))
  z = numerics.normalise(z) if normalise else z
  here, codebook = jax.lax.stop_gradient((z, codebook))
  # ‖z‖² is the same for all codes.
  products = jnp.matmul(here, codebook.T, precision=numerics.EXACT)
  distance = 0.5 * jnp.square(codebook).sum(-1) - products
  codes = distance.argmin(-1)
  flat, k = codes.reshape(-1), len(codebook)
  sums = jax.ops.segment_sum(here.reshape(flat.size, -1), flat, k)
  counts = jax.ops.segment_sum(jnp.ones(flat.size, z.dtype), flat, k)
  return z + (codebook[codes] - here), codes, (sums, counts)


def update_codebook(
  codebook: jax.Array, sums: jax.Array, counts: jax.Array, momentum: float = 0.99
) -> jax.Array:
  """A codebook on the unit sphere moves towards its members: [k d], [k d], [k] -> [k d].

  Formula: e ← unit(momentum·e + (1 - momentum)·unit(sums/counts)); unused codes stay.
  Source: BEiT v2, Peng et al. 2022, 2208.06366.
  Tested: NumPy; golden value.

  sums and counts come from `quantise`; on a sharded batch they are already global.

  >>> sums, counts = jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.array([5, 0])
  >>> print(losses.update_codebook(jnp.eye(2), sums, counts, momentum=0.0).round(3))
  [[0.6 0.8]
   [0.  1. ]]
  """
  codebook, sums, counts = arguments.read(
    codebook=(codebook, "k d"), sums=(sums, "k d"), counts=(arguments.numbers(counts), "k")
  )
  # Dividing by the count is lost in the length 1.
  target = jnp.where(counts[:, None] > 0, numerics.normalise(sums), codebook)
  moved = numerics.normalise(momentum * codebook + (1 - momentum) * target)
  return jax.lax.stop_gradient(moved)


def vq_commitment(
  z: jax.Array, quantised: jax.Array, weights: jax.Array | None = None, *, normalise: bool = True
) -> jax.Array:
  """Encoder's output held at its code: [b n d], [b n d], weights [b n] -> [b].

  Formula: masked_mean over places of mean_d (z - sg(quantised))².
  Source: BEiT v2, Peng et al. 2022, 2208.06366; VQ-VAE, van den Oord et al. 2017, 1711.00937.
  Tested: NumPy; golden value; transformers' Chameleon (with normalise=False and both terms).

  normalise puts z on the unit sphere, as in `quantise`. VQ-VAE's other term, which moves the
  codebook, is this with the arguments exchanged and codebook[codes] in place of quantised. BEiT v2
  has only this one, weight 1; VQ-VAE weighs it 0.25. Published code of VQGANs, Chameleon among it,
  weighs the other one.

  >>> losses.vq_commitment(jnp.ones((1, 2, 4)), jnp.zeros((1, 2, 4))).tolist()
  [0.25]
  """
  z, quantised = arguments.read(z=(z, "b n d"), quantised=(quantised, "b n d"))
  z = numerics.normalise(z) if normalise else z
  return masked_mean(jnp.square(z - jax.lax.stop_gradient(quantised)).mean(-1), weights)


def rank_loss(
  scores: jax.Array,
  errors: jax.Array,
  weights: jax.Array | None = None,
  *,
  over: str = "example",
) -> jax.Array:
  """Predicted ranks of the patches' losses: [b m], [b m], weights [b m] -> [b].

  Formula: mean over pairs with sg(errors)_i > sg(errors)_j of -log(σ(s_i - s_j) + 1e-6).
  Source: HPM, Wang et al. 2023, 2304.05919 (over="batch").
  Tested: NumPy; torch; golden values (this and the absolute form).

  errors are the losses of reconstruction patch by patch. Pairs lie inside one example; ties and
  places of weight 0 are in none. The original counts each pair twice, from both sides, which
  changes nothing. Its absolute form is masked_l2 of scores and standardised errors:
  masked_l2(scores[:, None], targets.normalised_pixels(errors[:, None])).

  >>> print(losses.rank_loss(jnp.array([[100.0, 0.0]]), jnp.array([[1.0, 2.0]])).round(2))
  [13.82]
  """
  scores, errors, weights = arguments.read(
    scores=(scores, "b m"), errors=(errors, "b m"), weights=(arguments.numbers(weights), "?b m")
  )
  errors = jax.lax.stop_gradient(errors)
  larger = errors[:, :, None] > errors[:, None, :]
  pairs = larger.astype(scores.dtype)
  if weights is not None:
    pairs = pairs * weights[:, :, None] * weights[:, None, :]
  # 1e-6 bounds a pair at 13.8: it is part of the published loss, not a guard.
  values = -jnp.log(jax.nn.sigmoid(scores[:, :, None] - scores[:, None, :]) + 1e-6)
  flat = (len(scores), -1)
  return masked_mean(values.reshape(flat), pairs.reshape(flat), over=over)


def _hidden_share(t: jax.Array, schedule: str | float) -> tuple[jax.Array, jax.Array]:
  """Share of hidden tokens at time t, before the squeeze by eps, and its slope: [b] -> [b], [b]."""
  if schedule == "cosine":
    angle = 0.5 * math.pi * t
    return jnp.sin(angle), 0.5 * math.pi * jnp.cos(angle)
  power = 1.0 if schedule == "linear" else schedule
  if not isinstance(power, (int, float)) or power < 1:
    raise ValueError(f'schedule must be "linear", "cosine" or a power from 1 on, not {schedule!r}')
  return t**power, power * t ** (power - 1)


def masked_diffusion_alpha(
  t: jax.Array, schedule: str | float = "linear", *, eps: float = 1e-4
) -> jax.Array:
  """Probability that a token is still visible at time t: [b] -> [b].

  Formula: α = eps + (1 - 2·eps)·a; a = 1 - t, 1 - cos(π/2·(1 - t)) or 1 - t^power.
  Source: MD4, Shi et al. 2024, 2406.04329.
  Tested: NumPy; every schedule goes from 1 - eps to eps.

  Draw times together: t = (u + i/b) mod 1 with one uniform u for a batch. Then hide each token with
  probability 1 - α.

  >>> print(losses.masked_diffusion_alpha(jnp.array([0.0, 0.5, 1.0])).round(2))
  [1.  0.5 0. ]
  """
  (t,) = arguments.read(t=(t, "b"))
  share, _ = _hidden_share(jax.lax.stop_gradient(t), schedule)
  return 1.0 - eps - (1.0 - 2.0 * eps) * share


def masked_diffusion_weights(
  t: jax.Array,
  schedule: str | float = "linear",
  *,
  eps: float = 1e-4,
  steps: int | None = None,
) -> jax.Array:
  """Weight of the cross-entropy of hidden tokens at time t: [b] -> [b].

  Formula: -α'(t)/(1 - α(t)); with T steps T·(α(t - 1/T) - α(t))/(1 - α(t)).
  Source: MD4, Shi et al. 2024, 2406.04329.
  Tested: NumPy; expected bound of a uniform prediction by quadrature; steps tend to no steps.

  About 1/t for "linear": large where few tokens are hidden; eps bounds it by 1/eps. With steps, t
  is one of 1/T … 1, in the mask too. The original writes the same as T·expm1(γ_t - γ_s)·α_s with
  γ the log odds of α.

  >>> print(losses.masked_diffusion_weights(jnp.array([0.25, 1.0])).round(2))
  [4. 1.]
  """
  (t,) = arguments.read(t=(t, "b"))
  t = jax.lax.stop_gradient(t)
  share, slope = _hidden_share(t, schedule)
  if steps is not None:
    arguments.positive(steps=steps)
    before, _ = _hidden_share(jnp.maximum(t - 1.0 / steps, 0.0), schedule)
    slope = steps * (share - before)
  return (1.0 - 2.0 * eps) * slope / (eps + (1.0 - 2.0 * eps) * share)


def masked_diffusion_ce(
  logits: jax.Array, ids: jax.Array, hidden: jax.Array, weights: jax.Array
) -> jax.Array:
  """Bound on the negative log-likelihood a token: [b n v], int [b n], bool [b n], [b] -> [b].

  Formula: weights·Σ_hidden -log p(id) / n, p softmax of logits.
  Source: MD4, Shi et al. 2024, 2406.04329.
  Tested: NumPy; expected bound of a uniform prediction; 0 where nothing is hidden.

  weights are `masked_diffusion_weights`. The divisor is all n places, never the hidden ones: that
  would be BERT's loss and no bound. In nats; add the constant eps·log v (reconstruction of the
  first step) and divide by log 2 for bits. Logits have no row for the mask id.

  >>> hidden = jnp.array([[True, False], [False, False]])
  >>> logits, ids, weights = jnp.zeros((2, 2, 8)), jnp.ones((2, 2), int), jnp.ones(2)
  >>> (losses.masked_diffusion_ce(logits, ids, hidden, weights) > 0).tolist()
  [True, False]
  """
  logits, ids, hidden, weights = arguments.read(
    logits=(logits, "b n v"),
    ids=(ids, "b n:int"),
    hidden=(hidden, "b n:bool"),
    weights=(weights, "b"),
  )
  at = jnp.clip(ids, 0, logits.shape[-1] - 1)
  ce = optax.softmax_cross_entropy_with_integer_labels(logits, at)
  return weights * jnp.where(hidden, ce, 0.0).mean(-1)


def colorization_ce(
  logits: jax.Array, soft_bins: jax.Array, class_weights: jax.Array | None = None
) -> jax.Array:
  """Cross-entropy of binned colours: [b h w k], [b h w k], class_weights [k] -> [b].

  Formula: mean over pixels of -v·Σ_k soft_bins·log softmax(logits), v the weight of the pixel's
    largest bin.
  Source: Colorful Image Colorization, Zhang et al. 2016, 1603.08511.
  Tested: NumPy; torch cross_entropy with soft labels.

  The original has 313 bins of ab, each pixel soft over its 5 nearest (Gaussian of 5), and weights
  ∝ 1/((1 - λ)·prior + λ/313) with λ 0.5 whose mean under the prior is 1. The mean divides by the
  pixels, not by the weights.

  >>> bins = jax.nn.one_hot(jnp.zeros((2, 4, 4), int), 313)
  >>> losses.colorization_ce(99 * bins, bins, jnp.ones(313)).tolist()
  [0.0, 0.0]
  """
  logits, soft_bins, class_weights = arguments.read(
    logits=(logits, "b h w k"),
    soft_bins=(soft_bins, "b h w k"),
    class_weights=(class_weights, "?k"),
  )
  ce = optax.softmax_cross_entropy(logits, soft_bins)
  if class_weights is not None:
    ce = ce * class_weights[soft_bins.argmax(-1)]
  return ce.mean((1, 2))
