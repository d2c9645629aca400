"""python -m ssljax.plan --config=configs/mae_vitb.py:vitl16 --topology=v5e:16x16 [--fit]

Compiles the training step of a config for devices that need not be here, and says what it needs:
memory, work, communication, time. Neither data nor accelerator is touched."""

import argparse
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ssljax import config as config_lib
from ssljax.errors import explain
from ssljax.topology import topology_devices

GIB = 2**30
DOES_NOT_FIT = 3  # exit code


def plan(
  config: Mapping, topology: str, *, mfu: float = 0.5, hbm: float = 0.0, fit: bool = False
) -> dict[str, Any]:
  """What a run of the config would need on a topology, as a plain dict; `table` prints it.

  mfu: share of the matmul peak that the estimate of time assumes. hbm: GiB of a device, where the
  table of chips does not know it or less is granted (0: the table's).
  """
  from ssljax import chips

  if not 0 < mfu <= 1:
    raise ValueError(f"--mfu {mfu} must be above 0 and at most 1")
  devices = topology_devices(topology)
  job = planned_job(config, devices)
  known = chips.chip(devices[0].device_kind)
  room = (hbm or (known.hbm if known else 0.0)) * GIB
  found = sizes(job, topology) | {"memory_of_a_device": room or None}
  found |= compiled(job, room) | work(job)
  if found["fits"]:
    found |= roofline(found, job, known)
  found |= estimate(found, job, mfu)
  if fit:
    found["fit"] = largest_batch(config, devices, room, found)
  return found


def planned_job(config: Mapping, devices: Sequence[Any], **changes: Any) -> Any:
  """The run on these devices, without its data: pictures have the size that the views give them."""
  from ssljax import job as job_lib
  from ssljax import sharding
  from ssljax.data.sources import Source

  complete: dict = config_lib.complete(config_lib.plain(config))
  config = complete | changes
  data = complete["data"]
  if data["mean"] is None and data["std"] is None:  # any will do: they are numbers in the program
    half = (0.5,) * data["channels"]
    data = data | {"mean": half, "std": half}
    config |= {"data": data}
  axes = {key: config["mesh"][key] for key in ("devices", "replica", "tensor")}
  mesh = sharding.make_mesh(**axes, there=devices)
  # Where the step makes the views it is given pictures as they are.
  whole = data["views_on"] == "device" and not data["canvas"]
  if whole or (data["views"] or {}).get("size") is None:
    source = job_lib.open_source(config, data["split"])
  else:
    # Whether there is something to read labels from decides if batches have them: they are there
    # where evaluations want them.
    read = _unread if config["probe"]["rate"] or data["eval_train"] else None
    source = Source(
      str(data["source"]),
      0,
      None,
      False,
      _unread,
      _unread,
      {},
      channels=data["channels"],
      read=read,
    )
  return job_lib.assemble(config, mesh=mesh, source=source)


def _unread(*unused: Any) -> Any:
  raise RuntimeError("a plan reads no data")


def sizes(job: Any, topology: str) -> dict[str, Any]:
  """What follows from shapes and placement alone."""
  import jax

  def held(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

  params = jax.tree.leaves(job.state.params)
  state = job.state
  return {
    "config": config_lib.as_json(job.config),
    "topology": topology,
    "device_kind": job.mesh.devices.flat[0].device_kind,
    "mesh": dict(job.mesh.shape),
    "batch_size": job.config["batch_size"],
    "parameters": sum(x.size for x in params),
    "state_bytes_per_device": {
      "parameters": held(state.params), "optimizer": held(state.opt), "extra": held(state.extra)
    },
  }  # fmt: skip


def compiled(job: Any, room: float) -> dict[str, Any]:
  """Memory and communication of the compiled step; `fits` is False where it needs too much."""
  import jax

  from ssljax import hlo, train

  began = time.perf_counter()
  try:
    with jax.set_mesh(job.mesh):
      program = train.compiled_step(job)
  except jax.errors.JaxRuntimeError as error:
    needed = oom(str(error))
    if needed is None:
      raise
    return {"fits": False, "peak_bytes": needed, "compile_seconds": time.perf_counter() - began}
  took = time.perf_counter() - began
  memory, text = program.memory_analysis(), program.as_text()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
  sent = hlo.collectives(text, job.mesh.size)
  return {
    "fits": not room or peak <= room,
    "peak_bytes": peak,
    "memory": {
      "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
      "outputs": memory.output_size_in_bytes, "in place of arguments": memory.alias_size_in_bytes,
    },
    "sent_bytes": {f"{kind} {dtype}": value for (kind, dtype), value in sorted(sent.items())},
    "memory_traffic_bytes": hlo.traffic(text),
    "compile_seconds": took,
  }  # fmt: skip


def oom(message: str) -> float | None:
  """Bytes that a step needed, from the compiler's out-of-memory error; None for other errors."""
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  used = re.search(r"[Uu]sed (\d+(?:\.\d+)?)([KMGT]?)", message)
  scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  return float(used[1]) * scale[used[2]] if used else math.inf


def work(job: Any) -> dict[str, Any]:
  """Matmul FLOPs of a step on the global batch: the model's, and with what is computed again."""
  import functools

  import jax

  from ssljax import flops, train
  from ssljax.step import train_step

  step = functools.partial(train_step, job.trained, job.tx, job.config["accum"])
  plain = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
  model = train.model_flops(job)
  return {
    "model_flops_per_step": model,
    "model_flops_per_image": model / job.config["batch_size"],
    "executed_flops_per_step": flops.count_flops(step, plain(job.state), plain(job.given)),
  }


def roofline(found: Mapping, job: Any, known: Any) -> dict[str, Any]:
  """Seconds that each resource of a device is busy in a step at its full speed, and the longest."""
  from ssljax import chips, flops

  peak = flops.device_peak_flops(found["device_kind"], job.config["dtype"])
  if known is None or peak is None:
    return {"seconds": None}
  devices = list(job.mesh.devices.flat)
  link = known.link * 1e9 * chips.links(devices, known.wrap)
  seconds = {
    "compute": found["executed_flops_per_step"] / (peak * len(devices)),
    "memory": found["memory_traffic_bytes"] / (known.bandwidth * 1e9),
    "links": sum(found["sent_bytes"].values()) / link,
  }
  bound = max(seconds, key=lambda key: seconds[key])
  return {"seconds": seconds, "bound_by": bound, "links_bytes_per_second": link, "peak_flops": peak}


def estimate(found: Mapping, job: Any, mfu: float) -> dict[str, Any]:
  """Time of the schedule at the stated MFU, or at the roofline where that is slower."""
  from ssljax import flops

  peak = flops.device_peak_flops(found["device_kind"], job.config["dtype"])
  if peak is None:
    return {"assumed_mfu": mfu, "step_seconds": None, "chip_hours": None}
  step = found["model_flops_per_step"] / (peak * job.mesh.size * mfu)
  step = max([step, *(found.get("seconds") or {}).values()])
  hours = step * job.config["total_steps"] * job.mesh.size / 3600
  return {"assumed_mfu": mfu, "step_seconds": step, "chip_hours": hours}


def largest_batch(config: Mapping, devices: Sequence[Any], room: float, found: Mapping) -> dict:
  """The largest batch of a device: a line through two compiles, and one compile to verify.

  Where the compiler's plan is larger than the line says, the batch shrinks by a twentieth and is
  verified again, three times at most.
  """
  if not room:
    raise ValueError(f"the memory of {found['device_kind']} is not known: give --hbm=GIB for --fit")
  mesh, accum = found["mesh"], found["config"]["accum"]
  groups = math.prod(mesh[axis] for axis in mesh if axis != "tensor")

  def peak(per_device):
    changes = {
      "batch_size": per_device * groups,
      "eval": found["config"]["eval"] | {"batch_size": 0},
    }
    try:
      job = planned_job(config, devices, **changes)
    except ValueError:  # the config does not allow this batch, e.g. a queue smaller than it
      return math.inf, False
    made = compiled(job, room)
    return made["peak_bytes"], made["fits"]

  second = found["batch_size"] // groups
  first = max(accum, second // 2 // accum * accum)
  if first == second:
    second = 2 * first
  points = {first: peak(first), second: (found["peak_bytes"], found["fits"])}
  if second * groups != found["batch_size"]:
    points = {first: (found["peak_bytes"], found["fits"]), second: peak(second)}
  if not all(math.isfinite(size) for size, _ in points.values()):
    return {"batch_per_device": None, "batch_size": None, "bytes_per_example": None}
  slope = max((points[second][0] - points[first][0]) / (second - first), 1.0)
  best = int((room - points[first][0]) / slope + first) // accum * accum
  for _ in range(3):
    if best < accum:
      return {"batch_per_device": 0, "batch_size": 0, "bytes_per_example": slope}
    needed, fits = points.get(best) or peak(best)
    if fits:
      break
    best = min(best - accum, int(0.95 * best)) // accum * accum
  else:
    return {"batch_per_device": None, "batch_size": None, "bytes_per_example": slope}
  return {
    "batch_per_device": best, "batch_size": best * groups, "peak_bytes": needed,
    "bytes_per_example": slope,
  }  # fmt: skip


def table(found: Mapping) -> str:
  """The plan as text."""
  from ssljax.plan_table import lines

  return "\n".join(lines(found))


def main(argv: Sequence[str] | None = None) -> int:
  """The command; -> 0, 1 for what the user can mend, 3 where the step does not fit."""
  from ssljax.main import load_config, settings

  parser = argparse.ArgumentParser("ssljax.plan", description=__doc__, allow_abbrev=False)
  parser.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
  parser.add_argument(
    "--topology", required=True, help="v5e:16x16, v5p:4x4x4, v6e:8x8, cpu:8, local"
  )
  parser.add_argument("--fit", action="store_true", help="also find the largest batch of a device")
  parser.add_argument("--mfu", type=float, default=0.5, help="assumed for the estimate of time")
  parser.add_argument("--hbm", type=float, default=0.0, help="GiB of a device (0: as tabled)")
  parser.add_argument("--json", default="", help="write the plan here, too")
  try:
    flags, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if flags.topology != "local":
      import jax

      jax.config.update("jax_platforms", "cpu")  # an accelerator here is left alone
    config = config_lib.override(load_config(flags.config), settings(rest))
    found = plan(config, flags.topology, mfu=flags.mfu, hbm=flags.hbm, fit=flags.fit)
    print(table(found))
    if flags.json:
      pathlib.Path(flags.json).write_text(json.dumps(found, indent=2) + "\n")
  except (ValueError, OSError, RuntimeError) as error:
    return explain(error)
  return 0 if found["fits"] else DOES_NOT_FIT


if __name__ == "__main__":
  sys.exit(main())
