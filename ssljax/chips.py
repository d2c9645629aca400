"""Memory and links of accelerators, for plans. Matmul peaks are in `ssljax.flops`."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Chip(NamedTuple):
  """One JAX device. `wrap`: a torus axis is closed to a ring where this divides its length; 0 means
  no torus (every device reaches every other at `link`)."""

  name: str  # in the device kind; the first entry that is counts
  hbm: float  # GiB that a program may use
  bandwidth: float  # of the memory, GB/s
  link: float  # one way over one link to another device, GB/s
  wrap: int


# TPU: docs.cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e (read in November 2026). Links:
# "bidirectional ICI bandwidth per chip" (400, 1200, 800 GB/s) divided by two directions and by
# ports (4, 6, 4).
# Older pages give 819 GB/s and 1,640 GB/s for the memory of v5e and v6e, and 3,584 Gbit/s of ICI
# for v6e; the lower, newer figures are taken. HBM of v5e: 16 GiB, of which libtpu's compiler grants
# 15.75; the same 0.25 are taken off v6e. v5p: 95 of 96 GiB, as its page says.
# Rings: v5e and v6e close an axis at 16 chips (jax-ml.github.io/scaling-book/tpus), v5p at
# multiples of 4 (its page: "4x4x4 and larger").
# GPU: NVIDIA data sheets of A100 80 GB (2021), H100 SXM (2023), H200 SXM (2024): half of the NVLink
# figure, which counts both directions; within one NVLink domain.
CHIPS = (
  Chip("TPU v6", 31.75, 1600.0, 100.0, 16),
  Chip("TPU v5 lite", 15.75, 819.0, 50.0, 16),
  Chip("TPU v5e", 15.75, 819.0, 50.0, 16),
  Chip("TPU v5", 95.0, 2765.0, 100.0, 4),
  Chip("H200", 131.0, 4800.0, 450.0, 0),
  Chip("H100", 74.0, 3350.0, 450.0, 0),
  Chip("A100", 74.0, 2039.0, 300.0, 0),
)


def chip(device_kind: str) -> Chip | None:
  """What is known of a device kind (`jax.devices()[0].device_kind`)."""
  return next((c for c in CHIPS if c.name.lower() in device_kind.lower()), None)


def links(devices: Sequence[Any], wrap: int) -> int:
  """Links of one device: two an axis of the torus that is closed, one an open one."""
  coords = [getattr(device, "coords", None) for device in devices]
  if not wrap or len(devices) == 1 or None in coords:
    return 1
  sizes = [len(set(axis)) for axis in zip(*coords)]
  return sum(2 if size % wrap == 0 else 1 for size in sizes if size > 1)
