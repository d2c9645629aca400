"""Real processes on this machine: they compute what one computes, and end and go on together."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import killed_run
import numpy as np
import pytest
import tiny

from ssljax import checkpoint, launch, main, processes, records, reporting

RUNNER = pathlib.Path(__file__).parent / "killed_run.py"
METHODS = ("mae", pytest.param("simclr", marks=pytest.mark.slow))
SHARDED = ("--config.mesh.state=full", "--config.mesh.min_size=64")


@pytest.fixture(scope="module", autouse=True)
def no_report():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reporting, "write", killed_run.no_report)
    yield


def alone(workdir: pathlib.Path, devices: int, *more: str, method: str = "mae") -> None:
  """The same run in this process."""
  config = [f"--config={RUNNER}:{method}", f"--workdir={workdir}", *more]
  assert main.main([*config, f"--config.mesh.devices={devices}"]) == 0


def together(
  count: int, workdir: pathlib.Path, *more: str, place: str = "none", method: str = "mae"
) -> tuple[int, str]:
  """The run in `count` processes of two devices: exit code and what they said."""
  command = [sys.executable, "-m", "ssljax.launch", f"--processes={count}"]
  command += ["--devices_per_process=2", "--grace=60", "--", str(RUNNER), place]
  command += [f"--config={RUNNER}:{method}", f"--workdir={workdir}", *more]
  done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return done.returncode, done.stdout


def record(workdir: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl but for what depends on the clock."""
  rows = records.read_metrics(workdir / "metrics.jsonl")
  return [{k: v for k, v in row.items() if not k.startswith("throughput/")} for row in rows]


def assert_close(workdir: pathlib.Path, other: pathlib.Path, rtol: float = 1e-5) -> None:
  """The same lines; losses to `rtol`, what follows from them a little less closely."""
  here, there = record(workdir), record(other)
  assert [row["step"] for row in here] == [row["step"] for row in there]
  for row, wanted in zip(here, there):
    assert row.keys() == wanted.keys()
    for key, value in row.items():
      tight = key in ("train/loss", "eval/heldout/loss", "step", "train/lr")
      np.testing.assert_allclose(value, wanted[key], rtol=rtol if tight else 1e-3, err_msg=key)


@pytest.fixture(scope="module", params=METHODS)
def killed(request, tmp_path_factory):
  """A run in one process; and one in two, of which the second was killed in step 5."""
  root = tmp_path_factory.mktemp(request.param)
  alone(root / "one", 4, *SHARDED, method=request.param)
  code, said = together(2, root / "two", *SHARDED, place="step:5@1", method=request.param)
  return root, code, said, request.param


def test_a_killed_process_ends_the_others_and_is_named(killed):
  root, code, said, _ = killed
  assert code == 128 + signal.SIGKILL, said[-3000:]
  assert "launch: process 1 was ended by SIGKILL: the others end too" in said
  assert re.search(r"^0: error: process 0 of 2, step [56]: process 1 does not answer", said, re.M)
  assert [row["step"] for row in record(root / "two")] == [1, 2, 3, 3, 4]


def test_two_processes_resume_and_compute_what_one_computes(killed, tmp_path):
  root, _, _, method = killed
  workdir = pathlib.Path(shutil.copytree(root / "two", tmp_path / "two"))
  code, said = together(2, workdir, *SHARDED, method=method)
  assert code == 0, said[-3000:]
  assert re.search(r"^0: resumed at step [34]$", said, re.M)
  assert not re.search(r"^1: (?!\[Gloo\])", said, re.M), said  # the first one speaks for all
  assert_close(workdir, root / "one")
  here, there = (checkpoint.load_params(root) for root in (workdir, root / "one"))
  for leaf, wanted in zip(jax.tree.leaves(here), jax.tree.leaves(there)):
    # Adam makes whole steps of gradients that are zero but for rounding (biases of the keys).
    np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=5e-4)


def test_one_process_goes_on_where_two_were_killed(killed, tmp_path):
  root, _, _, method = killed
  workdir = pathlib.Path(shutil.copytree(root / "two", tmp_path / "two"))
  alone(workdir, 2, *SHARDED, method=method)
  assert_close(workdir, root / "one")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_four_processes_compute_what_one_computes_and_two_go_on(tmp_path, method):
  alone(tmp_path / "one", 8, method=method)
  code, said = together(4, tmp_path / "four", method=method, place="step:5@0")
  assert code not in (0, 128 + signal.SIGSEGV), said[-3000:]
  # The words are kept by process 0; without it, ours or those of the runtime name it.
  for i in (1, 2, 3):
    assert re.search(rf"^{i}: .*(process 0 does not answer|leader task)", said, re.M), said[-5000:]
  code, said = together(2, tmp_path / "four", method=method)
  assert code == 0, said[-3000:]
  assert_close(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(tmp_path):
  free = ["--config.eval.every=0", "--config.checkpoint.every=0"]
  code, said = together(2, tmp_path, *free, "--config.total_steps=20000", place="term:5@1")
  assert code == 0, said[-3000:]
  stopped = int(re.search(r"stopped by a signal at step (\d+)", said)[1])
  last = record(tmp_path)[-1]["step"]
  assert checkpoint.load(tmp_path, parts=("step",)).step == stopped == last >= 5
  more = [*free, f"--config.total_steps={stopped + 2}", "--allow_new_schedule"]
  alone(tmp_path, 4, *more)
  assert [row["step"] for row in record(tmp_path)] == list(range(1, stopped + 3))


@pytest.mark.slow
@pytest.mark.parametrize(
  "place, told",
  [
    ("lack:4@1", "1: OSError: the disk with the images is gone"),
    ("hang:4@1", "step 4, waiting for data: nothing happened for 15 s"),
  ],
)
def test_a_process_that_fails_or_hangs_is_named_to_all(tmp_path, place, told):
  code, said = together(2, tmp_path, "--config.log.watchdog=15", place=place)
  assert code == 1, said[-3000:]
  assert told in said
  assert re.search(r"^0: .*process 1 ended at step 4, waiting for data", said, re.M), said[-5000:]


def start(**given):
  return processes.start(**{"timeout": 0} | given)


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(num_processes=2, process_id=0), "--coordinator is missing"),
    (dict(coordinator="a:1", process_id=0), "--num_processes is missing"),
    (dict(coordinator="a:1", num_processes=2), "--process_id is missing"),
    (dict(coordinator="a", num_processes=2, process_id=0), "'a' is not HOST:PORT"),
    (dict(coordinator="a:1", num_processes=2, process_id=2), "2 processes are 0…1"),
    (dict(cluster=True), "no cluster is recognised here; known are .*slurm"),
  ],
)
def test_numbers_that_make_no_sense(given, message):
  with pytest.raises(ValueError, match=message):
    start(**given)


def test_a_coordinator_that_is_not_there_or_cannot_listen():
  where = f"127.0.0.1:{launch.free_port()}"
  with pytest.raises(OSError, match=f"process 1 cannot reach the coordinator {where} within 0 s"):
    start(coordinator=where, num_processes=2, process_id=1)
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=f"process 0 cannot listen on port {port}"):
      start(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=0)


def test_a_cluster_of_one_is_no_cluster(monkeypatch):
  names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
  for name, value in zip(names, ("7", "node1", "1", "0", "0")):
    monkeypatch.setenv(f"SLURM_{name}", value)
  start(cluster=True)
  assert not jax.distributed.is_initialized() and processes.count() == 1 and processes.first()
  monkeypatch.setenv("SLURM_NTASKS", "two")
  with pytest.raises(ValueError, match=r"a cluster \(slurm\), .*--num_processes=1 runs this"):
    start()
  start(num_processes=1)


def test_one_process_needs_no_exchange():
  assert processes.from_first(lambda: {"a": 1}) == {"a": 1} and processes.to_first(3) == [3]
  with pytest.raises(KeyError), processes.together():
    raise KeyError("as without it")


def test_the_watch_ends_what_stays_and_lets_rest():
  ended, places = threading.Event(), []
  watch = processes.Watch(0.02, lambda place: (places.append(place), ended.set()))
  watch.at("step 1")
  watch.rest()
  assert places == [] or places == ["step 1"]  # the latter on a machine that stood still meanwhile
  watch.at("step 2")
  assert ended.wait(60) and places[0] in ("step 1", "step 2")
  watch.close()


def test_who_is_silent_is_named_only_where_that_is_known(monkeypatch):
  monkeypatch.setattr(processes, "count", lambda: 4)
  answers = {0: "step 3: lost the others", 1: "step 3: lost the others", 2: "step 3: no disk"}
  assert processes.others(answers, named=True) == [
    "process 2 ended at step 3: no disk",
    "process 3 does not answer: it was killed, is stuck, or its machine is gone",
  ]
  assert processes.others(answers, named=False) == ["process 2 ended at step 3: no disk"]
  assert "process 0 does not answer" in processes.others(None, named=True)[0]


def test_the_launcher_gives_each_process_its_number_and_devices(monkeypatch):
  lines = launch.commands(2, 5, ["--config=a.py", "--workdir=b"])
  assert lines[1][1:] == [
    "-m", "ssljax.main", "--config=a.py", "--workdir=b",
    "--coordinator=127.0.0.1:5", "--num_processes=2", "--process_id=1",
  ]  # fmt: skip
  assert launch.commands(1, 5, ["a.py", "x"])[0][1:3] == ["a.py", "x"]
  monkeypatch.setenv("XLA_FLAGS", "--a --xla_force_host_platform_device_count=8")
  env = launch.environment(1, 2)
  assert env["XLA_FLAGS"].split() == ["--a", "--xla_force_host_platform_device_count=2"]
  assert env["JAX_LOCAL_DEVICE_IDS"] == "2,3"
  assert launch.environment(1, 0).get("JAX_LOCAL_DEVICE_IDS") == os.environ.get(
    "JAX_LOCAL_DEVICE_IDS"
  )


def test_the_launcher_returns_the_first_bad_code_and_ends_the_rest(capsys):
  wait = "import threading; print('here', flush=True); threading.Event().wait()"
  fail = "import sys; sys.exit(3)"
  group = launch.Group([[sys.executable, "-c", wait], [sys.executable, "-c", fail]], 0)
  assert group.wait(grace=0) == 3 and group.children[0].wait() == -signal.SIGKILL
  assert "launch: process 1 failed with exit code 3: the others end too" in capsys.readouterr().err


def test_pass_of_an_evaluation_in_parts():
  """Rows of every process together are the whole batch, padding and all."""
  from ssljax.data import pipeline, sources

  source = sources.open_source(tiny.images(21))
  parts = [
    list(pipeline.examples(source, batch_size=8, rows=rows))
    for rows in (None, [0, 1, 4, 5], [2, 3, 6, 7])
  ]
  for whole, one, other in zip(*parts, strict=True):
    for key, value in whole.items():
      np.testing.assert_array_equal(one[key], value[[0, 1, 4, 5]], err_msg=key)
      np.testing.assert_array_equal(other[key], value[[2, 3, 6, 7]], err_msg=key)
