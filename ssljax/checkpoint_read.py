"""One step of a checkpoint back from disk, on this process's own; every leaf checked."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ssljax import leaves

FORMAT = 1  # of what `checkpoint.save` writes


def alike(read: Callable[[], Any]) -> Any:
  """What `read` gives where it succeeds in every process; an error in all where it fails in one, so
  that all go on from the same step."""
  if jax.process_count() == 1:
    return read()
  found, failure = None, None
  try:
    found = read()
  except Exception as error:
    failure = error
  failed = multihost_utils.process_allgather(np.int32(failure is not None))
  if failure is not None:
    raise failure
  if failed.any():
    raise OSError(f"process {int(failed.argmax())} cannot read it")
  return found


def read_manifest(path: epath.Path) -> dict:
  """Shape, type and checksum of every leaf, and what else was noted.

  Raises:
    ValueError: it is damaged, or written by a newer version.
  """
  manifest = leaves.unsign(_restore(path, manifest=ocp.args.JsonRestore())["manifest"])
  if manifest["format"] > FORMAT:
    raise ValueError(f"format {manifest['format']} is newer than this version of ssljax reads")
  return manifest


def read_state(path: epath.Path, entries: dict[str, dict], abstract_state: Any) -> Any:
  """The leaves of `entries` in the form and the places of `abstract_state`, their sums checked."""
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  asked = {}
  for name, leaf in leaves.named(abstract_state).items():
    sharding = getattr(leaf, "sharding", None) or default
    if leaves.is_key(leaf):  # the data of a key has one more axis, which its sharding need not name
      leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    asked[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  whole = {name: leaf for name, leaf in asked.items() if leaf.size}
  args = ocp.checkpoint_utils.construct_restore_args(whole)
  read = alike(lambda: _restore_arrays(path, whole, args))
  leaves.check_sums(entries, read)
  for name, leaf in asked.items():
    array = read[name] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    asked[name] = leaves.undescribe(array, entries[name])
  return jax.tree.unflatten(jax.tree.structure(abstract_state), asked.values())


def read_parts(path: epath.Path, entries: dict[str, dict], parts: Sequence[str]) -> dict[str, Any]:
  """Top-level parts as nested dicts of numpy arrays, their sums checked."""
  entries = {name: entry for name, entry in entries.items() if name.split("/")[0] in parts}
  whole = {name: entry for name, entry in entries.items() if "sum" in entry}
  item = {name: jax.ShapeDtypeStruct(entry["shape"], np.uint8) for name, entry in whole.items()}
  # With no type given, orbax returns the type on disk; uint8 above is only a placeholder.
  args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in whole}
  read = _restore_arrays(path, item, args) if whole else {}
  leaves.check_sums(entries, read)
  for name, entry in entries.items():
    array = read[name] if name in read else np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
    read[name] = leaves.undescribe(array, entry)
  return {part: {} for part in parts} | leaves.nested(read)


def _restore_arrays(path: epath.Path, item: dict, restore_args: dict) -> dict[str, Any]:
  args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
  return _restore(path, state=args)["state"]


def _restore(path: epath.Path, **args: Any) -> Any:
  # Each process reads for itself: one that fails must not leave the others at a barrier.
  me = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
  handler = ocp.CompositeCheckpointHandler()
  with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
    return reader.restore(path, args=ocp.args.Composite(**args))
