"""Batches are a function of (seed, step): any hosts, any start, damaged files among the images."""

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from ssljax.data import direct, masking, order, views
from ssljax.data.pipeline import batches, examples
from ssljax.data.sources import open_source

BATCH = 8
DATA = os.environ.get(
  "SSLJAX_TEST_DATA", os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
)


def encoded(image, form="JPEG"):
  out = io.BytesIO()
  Image.fromarray(image).save(out, form, quality=85)
  return out.getvalue()


def absurd_png():
  """A good header that claims 100,000 x 100,000 pixels."""
  data = bytearray(encoded(np.zeros((4, 4, 3), np.uint8), "PNG"))
  data[16:24] = (100_000).to_bytes(4, "big") * 2
  return bytes(data)


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory):
  """25 good JPEGs of several sizes and 6 that are broken in different ways."""
  place = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(25):
    h, w = rng.integers(24, 60, 2)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((w, h), Image.BICUBIC))
    (place / f"good_{i:02d}.jpg").write_bytes(encoded(smooth))
  good = (place / "good_00.jpg").read_bytes()
  (place / "bad_cut.jpg").write_bytes(good[: len(good) // 2])
  (place / "bad_empty.jpg").write_bytes(b"")
  (place / "bad_text.jpg").write_bytes(b"<html>404</html>" * 20)
  (place / "bad_head.jpg").write_bytes(good[:30])
  (place / "bad_huge.png").write_bytes(absurd_png())
  # A whole header and end, no picture between: only the decoder can tell.
  png = encoded(np.asarray(Image.open(io.BytesIO(good))), "PNG")
  (place / "bad_body.png").write_bytes(png[:60] + bytes(40) + png[100:])
  return place


VIEW = views.crop_flip(size=(16, 16))
HIDDEN = masking.random((4, 4), ratio=0.75)


def collect(source, steps, **options):
  stream = batches(source, batch_size=BATCH, seed=3, steps=steps, hidden=HIDDEN, **options)
  with stream:
    return list(stream), stream.damaged


def merged(parts, rows):
  """Global batches from those of several hosts."""
  out = []
  for step in zip(*parts):
    whole = {}
    for key, first in step[0].items():
      leaf = np.empty((BATCH, *first.shape[1:]), first.dtype)
      for host, batch in zip(rows, step):
        leaf[host] = batch[key]
      whole[key] = leaf
    out.append(whole)
  return out


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key], err_msg=key)


@pytest.fixture(scope="module")
def reference(damaged_folder):
  return collect(open_source(f"folder:{damaged_folder}"), 50, views=VIEW)


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("layout", ["blocks", "strided"])
def test_global_batches_are_the_same_for_any_hosts(damaged_folder, reference, hosts, layout):
  rows = np.arange(BATCH).reshape(hosts, -1)
  rows = rows if layout == "blocks" else np.arange(BATCH).reshape(-1, hosts).T
  parts = [
    collect(open_source(f"folder:{damaged_folder}"), 50, views=VIEW, rows=host)[0] for host in rows
  ]
  assert_same(merged(parts, rows), reference[0])


@pytest.mark.parametrize("start", [1, 17, 49])
def test_global_batches_are_the_same_from_any_start(damaged_folder, reference, start):
  source = open_source(f"folder:{damaged_folder}")
  assert_same(collect(source, 50 - start, views=VIEW, start_step=start)[0], reference[0][start:])


def test_workers_change_nothing(damaged_folder, reference):
  source = open_source(f"folder:{damaged_folder}")
  assert_same(collect(source, 20, views=VIEW, workers=5)[0], reference[0][:20])


LARGE = views.crop_flip(size=(64, 72))
DIRECT = {
  "one": LARGE,
  "several": views.Views({
    "global": (LARGE,) * 2, "image": views.crop_flip(size=(80, 64), method="bilinear", flip=False),
  }),
  "boxes": views.two_views(
    size=(64, 72), jitter=(0.0,) * 4, gray=(0.0, 0.0), blur=(0.0, 0.0), boxes=True
  ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", DIRECT)
def test_views_without_a_graph_are_those_of_the_graph(damaged_folder, recipe, monkeypatch):
  """The same bits and the same replacements, by whatever way, start and hosts."""
  assert direct.possible(open_source(f"folder:{damaged_folder}"), views.recipe_of(DIRECT[recipe]))
  first, damaged = collect(
    open_source(f"folder:{damaged_folder}"), 8, views=DIRECT[recipe], workers=3
  )
  rows = np.arange(1, BATCH, 2)
  part = collect(
    open_source(f"folder:{damaged_folder}"), 5, views=DIRECT[recipe], start_step=3, rows=rows
  )[0]
  assert_same(part, [{key: x[rows] for key, x in batch.items()} for batch in first[3:]])
  monkeypatch.setattr(direct, "possible", lambda source, views: False)
  graph, same = collect(open_source(f"folder:{damaged_folder}"), 8, views=DIRECT[recipe])
  assert_same(first, graph)
  assert damaged == same and len(damaged) == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_all_kinds_without_a_graph(tmp_path, channels, monkeypatch):
  """EXIF, grey, CMYK, other formats: as the graph decodes them."""
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((90, 70))
  for turn in range(1, 9):
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / f"turn_{turn}.jpg", exif=exif.tobytes())
  image.convert("L").save(tmp_path / "grey.jpg")
  if channels == 3:  # TensorFlow makes no grey picture of one
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
  for form in ("png", "bmp", "webp"):
    image.save(tmp_path / f"plain.{form}")
  image.convert("RGBA").save(tmp_path / "alpha.png")
  source = open_source(f"folder:{tmp_path}", channels=channels)
  found = []
  for fast in (True, False):
    monkeypatch.setattr(direct, "possible", lambda source, views, fast=fast: fast)
    with examples(source, batch_size=source.size, views=LARGE, channels=channels) as stream:
      found.append(next(stream))
    assert found[-1]["valid"].all(), stream.damaged
  assert_same(*([batch] for batch in found))


def test_damaged_images_are_replaced_in_place_and_named(damaged_folder, reference):
  """All other rows hold what the order says; those of a damaged file hold a good one."""
  found, damaged = reference
  source = open_source(f"folder:{damaged_folder}")
  names = [source.example_name(i) for i in range(source.size)]
  assert sorted(damaged) == sorted(n for n in names if n.startswith("bad"))
  assert "is cut" in damaged["bad_cut.jpg"]
  assert "is empty" in damaged["bad_empty.jpg"]
  assert "is not a JPEG" in damaged["bad_text.jpg"]
  assert "100000 x 100000" in damaged["bad_huge.png"]
  assert "cannot be decoded" in damaged["bad_body.png"]
  replaced = 0
  for step, batch in enumerate(found):
    _, _, index = order.places(step, BATCH, np.arange(BATCH), source.size, 3, True)
    bad = np.array([names[i].startswith("bad") for i in index])
    assert (batch["index"][~bad] == index[~bad]).all()
    assert all(names[i].startswith("good") for i in batch["index"])
    assert batch["image"].shape == (BATCH, 16, 16, 3) and batch["image"].std((1, 2, 3)).min() > 0
    replaced += bad.sum()
  assert replaced > 30


def test_evaluation_leaves_damaged_images_out(damaged_folder):
  source = open_source(f"folder:{damaged_folder}")
  view = views.resize_crop(size=(16, 16))
  with examples(source, batch_size=BATCH, views=view, hidden=HIDDEN) as stream:
    found = list(stream)
  index, valid = (np.concatenate([b[k] for b in found]) for k in ("index", "valid"))
  assert len(found) == 4 and valid.sum() == 25
  assert sorted(index[valid]) == [i for i in range(31) if source.example_name(i).startswith("good")]
  assert len(stream.damaged) == 6
  assert not np.concatenate([b["image"] for b in found])[~valid][:6].any()


def test_an_epoch_holds_every_example_once():
  source = open_source({"image": np.zeros((24, 4, 4, 3), np.uint8)})
  with batches(source, batch_size=8, seed=1, steps=6) as stream:
    index = np.concatenate([b["index"] for b in stream]).reshape(2, 24)
  assert (np.sort(index, 1) == np.arange(24)).all()
  assert (index[0] != index[1]).any() and (index[0] != np.arange(24)).any()


def test_epochs_meet_inside_a_batch_and_any_step_is_at_hand():
  places = [order.places(step, 7, np.arange(7), 10, 0, True) for step in range(10)]
  epoch, offset, index = (np.concatenate(p) for p in zip(*places))
  assert (epoch * 10 + offset == np.arange(70)).all()
  assert (np.sort(index.reshape(7, 10), 1) == np.arange(10)).all()
  source = open_source({"image": np.zeros((10, 4, 4, 3), np.uint8)})
  with batches(source, batch_size=7, start_step=10**9, steps=1) as stream:
    expected = order.places(10**9, 7, np.arange(7), 10, 0, True)[2]
    assert (next(stream)["index"] == expected).all()


def test_shuffle_of_large_sets_is_a_keyed_bijection():
  size, offset = 1000, np.arange(1000)
  epochs = [order.shuffle_large(offset, size, seed=5, epoch=e) for e in range(3)]
  for image in epochs:
    assert (np.sort(image) == offset).all()
    # Four rounds, TensorFlow's default, leave visible runs; eight look like a permutation.
    assert abs(np.corrcoef(image, offset)[0, 1]) < 0.1
    assert (np.diff(image) == 1).sum() < 10
  assert (epochs[0] != epochs[1]).mean() > 0.98
  assert (order.shuffle_large(offset[7:9], size, 5, 0) == epochs[0][7:9]).all()


def test_damage_known_from_an_earlier_pass_is_not_told_again(damaged_folder, caplog):
  source = open_source(f"folder:{damaged_folder}")
  with examples(source, batch_size=BATCH, views=VIEW) as first:
    valid = [batch["valid"] for batch in first]
  assert "bad_cut.jpg is cut" in caplog.text
  caplog.clear()
  with examples(source, batch_size=BATCH, views=VIEW, known=first.damaged) as second:
    again = [batch["valid"] for batch in second]
  assert caplog.text == "" and second.damaged == first.damaged
  np.testing.assert_array_equal(again, valid)


def test_arrays_with_views_use_the_keys_of_their_examples():
  image = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)
  source = open_source({"image": image, "label": np.arange(20)})
  view = views.crop_flip(size=(8, 8))
  with batches(source, batch_size=4, views=view, steps=10) as stream:
    first = list(stream)
  with batches(source, batch_size=4, views=view, rows=[1, 2], start_step=3, steps=1) as stream:
    part = next(stream)
  assert (part["image"] == first[3]["image"][1:3]).all()
  assert (first[0]["label"] == first[0]["index"]).all()
  by_index = {int(i): x for b in first[:5] for i, x in zip(b["index"], b["image"])}
  again = {int(i): x for b in first[5:] for i, x in zip(b["index"], b["image"])}
  assert by_index.keys() == again.keys()
  assert np.mean([(by_index[i] == again[i]).all() for i in by_index]) < 0.3


def test_evaluation_pads_the_last_batch_and_takes_indices():
  image = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
  source = open_source({"image": image, "label": np.arange(10)})
  with examples(source, batch_size=4) as stream:
    found = list(stream)
  assert [b["valid"].sum() for b in found] == [4, 4, 2]
  assert np.concatenate([b["image"][b["valid"], 0, 0, 0] for b in found]).tolist() == list(
    range(10)
  )
  with examples(source, batch_size=4, indices=[7, 3, 3]) as stream:
    (batch,) = stream
  assert batch["label"][batch["valid"]].tolist() == [7, 3, 3]


def test_images_of_many_sizes_need_a_view(damaged_folder):
  source = open_source(f"folder:{damaged_folder}")
  with batches(source, batch_size=BATCH, steps=2) as stream:
    with pytest.raises(ValueError, match="differ in size: set a view"):
      list(stream)


def test_a_folder_that_goes_bad_ends_with_the_reason(tmp_path):
  for i in range(4):
    (tmp_path / f"{i}.jpg").write_bytes(encoded(np.full((16, 16, 3), 60 * i, np.uint8)))
  source = open_source(f"folder:{tmp_path}")
  for path in tmp_path.iterdir():
    path.unlink()
  with batches(source, batch_size=2, views=VIEW) as stream:
    with pytest.raises(ValueError, match="no readable image.*is empty or cannot be opened"):
      next(stream)


def test_pixel_limit_is_checked_before_decoding(tmp_path):
  for i, side in enumerate((20, 20, 20, 40)):
    (tmp_path / f"{i}.jpg").write_bytes(encoded(np.full((side, side, 3), 99, np.uint8)))
  source = open_source(f"folder:{tmp_path}")
  with examples(source, batch_size=4, views=VIEW, max_pixels=1000) as stream:
    assert next(stream)["valid"].tolist() == [True, True, True, False]
  assert "40 x 40 pixels, more than the limit of 1000" in stream.damaged["3.jpg"]


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"batch_size": 11}, "batch_size 11 is larger than the 10 examples"),
    ({"batch_size": 0}, "at least 1"),
    ({"batch_size": 4, "rows": [0, 4]}, r"0..3"),
    ({"batch_size": 4, "rows": [2, 1]}, "sorted"),
    ({"batch_size": 4, "hidden": HIDDEN, "grid": (2, 2)}, r"built for the grid \(4, 4\)"),
  ],
)
def test_errors_say_what_is_wrong(options, words):
  source = open_source({"image": np.zeros((10, 4, 4, 3), np.uint8)})
  with pytest.raises(ValueError, match=words):
    batches(source, **options)


def test_closing_ends_the_thread():
  import threading

  source = open_source({"image": np.zeros((10, 4, 4, 3), np.uint8)})
  before = threading.active_count()
  stream = batches(source, batch_size=2)
  next(stream)
  stream.close()
  stream.close()
  assert threading.active_count() == before
  with pytest.raises(StopIteration):
    next(stream)
  dropped = batches(source, batch_size=2)
  next(dropped)
  del dropped
  assert threading.active_count() == before


def test_a_failing_sampler_is_an_error_in_the_reader():
  def draw(seed, epoch, index):
    raise RuntimeError("no noise today")

  source = open_source({"image": np.zeros((10, 4, 4, 3), np.uint8)})
  stream = batches(source, batch_size=2, hidden=HIDDEN._replace(draw=draw))
  for _ in range(2):
    with pytest.raises(RuntimeError, match="no noise today"):
      next(stream)


BLOCKED = """
import sys
for name in ("tensorflow", "jax", "clu", "ml_collections", "sklearn"):
  sys.modules[name] = None
import numpy as np
from ssljax.data import masking, views
from ssljax.data.pipeline import batches, examples, moments
from ssljax.data.sources import open_source
source = open_source({"image": np.zeros((10, 8, 8, 1), np.uint8), "label": np.arange(10)})
for keep in (None, views.keep()):
  hidden = masking.block((4, 4), count=6, min_area=2)
  with batches(source, batch_size=4, hidden=hidden, views=keep) as stream:
    assert next(stream)["hidden"].sum() == 24
assert len(list(examples(source, batch_size=4))) == 3
moments(source)
"""


def test_arrays_need_numpy_only():
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=root, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


def test_the_package_never_imports_jax():
  place = os.path.join(os.path.dirname(__file__), "..", "ssljax", "data")
  for file in os.listdir(place):
    if file.endswith(".py"):
      with open(os.path.join(place, file)) as text:
        lines = [line.split() for line in text if line.lstrip().startswith(("import ", "from "))]
      assert not [words for words in lines if words[1].split(".")[0] in ("jax", "flax", "optax")], (
        file
      )


@pytest.mark.parametrize("name", ["jpeg_varied.tar", "imagenette224_val.tar"])
def test_real_photographs(name):
  path = os.path.join(DATA, name)
  if not os.path.exists(path):
    pytest.skip(f"{path} is absent: set SSLJAX_TEST_DATA")
  source = open_source(f"tar:{path}", "train[:58]")
  with tarfile.open(path) as shard:
    first = shard.extractfile(next(m for m in shard if m.name.endswith(".jpg"))).read()
  assert source.fetch(np.array([0])) == [first]
  with examples(source, batch_size=29, views=views.resize_crop(size=(64, 64))) as stream:
    found = list(stream)
  assert not stream.damaged and all(b["valid"].all() for b in found)
  assert all(b["image"].std((1, 2, 3)).min() > 3 for b in found)
