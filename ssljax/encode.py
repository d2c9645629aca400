"""python -m ssljax.encode --workdir=DIR --source=folder:/imgs --out=features.npz

Features of any source by the encoder of a run, in the order of the source, in constant memory.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ssljax import sharding
from ssljax.data import pipeline, sources, views
from ssljax.load import Run, load
from ssljax.tables import open_table


def encode(
  workdir: str | os.PathLike,
  source: Any,
  out: str | os.PathLike,
  *,
  split: str = "train",
  patches: bool = False,
  layers: Sequence[int] = (),
  batch_size: int = 64,
  step: int | None = None,
  log: Any = print,
) -> dict[str, str]:
  """Writes the features of `source`; -> the images that could not be read, by name, and why.

  out: .npz (arrays `pooled` [N d], `cls`, `name`, `index`, `readable`, `error`, `label` where the
  source has labels) or .parquet (the same as columns). patches: also `patches` [N n d]. layers:
  also `layer_i` [N n d], the patches after block i (from 0; negative from the end). An image that
  cannot be read keeps its row: `readable` is False, the features are NaN, `error` says why.

  Raises:
    FileNotFoundError, ValueError: no run, no source, a wrong layer or a wrong kind of file.
  """
  run = load(workdir, step=step)
  depth = run.encoder.depth
  if wrong := [i for i in layers if not -depth <= i < depth]:
    raise ValueError(f"--layers {wrong[0]}: the encoder has blocks 0 to {depth - 1}")
  if batch_size < 1:
    raise ValueError(f"--batch_size {batch_size} must be at least 1")
  opened = sources.open_source(source, split, channels=run.config["data"]["channels"])
  if (np.dtype(opened.dtype).kind == "f") != (np.dtype(run.dtype).kind == "f"):
    log(f"careful: the run saw {run.dtype} images, {opened.name} holds {opened.dtype}")
  batches, devices = _batches(run, opened, batch_size)
  with batches, open_table(out, opened.size) as table:
    bar = tqdm(total=opened.size, unit=" images", disable=None)
    for batch, features in _features(run, batches, patches, tuple(layers), devices):
      rows = _rows(batch, features, opened, batches.damaged)
      table.add(rows)
      bar.update(len(rows["index"]))
    bar.close()
  damaged = dict(batches.damaged)
  log(f"wrote {out}: {opened.size} rows, {table.describe()}")
  if damaged:
    log(f"{len(damaged)} images could not be read (readable is False, features are NaN):")
    for name, reason in damaged.items():
      log(f"  {name}: {reason}")
  return damaged


def _batches(run: Run, source: Any, batch_size: int) -> tuple[Any, Any]:
  """One pass over the source in the run's evaluation view, and the mesh that the rows go to."""
  mesh = sharding.make_mesh()
  devices = mesh.shape["data"]
  batch_size = -(-min(batch_size, source.size) // devices) * devices
  data, view = run.config["data"], run.eval_views
  if view is None and source.shape != run.shape:
    view = views.resize_crop(size=run.shape[:2])
  batches = pipeline.examples(
    source,
    batch_size=batch_size,
    views=view,
    channels=data["channels"],
    workers=data["workers"],
    max_pixels=data["max_pixels"],
  )
  return batches, mesh


def _features(
  run: Run, batches: Any, patches: bool, layers: tuple[int, ...], mesh: Any
) -> Iterator[tuple[dict, dict]]:
  """(batch, features) in order; the next batch is computed while one is written."""
  names = {f"layer_{range(run.encoder.depth)[i]}" for i in layers} | {"pooled", "cls"}
  names |= {"patches", "registers"} if patches else set()

  @jax.jit
  def forward(params, extra, image):
    found = run.method.encode(params, extra, {"image": image}, layers=layers)
    return {k: v.astype(np.float32) for k, v in found.items() if k in names}

  rows = sharding.batch_sharding(mesh)
  weights = jax.device_put((run.params, run.extra), jax.NamedSharding(mesh, jax.P()))
  waiting = None
  with jax.set_mesh(mesh):
    for batch in batches:
      features = forward(*weights, jax.device_put(batch["image"], rows))
      if waiting:
        yield waiting[0], jax.device_get(waiting[1])
      waiting = batch, features
    if waiting:
      yield waiting[0], jax.device_get(waiting[1])


def _rows(batch: dict, features: dict, source: Any, damaged: dict[str, str]) -> dict[str, Any]:
  """The rows of a batch, without the padding of the last one."""
  # Padding repeats the last index; an example that was asked for comes once.
  count = len(np.unique(batch["index"]))
  rows: dict[str, Any] = {k: v[:count] for k, v in features.items()}
  readable, index = batch["valid"][:count], batch["index"][:count]
  if not readable.all():
    rows = {k: np.array(v) for k, v in rows.items()}  # what comes from the device is read-only
    for value in rows.values():
      value[~readable] = np.nan
  names = [source.example_name(i) for i in index]
  errors = ["" if ok else damaged.get(n, "cannot be read") for ok, n in zip(readable, names)]
  rows |= {"index": index, "name": names, "readable": readable, "error": errors}
  if "label" in batch:
    rows["label"] = batch["label"][:count]
  return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser("ssljax.encode", description=__doc__, allow_abbrev=False)
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--source", required=True, help="digits, folder:DIR, npz:FILE, tar:SHARDS, …")
  parser.add_argument("--out", required=True, help="FILE.npz or FILE.parquet")
  parser.add_argument("--split", default="train", help='e.g. "train[:90%%]"')
  parser.add_argument("--patches", action="store_true", help="features of every patch, too")
  parser.add_argument("--layers", default="", help="patch features after these blocks, e.g. 3,11")
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--step", type=int, help="a checkpoint other than the newest")
  flags = parser.parse_args(argv)
  try:
    flags.layers = tuple(int(i) for i in flags.layers.split(",") if i)
  except ValueError:
    parser.error(f"--layers {flags.layers} must be numbers of blocks, e.g. 3,11")
  return flags


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; -> the exit code."""
  from ssljax.errors import explain

  flags = parse(argv)
  try:
    encode(
      flags.workdir, flags.source, flags.out, split=flags.split, patches=flags.patches,
      layers=flags.layers, batch_size=flags.batch_size, step=flags.step,
    )  # fmt: skip
  except (ValueError, FileNotFoundError) as error:
    return explain(error)
  return 0


if __name__ == "__main__":
  sys.exit(main())
