"""A probe that learns along: the method's own numbers stay as they are, to the bit."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax import sharding, train

PROBE = dict(rate=1e-2)


@functools.cache
def trained(name: str, accum: int, rate: float, steps: int = 3):
  """Metrics of the steps, and the state after them."""
  config = tiny.config(name, accum=accum, mesh=dict(devices=1), probe=dict(rate=rate))
  built = job_lib.assemble(config_lib.complete(config))
  found = []
  with jax.set_mesh(built.mesh), built.batches(0) as batches:
    state, step = train.start(built), train.compiled_step(built)
    for _ in range(steps):
      state, metrics = step(state, sharding.to_global(next(batches), built.mesh, 16))
      found.append(jax.device_get(metrics))
  return found, jax.device_get((state.params, state.extra))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("name, accum", [("mae", 1), slow("mae", 4), slow("byol", 1), ("byol", 4)])
def test_the_method_does_not_notice(name, accum):
  plain, (params, extra) = trained(name, accum, 0.0)
  probed, (with_probe, other) = trained(name, accum, 1e-2)
  for before, now in zip(plain, probed):
    assert set(now) - set(before) == {"probe_loss", "probe_top1"}
    for key in set(before) - {"grad_norm"}:
      np.testing.assert_array_equal(now[key], before[key], err_msg=key)
  probe = with_probe["probe"]
  rest = {k: v for k, v in with_probe.items() if k != "probe"}
  jax.tree.map(np.testing.assert_array_equal, rest, params)
  jax.tree.map(np.testing.assert_array_equal, other, extra)
  assert probe["kernel"].shape == (32, 4) and np.abs(probe["kernel"]).min() > 0
  np.testing.assert_allclose(probed[0]["probe_loss"], np.log(4), rtol=1e-6)  # it starts at zero


@pytest.mark.parametrize("name", tiny.METHODS)
def test_every_method_offers_its_features(name):
  config = tiny.config(name, mesh=dict(devices=1), probe=PROBE)
  built = job_lib.assemble(config_lib.complete(config))
  assert built.state.params["probe"]["bias"].shape == (4,)


@pytest.mark.parametrize("name", ["mae", "byol"])
def test_accumulated_it_learns_the_same(name):
  one, (params, _) = trained(name, 1, 1e-2)
  four, (other, _) = trained(name, 4, 1e-2)
  for key in ("probe_loss", "probe_top1"):
    np.testing.assert_allclose([m[key] for m in one], [m[key] for m in four], rtol=1e-4)
  np.testing.assert_allclose(params["probe"]["kernel"], other["probe"]["kernel"], atol=1e-3)


def tinted(count: int = 64) -> dict[str, np.ndarray]:
  """Noise, red, green, blue or neither by class: what pooled features of any encoder tell apart."""
  rng = np.random.default_rng(0)
  label = np.arange(count, dtype=np.int32) % 4
  tints = np.array([[120, 0, 0], [0, 120, 0], [0, 0, 120], [0, 0, 0]], np.uint8)
  image = rng.integers(0, 80, (count, 32, 32, 3), dtype=np.uint8) + tints[label][:, None, None]
  return {"image": image, "label": label}


def test_a_run_learns_reports_and_goes_on_to_the_last_bit(tmp_path):
  data = dict(source=tinted(), eval_train="train[:48]", eval_test="train[48:]")
  knn = dict(name="ssljax.evals.knn", k=(1,))
  config = tiny.config("mae", total_steps=30, probe=PROBE, data=data)
  config |= dict(checkpoint=dict(every=15, keep=2), eval=dict(every=30, figures=False, knn=knn))
  last = train.run(config, tmp_path / "straight")
  lines = [json.loads(x) for x in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
  losses = [line["train/probe_loss"] for line in lines if "train/probe_loss" in line]
  assert len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * losses[0]
  assert last["train/probe_top1"] > 0.5 and "eval/knn_k1_T0.07/top1" in last
  shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed/checkpoints/30")
  again = train.run(config, tmp_path / "resumed")
  same = [key for key in last if key.startswith(("train/", "eval/"))]
  assert {key: again[key] for key in same} == {key: last[key] for key in same}


@pytest.mark.parametrize(
  "labels, classes, message",
  [
    (None, 0, "probe.rate 0.01: .* has no labels"),
    (np.arange(64) % 4, 3, "probe.classes 3: the labels of .* go from 0 to 3"),
    (np.arange(64) % 4 - 1, 0, "go from -1 to 2"),
  ],
)
def test_labels_that_no_probe_can_learn(labels, classes, message):
  source = {"image": tiny.images(64)["image"]} | ({} if labels is None else {"label": labels})
  config = tiny.config("mae", probe=PROBE | dict(classes=classes), data=dict(source=source))
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.complete(config))


def test_more_classes_than_labels_are_allowed():
  config = tiny.config("byol", probe=PROBE | dict(classes=9))
  built = job_lib.assemble(config_lib.complete(config))
  assert built.state.params["probe"]["kernel"].shape == (32, 9)
  assert "label" in built.trained.needs and "label" not in built.method.needs
