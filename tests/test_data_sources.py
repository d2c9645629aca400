"""Sources: what each kind holds, splits, labels, and errors in the user's words."""

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from ssljax.data.pipeline import batches, examples, moments
from ssljax.data.sources import open_source, source_change, split_bounds


def jpeg(value, size=(12, 10), form="JPEG"):
  out = io.BytesIO()
  Image.new("RGB", size, (value, 255 - value, 128)).save(out, form, quality=95)
  return out.getvalue()


def colours(source, **options):
  """Value of the red channel of every example, in order."""
  with examples(source, batch_size=4, **options) as stream:
    return np.concatenate([b["image"][b["valid"]].mean((1, 2))[:, 0] for b in stream])


def write_tar(path, members):
  with tarfile.open(path, "w") as shard:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      shard.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
  for place, values in {"train/cat": (10, 20), "train/dog": (30,), "test/dog": (40, 50)}.items():
    (tmp_path / place).mkdir(parents=True)
    for value in values:
      (tmp_path / place / f"{value}.jpg").write_bytes(jpeg(value))
  (tmp_path / "train/cat/notes.txt").write_text("not an image")
  (tmp_path / "train/cat/._10.jpg").write_bytes(b"what some systems leave behind")
  return tmp_path


def test_digits_are_deterministic_and_disjoint():
  train, test = open_source("digits", channels=1), open_source("digits", "test", channels=1)
  assert (train.size, test.size) == (1437, 360)
  image = train.fetch(np.arange(train.size))
  assert image.shape == (1437, 8, 8, 1) and image.dtype == np.uint8 and image.max() == 255
  assert len({x.tobytes() for x in image} & {x.tobytes() for x in test.fetch(np.arange(360))}) <= 1
  assert np.bincount(train.labels).min() > 120
  assert open_source("digits", channels=3).fetch(np.arange(2)).shape == (2, 8, 8, 3)


def test_digits_photo_is_readable_but_not_by_a_linear_classifier_of_pixels():
  from sklearn.linear_model import RidgeClassifier
  from sklearn.neighbors import KNeighborsClassifier

  train, test = open_source("digits_photo"), open_source("digits_photo", "test")
  assert train.shape == (24, 24, 3) and train.size == 8 * 1437 and test.size == 2 * 360
  again = open_source("digits_photo", "test")
  assert again.fingerprint == test.fingerprint
  x, y = (s.fetch(np.arange(min(s.size, 1437))) / np.float32(255) for s in (train, test))
  x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
  nearest = KNeighborsClassifier(10, metric="cosine").fit(x, train.labels[:1437])
  assert nearest.score(y, test.labels) > 0.5
  assert RidgeClassifier(30.0).fit(x, train.labels[:1437]).score(y, test.labels) < 0.5


def test_mapping_is_a_view_of_the_arrays():
  image = np.arange(5 * 4 * 6 * 2, dtype=np.uint16).reshape(5, 4, 6, 2)
  source = open_source({"image": image, "label": [0, 1, 2, 3, 4]}, "train[1:4]", channels=2)
  assert source.size == 3 and source.labels.tolist() == [1, 2, 3]
  assert (source.fetch(np.array([2, 0])) == image[[3, 1]]).all()
  assert source.dtype == "uint16" and not source.encoded


def test_npz_keys_and_split_in_the_string(tmp_path):
  image = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
  path = tmp_path / "x.npz"
  np.savez(
    path, image=image, train_x=image[:4], train_y=np.arange(4), test_x=image[4:], test_y=[4, 5]
  )
  assert open_source(f"npz:{path}").fetch(np.array([5])).shape == (1, 4, 4, 3)
  assert open_source(f"npz:{path}").labels is None
  keyed = f"npz:{path}?image={{split}}_x&label={{split}}_y"
  train, test = open_source(keyed, "train[:2]", channels=1), open_source(keyed, "test", channels=1)
  assert (train.fetch(np.arange(2))[..., 0] == image[:2]).all()
  assert test.labels.tolist() == [4, 5]
  with pytest.raises(ValueError, match="unknown key 'train_z'.*Did you mean 'train_"):
    open_source(f"npz:{path}?image=train_z")
  with pytest.raises(ValueError, match="unknown key 'lable'"):
    open_source(f"npz:{path}?lable=y")


def test_npz_is_never_unpickled(tmp_path):
  path = tmp_path / "x.npz"
  np.savez(path, image=np.array([{"a": 1}], dtype=object))
  with pytest.raises(ValueError, match="cannot be read"):
    open_source(f"npz:{path}")


def test_folder_splits_labels_and_names(folder):
  train, test = open_source(f"folder:{folder}"), open_source(f"folder:{folder}", "test")
  assert [train.example_name(i) for i in range(3)] == ["cat/10.jpg", "cat/20.jpg", "dog/30.jpg"]
  assert train.labels.tolist() == [0, 0, 1]
  # The class number is that of the name, although the test split has one class only.
  assert test.labels.tolist() == [1, 1]
  np.testing.assert_allclose(colours(train), [10, 20, 30], atol=3)
  np.testing.assert_allclose(colours(open_source(f"folder:{folder}", "train[2:]")), [30], atol=3)
  with pytest.raises(ValueError, match="unknown split 'tets'.*Did you mean 'test'"):
    open_source(f"folder:{folder}", "tets")


def test_flat_folder_is_one_unlabelled_split(tmp_path):
  for value in (5, 60, 200):
    (tmp_path / f"{value:03d}.png").write_bytes(jpeg(value, form="PNG"))
  source = open_source(f"folder:{tmp_path}", "train[:67%]")
  assert source.size == 2 and source.labels is None
  assert colours(source).tolist() == [5, 60]
  with pytest.raises(ValueError, match="there are 'train'"):
    open_source(f"folder:{tmp_path}", "test")


def test_folder_of_npy_keeps_dtype_and_channels(tmp_path):
  stack = np.random.default_rng(0).integers(0, 60000, (3, 6, 5, 4)).astype(np.uint16)
  np.save(tmp_path / "a.npy", stack[0])
  np.save(tmp_path / "b.npy", np.asfortranarray(stack[1]))
  np.save(tmp_path / "c.npy", stack[2].astype(">u2"))
  np.save(tmp_path / "d.npy", stack[2, :3])
  whole = (tmp_path / "d.npy").read_bytes()
  (tmp_path / "d.npy").write_bytes(whole[:-7])
  source = open_source(f"folder:{tmp_path}", channels=4)
  with examples(source, batch_size=4, channels=4) as stream:
    batch = next(stream)
  assert (batch["image"][:3] == stack).all() and batch["image"].dtype == np.uint16
  assert batch["valid"].tolist() == [True, True, True, False]
  assert "is cut" in stream.damaged["d.npy"]
  mean, deviation = moments(source, 4)
  np.testing.assert_allclose(mean, stack.mean((0, 1, 2)) / 65535, rtol=1e-5)
  np.testing.assert_allclose(deviation, stack.std((0, 1, 2)) / 65535, rtol=1e-5)


def test_tar_reads_members_in_place(tmp_path):
  for shard, values in enumerate([(10, 20, 30), (40, 50)]):
    members = {}
    for value in values:
      members |= {
        f"d/{value}.jpg": jpeg(value),
        f"d/{value}.cls": str(value // 10).encode(),
        f"d/{value}.json": b"{}",
      }
    write_tar(tmp_path / f"s-{shard:03d}.tar", members)
  for pattern in ("s-*.tar", "s-{000..001}.tar"):
    source = open_source(f"tar:{tmp_path}/{pattern}", cache_dir=str(tmp_path / "cache"))
    assert source.size == 5 and source.labels.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(colours(source), [10, 20, 30, 40, 50], atol=3)
    assert source.example_name(3) == "s-001.tar/d/40.jpg"
  assert len(os.listdir(tmp_path / "cache")) == 2
  with pytest.raises(FileNotFoundError, match="1 of 3 shards are missing"):
    open_source(f"tar:{tmp_path}/s-{{000..002}}.tar")
  with pytest.raises(FileNotFoundError, match="no file matches"):
    open_source(f"tar:{tmp_path}/t-*.tar")


def test_tar_index_follows_the_shard(tmp_path):
  cache = str(tmp_path / "cache")
  write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(10), "1.jpg": jpeg(20)})
  before = open_source(f"tar:{tmp_path}/a.tar", cache_dir=cache)
  write_tar(
    tmp_path / "a.tar", {"0.jpg": jpeg(10), "1.jpg": jpeg(20), "2.jpg": jpeg(30), "3.jpg": jpeg(1)}
  )
  after = open_source(f"tar:{tmp_path}/a.tar", cache_dir=cache)
  assert (before.size, after.size) == (2, 4) and after.labels is None
  assert "size was 2, is 4" in source_change(before.fingerprint, after.fingerprint)
  for stored in (tmp_path / "cache").iterdir():
    stored.write_bytes(b"damaged")
  assert open_source(f"tar:{tmp_path}/a.tar", cache_dir=cache).size == 4


def test_tar_errors(tmp_path):
  cache = str(tmp_path / "cache")
  write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(10), "0.cls": b"x"})
  with pytest.raises(ValueError, match="not a class number"):
    open_source(f"tar:{tmp_path}/a.tar", cache_dir=cache)
  write_tar(tmp_path / "b.tar", {"0.jpg": jpeg(10), "0.cls": b"1", "1.jpg": jpeg(10)})
  with pytest.raises(ValueError, match="1 of 2 images have no .cls"):
    open_source(f"tar:{tmp_path}/b.tar", cache_dir=cache)
  write_tar(tmp_path / "c.tar", {"0.jpg": jpeg(10, (200, 200)), "1.jpg": jpeg(20, (200, 200))})
  whole = (tmp_path / "c.tar").read_bytes()
  with tarfile.open(tmp_path / "c.tar") as shard:
    last = shard.getmembers()[-1]
  (tmp_path / "c.tar").write_bytes(whole[: last.offset_data + 100])
  with pytest.raises(ValueError, match="c.tar (is cut off|cannot be indexed)"):
    open_source(f"tar:{tmp_path}/c.tar", cache_dir=cache)
  write_tar(tmp_path / "d.tar", {"0.txt": b"x"})
  with pytest.raises(ValueError, match="no image in 1 shards"):
    open_source(f"tar:{tmp_path}/d.tar", cache_dir=cache)


WRITE_TFDS = """
import sys, io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import gcs_utils

gcs_utils._is_gcs_disabled = True

class Tiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    features = tfds.features.FeaturesDict({
      "image": tfds.features.Image(shape=(None, None, 3)),
      "label": tfds.features.ClassLabel(num_classes=10)})
    return tfds.core.DatasetInfo(builder=self, features=features)
  def _split_generators(self, dl_manager):
    return {"train": self._examples(range(7)), "test": self._examples(range(7, 10))}
  def _generate_examples(self):
    pass
  def _examples(self, values):
    for value in values:
      yield value, {"image": np.full((9, 8, 3), 20 * value, np.uint8), "label": value}

for form in ("array_record", "tfrecord"):
  builder = Tiny(data_dir=f"{sys.argv[1]}/{form}", file_format=form)
  builder.download_and_prepare()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A small set in both formats of TFDS, written by TFDS itself in a process of its own."""
  place = tmp_path_factory.mktemp("tfds")
  (place / "tiny.py").write_text(WRITE_TFDS)
  environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "NO_GCE_CHECK": "true"}
  done = subprocess.run(
    [sys.executable, str(place / "tiny.py"), str(place)],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return place


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_tfds_is_read_at_random_places(prepared, tmp_path, form, caplog):
  source = f"tfds:tiny?data_dir={prepared}/{form}"
  train = open_source(source, cache_dir=str(tmp_path))
  assert ("TFRecord" in caplog.text) == (form == "tfrecord")
  assert (train.size, open_source(source, "test", cache_dir=str(tmp_path)).size) == (7, 3)
  with examples(train, batch_size=7) as stream:
    batch = next(stream)
  assert sorted(batch["label"]) == list(range(7))
  assert (batch["image"].mean((1, 2, 3)) == 20 * batch["label"]).all()
  part = open_source(source, "train[2:5]", cache_dir=str(tmp_path))
  with examples(part, batch_size=3) as stream:
    assert (next(stream)["label"] == batch["label"][2:5]).all()
  with batches(train, batch_size=4, steps=9) as stream:
    for batch in stream:
      assert (batch["image"].mean((1, 2, 3)) == 20 * batch["label"]).all()


def test_tfds_errors(prepared):
  with pytest.raises(FileNotFoundError, match="tfds build tinny --file_format=array_record"):
    open_source(f"tfds:tinny?data_dir={prepared}/tfrecord")
  with pytest.raises(ValueError, match="unknown split 'trian'.*Did you mean 'train'"):
    open_source(f"tfds:tiny?data_dir={prepared}/array_record", "trian")
  with pytest.raises(ValueError, match="unknown label feature 'lab'"):
    open_source(f"tfds:tiny?data_dir={prepared}/array_record&label=lab")


def test_cut_tfrecord_is_named(prepared, tmp_path):
  import shutil

  shutil.copytree(prepared / "tfrecord", tmp_path / "cut")
  (file,) = (tmp_path / "cut").rglob("*train.tfrecord*")
  file.write_bytes(file.read_bytes()[:-5])
  with pytest.raises(ValueError, match="is cut off or damaged at byte"):
    open_source(f"tfds:tiny?data_dir={tmp_path}/cut", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
  ("split", "bounds"),
  [
    ("train", (0, 10)),
    ("train[:90%]", (0, 9)),
    ("train[90%:]", (9, 10)),
    ("train[2:5]", (2, 5)),
    ("train[-3:]", (7, 10)),
    ("train[:33%]", (0, 3)),
    ("train[5:500]", (5, 10)),
  ],
)
def test_split_bounds(split, bounds):
  assert split_bounds(split, 10) == bounds


@pytest.mark.parametrize(
  ("source", "split", "error", "words"),
  [
    ("digit", "train", ValueError, "unknown source 'digit'.*Did you mean 'digits'"),
    ("folder:", "train", ValueError, "says no place"),
    ("folder:/no/such/place", "train", FileNotFoundError, "there is no such folder"),
    ("npz:/no/such.npz", "train", FileNotFoundError, "there is no such file"),
    ("digits", "val", ValueError, "unknown split 'val'"),
    ("digits", "train[5:5]", ValueError, "is empty: there are 1437"),
    ("digits", "train[:90%", ValueError, "is not of the form"),
    (
      {"image": np.zeros((4, 8, 8, 3)), "label": [1, 2]},
      "train",
      ValueError,
      "but there are 4 images",
    ),
    ({"image": np.zeros((4, 8, 8, 3)), "label": [0.5] * 4}, "train", ValueError, "not integers"),
    ({"image": np.zeros((4, 8, 8, 5))}, "train", ValueError, "set channels=5"),
    ({"images": np.zeros((4, 8, 8, 3))}, "train", ValueError, "Did you mean 'images'"),
    ({"image": np.zeros((4, 8))}, "train", ValueError, r"\[N h w c\]"),
  ],
)
def test_errors_say_what_is_wrong(source, split, error, words):
  with pytest.raises(error, match=words) as raised:
    open_source(source, split)
  assert "\n" not in str(raised.value)


def test_folders_without_images(tmp_path):
  with pytest.raises(ValueError, match=r"no image was found \(looked for \*.jpg"):
    open_source(f"folder:{tmp_path}")
  for i in range(3):
    (tmp_path / f"{i}.jpg").write_bytes(jpeg(9)[: 100 * i])
  with pytest.raises(ValueError, match="none of the 3 images can be read"):
    open_source(f"folder:{tmp_path}")


def test_moments_are_those_of_all_pixels(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (9, 6, 7, 3), dtype=np.uint8)
  for i, one in enumerate(image):
    Image.fromarray(one).save(tmp_path / f"{i}.png")
  (tmp_path / "z.png").write_bytes(b"")
  for source in (open_source({"image": image}), open_source(f"folder:{tmp_path}")):
    mean, deviation = moments(source)
    np.testing.assert_allclose(mean, image.mean((0, 1, 2)) / 255, rtol=1e-5)
    np.testing.assert_allclose(deviation, image.std((0, 1, 2)) / 255, rtol=1e-5)


def test_fingerprints_tell_what_changed(folder):
  before = open_source(f"folder:{folder}").fingerprint
  assert source_change(before, open_source(f"folder:{folder}").fingerprint) is None
  (folder / "train/dog/30.jpg").write_bytes(jpeg(31, (40, 40)))
  assert "content differs" in source_change(before, open_source(f"folder:{folder}").fingerprint)
  (folder / "train/dog/31.jpg").write_bytes(jpeg(31))
  assert "size was 3, is 4" in source_change(before, open_source(f"folder:{folder}").fingerprint)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_wide_integers_are_refused(dtype):
  with pytest.raises(ValueError, match="make them uint8, uint16, or floats"):
    open_source({"image": np.zeros((4, 8, 8, 3), dtype)})
