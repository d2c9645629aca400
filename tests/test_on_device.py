"""Runs whose views and hidden places are made in the step, and whose data live on the device."""

import functools
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from ssljax import config as config_lib
from ssljax import dry_run, on_device, records, sharding, train, views
from ssljax import job as job_lib
from ssljax.methods import combine
from ssljax.step import Method, train_step

CROP = dict(name="ssljax.data.views.crop_flip", size=(32, 32), jitter=(0.4, 0.4, 0.4, 0.1))
ALL = dict(views=CROP, views_on="device", hidden_on="device", cache="device")


def assembled(devices=1, accum=1, method="mae", **data) -> job_lib.Job:
  config = tiny.config(method, data=data, accum=accum, mesh=dict(devices=devices, min_size=64))
  return job_lib.assemble(config_lib.complete(config))


def losses(job: job_lib.Job, steps: int = 3) -> list[float]:
  """The program is compiled ahead for one kind of arguments, which all steps must have."""
  found = []
  with jax.set_mesh(job.mesh), job.batches(0) as batches:
    step, state = train.compiled_step(job), train.start(job)
    place = on_device.placer(job.feed, job.mesh, job.config["batch_size"])
    for _ in range(steps):
      state, metrics = step(state, place(next(batches)))
      found.append(float(metrics["loss"]))
  return found


@functools.cache
def one_device() -> list[float]:
  return losses(assembled(**ALL))


def test_same_losses_on_eight_devices_and_accumulated():
  np.testing.assert_allclose(losses(assembled(8, 2, **ALL)), one_device(), rtol=1e-5)


def test_the_cache_changes_nothing_to_the_bit():
  assert losses(assembled(**ALL | dict(cache="none"))) == one_device()
  plain = losses(assembled())
  assert losses(assembled(cache="device")) == plain
  assert losses(assembled(cache="device"))[1:] != one_device()[1:]


def test_the_host_sends_indices_alone():
  with assembled(**ALL).batches(7) as batches, assembled().batches(7) as plain:
    cached, full = next(batches), next(plain)
  assert set(cached) == {"index", "label"}
  np.testing.assert_array_equal(cached["index"], full["index"])
  np.testing.assert_array_equal(cached["label"], full["label"])


def test_pictures_of_the_cache_are_those_of_the_source():
  job = assembled(devices=8, cache="device")
  with job.batches(0) as batches, assembled().batches(0) as plain:
    placed = on_device.placer(job.feed, job.mesh, 16)(next(batches))
    full = next(plain)
  assert placed["image"].dtype == np.uint8
  assert placed["image"].sharding.is_equivalent_to(sharding.batch_sharding(job.mesh), 4)
  np.testing.assert_array_equal(placed["image"], full["image"])


def test_the_step_calls_nobody_and_counts_the_model_alone():
  job = assembled(**ALL)
  step = jax.jit(functools.partial(train_step, job.trained, job.tx, 1))
  assert "callback" not in step.lower(job.state, job.given).as_text()
  # What the views cost is no work of the model.
  assert train.model_flops(job) == train.model_flops(assembled())


def rows(workdir: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl but for what depends on the clock."""
  found = records.read_metrics(workdir / "metrics.jsonl")
  return [{k: v for k, v in row.items() if not k.startswith("throughput/")} for row in found]


def test_a_run_resumes_to_the_last_bit(tmp_path):
  config = tiny.config(data=ALL, mesh=dict(devices=1))
  train.run(config, tmp_path / "straight")
  resumed = pathlib.Path(shutil.copytree(tmp_path / "straight", tmp_path / "resumed"))
  shutil.rmtree(resumed / "checkpoints" / "6")
  train.run(config, resumed)
  assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4, 5, 6]
  assert rows(resumed) == rows(tmp_path / "straight")
  # The cache is a matter of speed: it may be switched off on the way; views may not move.
  shutil.rmtree(resumed / "checkpoints" / "6")
  train.run(tiny.config(data=ALL | dict(cache="none"), mesh=dict(devices=1)), resumed)
  assert rows(resumed) == rows(tmp_path / "straight")
  with pytest.raises(ValueError, match="data.hidden_on: 'device' -> 'host'"):
    train.run(tiny.config(data=ALL | dict(hidden_on="host"), mesh=dict(devices=1)), resumed)


PAIR = dict(views_on="device", cache="device")


@pytest.mark.slow
def test_two_views_train_and_evaluate_on_the_device(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "ssljax.data.graph", None)  # the host makes no view at all
  config = tiny.config(
    "simclr_vit",
    total_steps=2,
    data=PAIR | dict(eval_train="train[:32]", eval_test="train[32:]"),
    schedule=dict(warmup_steps=1),
    eval=dict(every=2, figures=False, knn=dict(name="ssljax.evals.knn", k=(5,))),
    mesh=dict(devices=1),
  )
  found = train.run(config, tmp_path)
  assert np.isfinite(found["train/loss"]) and 0 <= found["eval/knn_k5_T0.07/top1"] <= 1
  assert 2 < found["eval/heldout/loss"] < 5  # of 30 others, log 31 is 3.4
  assert train.checkpoint.load(tmp_path).meta["input"]["shape"] == [32, 32, 3]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr_vit", "moco", "vicregl"])
def test_two_views_are_the_same_on_eight_devices_and_accumulated(method):
  one = losses(assembled(method=method, **PAIR))
  assert losses(assembled(method=method, **PAIR | dict(cache="none"))) == one
  accum = 1 if method == "moco" else 2
  np.testing.assert_allclose(losses(assembled(8, accum, method, **PAIR)), one, rtol=1e-4)


def test_draws_belong_to_seed_step_and_index():
  """Not to the row: a method whose loss is the mean of its first pixels, in any order."""
  recipe = views.two_views(size=(8, 8))
  echo = Method(
    init=lambda rng, batch: ({}, {}),
    loss=lambda params, extra, batch, rng, step: (batch["views"], ({}, {})),
    update=lambda params, extra, stats, step: extra,
    encode=lambda params, extra, batch, layers=(): {"pooled": batch["image"]},
    needs=("views", "index"),
  )
  method = combine.viewed(echo, recipe)
  assert set(method.needs) == {"image", "index"}
  batch = {"image": tiny.images(4)["image"], "index": jnp.arange(4)}
  make = jax.jit(lambda batch, key: method.loss({}, {}, batch, key, 0)[0])
  first = make(batch, jax.random.key(0))
  assert first.shape == (4, 2, 8, 8, 3)
  turned = make({k: v[::-1] for k, v in batch.items()}, jax.random.key(0))
  np.testing.assert_allclose(first, turned[::-1], atol=1e-6)
  assert np.abs(first - make(batch, jax.random.key(1))).mean() > 0.01
  same = batch | {"image": np.repeat(batch["image"][:1], 4, 0)}
  assert np.abs(np.diff(make(same, jax.random.key(0)), axis=0)).mean((1, 2, 3, 4)).min() > 0.01
  assert method.encode({}, {}, batch)["pooled"] is batch["image"]


def test_dry_run_shows_what_the_step_makes(tmp_path):
  job = assembled(**ALL)
  with job.batches(0) as batches:
    seen = dry_run.seen(job, next(batches))
  assert seen["image"].shape == (16, 32, 32, 3) and seen["image"].dtype == np.float32
  assert (seen["hidden"].sum(1) == 48).all()
  assert dry_run.draw_batch(job, tmp_path).exists()


@pytest.fixture
def folder(tmp_path):
  """Twenty pictures of two classes, all of one size or not."""
  pytest.importorskip("tensorflow")

  def make(*sizes):
    for number, picture in enumerate(tiny.images(20)["image"]):
      place = tmp_path / f"class{number % 2}" / f"{number:02}.png"
      place.parent.mkdir(exist_ok=True)
      Image.fromarray(picture).resize(sizes[number % len(sizes)]).save(place)
    return f"folder:{tmp_path}"

  return make


def test_small_files_of_one_size_are_cached(folder):
  source = folder((32, 32))
  plain = dict(source=source, eval_train="", eval_test="", views=CROP)
  cached = assembled(**plain, views_on="device", cache="device")
  with cached.batches(0) as batches:
    batch = next(batches)
    image = on_device.placer(cached.feed, cached.mesh, 16)(batch)["image"]
  job = assembled(**plain, views_on="device", canvas=(32, 32))
  with job.batches(0) as batches:
    full = next(batches)
  np.testing.assert_array_equal(image, full["image"])
  np.testing.assert_array_equal(batch["label"], full["label"])
  assert cached.source.fingerprint == job.source.fingerprint


def test_images_of_many_sizes_need_a_canvas(folder):
  data = dict(source=folder((32, 32), (40, 36)), views=CROP, views_on="device")
  for cache in ("none", "device"):
    with pytest.raises(ValueError, match="differ in size.*data.canvas"):
      assembled(**data, cache=cache)
    job = assembled(**data, cache=cache, canvas=(36, 36))
    assert job.feed.shape == job.given["image"].shape[1:] == (36, 36, 3)
    assert job.batch["image"].shape == (16, 32, 32, 3)
    with job.batches(0) as batches:
      placed = on_device.placer(job.feed, job.mesh, 16)(next(batches))
    assert placed["image"].shape == (16, 36, 36, 3) and placed["image"].dtype == np.uint8


@pytest.mark.parametrize(
  "data, words",
  [
    (dict(views_on="gpu"), "data.views_on 'gpu' is none of host, device"),
    (dict(cache="device", views=CROP), "set data.views_on='device'"),
    (dict(canvas=(64, 64)), "data.canvas is where data.views start"),
    (
      dict(views_on="device", views=dict(name="ssljax.data.views.resize_crop", size=(32, 32))),
      "made on the host only; on the device there are crop_flip, keep, multi_crop, two_views",
    ),
    (
      dict(hidden_on="device", hidden=dict(name="ssljax.data.masking.block")),
      "made on the host only; on the device there are random, units",
    ),
    (
      dict(views_on="device", views=CROP, channels=1, source={"image": np.zeros((20, 32, 32))}),
      "needs RGB",
    ),
  ],
)
def test_errors_say_what_is_wrong(data, words):
  with pytest.raises(ValueError, match=words):
    assembled(**data)


def test_a_data_set_that_is_too_large_is_not_cached(monkeypatch):
  monkeypatch.setattr(on_device, "device_memory", lambda: 2 * 64 * 32 * 32 * 3 - 1)
  with pytest.raises(
    ValueError, match="64 examples of arrays in memory take .* GB, more than half"
  ):
    assembled(cache="device")
  assert on_device.device_memory() > 0


@pytest.mark.parametrize("method", ["swav", "lejepa", "dino_resnet", "simclr_vit"])
def test_views_made_in_the_step_are_accumulated(method):
  """What couples the examples is not given their pictures again."""
  views = dict(tiny.METHODS[method][2]["views"])
  accum = 1 if method == "dino_resnet" else 2  # its batch norm sees the whole batch
  config = tiny.config(method, accum=accum, data=dict(views=views, views_on="device"))
  if method == "swav":
    config["encoder"] = tiny.ENCODER
  job = job_lib.assemble(config_lib.complete(config | dict(mesh=dict(devices=1))))
  step = functools.partial(train_step, job.trained, job.tx, accum)
  state, metrics = jax.eval_shape(step, job.state, job.given)
  assert metrics["loss"].shape == () and jax.tree.structure(state) == jax.tree.structure(job.state)
