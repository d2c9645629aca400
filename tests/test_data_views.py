"""Views against plain Python and Pillow statements of torchvision's operations."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssljax.data import colour, images, order, resize, views
from ssljax.data.pipeline import batches, examples
from ssljax.data.sources import open_source

tf = pytest.importorskip("tensorflow")


def photo(height, width, seed=0):
  """A smooth picture with colour: JPEG and resize errors stay small."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def encoded(image, form="JPEG", **options):
  out = io.BytesIO()
  Image.fromarray(image).save(out, form, **options)
  return out.getvalue()


def torchvision_crop(width, height, u, scale, ratio):
  """RandomResizedCrop.get_params as a loop over the same uniforms: top, left, height, width."""
  for area_u, ratio_u, top_u, left_u in zip(*u):
    target = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + (high - low) * ratio_u)
    w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w
  if width / height < min(ratio):
    w, h = width, round(width / min(ratio))
  elif width / height > max(ratio):
    w, h = round(height * max(ratio)), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
  ("scale", "ratio"),
  [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (0.5, 3.0))],
)
def test_crop_geometry_is_torchvisions(scale, ratio):
  window = tf.function(
    lambda h, w, u: tf.stack(views.inception_window(h, w, u, scale, ratio)),
    input_signature=[
      tf.TensorSpec([], tf.int32),
      tf.TensorSpec([], tf.int32),
      tf.TensorSpec([4, 10], tf.float64),
    ],
  )
  rng = np.random.default_rng(0)
  fallbacks = 0
  for height, width in [(32, 32), (300, 500), (500, 300), (20, 400), (400, 20), (7, 5), (1, 1)]:
    for _ in range(40):
      u = rng.random((4, 10))
      expected = torchvision_crop(width, height, u, scale, ratio)
      assert tuple(window(height, width, u).numpy()) == expected
      fallbacks += (height, width) in ((20, 400), (400, 20))
  assert fallbacks


def test_crop_statistics_area_and_ratio():
  view = views.crop_flip(size=(8, 8), scale=(0.2, 1.0))
  keys = np.stack([np.arange(200), np.arange(200)], 1).astype(np.int64)
  drawn = tf.map_fn(
    lambda key: tf.stack(view.window(1000, 1000, view.draw(key))),
    keys,
    fn_output_signature=tf.int32,
  )
  _, _, h, w = drawn.numpy().T
  assert 0.19 <= (h * w / 1e6).min() <= 0.25 and (h * w / 1e6).max() <= 1
  assert abs(np.log(w / h).mean()) < 0.03
  assert 3 / 4 - 0.01 < (w / h).min() and (w / h).max() < 4 / 3 + 0.01


@pytest.mark.parametrize("size", [(24, 24), (80, 112)])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_resize_is_pillows(size, method):
  """Shrinking is antialiased, enlarging has the same kernel: within Pillow's rounding."""
  image = photo(60, 75)
  ours = views.to_dtype(views.resize(tf.constant(image), size, method), tf.uint8).numpy()
  filters = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}
  theirs = np.asarray(Image.fromarray(image).resize(size[::-1], filters[method]))
  assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(50, 40), (300, 420)])
def test_numpy_resize_is_tensorflows(size, method, monkeypatch):
  """Against TensorFlow's antialiased resize; the same bits in pieces of any width; mirrored."""
  image = np.random.default_rng(0).integers(0, 256, (201, 155, 3), dtype=np.uint8)
  expected = tf.image.resize(image, size, method=method, antialias=True).numpy()
  ours = resize.resize(image, size, method, rounded=False)
  np.testing.assert_allclose(ours, expected, atol=2e-2)
  small = resize.resize(image, size, method, rounded=True)
  assert small.dtype == np.uint8
  assert np.abs(small - np.clip(expected, 0, 255)).max() <= 0.52
  mirrored = resize.resize(image, size, method, rounded=True, mirrored=True)
  assert (mirrored == small[:, ::-1]).all()
  monkeypatch.setattr(resize, "PIECE", 201 * 7)
  assert (resize.resize(image, size, method, rounded=False) == ours).all()


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(48, 56), (96, 112)])
def test_enlarging_is_the_plain_kernel(method, mirrored, size):
  """Small views go through TensorFlow, large ones through NumPy: the same values."""
  image = np.random.default_rng(0).integers(0, 256, (45, 35, 3), dtype=np.uint8)
  run = tf.function(lambda x, m: views.resize(x, size, method, rounded=True, mirrored=m))
  ours = run(tf.constant(image), tf.constant(mirrored)).numpy()
  wanted = resize.resize(image, size, method, rounded=True, mirrored=mirrored)
  assert np.abs(ours.astype(int) - wanted.astype(int)).max() <= 1
  plain = np.clip(tf.image.resize(image, size, method=method).numpy(), 0, 255)
  assert np.abs(wanted - (plain[:, ::-1] if mirrored else plain)).max() <= 0.52


def test_windows_of_a_batch_are_those_of_each_alone():
  """To the bit, at any place of a batch of any size: hosts hold other rows."""
  rng = np.random.default_rng(0)
  u = rng.random((9, 4, views.TRIES))
  # Widths so near to where they are rounded up that one unit in the last place decides.
  aspect = np.exp(math.log(0.5) + (math.log(2) - math.log(0.5)) * u[:, 1])
  u[:, 0] = (np.arange(90).reshape(9, 10) + 100.5) ** 2 / aspect / 9e4
  window = lambda one: tf.stack(views.inception_window(300, 300, one, (0.0, 1.0), (0.5, 2.0)))  # noqa: E731
  alone = np.stack([window(tf.constant(one)) for one in u])
  for start, stop in [(0, 2), (1, 4), (4, 9), (0, 9)]:
    together = tf.vectorized_map(window, tf.constant(u[start:stop]))
    np.testing.assert_array_equal(together, alone[start:stop])


def test_flip_is_half_of_the_draws_and_mirrors():
  view = views.crop_flip(size=(16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0))
  image = photo(16, 16)
  mirrored = 0
  for key in range(40):
    out = view.apply(tf.constant(image), view.draw(tf.constant([7, key], tf.int64))).numpy()
    flipped = (out == image[:, ::-1]).all()
    assert flipped or (out == image).all()
    mirrored += flipped
  assert 10 <= mirrored <= 30
  still = views.crop_flip(size=(16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
  assert (
    (still.apply(tf.constant(image), still.draw(tf.constant([7, 1], tf.int64))) == image)
    .numpy()
    .all()
  )


def test_resize_crop_is_the_central_part():
  view = views.resize_crop(size=(32, 32), resize=36)
  image = photo(72, 90)
  ours = view.apply(tf.constant(image), {}).numpy()
  whole = np.asarray(Image.fromarray(image).resize((45, 36), Image.BICUBIC))
  theirs = whole[2:34, 6:38]
  assert ours.shape == (32, 32, 3)
  assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2


def test_jitter_changes_colour_and_not_geometry():
  plain = views.crop_flip(size=(20, 20))
  loud = views.crop_flip(size=(20, 20), jitter=(0.4, 0.4, 0.4, 0.1))
  image, key = tf.constant(photo(40, 40)), tf.constant([1, 2], tf.int64)
  a, b = (v.apply(image, v.draw(key)).numpy().astype(int) for v in (plain, loud))
  assert loud.colour and not plain.colour
  assert (plain.draw(key)["crop"] == loud.draw(key)["crop"]).numpy().all()
  assert np.abs(a - b).mean() > 2
  assert np.corrcoef(a.mean(2).ravel(), b.mean(2).ravel())[0, 1] > 0.9


def test_colour_steps_against_plain_statements():
  image = np.float32(photo(6, 7)) / 255
  grey = image @ np.float32([0.299, 0.587, 0.114])
  factor = 1.32

  def jitter(which):
    factors = [factor if which == i else 1.0 for i in range(3)] + [0.0]
    return colour.jitter(tf.constant(image), factors, tf.constant([2, 0, 3, 1])).numpy()

  clip = lambda x: np.clip(x, 0, 1)  # noqa: E731
  np.testing.assert_allclose(jitter(0), clip(image * factor), atol=1e-5)
  np.testing.assert_allclose(
    jitter(1), clip(factor * image + (1 - factor) * grey.mean()), atol=1e-5
  )
  expected = clip(factor * image + (1 - factor) * grey[..., None])
  np.testing.assert_allclose(jitter(2), expected, atol=1e-5)


def folder_of(tmp_path, files):
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  return open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, turn):
  image = photo(24, 40)
  exif = Image.Exif()
  exif[images.ORIENTATION] = turn
  data = encoded(image, quality=95, exif=exif.tobytes())
  expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
  source = folder_of(tmp_path, {"a.jpg": data})
  with examples(source, batch_size=1) as stream:
    got = next(stream)["image"][0]
  assert got.shape == expected.shape
  assert np.abs(got.astype(int) - expected.astype(int)).max() <= 4


def test_cropping_while_decoding_gives_the_same_pixels(tmp_path):
  """An upright JPEG is decoded in part: same as of the whole, Pillow's pixels."""
  image = photo(64, 96)
  data = encoded(image, quality=95, subsampling=0)
  whole = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
  assert (whole.numpy() == np.asarray(Image.open(io.BytesIO(data)))).all()
  source = folder_of(tmp_path, {"a.jpg": data})
  view = views.crop_flip(size=(32, 32), scale=(0.3, 0.6))
  with batches(source, batch_size=1, views=view, steps=6) as stream:
    for epoch, batch in enumerate(stream):
      key = order.keys(0, [epoch], [0], "views").view(np.int64)[0]
      expected = view.apply(whole, view.draw(tf.constant(key))).numpy()
      assert (batch["image"][0] == expected).all()


@pytest.mark.parametrize(
  ("form", "options"),
  [("JPEG", {"quality": 95}), ("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_formats_and_channels(tmp_path, form, options, channels, mode):
  if form == "JPEG" and mode in ("RGBA", "P"):
    pytest.skip("JPEG has neither alpha nor palette")
  picture = Image.fromarray(photo(20, 30)).convert(mode)
  out = io.BytesIO()
  picture.save(out, form, **options)
  (tmp_path / f"a.{form.lower()}").write_bytes(out.getvalue())
  source = open_source(f"folder:{tmp_path}", channels=channels)
  with examples(source, batch_size=1, channels=channels) as stream:
    got = next(stream)["image"][0]
  assert not stream.damaged
  expected = np.asarray(Image.open(out).convert("L" if channels == 1 else "RGB"))
  assert got.shape == (20, 30, channels) and got.dtype == np.uint8
  assert np.abs(got.astype(int) - expected.reshape(got.shape).astype(int)).max() <= 4


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: views.crop_flip(size=(0, 4)), "size"),
    (lambda: views.crop_flip(scale=(1.0, 0.2)), "scale"),
    (lambda: views.crop_flip(method="nearest"), "there are 'bicubic'"),
    (lambda: views.crop_flip(jitter=(0.1, 0.1, 0.1)), "jitter"),
    (lambda: views.crop_flip(gray=1.5), "gray .1.5,.: one probability for each of the 1 view"),
    (lambda: views.resize_crop(size=(32, 32), resize=16), "smaller than the crop"),
    (lambda: views.multi_crop(blur=(0.5, 0.5)), "blur .*first global, second global and local"),
    (lambda: views.multi_crop(size=(64, 64)), r"local_size \(96, 96\) is larger than the global"),
    (lambda: views.multi_crop(local_views=-1), "local_views -1: 0 or more"),
    (lambda: views.multi_crop(local_size=(9, 6)), "blur_kernel 13.* twice the view .9, 6."),
  ],
)
def test_errors_say_what_is_wrong(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_colour_operations_need_rgb():
  source = open_source("digits", channels=1)
  one = views.crop_flip(size=(8, 8), jitter=(0.4, 0.4, 0.4, 0.1))
  for view in (one, views.multi_crop(size=(8, 8), local_size=(8, 8), blur_kernel=3)):
    with pytest.raises(ValueError, match="colour jitter needs RGB"):
      batches(source, batch_size=4, views=view, channels=1)
