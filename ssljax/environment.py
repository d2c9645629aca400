"""What a run runs on: settings of JAX before it starts, and a description beside the results."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
from typing import Any

import jax
import jaxlib

CPU_FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"
PACKAGES = ("ssljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow")


def prepare() -> None:
  """Settings for a process of our own, before JAX looks for devices. What the user set stays."""
  keep_compiled()
  tune_cpu()


def keep_compiled() -> None:
  """Compiled programs are kept in the user's cache folder: a second start need not compile."""
  settings: Any = jax.config
  if "JAX_COMPILATION_CACHE_DIR" in os.environ or settings.jax_compilation_cache_dir:
    return
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  jax.config.update("jax_compilation_cache_dir", str(cache / "ssljax" / "jax"))


def tune_cpu() -> None:
  """Switches a scheduler of the CPU backend of jaxlib 0.10 off.

  It orders operations so that many can run at once, and keeps more of them alive: MAE's step on two
  cores takes 5 % longer and 13 % more memory with it. Another jaxlib may not know the flag, and
  XLA ends the process at flags that it does not know.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  settings: Any = jax.config
  elsewhere = settings.jax_platforms not in (None, "", "cpu") or importlib.util.find_spec("libtpu")
  if jaxlib.__version__.startswith("0.10.") and CPU_FLAG not in flags and not elsewhere:
    os.environ["XLA_FLAGS"] = f"{flags} --{CPU_FLAG}=false".strip()


def describe() -> dict:
  """Versions, devices and command of this process."""
  versions = {}
  for name in (*PACKAGES, "tensorflow-cpu"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  devices = jax.devices()
  return {
    "command": " ".join(sys.argv),
    "python": platform.python_version(),
    "platform": platform.platform(),
    "cpus": os.cpu_count(),
    "devices": {"kind": devices[0].device_kind, "count": len(devices)},
    "processes": jax.process_count(),
    "versions": versions,
  }


def write(workdir: pathlib.Path) -> None:
  """Writes environment.json."""
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "environment.json").write_text(json.dumps(describe(), indent=2) + "\n")
