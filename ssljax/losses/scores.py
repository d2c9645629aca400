"""Contrastive losses of given scores: the circle form, and AMDIM's over many places."""

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, pairs

__all__ = ("circle_contrast", "multi_scale_nce", "soft_clip")


def circle_contrast(
  positives: jax.Array,
  negatives: jax.Array,
  gamma: float | jax.Array,
  positive_mask: jax.Array | None = None,
  negative_mask: jax.Array | None = None,
) -> jax.Array:
  """Unified pair loss of similarities: positives [b p], negatives [b m] -> [b].

  Formula: log(1 + Σ_n exp(gamma·s_n) · Σ_p exp(-gamma·s_p)).
  Source: Circle loss, Sun et al. 2020, 2002.10857 (its equation 1 without margin); in MetAug, Li et
    al. 2022, 2203.05119.
  Tested: NumPy; one positive is InfoNCE with temperature 1/gamma.
  MetAug maps cosines to [0, 1] before; its code sets circle loss's adaptive weights to 1, as here.
  Masks: bool [b p] and [b m]; without a positive or without a negative the loss is 0.

  >>> losses.circle_contrast(jnp.ones((4, 2)), jnp.zeros((4, 8)), gamma=10.0).shape
  (4,)
  """
  arguments.positive(gamma=gamma)
  if not isinstance(gamma, (int, float)):
    arguments.read(gamma=(gamma, ""))
  positives, negatives, positive_mask, negative_mask = arguments.read(
    positives=(positives, "b p"),
    negatives=(negatives, "b m"),
    positive_mask=(positive_mask, "?b p:bool"),
    negative_mask=(negative_mask, "?b m:bool"),
  )
  gamma = pairs.capped(gamma, positives.dtype)
  every = jnp.ones((), bool)
  near = pairs.mass(-gamma * positives, every if positive_mask is None else positive_mask)
  far = pairs.mass(gamma * negatives, every if negative_mask is None else negative_mask)
  return jax.nn.softplus(near + far)


def soft_clip(s: jax.Array, c: float) -> jax.Array:
  """Scores softly clipped to (-c, c), any shape.

  Formula: c·tanh(s / c).
  Source: AMDIM, Bachman et al. 2019, 1906.00910.
  Tested: NumPy.

  >>> losses.soft_clip(jnp.array([0.0, 1000.0]), 20.0).tolist()
  [0.0, 20.0]
  """
  arguments.positive(c=c)
  (s,) = arguments.read(s=(s, "*"))
  return c * jnp.tanh(s / c)


def multi_scale_nce(
  source: jax.Array,
  target: jax.Array,
  image_id: jax.Array | None = None,
  clip: float = 20.0,
  reg: float = 0.05,
) -> tuple[jax.Array, jax.Array]:
  """One vector against all places of all images: [b d], [b l d], ids [b] -> nce [b], penalty [b].

  Formula: s = source·target / √d, c = clip·tanh(s / clip); nce_i = mean over own places l of
    -log(exp(c_iil) / (exp(c_iil) + Σ_{j of other images, l'} exp(c_ijl'))); penalty_i = reg · mean
    s², before clipping.
  Source: AMDIM, Bachman et al. 2019, 1906.00910.
  Tested: NumPy; zero scores give log(1 + number of negatives).
  The loss is the sum of both. Inputs are not normalised. image_id: rows of one id are not each
  other's negatives; without it each row is an image. AMDIM adds three pairs of scales (1 to 5, 1 to
  7, 5 to 5), each the mean over both directions between two views; reg is 0.04 in its costs.py.

  >>> nce, penalty = losses.multi_scale_nce(jnp.eye(4), jnp.ones((4, 9, 4)))
  >>> nce.shape, penalty.shape
  ((4,), (4,))
  """
  arguments.positive(clip=clip)
  source, target, image_id = arguments.read(
    source=(source, "b d"), target=(target, "b l d"), image_id=(image_id, "?b:int")
  )
  b, places, d = target.shape
  exact = jax.lax.Precision.HIGHEST
  scores = jnp.einsum("id,jld->ijl", source, target, precision=exact) / d**0.5
  own = jnp.einsum("id,ild->il", source, target, precision=exact) / d**0.5
  different = pairs.others(b) if image_id is None else image_id[:, None] != image_id
  different = jnp.repeat(different, places, axis=1)
  rest = pairs.mass(soft_clip(scores, clip).reshape(b, -1), different)
  nce = jax.nn.softplus(rest[:, None] - soft_clip(own, clip)).mean(-1)
  return nce, reg * jnp.square(scores).mean((1, 2))
