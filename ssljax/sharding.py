"""Where arrays live: one mesh, one placement rule for the state, rows of the batch by device."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

STATES = ("replicated", "full")


def make_mesh(devices: int = 0) -> Mesh:
  """A mesh with one axis, `data`, over the first `devices` devices (0: all).

  Raises:
    ValueError: more devices asked for than there are.
  """
  there = jax.devices()
  if not 0 <= devices <= len(there):
    many = "negative" if devices < 0 else f"more than the {len(there)} devices there are"
    raise ValueError(f"mesh.devices {devices} is {many}")
  count = devices or len(there)
  # Auto, not the default Explicit: convolutions and view reshapes need it.
  return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=there[:count])


def check_batch(batch_size: int, mesh: Mesh, accum: int = 1, name: str = "batch_size") -> None:
  """Raises ValueError where a batch cannot be dealt out evenly."""
  devices = mesh.shape["data"]
  if batch_size % devices:
    raise ValueError(f"{name} {batch_size} is not divisible by {devices} devices")
  if batch_size % (devices * accum):
    raise ValueError(f"{name} {batch_size} is not divisible by {devices} devices × accum {accum}")


def check_processes(mesh: Mesh) -> None:
  """Raises ValueError where a process of the run has no device in the mesh."""
  idle = {d.process_index for d in jax.devices()} - {d.process_index for d in mesh.devices.flat}
  if idle:
    raise ValueError(
      f"mesh.devices {mesh.size} leaves process {min(idle)} without a device: start fewer processes"
    )


def state_shardings(state: Any, mesh: Mesh, *, placement: str, min_size: int) -> Any:
  """Placement of each leaf of the state: replicated, or fully sharded.

  "full" splits the largest axis that the number of devices divides; leaves of fewer than `min_size`
  values and leaves without such an axis stay whole. Moments and teachers follow by the same rule.
  """
  if placement not in STATES:
    raise ValueError(f"mesh.state {placement!r} is none of {', '.join(STATES)}")
  devices = mesh.shape["data"]

  def one(leaf):
    fits = [i for i, size in enumerate(leaf.shape) if size % devices == 0]
    if placement == "replicated" or leaf.size < min_size or not fits:
      return NamedSharding(mesh, P())
    axis = max(fits, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, P(*(None,) * axis, "data"))

  return jax.tree.map(one, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of the batch over the devices."""
  return NamedSharding(mesh, P("data"))


def replicated(x: np.ndarray, mesh: Mesh) -> jax.Array:
  """The same array, whole, on every device; every process must have it."""
  return jax.make_array_from_process_local_data(NamedSharding(mesh, P()), x, x.shape)


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """Numbers of the global rows that this process's devices hold, sorted: -> int [local b]."""
  where = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  rows = [np.arange(batch_size)[index] for index in where.values()]
  return np.unique(np.concatenate(rows))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
  """This process's rows -> global arrays [batch_size …], each device holding its own rows."""
  sharding = batch_sharding(mesh)

  def one(x):
    return jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))

  return {key: one(value) for key, value in batch.items()}
