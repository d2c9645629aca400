"""Mean and deviation of each channel, by which examples are normalised."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssljax import processes, reporting
from ssljax.data import moments

# Of the red, green and blue channels of ImageNet, on the 0…1 scale.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def statistics(config: Mapping, source: Any, workdir: pathlib.Path | None) -> tuple[Any, Any]:
  """Mean and deviation per channel: the config's, ImageNet's for RGB, or measured once over a
  sample and kept in `moments.json` of the workdir."""
  data = config["data"]
  if data["mean"] is not None or data["std"] is not None:
    return _checked_statistics(data)
  if source.channels == 3 and np.issubdtype(np.dtype(source.dtype), np.integer):
    return IMAGENET
  # All processes wait for the first: what one of them finds on the disk depends on the moment.
  mean, std = processes.from_first(lambda: _measured(source, workdir))
  return mean, std


def _measured(source: Any, workdir: pathlib.Path | None) -> list:
  kept = workdir / "moments.json" if workdir else None
  if kept and kept.exists():
    found = json.loads(kept.read_text())
    # A dry run, or a run that failed at once, may have measured another source here.
    if found["source"] == json.loads(json.dumps(source.fingerprint)):
      return [found["mean"], found["std"]]
  mean, std = (np.asarray(x).tolist() for x in moments.moments(source, source.channels))
  if kept:
    kept.parent.mkdir(parents=True, exist_ok=True)
    reporting.write_json(kept, {"mean": mean, "std": std, "source": source.fingerprint})
  return [mean, std]


def _checked_statistics(data: Mapping) -> tuple[Any, Any]:
  for key in ("mean", "std"):
    value = data[key]
    if value is None or len(value) != data["channels"]:
      raise ValueError(f"data.{key} must hold one number for each of {data['channels']} channels")
  if min(data["std"]) <= 0:
    raise ValueError(f"data.std must be positive, not {data['std']}")
  return data["mean"], data["std"]
