"""What the benchmarks share: contestants that take turns, a report that says where it was made."""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

FLAGS = ("XLA_FLAGS", "OMP_NUM_THREADS", "GLIBC_TUNABLES")


def alternate(
  contestants: Mapping[str, Callable[[], Any]], repeats: int, warm: int = 1, lead: int = 0
) -> dict[str, np.ndarray]:
  """Seconds of each call: {name: [repeats]}. Contestants take turns, so that a slow minute of the
  machine falls on all of them; the first `warm` rounds are not kept, nor are the first `lead` calls
  of a turn, in which the machine gives a contestant back what it took while the others worked."""
  seconds = {name: np.zeros(repeats) for name in contestants}
  for turn in range(-warm, repeats):
    for name, call in contestants.items():
      for _ in range(lead):
        call()
      start = time.perf_counter()
      call()
      if turn >= 0:
        seconds[name][turn] = time.perf_counter() - start
  return seconds


def own_process(build: Callable[..., Callable[[], Any]], *args: Any) -> Callable[[], Any]:
  """`build(*args)()` in a process of its own, which lives on; -> a call that waits for one turn.

  Contestants in one process disturb each other's memory and threads (experiments/LOG.md).
  """
  context = multiprocessing.get_context("spawn")
  here, there = context.Pipe()
  context.Process(target=_serve, args=(there, build, args), daemon=True).start()

  def turn():
    here.send(None)
    return here.recv()

  turn()
  return turn


def _serve(pipe: Any, build: Callable[..., Callable[[], Any]], args: tuple) -> None:
  call = build(*args)
  while True:
    try:
      pipe.recv()
    except EOFError:  # the benchmark has ended
      return
    call()
    pipe.send(None)


def ratio(slow: np.ndarray, fast: np.ndarray) -> float:
  """Ratio of the medians."""
  return float(np.median(slow) / np.median(fast))


def quartiles(values: np.ndarray) -> str:
  """`1.234 (1.200–1.300)`: median and quartiles."""
  low, middle, high = np.percentile(values, (25, 50, 75))
  return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def import_torch(threads: int) -> Any:
  """torch with so many threads, and torchvision made importable, which transformers imports, too:
  its published builds want an operator that the CPU build of torch does not have."""
  import torch

  if "torchvision" not in sys.modules:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    torchvision.operator_of_ours = library  # it vanishes with the object
  torch.set_num_threads(threads)
  return torch


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(packages: tuple[str, ...]) -> dict[str, Any]:
  """Processor, cores, load, date, command and versions."""
  versions = {}
  for name in packages:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    "date": datetime.date.today().isoformat(),
    "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    "cpu": _cpu(),
    "cores": cores(),
    "load_before": round(os.getloadavg()[0], 2),
    "python": platform.python_version(),
    "versions": versions,
    "flags": {k: os.environ[k] for k in FLAGS if k in os.environ},
  }


def _cpu() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  facts = dict.fromkeys(("model name", "cpu family", "model", "flags"), "")
  if not info.exists():
    return platform.processor() or platform.machine()
  for line in info.read_text().split("\n\n")[0].splitlines():
    key, _, value = line.partition(":")
    if key.strip() in facts:
      facts[key.strip()] = value.strip()
  vector = "AVX-512" if "avx512f" in facts["flags"] else "AVX2" if "avx2" in facts["flags"] else ""
  name, family, model = facts["model name"], facts["cpu family"], facts["model"]
  return f"{name} (family {family}, model {model}{', ' + vector if vector else ''})"


def report(title: str, header: list[str], rows: list[list[str]], where: Mapping, path: str) -> None:
  """Prints one Markdown table and where it was made; writes both as JSON to `path` if it is set."""
  print(f"\n{title}\n")
  print("| " + " | ".join(header) + " |")
  print("| " + " | ".join("---" for _ in header) + " |")
  for row in rows:
    print("| " + " | ".join(row) + " |")
  versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
  print(f"\n{where['date']}, {where['cpu']}, {where['cores']} cores, Python {where['python']}")
  load = f"{where['load_before']}, after {os.getloadavg()[0]:.2f}"
  print(f"load before {load}, flags {where['flags']}")
  print(f"{versions}\n`{where['command']}`")
  if path:
    content = {"title": title, "where": where, "rows": [dict(zip(header, row)) for row in rows]}
    pathlib.Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
