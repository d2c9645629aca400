"""Checkpoints of a run: saved in the background, checked on the way back. All orbax calls are here
and in `checkpoint_read.py`.

On disk: `<directory>/<step>/state` (arrays under flat names, see `leaves.py`) and
`<directory>/<step>/manifest` (JSON: shape, type and checksum of every leaf, and `meta`).
A step is renamed into place when it is whole, so that a killed save leaves nothing that counts.
Orbax notices neither flipped bytes nor a step that a kill left half deleted. Hence the checksums,
at least two kept steps, and a restore that falls back to the step before.
"""

import logging
import math
import os
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ssljax import leaves
from ssljax.checkpoint_read import FORMAT, alike, read_manifest, read_parts, read_state

_log = logging.getLogger(__name__)
_ASIDE = "damaged_"  # prefix of a damaged step that a restore moved out of the way


class Loaded(NamedTuple):
  """What a run learnt, as numpy arrays, for use without its optimizer and its mesh."""

  step: int
  tree: dict[str, Any]  # {"params": nested dict, "extra": nested dict}
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run; made by `open_checkpoints`."""

  def __init__(self, directory, every: int, keep: int, keep_every: int, log: Callable) -> None:
    self.directory = _absolute(directory)
    self._every, self._log = every, log
    self._scores: dict[int, float] = {}
    self._policy = types.SimpleNamespace(
      should_preserve=lambda infos, *, context: _kept(
        [info.step for info in infos], keep, keep_every, self._scores
      )
    )
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    for name in ("absl", "asyncio"):
      logging.getLogger(name).addFilter(_not_told_twice)
    self._scores.clear()  # a step that was set aside takes its score with it
    self._scores.update(_scores(self.directory))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._policy,
      cleanup_tmp_directories=True,  # what a killed save left behind
      lightweight_initialize=True,  # no step's own metadata is needed, and it may be damaged
      save_root_metadata=False,
    )
    return ocp.CheckpointManager(self.directory, options=options)

  def steps(self) -> list[int]:
    """Steps on disk and the one being written, ascending."""
    return sorted(self._manager.all_steps())

  def should_save(self, step: int) -> bool:
    """Whether `step` is a multiple of `every` (never with every=0) that is not saved yet."""
    due = self._every > 0 and step > 0 and step % self._every == 0
    return due and step not in self.steps()

  def save(self, step: int, state: Any, meta: dict, *, score: float | None = None) -> bool:
    """Saves in the background; False when `step` is there already.

    Returns as soon as the arrays are copied to the host: `state` may be donated to the next step.
    The step with the highest finite `score` is kept besides the latest ones. OSError when this
    save cannot start or the previous one failed; TypeError or ValueError when `meta` is not JSON.
    """
    if step in self.steps():
      return False
    arrays, entries = leaves.describe(state)
    score = float(score) if score is not None and math.isfinite(score) else None
    notes = {"format": FORMAT, "step": step, "score": score, "leaves": entries, "meta": meta}
    manifest = leaves.sign(notes)
    if score is not None:
      self._scores[step] = score
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(manifest)
    )
    self._guard(lambda: self._manager.save(step, args=args, force=True))
    return True

  def restore(self, abstract_state: Any) -> tuple[Any, dict] | None:
    """The newest good state and its `meta`; None when nothing was ever saved.

    abstract_state: `jax.ShapeDtypeStruct`s with shardings; any number of devices will do.
    Every damaged step is reported by `log` and, once an older one is restored, renamed to
    `damaged_<step>`, because the resumed run will save that step again.
    ValueError when leaves, shapes or types are not those that were saved (that is no damage: the
    settings differ); RuntimeError when there are steps and every one of them is damaged.
    """
    self.wait()

    def read(path):
      manifest = alike(lambda: read_manifest(path))
      leaves.check_fit(manifest["leaves"], abstract_state)
      return read_state(path, manifest["leaves"], abstract_state), manifest["meta"]

    found, bad = _newest_good(self.directory, read, self._log)
    if found and bad:
      self._set_aside(bad)
    return found[1] if found else None

  def wait(self) -> None:
    """Returns when the save in progress is on disk; OSError when it failed."""
    self._guard(self._manager.wait_until_finished)

  def check(self) -> None:
    """OSError when a save in the background has failed; returns at once."""
    self._guard(self._manager.check_for_errors)

  def close(self) -> None:
    """Waits for the save in progress, then releases the threads."""
    self._guard(self._manager.close)

  def _guard(self, call: Callable[[], Any]) -> None:
    try:
      call()
    except Exception as error:
      raise OSError(f"cannot write a checkpoint to {self.directory}: {_reason(error)}") from error

  def _set_aside(self, steps: Sequence[int]) -> None:
    self._manager.close()
    if jax.process_index() == 0:
      for step in steps:
        target = self.directory / f"{_ASIDE}{step}"
        if target.exists():
          target.rmtree()
        (self.directory / str(step)).rename(target)
        self._log(f"checkpoint of step {step} is damaged: moved to {target}, which can be deleted")
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("ssljax:damaged_steps")
    self._manager = self._open()


def open_checkpoints(
  directory: str | os.PathLike,
  *,
  every: int = 1000,
  keep: int = 2,
  keep_every: int = 0,
  log: Callable[[str], None] = _log.warning,
) -> Checkpoints:
  """Opens (or makes) the checkpoints in `directory`, for the one run that writes them.

  every: steps between saves (0 = only when asked). keep: how many of the latest stay; never fewer
  than two, because a kill can leave one of them unusable. keep_every: steps that are multiples of
  it stay for good (0 = none). log: told, in one line each, which step was not used and why.
  """
  for name, value in (("every", every), ("keep", keep), ("keep_every", keep_every)):
    if value < 0:
      raise ValueError(f"checkpoint.{name} is {value}: it must be 0 or more")
  if keep < 2:
    log(f"checkpoint.keep is {keep}: two are kept, one of them may be lost to a kill")
  return Checkpoints(directory, every, max(keep, 2), keep_every, log)


def load(
  directory: str | os.PathLike,
  *,
  step: int | None = None,
  parts: Sequence[str] = ("params", "extra"),
  log: Callable[[str], None] = _log.warning,
) -> Loaded:
  """Numpy trees of the newest good step (or of `step`), wherever they were trained.

  directory: a run's workdir or its `checkpoints`; it may be in use by a running job, nothing in it
  is changed. Lists and tuples come back as dicts with keys "0", "1", …; empty parts as {}.
  FileNotFoundError without checkpoints, ValueError for a `step` that is not there, RuntimeError
  when all are damaged.
  """
  root = _root(directory)
  steps = _steps(root)
  if not steps:
    raise FileNotFoundError(f"no checkpoint in {root}")
  if step is not None and step not in steps:
    raise ValueError(f"no checkpoint of step {step} in {root}; there are {steps}")

  def read(path):
    manifest = read_manifest(path)
    return read_parts(path, manifest["leaves"], parts), manifest["meta"]

  found, _ = _newest_good(root, read, log, None if step is None else [step])
  good, (tree, meta) = found
  return Loaded(good, tree, meta)


def load_params(directory: str | os.PathLike, *, step: int | None = None) -> dict[str, Any]:
  """The parameters of the newest good step (or of `step`) as a numpy tree; errors as in `load`."""
  return load(directory, step=step, parts=("params",)).tree["params"]


def best_step(directory: str | os.PathLike) -> int | None:
  """The kept step that was saved with the highest `score`; None when none has one."""
  scores = _scores(_root(directory))
  return max(scores, key=lambda step: scores[step], default=None)


def _kept(steps, keep, keep_every, scores):
  """Which of the ascending `steps` stay: the latest, the multiples, the best."""
  best = max((s for s in steps if s in scores), key=lambda s: scores[s], default=None)
  latest = steps[-keep:]
  return [s in latest or s == best or bool(keep_every and s % keep_every == 0) for s in steps]


def _newest_good(root, read, log, steps=None):
  """((step, what `read` returns), damaged steps) of the first step, newest first, that can be read.

  (None, []) without steps. A misfit is no damage: it becomes a ValueError at once.
  """
  failures = {}
  for step in sorted(_steps(root) if steps is None else steps, reverse=True):
    try:
      return (step, read(root / str(step))), list(failures)
    except leaves.Misfit as error:
      raise ValueError(f"checkpoint of step {step} in {root} {error}") from None
    except Exception as error:  # any failure at all: the step before is better than no run
      failures[step] = _reason(error)
      log(f"checkpoint of step {step} cannot be used: {failures[step]}")
  if failures:
    detail = "; ".join(f"step {step}: {reason}" for step, reason in failures.items())
    raise RuntimeError(f"every checkpoint in {root} is damaged: {detail}")
  return None, []


def _not_told_twice(record: logging.LogRecord) -> bool:
  """Orbax's threads and tensorstore's writes log what fails, each with a traceback, before it is
  raised: `_guard` and `log` tell it in a line."""
  if not record.exc_info or os.environ.get("SSLJAX_TRACEBACK"):
    return True
  return not ("orbax" in record.pathname or "Error writing" in str(record.exc_info[1]))


def _reason(error: BaseException) -> str:
  while error.__cause__ is not None:  # what tensorstore said is inside what orbax says
    error = error.__cause__
  first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
  text = f"{type(error).__name__}: {first}"
  # The system's own words ("No space left on device") stand at the end, behind long names of files.
  return text if len(text) <= 240 else f"{text[:80]} … {text[-157:]}"


def _absolute(directory: str | os.PathLike) -> epath.Path:
  text = os.fspath(directory)
  return epath.Path(text if "://" in text else os.path.abspath(text))


def _root(workdir: str | os.PathLike) -> epath.Path:
  path = _absolute(workdir)
  return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _scores(root: epath.Path) -> dict[int, float]:
  """The scores of the steps that have one; a damaged step has none (restoring it says why)."""
  scores: dict[int, float] = {}
  for step in _steps(root):
    try:
      score = read_manifest(root / str(step)).get("score")
    except Exception as error:
      _log.info("no score of step %d: %s", step, _reason(error))
    else:
      scores |= {} if score is None else {step: score}
  return scores


def _steps(root: epath.Path) -> list[int]:
  if not root.is_dir():
    return []
  return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit())
