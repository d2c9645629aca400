"""Where views lie in their pictures: against what is seen in them, on all ways to a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssljax import views as device
from ssljax.data import direct, order, views
from ssljax.data.pipeline import batches, examples
from ssljax.data.sources import open_source
from ssljax.methods.vicregl import places

tf = pytest.importorskip("tensorflow")

HEIGHT, WIDTH, CELLS = 90, 120, (4, 4)
PLAIN = dict(jitter=(0.0,) * 4, solarize=(0.0, 0.0), method="bilinear", boxes=True)
PAIR = PLAIN | dict(scale=(0.1, 0.6), gray=(0.0, 0.0), blur=(0.0, 0.0))
CROPS = PLAIN | dict(
  scale=(0.3, 0.9), local_scale=(0.1, 0.3), gray=(0.0,) * 3, blur=(0.0,) * 3, solarize=(0.0,) * 3
)


def atlas(height=HEIGHT, width=WIDTH):
  """A picture whose colours say where one is: red y, green x, in units of the longer side."""
  y, x = (np.arange(n) + 0.5 for n in (height, width))
  grid = np.stack([*np.meshgrid(y, x, indexing="ij"), np.zeros((height, width))], -1)
  return np.float32(grid / max(height, width))


def folder(path, turn=1):
  exif = Image.Exif()
  exif[0x0112] = turn
  for i in range(4):
    picture = Image.fromarray(np.uint8(255 * atlas(HEIGHT + 8 * i)))
    upright = {1: picture, 6: picture.rotate(90, expand=True)}[turn]
    upright.save(path / f"{i}.jpg", quality=95, subsampling=0, exif=exif.tobytes())
  return open_source(f"folder:{path}")


def seen(pictures):
  """Mean colours of the cells of views, red and green: [b v h w 3] -> [b v n 2]."""
  b, v, h, w, _ = pictures.shape
  parts = pictures[..., :2].reshape(b, v, CELLS[0], h // CELLS[0], CELLS[1], w // CELLS[1], 2)
  return parts.mean((3, 5)).reshape(b, v, -1, 2)


def check(batch, leaves, tolerance):
  """Cells are where their colours say; some views of either hand."""
  start = 0
  for leaf in leaves:
    count = batch[leaf].shape[1]
    boxes = np.asarray(batch["boxes"])[:, start : start + count]
    top = 255 if batch[leaf].dtype == np.uint8 else 1
    start += count
    np.testing.assert_allclose(places(boxes, CELLS), seen(batch[leaf] / top), atol=tolerance)
    mirrored = boxes[..., 1] > boxes[..., 3]
    assert mirrored.any() and not mirrored.all()
  assert batch["boxes"].shape == (*batch["boxes"].shape[:1], start, 4)


WAYS = {
  "array": (lambda path: open_source({"image": atlas()[None].repeat(4, 0)}), (16, 16), False),
  "graph": (folder, (16, 16), False),
  "turned": (lambda path: folder(path, 6), (16, 16), False),
  "direct": (folder, (64, 64), True),
  "direct, turned": (lambda path: folder(path, 6), (64, 64), True),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_views_lie_where_their_colours_say(way, tmp_path):
  make, size, fast = WAYS[way]
  source, recipe = make(tmp_path), views.two_views(size=size, **PAIR)
  if source.form == "picture":
    assert direct.possible(source, recipe) == fast
  with batches(source, batch_size=4, views=recipe, steps=3) as stream:
    for batch in stream:
      assert batch["boxes"].dtype == np.float32
      check(batch, ["views"], 0.01)


def test_crops_lie_where_their_colours_say():
  source = open_source({"image": atlas()[None].repeat(4, 0)})
  recipe = views.multi_crop(size=(16, 16), local_size=(8, 8), local_views=3, **CROPS)
  with batches(source, batch_size=4, views=recipe, steps=1) as stream:
    check(next(stream), ["global", "local"], 0.01)


def test_on_the_device():
  """By colours, and the host's numbers where the host's parameters are given."""
  host = views.multi_crop(size=(16, 16), local_size=(8, 8), local_views=3, **CROPS)
  ours = device.multi_crop(size=(16, 16), local_size=(8, 8), local_views=3, **CROPS)
  make = jax.jit(jax.vmap(lambda key: ours.apply(jnp.asarray(atlas()), ours.draw(key))))
  check(jax.device_get(make(jax.random.split(jax.random.key(0), 8))), ["global", "local"], 0.01)
  source = open_source({"image": atlas()[None].repeat(4, 0)})
  with batches(source, batch_size=4, views=host, steps=1) as stream:
    batch = next(stream)
  keys = order.keys(0, np.zeros(4, int), batch["index"], "views").view(np.int64)
  apply = jax.jit(lambda drawn: ours.apply(jnp.asarray(atlas()), drawn)["boxes"])
  for key, wanted in zip(keys, batch["boxes"]):
    drawn = tf.nest.map_structure(lambda x: jnp.asarray(x.numpy()), host.draw(tf.constant(key)))
    np.testing.assert_allclose(apply(drawn), wanted, atol=1e-7)


def test_none_unless_asked():
  for recipe in (views.two_views(size=(16, 16), blur_kernel=3), views.crop_flip(size=(8, 8))):
    assert views.recipe_of(recipe).beside() == {}
  source = open_source({"image": atlas()[None].repeat(4, 0)})
  with batches(source, batch_size=4, views=views.two_views(size=(32, 32)), steps=1) as stream:
    assert "boxes" not in next(stream)


def test_a_batch_without_a_readable_picture(tmp_path):
  (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
  source = folder(tmp_path)
  with examples(source, batch_size=1, views=views.two_views(size=(16, 16), **PAIR)) as stream:
    *_, good, bad = stream
  assert not bad["valid"][0] and not bad["boxes"].any() and bad["boxes"].dtype == np.float32
  assert good["valid"][0] and good["boxes"].shape == bad["boxes"].shape == (1, 2, 4)
