"""Several views of an image through a whole run: shapes, held-out loss, dry run, mistakes."""

import copy
import json

import numpy as np
import pytest
import tiny
from matplotlib import image as pictures

from ssljax import config as config_lib
from ssljax import dry_run, evaluate, job, train
from ssljax.data import views
from ssljax.data.sources import open_source
from ssljax.step import init_state
from ssljax.viz.batch import batch_figure

pytest.importorskip("tensorflow")

RECIPE = dict(
  name="ssljax.data.views.two_views", size=(32, 32), jitter=(0.0, 0.0, 0.0, 0.0),
  gray=(0.0, 0.0), blur=(0.0, 0.0), solarize=(0.0, 0.2),
)  # fmt: skip


def config(**data):
  """A tiny run on pairs; its test split has 21 images, not a whole number of batches."""
  given = dict(source=tiny.images(64), views=RECIPE) | data
  kept = dict(drop_path=0.0)  # nothing is drawn: losses can be made again
  return tiny.config("simclr_vit", encoder=kept, data=given, eval=dict(every=6, figures=False))


def test_shapes_and_the_image_of_the_encoder():
  built = job.assemble(config_lib.complete(config()))
  assert built.batch["views"].shape == (16, 2, 32, 32, 3)
  assert built.batch["views"].dtype == np.uint8 and "image" not in built.batch
  assert built.image.shape == (32, 32, 3) and built.input()["shape"] == [32, 32, 3]
  assert built.grid == (8, 8)
  with built.batches(0, steps=1) as batches:
    batch = next(batches)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in built.batch.items()
  }


@pytest.mark.slow
def test_a_run_trains_and_measures_the_heldout_loss(tmp_path):
  given = config(eval_train="train[:50%]", eval_test="train[50%:]")
  last = train.run(given, tmp_path)
  assert np.isfinite(last["eval/heldout/loss"]) and np.isfinite(last["train/loss"])
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "eval/heldout/loss" in line] == [6]


def test_heldout_loss_is_that_of_the_training_views_of_epoch_0(tmp_path):
  """Mean over whole batches of the test split in order, through the recipe."""
  given = config_lib.complete(config(eval_test="train[:42]", eval_train="train"))
  built = job.assemble(given)
  evaluation = evaluate.Evaluation(built, tmp_path, log=lambda line: None)
  state = init_state(built.method, built.tx, built.batch, 0)
  found = evaluation._heldout(state)
  assert found == evaluation._heldout(state)
  wanted = []
  with built.examples(evaluation.test, views=built.views) as batches:
    for batch in batches:
      if batch["valid"].all():
        wanted.append(built.method.loss(state.params, state.extra, batch, state.rng, 0)[0])
  assert len(wanted) == 2
  assert found == pytest.approx(np.mean(wanted), rel=1e-5)


def test_dry_run_shows_both_views(tmp_path, capsys):
  dry_run.dry_run(config(eval_test="train[:42]"), tmp_path)
  assert "views  16 x 2 x 32 x 32 x 3  uint8" in capsys.readouterr().out
  assert (tmp_path / "figures" / "batch.png").exists()


def test_batch_figure_has_a_row_for_each_view(tmp_path):
  colours = [(200, 30, 40), (20, 160, 60), (10, 60, 220), (240, 220, 0)]
  made = np.uint8(colours)[None, :, None, None].repeat(4, 0).repeat(16, 2).repeat(16, 3)
  path = batch_figure(tmp_path / "a.png", {"global": made[:, :2], "local": made[:, 2:, :8, :8]})
  seen = (pictures.imread(path)[..., :3] * 255).round().astype(int)
  for colour in colours:
    assert (np.abs(seen - colour).max(-1) <= 1).sum() > 100


def test_batch_figure_covers_the_hidden_places_of_each_view(tmp_path):
  made = np.full((3, 2, 16, 16, 3), 200, np.uint8)
  hidden = np.zeros((3, 2, 4), bool)
  hidden[:, 1, 0] = True
  path = batch_figure(tmp_path / "a.png", {"global": made, "hidden": hidden}, (2, 2))
  bare = batch_figure(tmp_path / "b.png", {"global": made, "hidden": hidden & False}, (2, 2))
  assert path.read_bytes() != bare.read_bytes()


def changed(key, value):
  given = copy.deepcopy(config())
  *path, last = key.split(".")
  inner = given
  for part in path:
    inner = inner[part]
  inner[last] = value
  return given


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("data.views", None, "two_view needs views in the batch, which has image.*two_views"),
    ("data.eval_views", RECIPE, "data.eval_views must give one view.*not ssljax.data.views.two"),
    ("data.views", RECIPE | dict(gray=(0.2,)), "gray .*one probability for each of the 2 views"),
    ("data.views", RECIPE | dict(gray=0.2), r"data.views.gray wants a tuple like \(0.2, 0.2\)"),
    ("data.views", RECIPE | dict(grey=(0.2, 0.2)), "unknown config key data.views.grey; did you"),
  ],
)
def test_mistakes_are_named_before_anything_is_compiled(key, value, words):
  with pytest.raises(ValueError, match=words):
    job.assemble(config_lib.complete(changed(key, value)))


def test_a_method_on_single_images_refuses_pairs():
  given = tiny.config(data=dict(views=RECIPE))
  with pytest.raises(ValueError, match="needs image.*which has views.*crop_flip.* makes image"):
    job.assemble(config_lib.complete(given))


def test_recipes_know_their_shapes():
  recipe = views.two_views(size=(24, 20), blur=(0.0, 0.0))
  assert recipe.shapes((None, None, 3)) == {"views": (2, 24, 20, 3)}
  crops = views.multi_crop(size=(24, 20), local_size=(12, 10), local_views=6)
  assert crops.shapes((None, None, 3)) == {"global": (2, 24, 20, 3), "local": (6, 12, 10, 3)}
  assert list(views.multi_crop(local_views=0).leaves) == ["global"]
  source = open_source({"image": np.zeros((4, 8, 9, 3), np.uint8)})
  assert job.example_shape(source, recipe) == (24, 20, 3)
  assert job.example_shape(source, views.keep()) == (8, 9, 3)
  assert views.recipe_of(None).shapes((8, 9, 3)) == {"image": (8, 9, 3)}
