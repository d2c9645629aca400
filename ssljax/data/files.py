"""Reading many files or parts of files at once, and indexes of shards that are kept in a cache."""

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

THREADS = 16


class Shards:
  """Records inside large files, read in place with `os.pread`: no position is shared."""

  def __init__(self, paths: list[str], shard: np.ndarray, start: np.ndarray, length: np.ndarray):
    self.paths, self.shard, self.start, self.length = paths, shard, start, length
    self._open: dict[int, int] = {}
    self._lock = threading.Lock()
    self._pool = ThreadPoolExecutor(THREADS)

  def read(self, index: Sequence[int] | np.ndarray) -> list[bytes]:
    """Bytes of the records; "" where the disk fails."""
    return in_parallel(self._pool, self._one, index)

  def _one(self, index: int) -> bytes:
    shard = int(self.shard[index])
    try:
      with self._lock:
        if shard not in self._open:
          self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
      return os.pread(self._open[shard], int(self.length[index]), int(self.start[index]))
    except OSError:
      return b""

  def close(self):
    """Close what was opened."""
    self._pool.shutdown()
    while self._open:
      os.close(self._open.popitem()[1])


def in_parallel(pool: ThreadPoolExecutor, read_one: Callable, index) -> list:
  """`read_one` of each index in order, in a few long pieces: a task per file costs too much."""
  index = [int(i) for i in index]
  if len(index) < 2 * THREADS:
    return [read_one(i) for i in index]
  step = -(-len(index) // THREADS)
  pieces = [index[i : i + step] for i in range(0, len(index), step)]
  return [
    one for piece in pool.map(lambda part: [read_one(i) for i in part], pieces) for one in piece
  ]


def cached_index(
  path: str, kind: str, build: Callable, cache_dir: str | None
) -> dict[str, np.ndarray]:
  """`build(path)`, a dict of arrays, kept in the cache until the file's size or time changes."""
  state = os.stat(path)
  name = f"{kind}2:{os.path.abspath(path)}:{state.st_size}:{state.st_mtime_ns}"
  key = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
  stored = os.path.join(cache_dir or default_cache(), f"{kind}_{key}.npz")
  try:
    with np.load(stored, allow_pickle=False) as arrays:
      return dict(arrays)
  except FileNotFoundError:
    pass
  except Exception as error:  # a damaged cache is only worth a rebuild
    logging.warning("index %s cannot be read (%s): built again", stored, str(error).splitlines()[0])
  arrays = build(path)
  try:
    os.makedirs(os.path.dirname(stored), exist_ok=True)
    with tempfile.NamedTemporaryFile(
      dir=os.path.dirname(stored), suffix=".npz", delete=False
    ) as file:
      np.savez(file, **arrays)
    os.replace(file.name, stored)
  except OSError as error:
    logging.warning("index of %s cannot be kept in %s: %s", path, os.path.dirname(stored), error)
  return arrays


def default_cache() -> str:
  """Where indexes are kept: $XDG_CACHE_HOME/ssljax or ~/.cache/ssljax."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(base, "ssljax")


def text_digest(lines) -> str:
  """Hash of text lines, for fingerprints."""
  state = hashlib.blake2b(digest_size=16)
  for line in lines:
    state.update(line.encode("utf-8", "surrogateescape") + b"\n")
  return state.hexdigest()
