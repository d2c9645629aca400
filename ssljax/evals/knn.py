"""Weighted k-nearest-neighbour classification of frozen features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ssljax.evals.features import Features, class_ids


def knn(
  train: Features,
  test: Features,
  *,
  k: tuple[int, ...] = (10, 20, 100, 200),
  temperature: float = 0.07,
  query_tile: int = 1024,
  bank_tile: int = 16384,
) -> dict[str, float]:
  """Top-1 accuracy (0..1) of weighted k-NN: train [n d], test [m d] -> {"knn_k20_T0.07/top1": …}.

  Cosine similarity; each of the k nearest train examples votes for its class with the weight
  exp(similarity / temperature) (Wu et al. 2018, 1805.01978; DINO, Caron et al. 2021, 2104.14294).
  A k above the number of train examples is capped there, and the key says the k that was used.

  Raises:
    ValueError: labels missing or useless (see `class_ids`), k < 1, temperature <= 0.
  """
  ks = (k,) if isinstance(k, int) else tuple(k)
  if not ks or min(ks) < 1:
    raise ValueError(f"knn: every k must be at least 1, got {ks}")
  if not temperature > 0:
    raise ValueError(f"knn: temperature must be above 0, got {temperature}")
  classes, train_ids, test_ids = class_ids(train, test, "knn")
  ks = tuple(sorted({min(one, len(train_ids)) for one in ks}))
  similarity, place = neighbours(
    train.pooled, test.pooled, ks[-1], query_tile=query_tile, bank_tile=bank_tile
  )
  # Relative to the nearest one: the same votes, and no overflow at small temperatures.
  weight = np.exp((similarity - similarity[:, :1]).astype(np.float64) / temperature)
  slot = np.arange(len(test_ids))[:, None] * len(classes) + train_ids[place]
  results = {}
  for one in ks:
    # On the host: bincount adds in a fixed order, a scatter on a GPU does not.
    shape = len(test_ids) * len(classes)
    votes = np.bincount(slot[:, :one].ravel(), weight[:, :one].ravel(), minlength=shape)
    guess = votes.reshape(len(test_ids), len(classes)).argmax(1)
    results[f"knn_k{one}_T{temperature:g}/top1"] = float(np.mean(guess == test_ids))
  return results


def neighbours(
  bank: np.ndarray,
  queries: np.ndarray,
  k: int,
  *,
  query_tile: int = 1024,
  bank_tile: int = 16384,
) -> tuple[np.ndarray, np.ndarray]:
  """Exact k nearest by cosine: bank [n d], queries [m d] -> similarity [m k], row of bank [m k].

  Nearest first; equal similarities in the order of the bank. On the device lie the queries, their
  k best so far, one tile of the bank and one query_tile x bank_tile table; the bank passes once.
  """
  if not 1 <= k <= len(bank):
    raise ValueError(f"{k} neighbours asked for, but there are {len(bank)} train examples")
  bank_tile, query_tile = min(bank_tile, len(bank)), min(query_tile, len(queries))
  tiles = []
  for start in range(0, len(queries), query_tile):
    tile = _unit_rows(queries[start : start + query_tile], query_tile)
    best = jnp.full((query_tile, k), -jnp.inf, jnp.float32)
    tiles.append((best, jnp.zeros((query_tile, k), jnp.int32), jnp.asarray(tile)))
  for start in range(0, len(bank), bank_tile):
    part = jnp.asarray(_unit_rows(bank[start : start + bank_tile], bank_tile))
    tiles = [
      (*_merge(best, place, query, part, start, len(bank)), query) for best, place, query in tiles
    ]
  similarity = np.concatenate([np.asarray(best) for best, _, _ in tiles])[: len(queries)]
  return similarity, np.concatenate([np.asarray(place) for _, place, _ in tiles])[: len(queries)]


@partial(jax.jit, donate_argnums=(0, 1))
def _merge(best, place, queries, bank, start, size):
  """The k best of those so far and one more tile: [q k], [q k], [q d], [t d] -> [q k], [q k]."""
  # highest: the default is TF32 on GPUs and bfloat16 on TPUs, which reorders neighbours.
  similarity = jnp.einsum("qd,td->qt", queries, bank, precision="highest")
  row = start + jnp.arange(bank.shape[0], dtype=jnp.int32)
  similarity = jnp.where(row < size, similarity, -jnp.inf)
  # What was found earlier comes first: top_k keeps the order of equals, so ties follow the bank.
  every = jnp.concatenate([best, similarity], 1)
  rows = jnp.concatenate([place, jnp.broadcast_to(row, similarity.shape)], 1)
  best, at = jax.lax.top_k(every, best.shape[1])
  return best, jnp.take_along_axis(rows, at, 1)


def _unit_rows(rows: np.ndarray, size: int) -> np.ndarray:
  """Rows of length 1, padded with zero rows: [r d] -> [size d] float32."""
  rows = np.asarray(rows, np.float32)
  # float64 for the length: squares of large features overflow float32.
  length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
  unit = (rows / np.maximum(length, 1e-12)).astype(np.float32)
  return np.pad(unit, ((0, size - len(unit)), (0, 0)))
