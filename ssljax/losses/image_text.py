"""Losses of pairs from two modalities: row i of one belongs to row i of the other.

FLIP (Li et al. 2022, 2212.00794) is `clip_loss` with an encoder that sees half of the patches, and
the contrast of SLIP (Mu et al. 2021, 2112.12750) is `clip_loss` with `row_only_grad`. MACRL pairs
two branches with unequal masks.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, contrastive, masked, pairs

__all__ = ("clip_loss", "masked_contrast", "siglip_loss")


def clip_loss(
  image: jax.Array,
  text: jax.Array,
  scale: float | jax.Array,
  row_only_grad: bool = False,
  weights: jax.Array | None = None,
) -> jax.Array:
  """CLIP's cross-entropy over both modalities: [b d], [b d], [] -> [b].

  Formula: ½·(-log softmax_j(s·cos(image_i, text_j))_i - log softmax_j(s·cos(text_i, image_j))_i).
  Source: CLIP, Radford et al. 2021, 2103.00020.
  Tested: NumPy; transformers CLIPModel; golden value.

  `scale` is s = 1/temperature: exp of a learnt parameter that starts at ln(1/0.07) and is clipped
  to s ≤ 100 after the optimiser's step, without weight decay. Two equal captions in a batch are
  each other's negatives. `row_only_grad`: an embedding learns from its own row only, as in the
  published runs of SLIP, which gathered the columns without gradient; the value is the same.
  `weights`: [b], how much a pair counts as a negative; 0 is padding, no one's negative, loss 0.

  >>> losses.clip_loss(jnp.eye(4), jnp.eye(4), scale=1 / 0.07).shape
  (4,)
  """
  scale = number("scale", scale)
  image, text, weights = pairs.read(1.0, weights, image=image, text=text)
  scale = pairs.capped(scale, image.dtype)
  columns = (image, text)
  if row_only_grad:
    columns = jax.lax.stop_gradient(columns)
  across = scale * pairs.products(image, columns[1])
  # The columns of one matrix, not the rows of its transpose: that one would be gathered whole when
  # the batch is sharded.
  down = scale * pairs.products(columns[0], text) if row_only_grad else across
  others = pairs.others(len(image))
  by_image = pairs.mass(across, others, weights)
  by_text = pairs.mass(down, others, None if weights is None else weights[:, None], axis=0)
  by_image -= scale * (image * columns[1]).sum(-1)
  by_text -= scale * (columns[0] * text).sum(-1)
  return pairs.keep((jax.nn.softplus(by_image) + jax.nn.softplus(by_text)) / 2, weights)


def siglip_loss(
  image: jax.Array,
  text: jax.Array,
  t: float | jax.Array,
  b: float | jax.Array,
  weights: jax.Array | None = None,
) -> jax.Array:
  """SigLIP's sigmoid loss of all pairs: [b d], [b d], [], [] -> [b].

  Formula: Σ_j softplus(-y_ij·(t·cos(image_i, text_j) + b)), y_ii = 1, else -1.
  Source: SigLIP, Zhai et al. 2023, 2303.15343.
  Tested: NumPy; transformers SiglipModel; golden value.

  A sum over texts: its mean over the batch divides by the images, not by the pairs. `t` is exp of a
  learnt parameter that starts at ln 10; the learnt bias `b` starts at -10, without which the many
  negatives dominate the first steps. `weights` as in `clip_loss`.

  >>> losses.siglip_loss(jnp.eye(4), jnp.eye(4), t=10.0, b=-10.0).shape
  (4,)
  """
  t, b = number("t", t), number("b", b, positive=False)
  image, text, weights = pairs.read(1.0, weights, image=image, text=text)
  t, b = pairs.capped(t, image.dtype), jnp.asarray(b, image.dtype)
  logits = t * pairs.products(image, text) + b
  own = jnp.eye(len(image), dtype=bool)
  terms = jax.nn.softplus(jnp.where(own, -logits, logits))
  if weights is not None:
    terms = terms * jnp.where(own, 1.0, weights)
  return pairs.keep(terms.sum(-1), weights)


def masked_contrast(
  z_weak: jax.Array,
  z_strong: jax.Array,
  reconstruction_weak: jax.Array,
  reconstruction_strong: jax.Array,
  patches: jax.Array,
  hidden_weak: jax.Array,
  hidden_strong: jax.Array,
  temperature: float | jax.Array = 0.2,
  reconstruction_weight: float | jax.Array = 1.0,
) -> jax.Array:
  """MACRL: contrast of two masked branches and their L1: [b d] ×2, [b n t] ×3, [b n] ×2 -> [b].

  Formula: nt_xent(z_weak, z_strong, T) + reconstruction_weight · Σ_branch masked_l1(branch).
  Source: MACRL, Yao et al. 2022, 2211.06012.
  Tested: NumPy.

  z: pooled over the visible tokens of the branch with few and of that with many hidden places.
  hidden: 1 where a place was hidden (numbers or bool). No code was published: weights are a guess
  to be tuned, and the paper's negatives come from a memory bank, for which see `info_nce_queue`;
  here they are the batch's. With reconstruction_weight 0 it is SimCLR.

  >>> z, x, hidden = jnp.eye(4), jnp.ones((4, 2, 3)), jnp.ones((4, 2))
  >>> losses.masked_contrast(z, z, x, x, x, hidden, hidden).shape
  (4,)
  """
  weight = number("reconstruction_weight", reconstruction_weight, positive=False)
  weak = masked.masked_l1(reconstruction_weak, patches, hidden_weak)
  strong = masked.masked_l1(reconstruction_strong, patches, hidden_strong)
  return contrastive.nt_xent(z_weak, z_strong, temperature) + weight * (weak + strong)


def number(name: str, value: Any, positive: bool = True) -> float | jax.Array:
  """A Python number, or a learnt one: a floating array without axes.

  Raises:
    TypeError: neither of the two.
    ValueError: a number that is not positive though it must be, an array with axes.
  """
  if not isinstance(value, (int, float)):
    return arguments.read(**{name: (value, "")})[0]
  if positive:
    arguments.positive(**{name: value})
  return value
