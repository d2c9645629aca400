"""Sums over the negatives of a row that never hold the whole matrix: the work behind `tiled`."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ssljax.losses import pairs

__all__: tuple[str, ...] = ()


class Walk(NamedTuple):
  """How to go through the columns.

  kind: "exp" for log Σ exp, "sigmoid" for Σ softplus.
  tile: columns at a time; None takes all that a device holds.
  axis: the mesh axis around which columns are passed (inside `jax.shard_map`); None: no passing.
  """

  kind: Literal["exp", "sigmoid"]
  tile: int | None
  axis: str | None = None


def negatives(
  walk: Walk,
  q: jax.Array,
  k: jax.Array,
  weights: jax.Array,
  scale: jax.Array,
  bias: float | jax.Array = 0.0,
) -> jax.Array:
  """Per row, log Σ_j w_j exp(x_ij) or Σ_j w_j softplus(x_ij), j ≠ i: [b d], [b d], [b] -> [b].

  x_ij = scale·q_i·k_j + bias. The gradient goes to all but the weights. Without any w_j > 0, log Σ
  exp is a large negative number with gradient 0.
  """
  scale, bias = jnp.asarray(scale, q.dtype), jnp.asarray(bias, q.dtype)
  if walk.axis is not None:
    # Every device sums its share of these numbers' gradient; the cast's transpose adds the shares.
    scale, bias = jax.lax.pcast((scale, bias), walk.axis, to="varying")
  return _negatives(walk, q, k, weights, scale, bias)


Arrays = tuple[jax.Array, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _negatives(
  walk: Walk, q: jax.Array, k: jax.Array, weights: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
  def visit(total, held, own):
    def add(total, tile):
      logits, _, counts = _logits(q, scale, bias, own, *tile)
      if walk.kind == "exp":
        return jnp.logaddexp(total, pairs.mass(logits, counts, tile[1])), None
      return total + jnp.where(counts, tile[1] * jax.nn.softplus(logits), 0.0).sum(-1), None

    return jax.lax.scan(add, total, _tiles(*held, walk.tile))[0], held

  # Not -inf, which would give NaN without negatives; the first tile's sum outweighs it.
  start = jnp.finfo(q.dtype).min / 4 if walk.kind == "exp" else 0.0
  return _go_round(walk, visit, jnp.full_like(q[:, 0], start), (k, weights))[0]


def _forward(walk: Walk, *inputs: jax.Array) -> tuple[jax.Array, Arrays]:
  total = _negatives(walk, *inputs)
  return total, (*inputs, total)


def _backward(walk: Walk, kept: Arrays, cotangent: jax.Array) -> Arrays:
  q, k, weights, scale, bias, total = kept

  def visit(sums, held, own):
    def add(sums, tile):
      logits, products, counts = _logits(q, scale, bias, own, *tile)
      slope = jnp.exp(logits - total[:, None]) if walk.kind == "exp" else jax.nn.sigmoid(logits)
      slope = jnp.where(counts, tile[1] * slope, 0.0) * cotangent[:, None]
      more = scale * _product(slope, tile[0]), (slope * products).sum(), slope.sum()
      return jax.tree.map(jnp.add, sums, more), scale * _product(slope.T, q)

    k, weights, for_k = held
    sums, tiles = jax.lax.scan(add, sums, _tiles(k, weights, walk.tile))
    # The strides of _tiles undone.
    return sums, (k, weights, for_k + tiles.swapaxes(0, 1).reshape(-1, q.shape[1])[: len(k)])

  sums = jax.tree.map(jnp.zeros_like, (q, scale, bias))
  sums, (_, _, for_k) = _go_round(walk, visit, sums, (k, weights, jnp.zeros_like(k)))
  for_q, for_scale, for_bias = sums
  return for_q, for_k, jnp.zeros_like(weights), for_scale, for_bias


_negatives.defvjp(_forward, _backward)


def _go_round(walk: Walk, visit: Callable[..., Any], sums: Any, held: Any) -> tuple[Any, Any]:
  """`visit` for every device's block in turn; what is held goes round once and comes home."""
  if walk.axis is None:
    return visit(sums, held, True)
  devices = jax.lax.axis_size(walk.axis)
  to_next = [(i, (i + 1) % devices) for i in range(devices)]

  def step(carry, turn):
    sums, held = visit(*carry, turn == 0)
    return (sums, jax.lax.ppermute(held, walk.axis, to_next)), None

  return jax.lax.scan(step, (sums, held), jnp.arange(devices))[0]


def _tiles(k: jax.Array, weights: jax.Array, tile: int | None) -> Arrays:
  """[c d], [c] -> [n tile d], [n tile], and the places [n tile] they had; filled with weight 0.

  Strided, tile t has the columns t, t + n, …: neighbours live on one device, so that each tile of
  a sharded batch is spread over all devices.
  """
  tile = min(tile or len(k), len(k))
  turns = -(-len(k) // tile)
  fill = turns * tile - len(k)

  def cut(x):
    x = jnp.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(tile, turns, *x.shape[1:]).swapaxes(0, 1)

  return cut(k), cut(weights), cut(jnp.arange(len(k)))


def _logits(
  q: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  own: bool | jax.Array,
  k: jax.Array,
  weights: jax.Array,
  places: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Logits and products [b tile], and which of them are of negatives."""
  products = pairs.products(q, k)
  positive = jnp.logical_and(jnp.arange(len(q))[:, None] == places, own)
  return scale * products + bias, products, (weights > 0) & ~positive


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision="highest")
