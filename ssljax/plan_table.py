"""A plan as text: what is computed, and what is assumed."""

import math
from collections.abc import Iterator, Mapping


def lines(found: Mapping) -> Iterator[str]:
  """The table of `ssljax.plan`, line by line."""
  mesh = " × ".join(f"{size} {axis}" for axis, size in found["mesh"].items())
  count = math.prod(found["mesh"].values())
  yield f"{found['topology']}: {count} × {found['device_kind']} ({mesh})"
  yield from _row("batch", f"{found['batch_size']:,}")
  yield from _row("parameters", f"{found['parameters']:,}")
  yield from _memory(found)
  yield from _work(found)
  if found["fits"]:
    yield from _sent(found)
    yield from _time(found)
  if "fit" in found:
    yield from _fit(found["fit"])
  yield ""
  yield from _honest(found)


def _row(name: str, value: str, note: str = "") -> Iterator[str]:
  yield f"  {name:<34}{value:>16}{'  ' + note if note else ''}"


def _bytes(number: float) -> str:
  for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
    if number >= scale:
      return f"{number / scale:,.2f} {unit}"
  return f"{number / 2**10:,.2f} KiB"


def _memory(found: Mapping) -> Iterator[str]:
  yield "memory of each device"
  for name, number in found["state_bytes_per_device"].items():
    yield from _row(f"  {name}", _bytes(number))
  for name, number in found.get("memory", {}).items():
    yield from _row(name, _bytes(number))
  room = found["memory_of_a_device"]
  share = f"{found['peak_bytes'] / room:.0%} of {_bytes(room)}" if room else "of a size not known"
  yield from _row("peak", _bytes(found["peak_bytes"]), share)
  if not found["fits"]:
    yield (
      f"  DOES NOT FIT: a batch of {found['batch_size']:,} needs {_bytes(found['peak_bytes'])} on"
      f" each device, which has {_bytes(room) if room else 'less'}"
    )


def _work(found: Mapping) -> Iterator[str]:
  yield "matmul FLOPs"
  yield from _row("model, a step", f"{found['model_flops_per_step']:.4e}")
  yield from _row("model, an image", f"{found['model_flops_per_image']:.4e}")
  again = found["executed_flops_per_step"] / found["model_flops_per_step"]
  yield from _row("with what is computed again", f"{again:.2f} ×")


def _sent(found: Mapping) -> Iterator[str]:
  yield "sent by each device in a step"
  for name, number in found["sent_bytes"].items():
    yield from _row(name, _bytes(number))
  yield from _row("together", _bytes(sum(found["sent_bytes"].values())))


def _time(found: Mapping) -> Iterator[str]:
  if not found["seconds"]:
    yield "time: the speed of these devices is not known"
    return
  yield "time of a step, each at its full speed"
  for name, seconds in found["seconds"].items():
    mark = "<- the bound" if name == found["bound_by"] else ""
    yield from _row(name, f"{1000 * seconds:,.2f} ms", mark)
  step, hours = found["step_seconds"], found["chip_hours"]
  yield from _row(f"estimate at {found['assumed_mfu']:.0%} MFU", f"{1000 * step:,.2f} ms")
  steps = found["config"]["total_steps"]
  yield from _row(f"{steps:,} steps", f"{steps * step / 3600:,.1f} h", f"{hours:,.0f} chip-hours")


def _fit(fit: Mapping) -> Iterator[str]:
  yield "largest batch"
  if not fit["batch_per_device"]:
    yield "  none was found that fits"
    return
  yield from _row("of a device", f"{fit['batch_per_device']:,}", f"{fit['batch_size']:,} together")
  yield from _row("  its peak, verified", _bytes(fit["peak_bytes"]))
  yield from _row("  memory of an example", _bytes(fit["bytes_per_example"]))


def _honest(found: Mapping) -> Iterator[str]:
  yield "Computed: memory, by the compiler for these devices; FLOPs (matmuls, convolutions), from"
  yield "the program of the step; bytes sent, from the compiled text, loops counted as often as"
  yield "they run, as on a ring. Assumed: published peaks (ssljax/flops.py, ssljax/chips.py);"
  yield "memory time from operands and results of the compiled operations; all links of a device"
  mfu = f"{found['assumed_mfu']:.0%} MFU"
  yield f"at once, without latency; perfect overlap; {mfu}; input, evaluation and checkpoints"
  yield f"cost nothing. Compiled in {found['compile_seconds']:.0f} s."
