"""A finished (or still running) run as something to use: its encoder, weights and normalisation."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ssljax import checkpoint, job
from ssljax import config as config_lib
from ssljax.methods.combine import normalised
from ssljax.step import Method


class Trained(NamedTuple):
  """What a run learnt. `method.encode(params, extra, {"image": …})` takes images as the source has
  them; `shape` is that of one (h, w, c), `mean` and `std` are on the 0…1 scale."""

  config: dict[str, Any]
  encoder: Any
  method: Method
  params: Any
  extra: Any
  shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  step: int


def load(
  workdir: str | os.PathLike, *, step: int | None = None, log: Callable[[str], None] = print
) -> Trained:
  """The newest good checkpoint of a run (or that of `step`); its data are not needed.

  Raises:
    FileNotFoundError: no run there, or one without a checkpoint.
    ValueError: no such step.
  """
  workdir = pathlib.Path(workdir)
  if not (workdir / "config.json").is_file():
    raise FileNotFoundError(f"{workdir} is no workdir of a run: it has no config.json")
  config = config_lib.complete(json.loads((workdir / "config.json").read_text()))
  loaded = checkpoint.load(workdir, step=step, log=log)
  params, extra = loaded.tree["params"], loaded.tree["extra"]
  encoder = config_lib.build(config["encoder"], dtype=config["dtype"])
  shape = _shape(config, loaded.meta)
  hidden = job.component(config["data"]["hidden"], grid=encoder.grid(shape[:-1]))
  mean, std = _statistics(config["data"], workdir)
  method = normalised(job.build_method(config, encoder, hidden), mean, std)
  return Trained(
    config, encoder, method, params, extra, shape, tuple(mean), tuple(std), loaded.step
  )


def evaluation_views(config: Mapping[str, Any], shape: tuple[int, int, int]) -> Any:
  """The run's evaluation view; without one, the central crop of the size that it trained on."""
  given = config["data"]["eval_views"]
  default = {"name": "ssljax.data.views.resize_crop", "size": tuple(shape[:-1])}
  return config_lib.build(given or default)


def _shape(config: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[int, int, int]:
  """(h, w, c) of the images that the encoder saw."""
  for views in (config["data"]["views"], config["data"]["eval_views"]):
    size = job.component(views).size if views else None
    if size is not None:
      return (*size, config["data"]["channels"])
  seen = meta["source"].get("shape")
  if not seen:
    raise ValueError("the checkpoint does not say which size its images had: set data.eval_views")
  return (seen[0], seen[1], config["data"]["channels"])


def _statistics(data: Mapping[str, Any], workdir: pathlib.Path) -> tuple[Any, Any]:
  """Mean and deviation with which the run normalised."""
  kept = workdir / "moments.json"
  if data["mean"] is not None:
    return data["mean"], data["std"]
  if kept.is_file():
    found = json.loads(kept.read_text())
    return found["mean"], found["std"]
  return job.IMAGENET
