"""The main job without TensorFlow, clu and ml_collections: plain dict, data in memory, views in the
step."""

import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parents[1]
BLOCKED = ("tensorflow", "clu", "ml_collections", "tensorflow_datasets", "array_record")

SCRIPT = """
import sys
for name in {blocked!r}:
  sys.modules[name] = None  # importing it raises ModuleNotFoundError
sys.path[:0] = [{root!r}, {tests!r}]
import tiny
from ssljax import train

# Everything that a batch needs is on the device: images, views, hidden places.
crop = dict(name="ssljax.data.views.crop_flip", size=(32, 32), jitter=(0.4, 0.4, 0.4, 0.1))
device = dict(views=crop, views_on="device", hidden_on="device", cache="device")
found = train.run(tiny.config(
  total_steps=4,
  data=dict(eval_train="train[:48]", eval_test="train[48:]") | device,
  checkpoint=dict(every=2),
  mesh=dict(devices=1),
  eval=dict(
    every=4, figures=True, best="knn_k5_T0.07/top1",
    knn=dict(name="ssljax.evals.knn", k=(5,)),
    linear=dict(name="ssljax.evals.linear", l2=(1e-2,), iterations=20),
    rank=dict(name="ssljax.evals.rank"),
  ),
), {workdir!r})
for key in ("knn_k5_T0.07/top1", "linear/top1", "rank/effective", "heldout/loss"):
  print(key, found["eval/" + key])
print("steps", int(train.checkpoint.load({workdir!r}).step))

# Defaults alone: neither evaluation nor splits are asked for, so none may be missed.
bare = tiny.config(total_steps=2, mesh=dict(devices=1), schedule=dict(warmup_steps=0))
del bare["data"]["eval_train"], bare["data"]["eval_test"], bare["eval"]
train.run(bare, {workdir!r} + "_bare")
assert all(sys.modules[name] is None for name in {blocked!r})
"""


def test_trains_and_evaluates_without_them(tmp_path):
  script = textwrap.dedent(SCRIPT).format(
    blocked=BLOCKED, root=str(ROOT), tests=str(ROOT / "tests"), workdir=str(tmp_path / "run")
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "steps 4" in done.stdout and "linear/top1" in done.stdout
  for name in ("metrics.jsonl", "report.html", "figures/reconstructions.png", "baselines.json"):
    assert (tmp_path / "run" / name).exists(), name
  assert not (tmp_path / "run" / "tensorboard").exists()
