"""The benchmarks' scripts: they measure what they name, and a lost part loses nothing else."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from ssljax import config as config_lib
from ssljax import main

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "experiments"))

import bench_gpu  # noqa: E402
import bench_two_view  # noqa: E402
import gpu_parts  # noqa: E402
import weak_scaling  # noqa: E402

# part of bench_gpu -> the config it names, and what is the same in both
RECIPES = {
  "mae_B": ("mae_vitb.py:vitb16", ("encoder", "method", "optimizer", "dtype")),
  "mae_L": ("mae_vitb.py:vitl16", ("encoder", "method", "optimizer", "dtype")),
  "mae_H": ("mae_vitb.py:vith14", ("encoder", "method", "optimizer", "dtype")),
  "barlow_S": ("barlow_twins_r50.py", ("method", "dtype", "data.views")),
  "simclr_float32": (
    "simclr_cifar10.py", ("encoder", "method", "optimizer", "dtype", "data.views", "batch_size")
  ),
}  # fmt: skip
BLOCKED = ("tensorflow", "clu", "ml_collections", "tensorflow_datasets", "array_record")


@pytest.mark.parametrize("part", RECIPES)
def test_gpu_parts_are_the_configs_they_name(part, monkeypatch):
  shape = {"mae": 224, "barlow": 256, "simclr": 32}[part.split("_")[0]]

  def small(count, pixels):  # what the pictures are does not matter, their size does
    assert pixels == shape
    return {"image": range(count)}

  monkeypatch.setattr(gpu_parts, "noise", small)
  file, same = RECIPES[part]
  wanted = config_lib.plain(main.load_config(str(ROOT / "configs" / file)))
  batch = gpu_parts.batch_of(part, tiny=False)
  found = config_lib.complete(gpu_parts.config_of(part, batch, tiny=False))
  for key in same:
    mine, theirs = (_at(config, key) for config in (found, wanted))
    assert mine == theirs, key


def _at(config, key):
  for name in key.split("."):
    config = config[name]
  return config


def test_gpu_table_compares_with_peak_and_pytorch():
  run = dict(step_ms=[99.0, 100.0, 101.0], first_step_s=12.34, peak_bytes=2**31, flops=4e12)
  rows = {
    "matmul": {"tflops": {"64": 50.0, "128": 80.0}, "device": "some GPU"},
    "torch_B": dict(step_ms=[100.0], first_step_s=1.0, peak_bytes=None, batch=4),
    "mae_B:noscan": run | dict(batch=8),
    "simclr_float32": run | dict(batch=8, steps=90, step_ms=[20.0]),
    "start_cold": run | dict(batch=8, step_ms=[]),
    "mae_L": {"failed": "over 240 s"},
  }
  found = {line[0]: dict(zip(bench_gpu.HEADER, line)) for line in bench_gpu.table(rows)}
  assert list(found)[:2] == ["matmul", "torch_B"] and set(found) == set(rows)
  ours, theirs = found["mae_B:noscan"], found["torch_B"]
  assert (ours["images/s"], ours["TFLOP/s"], ours["of measured peak"]) == ("80", "40", "50.0%")
  assert (ours["peak GiB"], ours["first step s"]) == ("2.0", "12.3")
  # Half of our batch in the same time: half as fast, by half of the FLOPs.
  assert theirs["note"] == "ours 2.00× as fast" and theirs["TFLOP/s"] == "20"
  assert found["simclr_float32"]["note"] == "1.80 s an epoch of 90 steps, 6.0 min for 200"
  assert found["start_cold"]["images/s"] == "–" and found["start_cold"]["first step s"] == "12.3"
  assert found["mae_L"]["note"] == "failed: over 240 s"


def test_a_lost_part_is_a_row(tmp_path):
  slow = bench_gpu.run_part("mae_B", 0, 0.01, True, str(tmp_path))
  assert slow["failed"] == "over 0.01 s"
  wrong = bench_gpu.run_part("mae_X", 0, 100.0, True, str(tmp_path))
  assert "KeyError" in wrong["failed"]
  file = tmp_path / "new" / "rows.json"
  bench_gpu.write(file, {}, {"mae_B": slow, "mae_X": wrong | {"tiny": False}})
  assert bench_gpu.kept_rows(file, tiny=True) == {"mae_B": slow}


@pytest.mark.parametrize("part", ["simclr_resnet18", "barlow_vits"])
def test_two_view_step_takes_a_ready_batch(part):
  job = bench_two_view.make_job(part, 4, "dots")
  pixels = {"resnet18": 32, "vits": 96}[part.split("_")[1]]
  assert job.given["views"].shape == (4, 2, pixels, pixels, 3)
  assert job.trained is job.method  # no view is made in the step


@pytest.mark.slow
def test_gpu_script_on_a_cpu_without_tensorflow(tmp_path):
  for name in BLOCKED:
    error = f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n"
    (tmp_path / f"{name}.py").write_text(error)
  parts = [part for part in gpu_parts.PARTS if not part.startswith("torch_")]
  file = tmp_path / "rows.json"
  script = ROOT / "experiments" / "bench_gpu.py"
  flags = ["--tiny", "--limit=600", f"--parts={','.join(parts)}", f"--json={file}"]
  done = subprocess.run(
    [sys.executable, script, *flags],
    env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  rows = json.loads(file.read_text())["parts"]
  assert list(rows) == parts
  assert not [row for row in rows.values() if "failed" in row], done.stderr[-3000:]
  for part, row in rows.items():
    if part != "matmul":
      assert row["first_step_s"] > 0 and row["flops"] > 0
      assert bool(row["step_ms"]) != part.startswith("start_")
  assert "Training on a GPU" in done.stdout


def test_weak_scaling_counts_against_the_same_step_without_its_communication():
  def plan(links, devices):
    return dict(
      fits=True, mesh=dict(replica=2, data=devices // 2), sent_bytes={"all-reduce bf16": 2**22},
      seconds=dict(compute=0.010, memory=0.030, links=links),
    )  # fmt: skip

  plans = {"v5e:2x4": plan(0.010, 8), "v5e:8x8": plan(0.060, 64), "v5e:16x16": {"fits": False}}
  near, far, none = weak_scaling.rows("a.py", plans, mfu=0.5)
  assert near[2:8] == ["8", "20.0", "30.0", "10.0", "4", "memory"]
  assert near[8:] == ["30.0", "100.0%", "60.0", "83.3%"]  # 30 of 30; 20 + 30 of 60
  assert far[7:] == ["links", "60.0", "50.0%", "110.0", "45.5%"]
  assert all(len(row) == len(weak_scaling.HEADER) for row in (near, far, none))


def test_a_plan_that_is_kept_is_not_made_again(tmp_path, monkeypatch):
  def run(command, **given):
    (file,) = (word.removeprefix("--json=") for word in command if word.startswith("--json="))
    assert "--config.batch_size=256" in command and "--config.accum=2" in command
    pathlib.Path(file).write_text('{"fits": false}')

  monkeypatch.setattr(weak_scaling.subprocess, "run", run)
  given = ("configs/a.py:b", "v5e:4x4", 16, 0.5, ["--config.accum=2"], str(tmp_path))
  assert weak_scaling.planned(*given) == {"fits": False}
  monkeypatch.setattr(weak_scaling.subprocess, "run", lambda *a, **k: pytest.fail("made again"))
  assert weak_scaling.planned(*given) == {"fits": False}
