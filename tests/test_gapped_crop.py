"""Patches cut with gaps: which pixels they are, in plain NumPy; the way without a graph; errors."""

import numpy as np
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.data import order, views
from ssljax.data.gapped_crop import gapped_crop

tf = pytest.importorskip("tensorflow")
KEYS = order.keys(0, 0, np.arange(40), "views").view(np.int64)
# A picture whose pixels tell their place, as large as the cells: the crop takes all of it.
WHOLE = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)


def numbered(height, width):
  return np.stack([*np.indices((height, width)), np.zeros((height, width))], -1).astype(np.uint8)


def cut(image, patch, gap, offset):
  """The statement: cell by cell, a patch at its own offset, written where the encoder looks."""
  rows, columns = offset.shape[1:]
  out = np.zeros((rows * patch, columns * patch, 3), np.uint8)
  for i in range(rows):
    for j in range(columns):
      y, x = i * (patch + gap) + offset[0, i, j], j * (patch + gap) + offset[1, i, j]
      to = np.s_[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
      out[to] = image[y : y + patch, x : x + patch]
  return out


@pytest.mark.parametrize(
  ("patch", "gap", "grid"), [(4, 3, (3, 5)), (16, 4, (6, 6)), (4, 0, (3, 5))]
)
def test_pixels_are_those_of_a_patch_in_each_cell(patch, gap, grid):
  size = grid[0] * patch, grid[1] * patch
  ratio = dict(ratio=(grid[1] / grid[0],) * 2)
  view = gapped_crop(size=size, patch=(patch, patch), gap=gap, **WHOLE | ratio)
  image = numbered(*(n * (patch + gap) for n in grid))
  found = []
  for key in KEYS[:8]:
    drawn = view.draw(tf.constant(key))
    found.append(drawn["offset"].numpy())
    made = view.apply(tf.constant(image), drawn).numpy()
    np.testing.assert_array_equal(made, cut(image, patch, gap, found[-1]))
  assert found[0].shape == (2, *grid)
  assert set(np.unique(found)) == set(range(max(gap, 1)))  # the end is not among them
  if gap:
    assert (found[0] != found[1]).any() and (found[0][0] != found[0][1]).any()


def test_offsets_are_even_and_belong_to_seed_epoch_and_index():
  view = gapped_crop(size=(56, 56), patch=(4, 4), gap=4)
  draw = tf.function(lambda keys: tf.vectorized_map(view.draw, keys, warn=False))
  drawn = draw(KEYS)
  offsets = drawn["offset"].numpy()
  share = np.bincount(offsets.reshape(-1), minlength=4) / offsets.size
  assert np.abs(share - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / offsets.size)
  again = draw(KEYS[[3, 17]])["offset"].numpy()
  np.testing.assert_array_equal(again, offsets[[3, 17]])
  # What crop_flip draws is untouched.
  plain = tf.function(lambda keys: tf.vectorized_map(views.crop_flip().draw, keys, warn=False))(
    KEYS
  )
  np.testing.assert_array_equal(plain["crop"], drawn["crop"])


def test_the_way_without_a_graph_is_the_same_to_the_bit():
  view = gapped_crop(size=(96, 64), patch=(16, 16), gap=4)
  image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
  for key in KEYS[:4]:
    drawn = view.draw(tf.constant(key))
    y, x, h, w = (int(n) for n in view.window(90, 130, drawn))
    part = image[y : y + h, x : x + w]
    out = np.zeros((96, 64, 3), np.uint8)
    view.direct(part, {k: v.numpy() for k, v in drawn.items()}, out)
    np.testing.assert_array_equal(out, view.apply(tf.constant(image), drawn))


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    (dict(gap=-1), "data.views.gap -1: 0 pixels or more"),
    (dict(size=(224, 220)), r"size \(224, 220\) is not divisible by patches of \(16, 16\)"),
    (dict(patch=(16,)), r"by patches of \(16,\)"),
  ],
)
def test_errors_say_what_is_wrong(settings, words):
  with pytest.raises(ValueError, match=words):
    gapped_crop(**settings)


@pytest.mark.parametrize(
  ("data", "words"),
  [
    (dict(patch=(8, 8)), r"data.views.patch \(8, 8\) is not encoder.patch \(4, 4\): the edges"),
    (dict(on="device"), "is made on the host only; on the device there are"),
  ],
)
def test_a_run_with_other_patches_than_the_encoders_is_refused(data, words):
  recipe = dict(name="ssljax.data.gapped_crop", size=(32, 32), patch=data.get("patch", (4, 4)))
  config = tiny.config(data=dict(views=recipe | dict(gap=1), views_on=data.get("on", "host")))
  with pytest.raises(ValueError, match=words):
    job_lib.assemble(config_lib.complete(config))


def test_batches_of_a_run_have_what_is_left():
  recipe = dict(name="ssljax.data.gapped_crop", size=(24, 32), patch=(4, 4), gap=2, **WHOLE)
  recipe |= dict(ratio=(4 / 3, 4 / 3))  # 36 of 48 pixels
  source = {"image": np.stack([numbered(36, 48)] * 16)}
  config = tiny.config(data=dict(views=recipe, source=source))
  with job_lib.assemble(config_lib.complete(config)).batches(0, 1) as batches:
    image = next(batches)["image"]
  assert image.shape == (16, 24, 32, 3)
  corners = image[:, ::4, ::4, :2].astype(int)
  offsets = corners - 6 * np.stack(np.indices((6, 8)), -1)
  assert set(np.unique(offsets)) == {0, 1}
  inside = image[..., :2].reshape(16, 6, 4, 8, 4, 2).swapaxes(2, 3) - corners[:, :, :, None, None]
  np.testing.assert_array_equal(inside[3, 2, 5], np.stack(np.indices((4, 4)), -1))
  assert (inside == inside[0, 0, 0]).all()
