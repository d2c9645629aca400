"""A run that was killed goes on to the last bit: losses, scores, parameters, optimizer, teacher."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import killed_run
import numpy as np
import pytest
import tiny

from ssljax import checkpoint, main, metrics, records, reporting, train

RUNNER = pathlib.Path(__file__).parent / "killed_run.py"
# name -> (method, where the process dies, its exit code, checkpoints that it may leave: they are
# written in the background, so that a kill at step 5 can come before number 4 is there)
DEATHS = {
  "stepping": ("mae", "step:5", -signal.SIGKILL, ([2, 3], [2, 3, 4], [3, 4])),
  "saving": ("mae", "save:3", -signal.SIGKILL, ([2],)),
  "teacher": ("data2vec", "save:4", -signal.SIGKILL, ([2, 3],)),
  "terminated": ("mae", "term:5", 0, ([3, 4, 5],)),  # 3 has the best score so far
}


@pytest.fixture(scope="module", autouse=True)
def no_report():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reporting, "write", killed_run.no_report)
    yield


def arguments(method: str, workdir: pathlib.Path, *more: str) -> list[str]:
  return [f"--config={RUNNER}:{method}", f"--workdir={workdir}", *more]


def start(place: str, method: str, workdir: pathlib.Path) -> subprocess.Popen:
  command = [sys.executable, str(RUNNER), place, *arguments(method, workdir)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, no_report):
  """Workdirs of runs that nothing disturbed, by method."""
  root = tmp_path_factory.mktemp("straight")
  for method in ("mae", "data2vec"):
    assert main.main(arguments(method, root / method)) == 0
  return {method: root / method for method in ("mae", "data2vec")}


@pytest.fixture(scope="module")
def dead(tmp_path_factory, straight):
  """What processes left that died, by name, and what they said. They run side by side, after
  `straight` has filled the cache of compiled programs."""
  root = tmp_path_factory.mktemp("dead")
  children = {
    name: start(place, method, root / name) for name, (method, place, _, _) in DEATHS.items()
  }
  said = {name: child.communicate()[0] for name, child in children.items()}
  for name, child in children.items():
    assert child.returncode == DEATHS[name][2], (name, said[name][-2000:])
  return {name: (root / name, said[name]) for name in DEATHS}


def copy(dead, name: str, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(dead[name][0], tmp_path / name))


def steps(workdir: pathlib.Path) -> list[int]:
  names = (path.name for path in (workdir / "checkpoints").iterdir())
  return sorted(int(name) for name in names if name.isdigit())


def record(workdir: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl but for what depends on the clock."""
  rows = records.read_metrics(workdir / "metrics.jsonl")
  return [{k: v for k, v in row.items() if not k.startswith("throughput/")} for row in rows]


def final(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Every leaf of the newest checkpoint: step, parameters, teacher, moments, key."""
  parts = ("step", "params", "extra", "opt", "rng")
  tree = checkpoint.load(workdir, parts=parts).tree
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  key = found.pop("['rng']")
  arrays = {name: np.asarray(leaf) for name, leaf in found.items()}
  return arrays | {"['rng']": np.asarray(jax.random.key_data(key))}


def assert_same_to_the_last_bit(workdir: pathlib.Path, other: pathlib.Path) -> None:
  assert record(workdir) == record(other)
  here, there = final(workdir), final(other)
  assert here.keys() == there.keys()
  for name, leaf in here.items():
    assert leaf.dtype == there[name].dtype
    np.testing.assert_array_equal(leaf, there[name], err_msg=name)


def test_a_straight_run_has_what_is_compared(straight):
  rows = record(straight["data2vec"])
  assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
  keys = set().union(*rows)
  assert {"train/loss", "train/target_std", "eval/knn_k5_T0.07/top1", "eval/rank/effective"} <= keys
  assert {"eval/heldout/loss", "eval/baseline_pixels/rank/std"} <= keys
  names = final(straight["data2vec"])
  for part in ("['extra']['teacher']", "['opt']", "['params']['encoder']", "['rng']", "['step']"):
    assert any(name.startswith(part) for name in names), part
  assert record(straight["mae"]) != record(straight["data2vec"])


@pytest.mark.parametrize("name", DEATHS)
def test_what_a_death_leaves(dead, name):
  workdir, said = dead[name]
  assert steps(workdir) in DEATHS[name][3]
  rows = [row["step"] for row in record(workdir)]
  half = [path.name for path in (workdir / "checkpoints").glob("*tmp*")]
  if "save" in DEATHS[name][1]:
    assert half  # the files were written: the kill came in the middle
    assert rows[-1] > steps(workdir)[-1]  # more is recorded than saved
  if name == "stepping":
    assert rows[-1] == 4
  if name == "terminated":
    assert "stopped by a signal at step 5; the same command goes on from there" in said
    assert rows[-1] == 5 and not half


def test_the_same_command_goes_on_in_a_new_process(dead, straight, tmp_path):
  workdir = copy(dead, "stepping", tmp_path)
  child = start("none", "mae", workdir)
  said = child.communicate()[0]
  assert child.returncode == 0, said[-2000:]
  assert f"resumed at step {steps(dead['stepping'][0])[-1]}" in said
  assert_same_to_the_last_bit(workdir, straight["mae"])


@pytest.mark.parametrize("name", ["saving", "teacher", "terminated"])
def test_a_resumed_run_equals_one_that_was_never_stopped(dead, straight, tmp_path, name, capsys):
  workdir = copy(dead, name, tmp_path)
  method, left = DEATHS[name][0], steps(workdir)[-1]
  assert main.main(arguments(method, workdir)) == 0
  assert f"resumed at step {left}" in capsys.readouterr().out
  assert not list((workdir / "checkpoints").glob("*tmp*"))
  assert_same_to_the_last_bit(workdir, straight[method])


def test_a_damaged_newest_checkpoint_is_passed_over(dead, straight, tmp_path, capsys):
  workdir = copy(dead, "stepping", tmp_path)
  *_, before, newest = steps(workdir)
  # All data files: the format appends, and on a slow disk some of them are superseded by others
  # before the save ends, so that nobody would read the largest one.
  for path in (workdir / f"checkpoints/{newest}").glob("**/d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert main.main(arguments("mae", workdir)) == 0
  said = capsys.readouterr().out
  assert f"checkpoint of step {newest} cannot be used: " in said
  assert f"resumed at step {before}" in said
  assert (workdir / "checkpoints" / f"damaged_{newest}").is_dir()
  assert_same_to_the_last_bit(workdir, straight["mae"])


def test_resumes_on_another_number_of_devices_and_sharded(dead, straight, tmp_path):
  workdir = copy(dead, "stepping", tmp_path)
  mesh = ["mesh.devices=2", "mesh.state=full", "mesh.min_size=64"]
  assert main.main(arguments("mae", workdir, *(f"--config.{key}" for key in mesh))) == 0
  here, there = record(workdir), record(straight["mae"])
  assert here[:2] == there[:2]  # before the resumption: on eight devices
  assert [row.keys() for row in here] == [row.keys() for row in there]
  for row, other in zip(here, there):
    for key in row.keys() & {"step", "train/loss", "eval/heldout/loss"}:
      np.testing.assert_allclose(row[key], other[key], rtol=1e-5, err_msg=key)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(straight, tmp_path):
  """Real processes on a file system of 16 MB, in a name space of its own."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = f"mount -t tmpfs -o size=16m tmpfs {disk}"
  apart = ["unshare", "-Urm", "sh", "-c"]
  if shutil.which("unshare") is None or subprocess.run([*apart, mount]).returncode:
    pytest.skip("mounting is not allowed here")

  def command(place):
    return f"{sys.executable} {RUNNER} {place} {' '.join(arguments('mae', disk / 'run'))}"

  script = (
    f"{mount} && {command('fill:3')} >{tmp_path}/first 2>&1; echo $? >>{tmp_path}/first;"
    f" cp -r {disk}/run {tmp_path}/full; rm {disk}/filler;"
    f" {command('none')} >{tmp_path}/second 2>&1; echo $? >>{tmp_path}/second;"
    f" cp -r {disk}/run {tmp_path}/done"
  )
  subprocess.run([*apart, script], check=True)
  first, second = ((tmp_path / name).read_text() for name in ("first", "second"))
  assert first.endswith("\n1\n"), first[-2000:]
  # What tensorstore's threads print of the event loop that they lost may stand on the same line.
  said = re.findall(r"error: cannot write a checkpoint to (.*)", first)
  assert len(said) == 1 and said[0].startswith(f"{disk}/run/checkpoints: "), first[-3000:]
  assert "No space left on device" in said[0]
  assert checkpoint.load(tmp_path / "full").step == 2
  assert second.endswith("\n0\n") and "resumed at step 2" in second, second[-2000:]
  assert_same_to_the_last_bit(tmp_path / "done", straight["mae"])


def test_a_signal_between_looking_and_leaving_loses_nothing(tmp_path, monkeypatch, capsys):
  """A signal that arrives while a step that is not saved is logged."""
  write = metrics.Writer.write

  def interrupted(self, step, values):
    write(self, step, values)
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(metrics.Writer, "write", interrupted)
  config = tiny.config(total_steps=6, mesh=dict(devices=1), checkpoint=dict(every=0))
  train.run(config, tmp_path)
  said = capsys.readouterr().err
  stopped = steps(tmp_path)
  assert stopped == [4] and f"stopped by a signal at step {stopped[-1]}" in said
  assert [row["step"] for row in record(tmp_path)] == [1, 2, 3, 4]
  before = signal.getsignal(signal.SIGTERM)
  assert before == signal.SIG_DFL  # the process listens to signals as it did before
