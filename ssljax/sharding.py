"""Where arrays live: one mesh, one placement rule for the state, rows of the batch by device."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

STATES = ("replicated", "full")
# Columns of the first matrix of a pair, rows of the second: one all-reduce for the pair. Leaves of
# the same names in moments and teachers follow.
TENSOR = {
  "qkv/kernel": 1, "qkv/bias": 0, "fc1/kernel": 1, "fc1/bias": 0,
  "proj/kernel": 0, "fc2/kernel": 0,
}  # fmt: skip


def make_mesh(
  devices: int = 0, replica: int = 1, tensor: int = 1, there: Sequence[Any] | None = None
) -> Mesh:
  """A mesh over the first `devices` of `there` (0: all; None: this machine's).

  Its axes: `data`; before it `replica` (several slices or nodes, slow links between them) and after
  it `tensor` (one model over several devices), each only where it is larger than 1.

  Raises:
    ValueError: more devices asked for than there are, or a number that the axes do not divide.
  """
  there = jax.devices() if there is None else list(there)
  if not 0 <= devices <= len(there):
    many = "negative" if devices < 0 else f"more than the {len(there)} devices there are"
    raise ValueError(f"mesh.devices {devices} is {many}")
  count = devices or len(there)
  for name, size in (("replica", replica), ("tensor", tensor)):
    if size < 1 or count % (replica * max(tensor, 1)):
      raise ValueError(f"mesh.{name} {size} does not divide {count} devices")
  sizes = {"replica": replica, "data": count // (replica * tensor), "tensor": tensor}
  sizes = {name: size for name, size in sizes.items() if size > 1 or name == "data"}
  # Auto, not the default Explicit: convolutions and view reshapes need it.
  kinds = (AxisType.Auto,) * len(sizes)
  slices = {getattr(device, "slice_index", 0) for device in there[:count]}
  if len(slices) > 1 and replica != len(slices) and there[0].platform != "tpu":
    # GPUs: every node counts as a slice, and one axis may well go across nodes.
    return Mesh(np.asarray(there[:count]).reshape(*sizes.values()), tuple(sizes), axis_types=kinds)
  if len(slices) > 1:  # jax.make_mesh knows the links within a slice only
    outer = tuple(size if name == "replica" else 1 for name, size in sizes.items())
    if replica != len(slices):
      raise ValueError(f"mesh.replica {replica} must be the number of slices, {len(slices)}")
    inner = tuple(1 if name == "replica" else size for name, size in sizes.items())
    placed = mesh_utils.create_hybrid_device_mesh(inner, outer, there[:count])
    return Mesh(placed, tuple(sizes), axis_types=kinds)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=there[:count])


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
  """The axes that share out the rows of a batch: all but `tensor`."""
  return tuple(name for name in mesh.axis_names if name != "tensor")


def check_batch(batch_size: int, mesh: Mesh, accum: int = 1, name: str = "batch_size") -> None:
  """Raises ValueError where a batch cannot be dealt out evenly."""
  devices = math.prod(mesh.shape[axis] for axis in batch_axes(mesh))
  groups = f"{devices} devices" if devices == mesh.size else f"{devices} groups of devices"
  if batch_size % devices:
    raise ValueError(f"{name} {batch_size} is not divisible by {groups}")
  if batch_size % (devices * accum):
    raise ValueError(f"{name} {batch_size} is not divisible by {groups} × accum {accum}")


def check_heads(encoder: Any, mesh: Mesh) -> None:
  """Raises ValueError where a `tensor` axis would cut through a head of attention."""
  heads, tensor = getattr(encoder, "heads", 0), mesh.shape.get("tensor", 1)
  if tensor > 1 and not heads:
    raise ValueError(f"mesh.tensor {tensor} splits attention, which the encoder does not have")
  if heads % tensor:
    raise ValueError(f"mesh.tensor {tensor} does not divide the {heads} heads of the encoder")


def check_processes(mesh: Mesh) -> None:
  """Raises ValueError where a process of the run has no device in the mesh."""
  idle = {d.process_index for d in jax.devices()} - {d.process_index for d in mesh.devices.flat}
  if idle:
    raise ValueError(
      f"mesh.devices {mesh.size} leaves process {min(idle)} without a device: start fewer processes"
    )


def state_shardings(state: Any, mesh: Mesh, *, placement: str, min_size: int) -> Any:
  """Placement of each leaf of the state: replicated, or fully sharded over `data`.

  "full" splits the largest axis that the size of `data` divides; leaves of fewer than `min_size`
  values and leaves without such an axis stay whole. Moments and teachers follow by the same rule.
  Over `replica` everything is whole. A `tensor` axis splits the blocks' matrices as TENSOR says
  (Shoeybi et al. 2019, 1909.08053), and "full" another axis of each.
  """
  if placement not in STATES:
    raise ValueError(f"mesh.state {placement!r} is none of {', '.join(STATES)}")
  devices = mesh.shape["data"]

  def one(path, leaf):
    spec: list[str | None] = [None] * len(leaf.shape)
    if (split := tensor_axis(path, leaf, mesh)) is not None:
      spec[split] = "tensor"
    fits = [i for i, size in enumerate(leaf.shape) if size % devices == 0 and not spec[i]]
    if placement == "full" and leaf.size >= min_size and fits:
      spec[max(fits, key=lambda i: leaf.shape[i])] = "data"
    while spec and spec[-1] is None:
      spec.pop()
    return NamedSharding(mesh, P(*spec))

  return jax.tree_util.tree_map_with_path(one, state)


def tensor_axis(path: Any, leaf: Any, mesh: Mesh) -> int | None:
  """Which axis of a leaf lies along `tensor`: by the last two parts of its name."""
  name = "/".join(jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2:])
  axis = TENSOR.get(name)
  if "tensor" not in mesh.axis_names or axis is None:
    return None
  if leaf.shape[axis] % mesh.shape["tensor"]:
    raise ValueError(f"mesh.tensor {mesh.shape['tensor']} does not divide {name} {leaf.shape}")
  return axis


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of the batch over the devices."""
  axes = batch_axes(mesh)
  return NamedSharding(mesh, P(axes if len(axes) > 1 else axes[0]))


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
