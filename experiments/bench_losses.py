"""Losses on a CPU: seconds and extra memory, beside lightly, and tiles at batches of 32k and 64k.

  python experiments/bench_losses.py                                  both parts
  python experiments/bench_losses.py --parts=time --batches=1024,4096 --objectives=NT-Xent,SigLIP
  python experiments/bench_losses.py --parts=large --large=32768,65536 --run_up_to=65536

time: value and gradients of both views (Sinkhorn: the assignment), float32, against lightly's
classes where it has them. Each contestant has a process of its own; they take turns. The ring is
around two fake CPU devices that share the cores: it shows that it works, not what it is for.
large: the plain forms are only compiled; the tiled forms run once up to --run_up_to.

Memory is what a call needs beside its inputs. `compiled`: XLA's temporary buffers. `peak`: how far
the resident memory of a fresh process rises above its level before its first call (VmHWM of
/proc/self/status, set back by /proc/self/clear_refs), results included, measured alike for both
libraries. A contestant that would need more than --limit GiB is not run: ours by its compiled size,
PyTorch by a limit on its address space, in which its allocation fails.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side

from ssljax import losses

PACKAGES = ("jax", "jaxlib", "torch", "lightly", "numpy")
MIB = 2**20
PROTOTYPES, EXPANDED = 3000, 1024  # columns of Sinkhorn's scores; width of VICReg's embeddings
OURS, TILED, RING, THEIRS = "ssljax", "ssljax tiled", "ssljax ring (2 devices)", "lightly"
OBJECTIVES = {
  "NT-Xent": (OURS, TILED, RING, THEIRS),
  "InfoNCE": (OURS, TILED, RING),
  "DCL": (OURS, THEIRS),
  "SigLIP": (OURS, TILED, RING),
  "Sinkhorn": (OURS, THEIRS),
  "VICReg": (OURS, THEIRS),
}


def our_loss(objective: str, who: str, tile: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The loss as a function of two views."""
  plain = {
    "NT-Xent": (losses.nt_xent, losses.nt_xent_tiled, losses.nt_xent_ring, (0.1,)),
    "InfoNCE": (losses.info_nce, losses.info_nce_tiled, losses.info_nce_ring, (0.1,)),
    "SigLIP": (losses.siglip_loss, losses.siglip_tiled, losses.siglip_ring, (10.0, -10.0)),
    "DCL": (losses.decoupled_nce, None, None, (0.1,)),
    "VICReg": (lambda a, b: losses.vicreg(a, b)[0], None, None, ()),
    "textbook InfoNCE": (textbook_info_nce, None, None, (0.1,)),
  }
  loss, tiled, ring, numbers = plain[objective]
  if who == TILED:
    return lambda a, b: tiled(a, b, *numbers, tile=tile)
  if who == RING:
    return lambda a, b: ring(a, b, *numbers, "data", two_devices())
  return lambda a, b: loss(a, b, *numbers)


def textbook_info_nce(q: jax.Array, k: jax.Array, temperature: float) -> jax.Array:
  """Logits, log-softmax, diagonal: what one writes without thinking of memory."""
  return -jnp.diag(jax.nn.log_softmax(q @ k.T / temperature))


def two_devices() -> jax.sharding.Mesh:
  return jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def shape(objective: str, b: int, width: int) -> tuple[int, int]:
  return b, {"Sinkhorn": PROTOTYPES, "VICReg": EXPANDED}.get(objective, width)


def inputs(objective: str, b: int, width: int) -> list[np.ndarray]:
  """Two views of noise, the second near the first; scores in [-1, 1] for Sinkhorn."""
  rng = np.random.default_rng(0)
  first = rng.normal(size=shape(objective, b, width)).astype(np.float32)
  if objective == "Sinkhorn":
    return [np.tanh(first)]
  return [first, first + rng.normal(size=first.shape).astype(np.float32)]


def compile_ours(objective: str, who: str, b: int, width: int, tile: int) -> Any:
  """The compiled program: (value, gradients) of two views, or an assignment."""
  if who == RING:
    jax.config.update("jax_num_cpu_devices", 2)
  sharding = None
  if who == RING:
    sharding = jax.sharding.NamedSharding(two_devices(), jax.sharding.PartitionSpec("data"))
  x = jax.ShapeDtypeStruct(shape(objective, b, width), jnp.float32, sharding=sharding)
  if objective == "Sinkhorn":
    return jax.jit(losses.sinkhorn_knopp).lower(x).compile()
  loss = our_loss(objective, who, tile)
  both = jax.value_and_grad(lambda a, b: loss(a, b).mean(), (0, 1))
  return jax.jit(both).lower(x, x).compile()


def ours(
  objective: str, who: str, b: int, width: int, tile: int, limit: float
) -> tuple[Callable[[], Any] | None, int]:
  """One call, or None where it needs too much; and the bytes that XLA counted, on all devices."""
  program = compile_ours(objective, who, b, width, tile)
  size = program.memory_analysis().temp_size_in_bytes * (2 if who == RING else 1)
  if size > limit:
    return None, size
  arrays = [
    jax.device_put(x, where)
    for x, where in zip(inputs(objective, b, width), program.input_shardings[0])
  ]
  return lambda: jax.block_until_ready(program(*arrays)), size


def theirs(objective: str, b: int, width: int, threads: int, limit: float) -> Callable[[], Any]:
  """The same by lightly; an allocation beyond the limit raises RuntimeError."""
  warnings.filterwarnings("ignore", message="Failed to load image Python extension")
  torch = side_by_side.import_torch(threads)
  from lightly import loss as lightly
  from lightly.loss import swav_loss

  arrays = [torch.tensor(x) for x in inputs(objective, b, width)]
  resource.setrlimit(resource.RLIMIT_AS, (int(status("VmSize") + limit),) * 2)
  if objective == "Sinkhorn":
    return lambda: swav_loss.sinkhorn(*arrays, iterations=3, epsilon=0.05)
  classes: dict[str, Callable[[], Any]] = {
    "NT-Xent": lambda: lightly.NTXentLoss(temperature=0.1),
    "DCL": lambda: lightly.DCLLoss(temperature=0.1),
    "VICReg": lightly.VICRegLoss,
  }
  criterion = classes[objective]()
  arrays = [x.requires_grad_() for x in arrays]

  def call():
    loss = criterion(*arrays)
    return loss.item(), torch.autograd.grad(loss, arrays)

  return call


def contestant(
  objective: str, who: str, b: int, width: int, tile: int, threads: int, limit: float
) -> Callable[[], Any]:
  """A call that is known to fit."""
  if who == THEIRS:
    return theirs(objective, b, width, threads, limit)
  call, _ = ours(objective, who, b, width, tile, limit)
  assert call is not None
  return call


def status(key: str) -> int:
  """VmSize, VmRSS or VmHWM of this process in bytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(f"{key}:"):
      return int(line.split()[1]) * 1024
  raise KeyError(key)


def first_call(
  objective: str, who: str, b: int, width: int, tile: int, threads: int, limit: float
) -> dict[str, float]:
  """In a fresh process: `compiled` and `peak` bytes and `seconds` of the first call, as known."""
  known: dict[str, float] = {}
  if who == THEIRS:
    call = theirs(objective, b, width, threads, limit)
  else:
    call, known["compiled"] = ours(objective, who, b, width, tile, limit)
    if call is None:
      return known
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before, start = status("VmRSS"), time.perf_counter()
  try:
    result = call()
  except RuntimeError as error:
    if "memory" not in str(error):
      raise
    return known
  known["seconds"] = time.perf_counter() - start
  del result
  return known | {"peak": status("VmHWM") - before}


def alone(function: Callable[..., Any], *args: Any) -> Any:
  """The result of a call in a fresh process."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(function, *args).result()


def mib(known: dict[str, float], key: str, limit: float) -> str:
  if key in known:
    return f"{known[key] / MIB:,.0f}"
  return f"over {limit / MIB:,.0f}" if key == "peak" else "–"


def bench_time(args: argparse.Namespace) -> list[list[str]]:
  """Rows for all batches and objectives: seconds, ratio to our plain form, memory."""
  limit, rows = args.limit * 2**30, []
  for b in map(int, args.batches.split(",")):
    for objective in args.objectives.split(","):
      sizes = b, args.width, args.tile, args.threads, limit
      known = {w: alone(first_call, objective, w, *sizes) for w in OBJECTIVES[objective]}
      calls = {
        w: side_by_side.own_process(contestant, objective, w, *sizes)
        for w in known
        if "peak" in known[w]
      }
      took = side_by_side.alternate(calls, args.repeats, args.warm)
      for who in known:
        ratio = "–"
        if who in took and OURS in took:
          ratio = f"{side_by_side.ratio(took[who], took[OURS]):.2f}"
        seconds = side_by_side.quartiles(took[who]) if who in took else "not run"
        memory = [mib(known[who], key, limit) for key in ("peak", "compiled")]
        rows.append([objective, who, f"{b:,}", seconds, ratio, *memory])
        print(" | ".join(rows[-1]), flush=True)
  return rows


def bench_large(args: argparse.Namespace) -> list[list[str]]:
  """Rows for the largest batches: plain compiled only, tiled run once."""
  rows = []
  for b in map(int, args.large.split(",")):
    for objective in ("textbook InfoNCE", "InfoNCE", "NT-Xent", "SigLIP"):
      for who in (OURS,) if objective.startswith("textbook") else (OURS, TILED):
        # A limit of nothing: compiled, never run.
        limit = args.limit * 2**30 if who == TILED and b <= args.run_up_to else 0
        known = alone(first_call, objective, who, b, args.width, args.tile, args.threads, limit)
        seconds = f"{known['seconds']:.1f}" if "seconds" in known else "not run"
        peak = mib(known, "peak", limit) if "peak" in known else "–"
        name = "jax.nn.log_softmax" if objective.startswith("textbook") else who
        rows.append([objective, name, f"{b:,}", seconds, peak, mib(known, "compiled", limit)])
        print(" | ".join(rows[-1]), flush=True)
  return rows


def run() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--parts", default="time,large")
  parser.add_argument("--objectives", default=",".join(OBJECTIVES))
  parser.add_argument("--batches", default="1024,4096,16384")
  parser.add_argument("--large", default="32768,65536")
  parser.add_argument("--run_up_to", type=int, default=32768, help="largest batch of part large")
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--tile", type=int, default=1024)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--warm", type=int, default=1)
  parser.add_argument("--limit", type=float, default=10.0, help="GiB for one contestant")
  parser.add_argument("--threads", type=int, default=side_by_side.cores(), help="of PyTorch")
  parser.add_argument("--json", default="", help="write the table here, too")
  args = parser.parse_args()
  where = side_by_side.machine(PACKAGES)
  what = f"width {args.width}, float32, tile {args.tile}"
  if "time" in args.parts:
    header = ["objective", "by", "batch", "seconds: median (quartiles)", "÷ plain"]
    header += ["peak MiB", "compiled MiB"]
    path = args.json and args.json.replace(".json", "_time.json")
    title = f"Value and gradients, {what}; Sinkhorn {PROTOTYPES} columns, VICReg width {EXPANDED}"
    side_by_side.report(title, header, bench_time(args), where, path)
  if "large" in args.parts:
    header = ["objective", "by", "batch", "seconds", "peak MiB", "compiled MiB"]
    path = args.json and args.json.replace(".json", "_large.json")
    title = f"Value and gradients of large batches, {what}"
    side_by_side.report(title, header, bench_large(args), where, path)


if __name__ == "__main__":
  run()
