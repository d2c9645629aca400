"""The command: what it prints and writes, and what it says when something is wrong."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from ssljax import dry_run, environment, main, records, train

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a config file, an npz, and folders of pictures."""
  root = tmp_path_factory.mktemp("main")
  (root / "conf.py").write_text(
    "import tiny\n"
    "def get_config(arg='mae'):\n"
    f"  data = dict(source='npz:{root}/images.npz', eval_train='train[:48]',"
    " eval_test='train[48:]')\n"
    "  return tiny.config(arg, data=data, total_steps=2, mesh=dict(devices=1),"
    " schedule=dict(warmup_steps=1))\n"
  )
  np.savez(root / "images.npz", **tiny.images(64))
  data = tiny.images(64)
  np.savez(root / "labels.npz", image=data["image"], label=data["label"][:60])
  np.savez(root / "grey.npz", image=data["image"][..., :1])
  np.savez(root / "four.npz", image=data["image"][..., [0, 1, 2, 0]])
  np.savez(root / "odd.npz", image=data["image"][:, :30])
  for name, count, broken in (("good", 40, 0), ("broken", 0, 3), ("one", 9, 0)):
    pictures(root / name, count, broken)
  (root / "empty").mkdir()
  return root


def pictures(folder: pathlib.Path, count: int, broken: int, side: int = 40):
  """JPEGs of different sizes, and as many damaged files of five kinds as asked for."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(1)
  for i in range(count):
    base = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(base).resize((side + i % 3, side - i % 4), Image.Resampling.BICUBIC)
    picture.save(folder / f"{i:03d}.jpg", quality=90)
  good = folder / "000.jpg"
  whole = good.read_bytes() if count else b"\xff\xd8\xff\xe0" + bytes(200)
  huge = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + bytes(20)
  kinds = [b"", whole[: len(whole) // 2], b"not a picture at all", huge, b"\xff\xd8" + bytes(99)]
  for i in range(broken):
    (folder / f"broken_{i}.jpg").write_bytes(kinds[i % len(kinds)])


@pytest.fixture
def nothing_compiles(monkeypatch):
  def fail(*args, **kwargs):
    raise AssertionError("this must be found out before anything is compiled")

  monkeypatch.setattr(train, "compiled_step", fail)
  monkeypatch.setattr(train, "start", fail)
  monkeypatch.setattr(dry_run, "compiled_step", fail)


@pytest.fixture(scope="module")
def finished(place):
  """A workdir with two steps done, and what was printed is of no interest."""
  assert command(place, place / "finished") == 0
  return place / "finished"


def command(place, workdir, *arguments, config="conf.py"):
  return main.main([f"--config={place}/{config}", f"--workdir={workdir}", *arguments])


# What bad input gets. {place} is the fixture's folder; a word of the message, and of the hint.
BAD = {
  "config key": (
    ["--config.data.sorce=x"],
    "unknown config key data.sorce; did you mean data.source?",
  ),
  "section": (
    ["--config.optimiser.b1=1.0"],
    "unknown config key optimiser; did you mean optimizer?",
  ),
  "method": (["--config.method.name=ssljax.methods.maskd"], "did you mean ssljax.methods.masked?"),
  "encoder": (["--config.encoder.name=ssljax.models.vitt"], "did you mean ssljax.models.vit?"),
  "method's argument": (
    ["--config.method.target=pixls"],
    "none of normalised_pixels, pixels, teacher",
  ),
  "source": (["--config.data.source=foldr:/imgs"], "unknown source 'foldr'.*Did you mean 'folder'"),
  "source without a place": (["--config.data.source=npz:"], "says no place: write npz:/path"),
  "split": (["--config.data.split=trian"], "unknown split 'trian'.*Did you mean 'train'"),
  "evaluation": (
    ["--config.eval.knn.name=ssljax.evals.kn"],
    "no component 'ssljax.evals.kn' for eval.knn; did you mean",
  ),
  "metric": (
    [
      "--config.eval.knn.name=ssljax.evals.knn",
      "--config.eval.every=1",
      "--config.eval.best=knn_k20/top1",
    ],
    "unknown metric eval.best 'knn_k20/top1'; did you mean knn_k20_T0.07/top1",
  ),
  "argument of an evaluation": (
    [
      "--config.eval.knn.name=ssljax.evals.knn",
      "--config.eval.every=1",
      "--config.eval.knn.temperature=-1.",
    ],
    "knn: temperature must be above 0",
  ),
  "batch and devices": (
    ["--config.mesh.devices=8", "--config.batch_size=12"],
    "batch_size 12 is not divisible by 8 devices",
  ),
  "batch, devices and accum": (
    ["--config.mesh.devices=8", "--config.accum=4"],
    "batch_size 16 is not divisible by 8 devices × accum 4",
  ),
  "evaluation's batch": (
    ["--config.mesh.devices=8", "--config.eval.batch_size=12"],
    "eval.batch_size 12 is not divisible by 8",
  ),
  "devices": (["--config.mesh.devices=9"], "mesh.devices 9 is more than the 8 devices there are"),
  "placement": (["--config.mesh.state=ful"], "mesh.state 'ful' is none of replicated, full"),
  "batch and data": (["--config.batch_size=128"], "batch_size 128 is larger than the 64 examples"),
  "patch": (
    ["--config.encoder.patch=(5,5)"],
    "image size 32 .* is not divisible by patch size 5; use 30 or 35",
  ),
  "patch and height": (
    ["--config.data.source=npz:{place}/odd.npz", "--config.encoder.patch=(4,4)"],
    "image size 30 .* is not divisible by patch size 4; use 28 or 32",
  ),
  "patch and view": (
    ["--config.data.views.name=ssljax.data.views.crop_flip", "--config.data.views.size=(30,30)"],
    "image size 30 .* is not divisible by patch size 4",
  ),
  "evaluation's view": (
    [
      "--config.data.eval_views.name=ssljax.data.views.resize_crop",
      "--config.data.eval_views.size=(28,28)",
      "--config.eval.every=1",
    ],
    r"data.eval_train: evaluation images are \(28, 28, 3\), those of training \(32, 32, 3\)",
  ),
  "evaluation's split": (
    ["--config.data.eval_test=test", "--config.eval.every=1"],
    "data.eval_test: unknown split 'test'",
  ),
  "empty folder": (
    ["--config.data.source=folder:{place}/empty"],
    r"empty: no image was found .*\.jpg",
  ),
  "missing folder": (["--config.data.source=folder:{place}/gone"], "gone: there is no such folder"),
  "no readable image": (
    ["--config.data.source=folder:{place}/broken"],
    r"none of the 3 images can be read \(looked for",
  ),
  "sizes without a view": (
    ["--config.data.source=folder:{place}/good"],
    "differ in size: set data.views",
  ),
  "colour": (
    [
      "--config.data.source=npz:{place}/grey.npz",
      "--config.data.channels=1",
      "--config.data.views.name=ssljax.data.views.crop_flip",
      "--config.data.views.size=(32,32)",
      "--config.data.views.jitter=(.4,.4,.4,0.)",
    ],
    "colour jitter needs RGB images, but channels is 1",
  ),
  "channels": (["--config.data.source=npz:{place}/four.npz"], "has 4 channels, but channels=3"),
  "labels": (
    ["--config.data.source=npz:{place}/labels.npz"],
    r"labels of .* have shape \(60,\), but there are 64",
  ),
  "missing file": (
    ["--config.data.source=npz:{place}/none.npz"],
    "none.npz: there is no such file",
  ),
  "mean": (
    ["--config.data.mean=(.5,.5,.5)"],
    "data.std must hold one number for each of 3 channels",
  ),
  "hidden": (["--config.data.hidden=None"], "data.hidden is not set, and the method hides places"),
  "hidden ratio": (["--config.data.hidden.ratio=1.5"], "hidden ratio 1.5 is not between 0 and 1"),
  "parts": (["--config.encoder.positions=relative"], 'needs the whole grid: use layout "replace"'),
  "heads": (["--config.encoder.heads=3"], "width 32 is not divisible by 3 heads"),
  "warm-up": (
    ["--config.schedule.warmup_steps=2"],
    "schedule.warmup_steps 2 must be less than total_steps 2",
  ),
  "type": (["--config.dtype=flaot32"], "dtype 'flaot32' is none of float32"),
  "argument": (["--dryrun"], "unknown argument --dryrun; did you mean --dry_run?"),
  "no value": (["--config.seed"], "--config.seed has no value: write --config.seed=VALUE"),
}


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_is_compiled(
  case, dry, place, tmp_path, nothing_compiles, capsys
):
  arguments, message = BAD[case]
  arguments = [argument.replace("{place}", str(place)) for argument in arguments]
  if case == "no value":
    arguments.reverse()
  assert command(place, tmp_path / "run", *["--dry_run"] * dry, *arguments) == 1
  said = capsys.readouterr().err.strip().splitlines()
  assert len(said) == 1 and said[0].startswith("error: "), said
  assert re.search(message, said[0]), said[0]
  assert not (tmp_path / "run" / "config.json").exists()  # the workdir is not claimed


def test_a_misspelt_config_file_names_its_neighbours(tmp_path, capsys):
  assert main.main([f"--config={CONFIGS}/mae_vitbb.py", f"--workdir={tmp_path}"]) == 1
  assert f"did you mean {CONFIGS}/mae_vitb.py" in capsys.readouterr().err
  assert main.main([f"--config={CONFIGS}/mae_vitb.py:vitl61", f"--workdir={tmp_path}"]) == 1
  assert "error: variant 'vitl61' is none of vitb16" in capsys.readouterr().err


def test_an_error_from_below_keeps_its_traceback(place, tmp_path, capsys, nothing_compiles):
  (place / "mine.py").write_text("def get_config():\n  return int('no number')\n")
  assert command(place, tmp_path, config="mine.py") == 1
  said = capsys.readouterr().err
  assert "Traceback" in said and "mine.py" in said and "no number" in said


def test_a_workdir_of_another_config_says_which_keys(place, finished, nothing_compiles, capsys):
  changes = ["--config.encoder.depth=3", "--config.optimizer.b2=.99", "--config.log.every=3"]
  assert command(place, finished, *changes) == 1
  said = capsys.readouterr().err
  assert "belongs to another config: " in said and said.count("\n") == 1
  assert "encoder.depth: 2 -> 3" in said and "optimizer.b2: 0.95 -> 0.99" in said
  assert "log.every" not in said and "use another workdir" in said


def test_a_run_that_never_began_leaves_the_workdir_free(place, tmp_path, monkeypatch, capsys):
  def too_large(job):
    raise RuntimeError("does not fit")

  with monkeypatch.context() as patch:
    patch.setattr(train, "compiled_step", too_large)
    assert command(place, tmp_path / "run", "--config.encoder.depth=3") == 1
  assert (tmp_path / "run" / "config.json").exists()
  assert command(place, tmp_path / "run", "--config.encoder.depth=1") == 0
  assert "belongs to another config" not in capsys.readouterr().err
  assert json.loads((tmp_path / "run" / "config.json").read_text())["encoder"]["depth"] == 1


def test_another_schedule_needs_permission(place, finished, tmp_path, capsys):
  shutil.copytree(finished, tmp_path / "run")
  more = "--config.total_steps=4"
  assert command(place, tmp_path / "run", more) == 1
  assert "total_steps: 2 -> 4; --allow_new_schedule allows it" in capsys.readouterr().err
  assert command(place, tmp_path / "run", more, "--allow_new_schedule") == 0
  assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_changed_source_says_how(place, finished, tmp_path, nothing_compiles, capsys):
  shutil.copytree(finished, tmp_path / "run")
  kept = (place / "images.npz").read_bytes()
  try:
    np.savez(place / "images.npz", **tiny.images(72))
    assert command(place, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "changed since the checkpoint: size was 64, is 72" in said and said.count("\n") == 1
    np.savez(place / "images.npz", **tiny.images(64, seed=5))
    assert command(place, tmp_path / "run") == 1
    assert "the same number of examples, but their content differs" in capsys.readouterr().err
  finally:
    (place / "images.npz").write_bytes(kept)


def test_a_finished_run_is_left_as_it_is(place, finished, tmp_path, capsys):
  shutil.copytree(finished, tmp_path / "run")
  assert command(place, tmp_path / "run") == 0
  assert "resumed at step 2" in capsys.readouterr().out
  assert rows(tmp_path / "run") == rows(finished)


def test_every_checkpoint_damaged_is_one_line(place, finished, tmp_path, capsys):
  shutil.copytree(finished, tmp_path / "run")
  for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest/*"):
    manifest.write_text("{")
  assert command(place, tmp_path / "run") == 1
  said = capsys.readouterr().err.strip().splitlines()
  assert said[-1].startswith("error: every checkpoint in ") and "is damaged" in said[-1]
  assert "Traceback" not in "".join(said)


def test_what_a_run_writes(finished):
  for name in ("config.json", "environment.json", "metrics.jsonl", "report.html"):
    assert (finished / name).stat().st_size > 0
  assert (finished / "figures" / "curves.png").exists()
  assert json.loads((finished / "config.json").read_text())["encoder"]["width"] == 32
  assert not list(finished.glob("*.part"))
  keys = set().union(*rows(finished))
  wanted = {"step", "train/loss", "train/lr", "train/grad_norm", "throughput/images_per_sec"}
  assert wanted <= keys


def test_dry_run_says_all_and_trains_nothing(place, tmp_path, capsys):
  assert command(place, tmp_path / "run", "--dry_run") == 0
  said = capsys.readouterr().out
  for words in (
    "encoder/stem/kernel", "48 x 32", "image  16 x 32 x 32 x 3  uint8", "hidden  16 x 64  bool",
    "memory of a step on each of 1 devices", "state and batch", "MiB", "model FLOPs",
  ):  # fmt: skip
    assert words in said, words
  total = next(line for line in said.splitlines() if line.startswith("total"))
  assert int(total.split()[-1].replace(",", "")) > 10_000
  written = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")]
  assert sorted(map(str, written)) == ["figures", "figures/batch.png"]
  with Image.open(tmp_path / "run" / "figures" / "batch.png") as picture:
    assert min(picture.size) > 100


def test_a_profile_on_demand(place, tmp_path, capsys):
  more = ["--config.total_steps=4", "--config.checkpoint.every=4", "--profile=2"]
  assert command(place, tmp_path / "run", *more) == 0
  written = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
  assert len(written) == 1 and written[0].stat().st_size > 1000
  assert "wrote the profile of steps 2 and following" in capsys.readouterr().out
  assert command(place, tmp_path / "run", *more) == 0
  assert "no profile was written: step 2 was not begun" in capsys.readouterr().out


def test_settings_before_jax_starts(tmp_path):
  """In a process of its own: where compiled programs are kept, and a flag of the CPU backend."""
  script = (
    "import os, jax\nfrom ssljax import environment\nenvironment.prepare()\n"
    "print(jax.config.jax_compilation_cache_dir, os.environ.get('XLA_FLAGS', ''), sep='|')"
  )
  wiped = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "JAX_PLATFORMS")
  base = {k: v for k, v in os.environ.items() if k not in wiped}

  def said(**env):
    done = subprocess.run(
      [sys.executable, "-c", script], env=base | env, cwd=CONFIGS.parent, capture_output=True,
      text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip().split("|")

  cache, flags = said(XDG_CACHE_HOME=str(tmp_path), JAX_PLATFORMS="cpu", XLA_FLAGS="--a=1")
  assert cache == str(tmp_path / "ssljax" / "jax")
  version = importlib.metadata.version("jaxlib")
  tuned = f"--a=1 --{environment.CPU_FLAG}=false" if version.startswith("0.10.") else "--a=1"
  assert flags == tuned or importlib.util.find_spec("libtpu")
  mine = f"--{environment.CPU_FLAG}=true"
  assert said(JAX_COMPILATION_CACHE_DIR="/x", JAX_PLATFORMS="cpu", XLA_FLAGS=mine) == ["/x", mine]
  assert said(JAX_COMPILATION_CACHE_DIR="/x", JAX_PLATFORMS="tpu")[1] == ""


def test_a_dry_run_leaves_no_statistics_for_another_source(tmp_path, place, monkeypatch):
  def stop(job):
    raise ValueError("seen enough")

  monkeypatch.setattr(dry_run, "compiled_step", stop)
  dark, light = tiny.images(64)["image"][..., 0] // 8, 255 - tiny.images(64)["image"][..., 0] // 8
  for name, image in (("dark", dark), ("light", light)):
    np.savez(tmp_path / f"{name}.npz", image=image)
  arguments = ["--config.data.channels=1", "--config.encoder.patch=(8,8)"]
  means = []
  for name in ("dark", "light"):
    source = f"--config.data.source=npz:{tmp_path}/{name}.npz"
    assert command(place, tmp_path / "run", "--dry_run", source, *arguments) == 1
    means.append(json.loads((tmp_path / "run" / "moments.json").read_text())["mean"][0])
  assert means[0] < 0.2 < 0.8 < means[1]


def rows(workdir):
  return records.read_metrics(workdir / "metrics.jsonl")


# Damaged images among good ones


def test_a_folder_with_broken_files_trains_on_and_reports_them(tmp_path, capsys):
  pictures(tmp_path / "imgs", 295, 5)
  small = [
    "encoder.width=32", "encoder.depth=1", "encoder.heads=2", "encoder.patch=(8,8)",
    "method.decoder_width=32", "method.decoder_depth=1", "method.decoder_heads=2",
    "data.views.size=(32,32)", "data.eval_views.size=(32,32)", "data.eval_views.resize=36",
    "total_steps=6", "batch_size=64", "schedule.warmup_steps=1", "eval.every=6",
    "checkpoint.every=3", "mesh.devices=1", "log.tensorboard=False",
  ]  # fmt: skip
  arguments = [f"--config.{setting}" for setting in small]
  source = f"--config.data.source=folder:{tmp_path}/imgs"
  workdir = tmp_path / "run"
  assert (
    main.main([f"--config={CONFIGS}/mae_folder.py", f"--workdir={workdir}", source, *arguments])
    == 0
  )
  printed = capsys.readouterr()
  damaged = json.loads((workdir / "damaged.json").read_text())
  # 6 batches of 64 are more than one epoch: every file has been met, those of evaluation too.
  assert sorted(damaged) == [f"broken_{i}.jpg" for i in range(5)]
  assert all(damaged.values()) and "empty" in damaged["broken_0.jpg"]
  assert "60000 x 60000 pixels, more than the limit" in damaged["broken_3.jpg"]
  told = re.findall(r"(\d+) unreadable images", printed.err)  # as they are met, each once
  assert sum(map(int, told)) == 5 and "eval: knn, linear off" in printed.out
  assert [row["step"] for row in rows(workdir) if "train/loss" in row] == [6]
  scores = next(row for row in rows(workdir) if "eval/rank/effective" in row)
  assert scores["eval/heldout/loss"] > 0 and "eval/knn_k10_T0.07/top1" not in scores
  report = (workdir / "report.html").read_text()
  assert "broken_3.jpg" in report and "data:image/png;base64" in report


# A loss that is not finite

NAN_METHOD = '''
import pathlib
import jax.numpy as jnp
from ssljax.methods.masked import masked

def sick(encoder, hidden_count, *, at: int = 3, mark: str = ""):
  """MAE whose loss is NaN at step `at` for as long as the file `mark` exists."""
  method = masked(encoder, hidden_count, decoder_width=32, decoder_depth=1, decoder_heads=2)
  ill = pathlib.Path(mark).exists()
  def loss(params, extra, batch, rng, step):
    value, aux = method.loss(params, extra, batch, rng, step)
    return jnp.where((step == at) & ill, jnp.nan, value), aux
  return method._replace(loss=loss)
'''


def test_a_loss_that_is_not_finite_stops_the_run_and_a_resume_goes_on(
  place, tmp_path, monkeypatch, capsys
):
  (tmp_path / "sick.py").write_text(NAN_METHOD)
  monkeypatch.syspath_prepend(tmp_path)
  mark = tmp_path / "mark"
  mark.touch()
  (tmp_path / "conf.py").write_text(
    "import tiny\n"
    "def get_config():\n"
    "  config = tiny.config(total_steps=6, mesh=dict(devices=1), log=dict(every=2))\n"
    f"  return config | dict(method=dict(name='sick', at=3, mark={str(mark)!r}))\n"
  )
  workdir = tmp_path / "run"
  assert command(tmp_path, workdir) == 1
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert said.startswith("error: step 4: train/loss is nan")  # step 4 is the update from step 3
  sys.modules.pop("sick")
  config = main.parse([f"--config={tmp_path}/conf.py", f"--workdir={workdir}"])[1]
  with train.job_lib.assemble(config).batches(3) as batches:
    index = next(batches)["index"].tolist()
  assert f"examples of the batch: {index}" in said
  assert [row["step"] for row in rows(workdir)] == [2]
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2"]
  mark.unlink()
  assert command(tmp_path, workdir) == 0
  assert "resumed at step 2" in capsys.readouterr().out
  assert [row["step"] for row in rows(workdir)] == [2, 4, 6]
  assert all(np.isfinite(row["train/loss"]) for row in rows(workdir))
