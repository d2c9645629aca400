"""The run: build, restore, loop, evaluate, save."""

import collections
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from ssljax import (
  checkpoint,
  collapse,
  environment,
  flops,
  metrics,
  on_device,
  processes,
  reporting,
  sharding,
)
from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.data import sources
from ssljax.evaluate import Evaluation
from ssljax.methods.combine import normalised
from ssljax.signals import stop_signals
from ssljax.step import init_state, train_step
from ssljax.trace import Trace


def run(
  config: Mapping[str, Any],
  workdir: str | os.PathLike,
  *,
  new_schedule: bool = False,
  profile: int = 0,
) -> dict[str, float]:
  """Trains until `total_steps`, from the newest good checkpoint in `workdir` if there is one.

  config: any mapping, complete or not (see `ssljax.config`). new_schedule: let `total_steps` and
  the schedule differ from those the workdir was begun with. profile: the first of three steps whose
  trace is written to `workdir/profile`; 0 is none. Returns the last value of each metric.

  Raises:
    ValueError, FileNotFoundError: the config, the data or the workdir do not allow the run.
    FloatingPointError: a metric stopped being finite; the last good checkpoint is kept.
  """
  config = config_lib.complete(config_lib.plain(config))
  workdir = pathlib.Path(workdir)
  check_workdir(workdir, config, new_schedule)
  job = job_lib.assemble(config, workdir)
  evaluate = Evaluation(job, workdir)
  claim(workdir, config)
  checkpoints = checkpoint.open_checkpoints(
    workdir / "checkpoints", **config["checkpoint"], log=processes.say
  )
  with jax.set_mesh(job.mesh):
    try:
      trace = Trace(workdir / "profile", profile)
      with processes.together(config["log"]["watchdog"]) as watch:
        state = restore(job, checkpoints) or start(job)
        return loop(job, state, checkpoints, evaluate, workdir, watch, trace)
    finally:
      checkpoints.close()


def loop(job, state, checkpoints, evaluate, workdir, watch, trace) -> dict[str, float]:
  """The steps, and what belongs between them. Step s is the state after s updates."""
  config = job.config
  total, batch_size, log = config["total_steps"], config["batch_size"], config["log"]
  first, pending = int(state.step), []
  last: dict[str, float] = {}
  processes.say(metrics.parameter_table(state.params))
  step_fn, place = compiled_step(job), on_device.placer(job.feed, job.mesh, batch_size)
  writer, progress = outputs(workdir, log, first, total)
  tell_collapse = collapse_watch(job, progress.note)
  with stop_signals() as stop, job.batches(first) as batches:
    speed = throughput(job)
    trace.after(first, state.step)
    for step in range(first + 1, total + 1):
      watch.at(f"step {step}, waiting for data")
      with speed.waiting():
        batch = next(batches)
      watch.at(f"step {step}")
      state, found = step_fn(state, place(batch))
      speed.step()
      pending.append((step, found, batch["index"]))
      trace.after(step, found)
      jax.block_until_ready(pending[-2:][0][1])  # at most two steps in flight
      stopping = stop(step)  # looked at once: a later signal must not skip the save below
      ends = step == total or stopping
      to_log = step % log["every"] == 0 or ends
      to_evaluate = is_due(config["eval"]["every"], step, total)
      to_save = checkpoints.should_save(step) or to_evaluate or ends
      if to_log or to_save:
        numbers = checked(pending) | {"train/lr": float(job.schedule(step - 1))}
      watch.rest()
      if to_log:
        checkpoints.check()
        numbers |= speed.read()
        writer.write(step, numbers)
        progress.update(step, numbers)
        tell_collapse(numbers)
        last |= numbers
      scores = {}
      if to_evaluate:
        with speed.paused():
          scores = evaluate(state, step)
        writer.write(step, scores)
        last |= scores
        progress.note(headline(step, scores))
      if to_save:
        # Before the save: what was met before a checkpoint is not met again by a resumed run.
        tell_damaged(workdir, batches.damaged | evaluate.damaged, progress.note)
        with speed.paused():
          save(job, checkpoints, state, step, scores)
      if to_evaluate and processes.first():
        reporting.write(workdir)
      if stopping:
        progress.note(f"stopped by a signal at step {step}; the same command goes on from there")
        break
  trace.stop()
  checkpoints.wait()
  writer.close()
  progress.close()
  if processes.first():
    processes.say(f"wrote {reporting.write(workdir)}")
  return last


def outputs(workdir, log, first, total) -> tuple[metrics.Writer, metrics.Progress]:
  """Where numbers go; nowhere but in the first process."""
  silent = not processes.first()
  writer = metrics.open_writer(
    workdir, tensorboard=log["tensorboard"], resume_step=first, silent=silent
  )
  return writer, metrics.Progress(total, first, stream=open(os.devnull, "w") if silent else None)


def collapse_watch(job, say):
  """`look(numbers)`, for what is logged: says, once each, the signs of collapse that the logged
  values of the last twentieth of the run agree on, the last ten at least."""
  logged = job.config["total_steps"] // job.config["log"]["every"]
  recent: collections.deque = collections.deque(maxlen=max(10, logged // 20))
  told: set[str] = set()

  def look(numbers):
    recent.append(numbers)
    found = collapse.warnings(recent, job.method.chance) if len(recent) == recent.maxlen else []
    for line in found:
      if line not in told:
        say(line)
        told.add(line)

  return look


def tell_damaged(workdir, damaged: Mapping[str, str], say) -> None:
  """The unreadable images that any process met, told once by the first."""
  found: dict[str, str] = {}
  for one in processes.to_first(dict(damaged)):
    found |= one
  if processes.first():
    reporting.tell_damaged(workdir, found, say)


def throughput(job):
  """Images/s, data wait and, on accelerators whose peak is known, MFU."""
  kind = jax.devices()[0].device_kind
  peak = flops.device_peak_flops(kind, job.config["dtype"])
  work = model_flops(job) if peak else 0.0
  peak = peak * job.mesh.size if peak else None
  return metrics.Throughput(job.config["batch_size"], flops=work, peak=peak)


def model_flops(job) -> float:
  """Matmul FLOPs of one step on the global batch, forward and backward, without what
  rematerialisation computes again."""
  encoder = job.encoder
  if getattr(encoder, "remat", "none") != "none":
    encoder = encoder.clone(remat="none")
  method = job_lib.build_method(job.config, encoder, job.hidden)
  method = normalised(method, job.mean, job.std)  # without it the losses would see whole numbers
  step = functools.partial(train_step, method, job.tx, 1)
  plain = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
  return flops.count_flops(step, plain(job.state), plain(job.batch))


def compiled_step(job):
  """The training step, compiled for the job's shapes and placement; the state is donated."""
  step = functools.partial(train_step, job.trained, job.tx, job.config["accum"])
  where = jax.tree.map(lambda x: x.sharding, job.state)
  rows = sharding.batch_sharding(job.mesh)
  jitted = jax.jit(step, donate_argnums=0, in_shardings=(where, rows), out_shardings=(where, None))
  return jitted.lower(job.state, job.given).compile()


def start(job):
  """The state before the first step, with released weights grafted in where the config says so."""
  where = jax.tree.map(lambda x: x.sharding, job.state)
  config = job.config
  begin = functools.partial(init_state, job.trained, job.tx, job.batch, config["seed"])
  state = jax.jit(begin, out_shardings=where)()
  if not config["init_from"]:
    return state
  from ssljax.interop import graft

  params, extra = graft(config["init_from"], job, state.params, state.extra, log=processes.say)
  place = functools.partial(jax.tree.map, lambda new, old: jax.device_put(new, old.sharding))
  return state._replace(params=place(params, state.params), extra=place(extra, state.extra))


def restore(job, checkpoints):
  """The newest good state in the workdir, or None; refuses one that saw another data set."""
  found = checkpoints.restore(job.state)
  if found is None:
    return None
  state, meta = found
  if change := sources.source_change(meta["source"], job.source.fingerprint):
    raise ValueError(f"the source {job.source.name} changed since the checkpoint: {change}")
  processes.say(f"resumed at step {int(state.step)}")
  return state


def save(job, checkpoints, state, step, scores):
  """Saves in the background, with the score that decides which step is the best."""
  best = job.config["eval"]["best"]
  meta = {"source": job.source.fingerprint, "input": job.input()}
  checkpoints.save(step, state, meta, score=scores.get(f"eval/{best}"))


def checked(pending: list) -> dict[str, float]:
  """Metrics of the newest step as numbers, once all steps since the last look are known finite."""
  steps, found, indices = zip(*pending)
  pending.clear()
  values = {}
  for step, numbers, index in zip(steps, jax.device_get(found), indices):
    values = {f"train/{k}": float(v) for k, v in numbers.items()}
    metrics.check_finite(step, values, index)
  return values


def is_due(every: int, step: int, total: int) -> bool:
  """Every so many steps and at the end; never where `every` is 0."""
  return bool(every) and (step % every == 0 or step == total)


def headline(step: int, scores: Mapping[str, float]) -> str:
  """One line of an evaluation: the run's own accuracies beside the untrained encoder's."""
  parts = []
  for key, value in scores.items():
    if key.endswith("/top1") and "baseline" not in key:
      name = key.removeprefix("eval/")
      random = scores.get(f"eval/baseline_random/{name}")
      parts.append(f"{name} {value:.3f}" + (f" (untrained {random:.3f})" if random else ""))
  return f"evaluation at step {step}: " + (", ".join(parts) or "no labels")


def check_workdir(workdir: pathlib.Path, config: Mapping, new_schedule: bool) -> None:
  """Raises ValueError where the workdir belongs to a run with another config.

  A run that ended before its first step has left nothing that another could spoil.
  """
  kept, record = workdir / "config.json", workdir / "metrics.jsonl"
  begun = any((workdir / "checkpoints").glob("*")) or (record.exists() and record.stat().st_size)
  if not kept.exists() or not begun:
    return
  changed = config_lib.differences(json.loads(kept.read_text()), config, new_schedule)
  if changed:
    only_schedule = all(c.startswith(("total_steps", "schedule.")) for c in changed)
    hint = "; --allow_new_schedule allows it" if only_schedule else "; use another workdir"
    raise ValueError(f"{workdir} belongs to another config: {', '.join(changed)}{hint}")


def claim(workdir: pathlib.Path, config: Mapping) -> None:
  """Writes what the run is and what it runs on."""
  if not processes.first():
    return
  environment.write(workdir)
  reporting.write_json(workdir / "config.json", config_lib.as_json(config))
