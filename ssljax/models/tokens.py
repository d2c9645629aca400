"""Tokens over an r-dimensional grid: cut, hide, gather, fill. The same for images, video and sound.

Letters: `b` batch, `s1…sr` sizes of one example, `g1…gr` grid, `n = g1·…·gr` tokens, `p` values in
a patch, `d` width, `k` kept tokens, `m` hidden tokens.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def grid_of(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
  """The grid of an example of `shape` (s1…sr) cut into patches of size `patch` (p1…pr).

  Raises:
    ValueError: a size is no multiple of its patch, or the numbers of axes differ.
  """
  if len(shape) != len(patch):
    raise ValueError(f"an example with axes {tuple(shape)} cannot be cut by patch {tuple(patch)}")
  for axis, (size, step) in enumerate(zip(shape, patch)):
    if size % step:
      below, above = size // step * step, (size // step + 1) * step
      raise ValueError(
        f"image size {size} (axis {axis}) is not divisible by patch size {step};"
        f" use {f'{below} or {above}' if below else above}, or another patch"
      )
  return tuple(size // step for size, step in zip(shape, patch))


def patchify(x: jax.Array, patch: Sequence[int]) -> jax.Array:
  """Cuts examples into patches: [b s1…sr c] -> [b n p].

  The grid is row-major (last axis fastest); the values of a token are ordered (p1, …, pr, c), the
  order of MAE (He et al. 2021, 2111.06377).
  """
  b, *shape, c = x.shape
  grid = grid_of(shape, patch)
  r = len(grid)
  x = x.reshape(b, *(i for pair in zip(grid, patch) for i in pair), c)
  x = x.transpose(0, *range(1, 2 * r, 2), *range(2, 2 * r + 1, 2), 2 * r + 1)
  return x.reshape(b, math.prod(grid), math.prod(patch) * c)


def unpatchify(tokens: jax.Array, grid: Sequence[int], patch: Sequence[int]) -> jax.Array:
  """The exact inverse of `patchify`: [b n p] -> [b s1…sr c]."""
  b, n, p = tokens.shape
  r, c = len(grid), p // math.prod(patch)
  if n != math.prod(grid) or c * math.prod(patch) != p:
    raise ValueError(f"tokens [{n} {p}] do not fill grid {tuple(grid)} of patches {tuple(patch)}")
  x = tokens.reshape(b, *grid, *patch, c)
  x = x.transpose(0, *(i for a in range(1, r + 1) for i in (a, a + r)), 2 * r + 1)
  return x.reshape(b, *(g * s for g, s in zip(grid, patch)), c)


def split_hidden(hidden: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Places that stay and places that are hidden: bool [… n] -> int32 [… n-count], [… count].

  Both are sorted. `count` is static and must be the number of hidden places of every example: the
  samplers of `data/masking.py` see to that.
  """
  order = jnp.argsort(hidden, axis=-1, stable=True).astype(jnp.int32)
  kept = hidden.shape[-1] - count
  return order[..., :kept], order[..., kept:]


def hide_attended(
  scores: jax.Array, count: jax.Array, keys: jax.Array | None = None, reveal: Sequence[float] = ()
) -> jax.Array:
  """Hides the places with the highest scores: float [b n], int [b] -> bool [b n].

  With `reveal` (low, high), as a share of all places, some are shown again: a number between these
  shares, of the first tenth by score, drawn with keys [b].
  Source: AttMask-High, and -Hint with reveal=(.01, .05), Kakogeorgiou et al. 2022, 2203.12719;
  scores are the teacher's attention. Ties are hidden in the order of the places.
  """
  n = scores.shape[-1]
  rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
  hidden = rank < count[:, None]
  if not reveal:
    return hidden

  def shown(key, rank):
    share, places = jax.random.split(key)
    number = (jax.random.uniform(share, minval=reveal[0], maxval=reveal[1]) * n).astype(jnp.int32)
    drawn = jnp.where(rank < n // 10, jax.random.uniform(places, (n,)), jnp.inf)
    order = jnp.argsort(jnp.argsort(drawn))
    return order < jnp.minimum(number, n // 10)

  return hidden & ~jax.vmap(shown)(keys, rank)


def take(tokens: jax.Array, places: jax.Array) -> jax.Array:
  """Gathers tokens at places: [… n d], [… k] -> [… k d]. A table [n d] gives its rows likewise."""
  if tokens.ndim == 2:
    return tokens[places]
  return jnp.take_along_axis(tokens, places[..., None], axis=-2)


def fill(tokens: jax.Array, hidden: jax.Array, keep: jax.Array, vector: jax.Array) -> jax.Array:
  """Puts kept tokens back at their places and one vector everywhere else.

  tokens [b k d], hidden bool [b n], keep int32 [b k], vector [d] -> [b n d].
  """
  b, n = hidden.shape
  full = jnp.broadcast_to(vector.astype(tokens.dtype), (b, n, tokens.shape[-1]))
  return jax.vmap(lambda row, at, new: row.at[at].set(new, unique_indices=True))(full, keep, tokens)


def replace(tokens: jax.Array, hidden: jax.Array, vector: jax.Array) -> jax.Array:
  """Exchanges hidden tokens for one vector: [b n d], bool [b n], [d] -> [b n d]."""
  return jnp.where(hidden[..., None], vector.astype(tokens.dtype), tokens)
