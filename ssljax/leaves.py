"""The leaves of a state by name, and what a checkpoint notes down to check them by.

A leaf's name is its path: `params/block_0/mlp/fc1/kernel`, `opt/0/mu/stem/bias`, `rng`.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Misfit(Exception):
  """The saved leaves are sound but not those that were asked for."""


def named(tree: Any) -> dict[str, Any]:
  """{name: leaf} in the order of the tree. ValueError when two leaves have the same name."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  result = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
  if len(result) < len(leaves):
    raise ValueError("two leaves of the state have the same name: a key of it contains '/'")
  return result


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
  """Dicts within dicts from {name: leaf}."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
  return tree


def is_key(leaf: Any) -> bool:
  """Whether this array (or its shape) holds typed PRNG keys."""
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(state: Any) -> tuple[dict[str, jax.Array], dict[str, dict]]:
  """Arrays to save (keys as their data, nothing for empty leaves), and a JSON entry per leaf."""
  arrays, entries = {}, {}
  for name, leaf in named(state).items():
    leaf = jnp.asarray(leaf)
    entries[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if is_key(leaf):
      entries[name]["key"] = str(jax.random.key_impl(leaf))
      leaf = jax.random.key_data(leaf)
    if leaf.size:  # orbax refuses arrays without elements
      arrays[name] = leaf
  for name, checksum in checksums(arrays).items():
    entries[name]["sum"] = checksum
  return arrays, entries


def undescribe(array: Any, entry: dict) -> Any:
  """The leaf again: keys become typed keys of the kind that was saved."""
  return jax.random.wrap_key_data(array, impl=entry["key"]) if "key" in entry else array


def check_fit(entries: dict[str, dict], abstract_state: Any) -> None:
  """Misfit unless names, shapes and types are those of `abstract_state`."""
  asked = named(abstract_state)
  for names, word in ((asked.keys() - entries, "lacks"), (entries.keys() - asked, "also has")):
    if names:
      more = f" and {len(names) - 3} more" if len(names) > 3 else ""
      raise Misfit(f"{word} {', '.join(sorted(names)[:3])}{more}: it was saved by other settings")
  for name, leaf in asked.items():
    was, now = (entries[name]["shape"], entries[name]["dtype"]), (list(leaf.shape), str(leaf.dtype))
    if was != now:
      raise Misfit(f"has {name} as {was[1]}{was[0]}, but the settings make it {now[1]}{now[0]}")


def check_sums(entries: dict[str, dict], arrays: dict[str, Any]) -> None:
  """ValueError naming a leaf whose bits are not those that were saved."""
  sums = checksums(arrays)
  wrong = sorted(name for name, checksum in sums.items() if checksum != entries[name].get("sum"))
  if wrong:
    more = f" and {len(wrong) - 1} more leaves" if len(wrong) > 1 else ""
    raise ValueError(f"{wrong[0]}{more} changed on disk (checksum)")


def sign(manifest: dict) -> dict:
  """Adds the digest of the manifest itself, after a round trip through JSON (tuples, int keys)."""
  manifest = json.loads(json.dumps(manifest, allow_nan=False))
  return manifest | {"sha256": _digest(manifest)}


def unsign(manifest: dict) -> dict:
  """The manifest without its digest. ValueError when they do not agree."""
  manifest = dict(manifest)
  if manifest.pop("sha256", None) != _digest(manifest):
    raise ValueError("the manifest does not match its own checksum")
  return manifest


def _digest(manifest: dict) -> str:
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def checksums(arrays: dict[str, Any]) -> dict[str, str]:
  """64-bit checksums of the bits of whole arrays, however they are laid out on devices.

  A sum modulo 2^32 over elements, each mixed with its place in the global array: integer sums are
  exact in any order, so several processes get the same number as one, each touching its own shards.
  A single changed element always changes it; anything else escapes with probability 2^-64.
  """
  sums: dict[str, Any] = {}
  for name, x in arrays.items():
    sums[name] = _summer(getattr(x, "sharding", None))(x)
    if jax.process_count() > 1:  # one after the other: see `processes.settled`
      jax.block_until_ready(sums[name])
  return {name: f"{a:08x}{b:08x}" for name, (a, b) in jax.device_get(sums).items()}


def _summer(sharding: Any) -> Callable[[Any], jax.Array]:
  return _summer_on(sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None)


@functools.cache
def _summer_on(mesh: Any) -> Callable[[Any], jax.Array]:
  if mesh is None:
    return jax.jit(_sum_bits)
  # Replicated, so that every process can read the result.
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(_sum_bits, out_shardings=everywhere)


def _sum_bits(x: jax.Array) -> jax.Array:
  size = x.dtype.itemsize
  x = x.astype(jnp.uint8) if x.dtype == bool else x
  bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))
  bits = bits.astype(jnp.uint32)  # 8-byte elements have become pairs in a new last axis
  place = jnp.zeros(bits.shape, jnp.uint32)
  for axis, length in enumerate(bits.shape):
    place = place * np.uint32(length & 0xFFFFFFFF) + jax.lax.broadcasted_iota(
      jnp.uint32, bits.shape, axis
    )
  lanes = [_mix(bits + _mix(place ^ np.uint32(seed))) for seed in (0x9E3779B9, 0x7F4A7C15)]
  return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in lanes])


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of 32-bit words that spreads every bit: MurmurHash3's finaliser (Appleby, 2011)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
