"""The record of a run is strict JSON, survives kills, and says what a person needs to know."""

import io
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import metrics, records


def lines_of(path) -> list[dict]:
  def refuse(word):
    raise AssertionError(f"{word} is no JSON")

  return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def written(workdir, steps, **settings) -> None:
  writer = metrics.open_writer(workdir, tensorboard=False, **settings)
  for step in steps:
    writer.write(step, {"train/loss": 1 / step})
  writer.close()


def test_one_object_a_line_and_never_invalid_json(tmp_path):
  writer = metrics.open_writer(tmp_path / "new" / "run", tensorboard=False)
  writer.write(1, {"train/loss": jnp.float32(0.5), "train/lr": np.float64(1e-3)})
  writer.write(np.int64(2), {"train/loss": float("nan"), "a": float("inf"), "b": -jnp.inf})
  path = tmp_path / "new" / "run" / "metrics.jsonl"
  want = [
    {"step": 1, "train/loss": 0.5, "train/lr": 1e-3},
    {"step": 2, "train/loss": None, "a": None, "b": None},
  ]
  assert lines_of(path) == want  # before close: a kill loses nothing
  writer.close()
  assert records.read_metrics(path) == want


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux's full disk")
def test_a_full_disk_is_named():
  writer = metrics.Writer("/dev/full")
  with pytest.raises(OSError, match="^cannot write /dev/full: No space left on device$"):
    writer.write(1, {"a": 1.0})


def test_a_resume_cuts_back_and_goes_on(tmp_path):
  written(tmp_path, range(1, 6))
  path = tmp_path / "metrics.jsonl"
  before = path.read_text().splitlines()
  with path.open("a") as file:
    file.write('{"step": 6, "train/lo')  # killed while writing
  written(tmp_path, range(4, 8), resume_step=3)
  assert [row["step"] for row in lines_of(path)] == list(range(1, 8))
  assert path.read_text().splitlines()[:5] == before
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_begins_again_starts_an_empty_record(tmp_path):
  written(tmp_path, range(1, 6))
  written(tmp_path, [1])
  assert [row["step"] for row in lines_of(tmp_path / "metrics.jsonl")] == [1]


def test_the_old_record_stays_whole_until_the_new_one_is(tmp_path, monkeypatch):
  written(tmp_path, range(1, 6))
  path = tmp_path / "metrics.jsonl"

  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(metrics.os, "fsync", killed)
  with pytest.raises(KeyboardInterrupt):
    metrics.cut_back(path, 2)
  assert len(lines_of(path)) == 5
  monkeypatch.undo()
  metrics.cut_back(path, 2)
  assert len(lines_of(path)) == 2


def test_lines_that_are_no_record_are_dropped_and_reported(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n[1]\n{"loss": 2}\n\x00\x00\n{"step": "x"}\n{"step": 2}\n')
  metrics.cut_back(path, 2)
  assert lines_of(path) == [{"step": 1}, {"step": 2}]
  assert "4 unreadable lines" in caplog.text
  metrics.cut_back(tmp_path / "absent.jsonl", 2)


def shown(workdir, tag: str = "train/loss") -> list[tuple[int, float]]:
  """Steps and values that TensorBoard shows."""
  pytest.importorskip("tensorflow")
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  events = EventAccumulator(str(workdir / "tensorboard")).Reload().Tensors(tag)
  return [(event.step, float(make_ndarray(event.tensor_proto))) for event in events]


def on_board(workdir, steps, value: float, **settings) -> None:
  pytest.importorskip("tensorflow")
  writer = metrics.open_writer(workdir, tensorboard=True, **settings)
  for step in steps:
    writer.write(step, {"train/loss": step * value})
  writer.close()


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
  on_board(tmp_path, (3, 4), 0.125)
  assert shown(tmp_path) == [(3, 0.375), (4, 0.5)]


def test_a_resume_cuts_tensorboard_back_as_well(tmp_path):
  on_board(tmp_path, range(1, 6), 1.0)
  (first,) = (tmp_path / "tensorboard").iterdir()
  with first.open("ab") as file:
    file.write(first.read_bytes()[-30:-7])  # killed while writing
  on_board(tmp_path, (4,), 2.0, resume_step=3)
  on_board(tmp_path, (), 0.0, resume_step=4)
  assert shown(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 8.0)]
  on_board(tmp_path, (3, 4), 4.0, resume_step=2)
  assert shown(tmp_path) == [(1, 1.0), (2, 2.0), (3, 12.0), (4, 16.0)]
  assert not list((tmp_path / "tensorboard").glob("*.part"))


def test_a_run_that_begins_again_starts_an_empty_board(tmp_path):
  on_board(tmp_path, range(1, 6), 1.0)
  on_board(tmp_path, (1,), 2.0)
  assert shown(tmp_path) == [(1, 2.0)]


def test_without_tensorboard_neither_clu_nor_tensorflow_is_needed(tmp_path):
  script = f"""
import sys
for name in ("clu", "tensorflow", "tqdm", "ml_collections"):
  sys.modules[name] = None  # importing it raises
from ssljax import metrics
writer = metrics.open_writer({str(tmp_path)!r}, tensorboard=False)
writer.write(1, {{"a": 1.0}})
metrics.Progress(3).update(1, {{"train/loss": 1.0}})
"""
  subprocess.run([sys.executable, "-c", script], check=True, cwd=metrics.__file__.rsplit("/", 2)[0])
  assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


def test_a_number_that_is_not_finite_is_named():
  index = jnp.asarray([7, 3, 11])
  metrics.check_finite(3, {"train/loss": 1.0, "train/grad_norm": jnp.float32(2)}, index)
  with pytest.raises(FloatingPointError) as error:
    metrics.check_finite(12, {"train/loss": jnp.nan, "a": 1, "b": -jnp.inf}, index)
  assert str(error.value) == (
    "step 12: train/loss is nan, b is -inf; examples of the batch: [7, 3, 11]"
  )


class Clock:
  """Time that passes only when a test says so."""

  def __init__(self):
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


def test_throughput_of_a_window():
  clock = Clock()
  window = metrics.Throughput(8, flops=1e9, peak=4e9, clock=clock)
  clock.now += 50  # compiling
  window.restart()
  for _ in range(4):
    with window.waiting():
      clock.now += 0.1
    clock.now += 0.4
    window.step()
  with window.paused():
    clock.now += 30  # evaluating
  assert window.read() == pytest.approx(
    {
      "throughput/images_per_sec": 16.0,
      "throughput/step_ms": 500.0,
      "throughput/data_wait": 0.2,
      "throughput/mfu": 0.5,
    }
  )
  assert window.read() == {}
  clock.now += 1.0
  window.step()
  assert window.read()["throughput/images_per_sec"] == pytest.approx(8.0)


def test_no_mfu_without_a_peak():
  clock = Clock()
  window = metrics.Throughput(8, flops=1e9, peak=None, clock=clock)
  clock.now += 1.0
  window.step()
  assert "throughput/mfu" not in window.read()


VALUES = {
  "train/loss": 0.53219,
  "throughput/images_per_sec": 64.18,
  "throughput/step_ms": 250.0,
  "throughput/data_wait": 0.031,
}


def test_plain_lines_when_the_output_is_no_terminal():
  stream = io.StringIO()
  progress = metrics.Progress(10_000, stream=stream)
  for step in range(10, 10_001, 10):
    progress.update(step, VALUES)
  progress.note("saved")
  progress.close()
  lines = stream.getvalue().splitlines()
  assert lines[0] == ("step 10/10000  loss 0.5322  64.2 images/s  waiting for data 3%  42 min left")
  assert lines[-2].startswith("step 10000/10000") and lines[-2].endswith("0 s left")
  assert lines[-1] == "saved"
  assert len(lines) <= 103 and "\r" not in stream.getvalue()


def test_a_resumed_run_shows_its_first_and_its_last_step():
  stream = io.StringIO()
  progress = metrics.Progress(1000, 990, stream=stream, lines=2)
  for step in range(991, 1001):
    progress.update(step, {"train/loss": 1.0})
  assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
    "991/1000",
    "995/1000",
    "1000/1000",
  ]


def test_a_bar_on_a_terminal():
  class Terminal(io.StringIO):
    def isatty(self) -> bool:
      return True

  stream = Terminal()
  progress = metrics.Progress(100, 40, stream=stream)
  progress.update(50, VALUES)
  progress.note("saved")
  progress.close()
  text = stream.getvalue()
  assert "50/100" in text and "loss 0.5322, 64.2 images/s, waiting for data 3%" in text
  assert "saved\n" in text


@pytest.mark.parametrize(
  "seconds, text",
  [(45, "45 s"), (89, "89 s"), (600, "10 min"), (9000, "2 h 30 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds, text):
  assert metrics.duration(seconds) == text


def test_the_parameter_table():
  params = {"stem": {"kernel": np.zeros((48, 1000)), "bias": np.zeros(1000, np.float16)}, "t": 0.0}
  params["t"] = np.float32(1)
  lines = metrics.parameter_table(params).splitlines()
  assert lines[0].split() == ["parameter", "shape", "type", "size"]
  assert lines[2].split() == ["stem/bias", "1000", "float16", "1,000"]
  assert lines[3].split() == ["stem/kernel", "48", "x", "1000", "float64", "48,000"]
  assert lines[4].split() == ["t", "scalar", "float32", "1"]
  assert lines[-1].split() == ["total", "49,001"]
  assert len({len(line) for line in lines}) == 1
