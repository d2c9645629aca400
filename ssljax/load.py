"""A finished or running run, opened for use: its encoder and what belongs to it."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from ssljax import checkpoint
from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.methods.combine import normalised
from ssljax.step import Method


class Run(NamedTuple):
  """`method.encode(params, extra, {"image": …})` takes images as the run's source had them: of
  `shape` (h, w, c) and `dtype`; `mean` and `std` per channel are inside."""

  config: dict[str, Any]
  step: int
  encoder: Any
  method: Method
  params: Any
  extra: Any
  shape: tuple[int, ...]
  dtype: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  eval_views: Any

  def weights(self) -> Any:
    """Of the encoder: its parameters; with batch norm all variables, {"params", "batch_stats"}."""
    params = self.params["encoder"]
    if self.config["method"].get("evaluate") == "teacher":  # the one that `encode` runs
      params = self.extra["teacher"]["encoder"]
    if self.encoder.patch is not None:
      return params
    stats = self.extra.get("stats", {}).get("encoder", {})  # a checkpoint keeps no empty parts
    return {"params": params, "batch_stats": stats}


def load(workdir: str | os.PathLike, *, step: int | None = None) -> Run:
  """The newest good checkpoint of a workdir (or that of `step`), with everything to encode images.

  Raises:
    FileNotFoundError: no run there, or no checkpoint yet.
    ValueError: no checkpoint of that step.
  """
  workdir = pathlib.Path(workdir)
  if not (workdir / "config.json").exists():
    raise FileNotFoundError(f"{workdir} holds no run: there is no config.json")
  config = config_lib.complete(json.loads((workdir / "config.json").read_text()))
  found = checkpoint.load(workdir, step=step)
  given = found.meta["input"]
  encoder = config_lib.build(config["encoder"], dtype=config["dtype"])
  hidden = job_lib.component(config["data"]["hidden"], grid=encoder.grid(tuple(given["shape"])))
  method = normalised(job_lib.build_method(config, encoder, hidden), given["mean"], given["std"])
  return Run(
    config, found.step, encoder, method, found.tree["params"], found.tree["extra"],
    tuple(given["shape"]), given["dtype"], tuple(given["mean"]), tuple(given["std"]),
    job_lib.component(config["data"]["eval_views"]),
  )  # fmt: skip
