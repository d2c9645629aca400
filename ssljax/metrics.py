"""Numbers of a run: JSON lines, TensorBoard, throughput, progress, the check that all are finite.

`metrics.jsonl` holds one object a line, `{"step": 12, "train/loss": 0.5}`, and is the record of the
run: strict JSON (a number that is not finite is written as null), cut back when a run resumes.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from ssljax.board import open_board

_log = logging.getLogger(__name__)


class Writer:
  """Writes scalars to `metrics.jsonl` and, if asked, to TensorBoard; made by `open_writer`."""

  def __init__(self, path: str | os.PathLike, board: Any = None) -> None:
    self._file = open(path, "a", encoding="utf-8")
    self._board = board

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line and hands it to the system, so that a kill loses nothing of it.

    OSError, with the name of the file, where the disk is full.
    """
    numbers = {key: float(value) for key, value in values.items()}
    finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    line = json.dumps({"step": int(step)} | finite, allow_nan=False)
    try:
      self._file.write(line + "\n")
      self._file.flush()
    except OSError as error:
      with contextlib.suppress(OSError):  # else it is written once more when Python ends
        self._file.close()
      raise OSError(f"cannot write {self._file.name}: {error.strerror}") from error
    if self._board is not None and numbers:
      self._board.write_scalars(int(step), numbers)

  def close(self) -> None:
    """Writes out what is buffered."""
    self._file.close()
    if self._board is not None:
      self._board.close()


def open_writer(
  workdir: str | os.PathLike,
  *,
  tensorboard: bool = True,
  resume_step: int = 0,
  silent: bool = False,
) -> Writer:
  """Opens `workdir/metrics.jsonl` and, if asked, TensorBoard events in `workdir/tensorboard`.

  resume_step: the step the run goes on from. Lines and events of later steps are dropped, because
  they will be written again; 0 means that the run begins, and drops them all.
  silent: nothing is written; another process of the run writes it.
  """
  if silent:
    return Writer(os.devnull)
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "metrics.jsonl"
  cut_back(path, resume_step)
  return Writer(path, open_board(folder / "tensorboard", resume_step) if tensorboard else None)


def cut_back(path: pathlib.Path, step: int) -> None:
  """Keeps the lines of steps up to `step` (none for 0), atomically; no file, nothing to do.

  A line that is no JSON object with a step is dropped and reported: the last line of a killed run
  may be half a line.
  """
  if not path.exists():
    return
  kept, broken = [], 0
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    try:
      keep = 0 < step >= json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
      keep, broken = False, broken + 1
    if keep:
      kept.append(line + "\n")
  if broken:
    _log.warning("%s: %d unreadable lines dropped", path, broken)
  part = path.with_name(path.name + ".part")
  with part.open("w", encoding="utf-8") as file:
    file.writelines(kept)
    file.flush()
    os.fsync(file.fileno())
  part.replace(path)


def check_finite(step: int, values: Mapping[str, Any], index: Sequence[int] | np.ndarray) -> None:
  """FloatingPointError naming step, metrics and the examples of the batch if any is not finite."""
  numbers = {key: float(value) for key, value in values.items()}
  bad = [f"{key} is {value}" for key, value in numbers.items() if not math.isfinite(value)]
  if bad:
    rows = [int(i) for i in np.asarray(index).reshape(-1)]
    raise FloatingPointError(f"step {step}: {', '.join(bad)}; examples of the batch: {rows}")


class Throughput:
  """Images/s, share of the time spent waiting for data, and MFU over a window of steps."""

  def __init__(
    self,
    batch_size: int,
    *,
    flops: float = 0.0,
    peak: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ) -> None:
    """flops: model FLOPs of a step over the global batch; peak: FLOP/s of all devices together
    (None = unknown: no MFU). The window begins at once; `restart` it after the compilation."""
    self._batch_size, self._flops, self._peak, self._clock = batch_size, flops, peak, clock
    self.restart()

  def restart(self) -> None:
    """Begins a new window."""
    self._began, self._steps, self._waited, self._left_out = self._clock(), 0, 0.0, 0.0

  def step(self) -> None:
    """Counts one training step."""
    self._steps += 1

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around the fetch of the next batch."""
    began = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - began

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around what is not training (evaluation, pictures): left out of the window."""
    began = self._clock()
    try:
      yield
    finally:
      self._left_out += self._clock() - began

  def read(self) -> dict[str, float]:
    """The numbers since the last `read` or `restart`, and a new window; {} without steps.

    Steps are dispatched ahead of the device: call it after fetching the last step's loss.
    """
    seconds = self._clock() - self._began - self._left_out
    steps, waited = self._steps, self._waited
    self.restart()
    if not steps or seconds <= 0:
      return {}
    rates = {
      "throughput/images_per_sec": steps * self._batch_size / seconds,
      "throughput/step_ms": 1000 * seconds / steps,
      "throughput/data_wait": min(1.0, waited / seconds),
    }
    if self._flops and self._peak:
      rates["throughput/mfu"] = self._flops * steps / seconds / self._peak
    return rates


class Progress:
  """Shows where a run is: a bar on a terminal, at most `lines` plain lines elsewhere."""

  def __init__(
    self,
    total: int,
    start: int = 0,
    *,
    unit: str = "images",
    stream: TextIO | None = None,
    lines: int = 100,
  ) -> None:
    """total: the last step; start: the step the run goes on from; lines: limit of plain lines."""
    self._total, self._unit, self._stream = total, unit, stream or sys.stderr
    self._between = max(1, -(-(total - start) // lines))
    self._next = start
    self._bar = None
    if self._stream.isatty():
      import tqdm

      self._bar = tqdm.tqdm(
        total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True
      )

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows `step` with loss, rate, share of waiting and time left, as far as `values` has them.

    values: the keys of `metrics.jsonl` (train/loss, throughput/…).
    """
    if self._bar is not None:
      self._bar.set_postfix_str(", ".join(self._facts(step, values)), refresh=False)
      self._bar.update(step - self._bar.n)
    elif step >= self._next or step >= self._total:
      self._next = step - step % self._between + self._between
      facts = [f"step {step}/{self._total}", *self._facts(step, values)]
      print("  ".join(facts), file=self._stream, flush=True)

  def note(self, text: str) -> None:
    """One line above the bar, or among the plain lines."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()

  def _facts(self, step: int, values: Mapping[str, Any]) -> list[str]:
    facts = []
    if "train/loss" in values:
      facts.append(f"loss {float(values['train/loss']):.4g}")
    if "throughput/images_per_sec" in values:
      facts.append(f"{values['throughput/images_per_sec']:.3g} {self._unit}/s")
    if "throughput/data_wait" in values:
      facts.append(f"waiting for data {values['throughput/data_wait']:.0%}")
    if "throughput/step_ms" in values:
      left = (self._total - step) * values["throughput/step_ms"] / 1000
      facts.append(f"{duration(left)} left")
    return facts


def duration(seconds: float) -> str:
  """45 -> "45 s", 600 -> "10 min", 9000 -> "2 h 30 min", 200000 -> "2 d 7 h"."""
  minutes = round(seconds / 60)
  if seconds < 90:
    return f"{seconds:.0f} s"
  if minutes < 60:
    return f"{minutes} min"
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def parameter_table(params: Any) -> str:
  """Name, shape, type and size of every leaf (arrays or shapes), and the total, as plain text."""
  rows = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    shape = " x ".join(map(str, leaf.shape)) or "scalar"
    rows.append((name, shape, str(leaf.dtype), math.prod(leaf.shape)))
  total = sum(row[3] for row in rows)
  rows = [(name, shape, dtype, f"{size:,}") for name, shape, dtype, size in rows]
  rows = [("parameter", "shape", "type", "size"), *rows, ("total", "", "", f"{total:,}")]
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = [
    f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}"
    for name, shape, dtype, size in rows
  ]
  rule = "-" * len(lines[0])
  return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
