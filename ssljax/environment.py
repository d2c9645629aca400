"""What a run ran on, written beside its results."""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys

import jax

PACKAGES = ("ssljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow")


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
