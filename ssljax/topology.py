"""Devices that a program is compiled for, whether they are here or not."""

import contextlib
import os
import re
from collections.abc import Sequence
from typing import Any


def topology_devices(name: str) -> Sequence[Any]:
  """Devices of `v5e:16x16`, `v5p:4x4x4`, `v6e:8x8` (compile-only, by libtpu), `cpu:8` (fake ones),
  or `local` (what is there).

  Raises:
    ValueError: no such topology, or libtpu is not installed.
  """
  kind, _, sizes = name.partition(":")
  if name == "local":
    import jax

    return jax.devices()
  if kind == "cpu" and sizes.isdigit():
    return _cpu_devices(int(sizes))
  if not re.fullmatch(r"v\d+[a-z]*", kind) or not re.fullmatch(r"\d+(x\d+){1,2}", sizes):
    raise ValueError(f"topology {name!r} is not like v5e:16x16, v5p:4x4x4, cpu:8 or local")
  _quiet_libtpu()
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(name, platform="tpu").devices
  except Exception as error:
    if "libtpu" in str(error) and "open" in str(error):
      raise ValueError("planning for a TPU needs libtpu: pip install 'ssljax[tpu]'") from error
    raise ValueError(f"topology {name!r}: {str(error).splitlines()[0]}") from error


def _cpu_devices(count: int) -> Sequence[Any]:
  import jax

  with contextlib.suppress(RuntimeError):  # JAX has begun already: how many it has is checked below
    jax.config.update("jax_num_cpu_devices", count)
  there = jax.devices("cpu")
  if len(there) < count:
    raise ValueError(f"cpu:{count}, but JAX has begun with {len(there)} CPU devices")
  return there[:count]


def _quiet_libtpu() -> None:
  """libtpu asks Google's metadata server which TPU it is on, and waits for an answer, unless it is
  told. What it is told does not matter: the compiler follows the name of the topology."""
  for key, value in (
    ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
    ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_WORKER_ID", "0"),
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_MIN_LOG_LEVEL", "3"),
    ("TPU_STDERR_LOG_LEVEL", "3"),
  ):  # fmt: skip
    os.environ.setdefault(key, value)
