"""Which example stands at which place: a function of (seed, step, row), for any hosts."""

import functools
import zlib
from typing import NamedTuple

import numpy as np

# Above this size a stored permutation costs seconds and hundreds of megabytes per epoch.
LARGE = 10_000_000


class Plan(NamedTuple):
  """What batch `step` shall hold: epoch, offset and index int64 [b] (offset -1: do not replace)."""

  epoch: np.ndarray
  offset: np.ndarray
  index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody calls


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  """Order of one epoch: int64 [size], a permutation keyed by (seed, epoch)."""
  order = np.random.default_rng([seed, epoch]).permutation(size)
  order.setflags(write=False)
  return order


def shuffle_large(offset: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
  """Images of int64 [k] offsets under a keyed bijection of 0..size-1, without storing it.

  Eight rounds: four (the default of `tf.random.experimental.index_shuffle`) mix too little.
  """
  from ssljax.data.tensorflow import load

  tf = load()
  words = np.random.SeedSequence([seed, epoch]).generate_state(3, np.uint32)
  last = np.full(len(offset), size - 1, np.int64)
  keys = np.broadcast_to(words, (len(offset), 3))
  with tf.device("/CPU:0"):
    image = tf.raw_ops.RandomIndexShuffle(
      index=np.asarray(offset, np.int64), seed=keys, max_index=last, rounds=8
    )
  return image.numpy()


def places(
  step: int, batch_size: int, rows: np.ndarray, size: int, seed: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Epoch, offset in the epoch and example index of the given rows of global batch `step`: int64
  [k] each.

  Epochs follow each other without a gap, so that a batch may hold the end of one and the start of
  the next.
  """
  epoch, offset = np.divmod(step * batch_size + np.asarray(rows, np.int64), size)
  if not shuffle:
    return epoch, offset, offset.copy()
  index = np.empty_like(offset)
  for one in np.unique(epoch):
    here = epoch == one
    if size > LARGE:
      index[here] = shuffle_large(offset[here], size, seed, int(one))
    else:
      index[here] = permutation(size, seed, int(one))[offset[here]]
  return epoch, offset, index


def substitutes(size: int, seed: int, epoch: int, offset: int, limit: int = 100) -> np.ndarray:
  """Indices to try, in order, in place of the unreadable example at this offset: int64 [<= limit].

  A function of the place alone, so that every host and every resumed run replaces by the same
  example.
  """
  rng = np.random.default_rng([seed, epoch, offset, zlib.crc32(b"substitute")])
  if size <= LARGE // 100:
    return rng.permutation(size)[:limit]
  return rng.integers(size, size=limit)


def keys(seed: int, epoch: np.ndarray, index: np.ndarray, name: str) -> np.ndarray:
  """Key of each example for the draws `name`: uint64 [b 2]; seed, epoch, index of 32 bits."""
  epoch, index = np.broadcast_arrays(np.asarray(epoch, np.uint64), np.asarray(index, np.uint64))
  first = (zlib.crc32(name.encode()) << 32) | (seed & 0xFFFFFFFF)
  second = (epoch << np.uint64(32)) | (index & np.uint64(0xFFFFFFFF))
  return np.stack([np.full_like(second, first), second], axis=-1)
