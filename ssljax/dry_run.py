"""`--dry_run`: everything is checked, a step compiled, a batch drawn; nothing is trained."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from ssljax import config as config_lib
from ssljax import flops, metrics, processes
from ssljax import job as job_lib
from ssljax.evaluate import Evaluation, unit_scale
from ssljax.methods.combine import IMAGES, make_views
from ssljax.train import check_workdir, compiled_step, model_flops


def dry_run(
  config: Mapping[str, Any], workdir: str | os.PathLike, *, new_schedule: bool = False
) -> None:
  """Prints parameters, shapes, memory and FLOPs of a step; writes figures/batch.png."""
  config = config_lib.complete(config_lib.plain(config))
  workdir = pathlib.Path(workdir)
  check_workdir(workdir, config, new_schedule)
  job = job_lib.assemble(config, workdir)
  Evaluation(job, workdir)  # opens the evaluation splits
  processes.say(metrics.parameter_table(job.state.params))
  processes.say("\nbatch, all devices together:")
  for key, value in job.batch.items():
    processes.say(f"  {key}  {' x '.join(map(str, value.shape))}  {value.dtype}")
  with jax.set_mesh(job.mesh):
    memory = compiled_step(job).memory_analysis()
  processes.say(f"\nmemory of a step on each of {job.mesh.size} devices:")
  for name, size in memory_lines(memory, job.state):
    processes.say(f"  {name:<28}{size / 2**20:12,.1f} MiB")
  work = model_flops(job)
  processes.say(f"\nmodel FLOPs: {work:.3e} a step, {work / config['batch_size']:.3e} an image")
  kind = jax.devices()[0].device_kind
  peak = flops.device_peak_flops(kind, config["dtype"])
  if peak:
    seconds = work / (peak * job.mesh.size)
    processes.say(f"at the full speed of {job.mesh.size} x {kind}: {1000 * seconds:.1f} ms a step")
  if processes.first():
    processes.say(f"\nwrote {draw_batch(job, workdir)}")


def memory_lines(memory: Any, state: Any) -> list[tuple[str, int]]:
  """What the compiler says of one device's memory, in bytes."""
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  return [
    ("state and batch", arguments),
    ("temporaries", temporary),
    ("together", arguments + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes),
    ("parameters, all devices", whole),
  ]


def seen(job: job_lib.Job, batch: Mapping[str, Any]) -> dict[str, Any]:
  """A host batch as the method sees it: what the step makes of it is made here, as in step 0."""
  feed = job.feed
  if not (feed.cached or feed.make_views or feed.draw_hidden):
    return dict(batch)
  rng = jax.random.fold_in(jax.random.key(job.config["seed"]), 0)
  # On one local device: of several processes this one alone draws.
  images = {"image": feed.source.fetch(batch["index"])} if feed.cached else {}
  make = jax.jit(lambda given: make_views(given, rng, feed.make_views, feed.draw_hidden))
  return jax.device_get(make({**batch, **images}))


def draw_batch(job: job_lib.Job, workdir: pathlib.Path) -> pathlib.Path:
  """The first training batch, views and hidden places, as a picture."""
  from ssljax.viz.batch import batch_figure

  with job.batches(0) as batches:
    batch = seen(job, next(batches))
  (workdir / "figures").mkdir(parents=True, exist_ok=True)
  shown = batch | {key: unit_scale(batch[key]) for key in IMAGES if key in batch}
  if job.hidden is not None:
    shown["hidden"] = job.hidden.shown(batch)
  return batch_figure(workdir / "figures" / "batch.png", shown, job.grid)
