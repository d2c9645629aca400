"""Colour operations and recipes of several views against plain NumPy statements."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from ssljax.data import colour, order, views
from ssljax.data.pipeline import batches, examples
from ssljax.data.sources import open_source

tf = pytest.importorskip("tensorflow")

LUMA = np.float64([0.299, 0.587, 0.114])
BYOL = dict(jitter=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2))


def picture(height=12, width=15, channels=3, seed=0):
  """A picture [h w c] on the 0…1 scale, with all colours."""
  return np.random.default_rng(seed).random((height, width, channels)).astype(np.float32)


def plain_jitter(image, factors, order):
  """Brightness, contrast, saturation, hue, one after the other, pixel by pixel in float64."""

  def blend(x, other, weight):
    return np.clip(weight * x + (1 - weight) * other, 0, 1)

  def turned(x):
    hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)])
    hsv[:, 0] = (hsv[:, 0] + factors[3]) % 1
    return np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv]).reshape(x.shape)

  steps = [
    lambda x: blend(x, 0, factors[0]),
    lambda x: blend(x, (x @ LUMA).mean(), factors[1]),
    lambda x: blend(x, (x @ LUMA)[..., None], factors[2]),
    turned,
  ]
  image = np.float64(image)
  for step in order:
    image = steps[step](image)
  return image


def plain_blur(image, sigma, kernel):
  """A weighted sum of shifted pictures, the border mirrored without repeating the last pixel."""
  side = kernel // 2
  offsets = np.arange(-side, side + 1)
  weight = np.exp(-(offsets**2) / (2 * sigma**2))
  weight /= weight.sum()
  wide = np.pad(np.float64(image), [(side, side), (side, side), (0, 0)], mode="reflect")
  h, w = image.shape[:2]
  out = np.zeros(image.shape)
  for i, a in enumerate(weight):
    for j, b in enumerate(weight):
      out += a * b * wide[i : i + h, j : j + w]
  return out


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_jitter_is_torchvisions_in_the_order_drawn(order):
  image, factors = picture(), [1.3, 0.6, 1.5, 0.13]
  ours = colour.jitter(tf.constant(image), factors, tf.constant(order)).numpy()
  np.testing.assert_allclose(ours, plain_jitter(image, factors, order), atol=2e-5)
  other = plain_jitter(image, factors, (1, 3, 0, 2))
  assert np.abs(ours - other).max() > 1e-2  # the order matters


@pytest.mark.parametrize(("sigma", "kernel"), [(0.1, 3), (0.7, 5), (2.0, 23), (1.3, 7)])
def test_blur_is_a_weighted_mean_of_neighbours(sigma, kernel):
  image = picture(14, 17, 2)
  ours = colour.gaussian_blur(tf.constant(image), tf.constant(sigma), kernel).numpy()
  np.testing.assert_allclose(ours, plain_blur(image, sigma, kernel), atol=1e-5)


def test_kernel_is_a_tenth_of_the_height_made_odd():
  assert [colour.kernel_size((h, 9)) for h in (224, 96, 32, 64, 19)] == [23, 9, 3, 7, 1]
  assert colour.kernel_size((224, 224), 13) == 13


def test_grey_and_solarise():
  image = picture()
  grey = np.repeat((image @ LUMA)[..., None], 3, -1)
  np.testing.assert_allclose(colour.grey(tf.constant(image)), grey, atol=1e-6)
  expected = np.where(image < 0.3, image, 1 - image)
  np.testing.assert_array_equal(colour.solarise(tf.constant(image), 0.3), expected)
  # Of bytes, 128 is the first that is inverted, as in Pillow.
  byte = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
  spec = colour.Colour(solarize=1.0)
  ours = colour.alter(tf.cast(byte, tf.float32), {"solarize": True}, spec, tf.uint8)
  np.testing.assert_allclose(ours, np.where(byte < 128, byte, 255 - byte.astype(int)), atol=1e-3)


def test_operations_follow_each_other_as_in_the_originals():
  """Jitter, grey, blur, solarise: each at its place, on bytes."""
  image = (picture(20, 22) * 255).astype(np.uint8)
  spec = colour.Colour((0.4, 0.4, 0.4, 0.1), 1.0, 0.5, 0.5, (0.1, 2.0), 5, 0.5, 0.4)
  drawn = {
    "jitter": True,
    "factors": tf.constant([1.2, 0.7, 1.3, 0.05]), "order": tf.constant([3, 0, 2, 1]),
    "gray": tf.constant(True), "blur": tf.constant(True), "sigma": tf.constant(1.1),
    "solarize": tf.constant(True),
  }  # fmt: skip
  ours = colour.alter(tf.constant(np.float32(image)), drawn, spec, tf.uint8).numpy()
  x = plain_jitter(image / 255, [1.2, 0.7, 1.3, 0.05], (3, 0, 2, 1))
  x = plain_blur(np.repeat((x @ LUMA)[..., None], 3, -1), 1.1, 5)
  np.testing.assert_allclose(ours, 255 * np.where(x < 0.4, x, 1 - x), atol=0.02)
  still = {key: tf.constant(False) for key in ("jitter", "gray", "blur", "solarize")}
  same = colour.alter(
    tf.constant(np.float32(image)), drawn | still, spec._replace(jitter=[0.0] * 4), tf.uint8
  )
  np.testing.assert_allclose(same, image, atol=1e-3)


def test_draws_have_their_probabilities_ranges_and_independence():
  recipe = views.two_views(
    jitter_probability=(0.8, 0.3), gray=(0.2, 0.6), blur=(0.5, 0.1), solarize=(0.0, 0.2)
  )
  keys = tf.constant(order.keys(0, np.zeros(4000), np.arange(4000), "views").view(np.int64))
  drawn = tf.vectorized_map(recipe.draw, keys)
  wanted = {
    "flip": (0.5, 0.5), "jitter": (0.8, 0.3), "gray": (0.2, 0.6), "blur": (0.5, 0.1),
    "solarize": (0.0, 0.2),
  }  # fmt: skip
  chosen = []
  for name, pair in wanted.items():
    for view, probability in zip(drawn, pair):
      found = view[name].numpy()
      assert abs(found.mean() - probability) < 4 * np.sqrt(0.25 / 4000), name
      chosen.append(found)
  varied = np.float64([c for c in chosen if c.std()])
  assert np.abs(np.corrcoef(varied) - np.eye(len(varied))).max() < 0.08
  for view in drawn:
    factors, sigma, places = (view[k].numpy() for k in ("factors", "sigma", "order"))
    low, high = [0.2, 0.2, 0.2, -0.2], [1.8, 1.8, 1.8, 0.2]
    assert (factors >= low).all() and (factors <= high).all()
    np.testing.assert_allclose(factors.mean(0), [1, 1, 1, 0], atol=0.04)
    np.testing.assert_allclose(factors.std(0), np.subtract(high, low) / 12**0.5, rtol=0.05)
    assert 0.1 <= sigma.min() and sigma.max() <= 2.0 and abs(sigma.mean() - 1.05) < 0.05
    assert (np.sort(places, 1) == np.arange(4)).all()
    counts = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 100 and counts.max() < 240
  assert (drawn[0]["crop"].numpy() != drawn[1]["crop"].numpy()).mean() > 0.99


def test_views_are_those_of_their_draws():
  """Both views are cut from the image as one view alone is, each with its own key."""
  image = (picture(40, 50) * 255).astype(np.uint8)
  source = open_source({"image": np.stack([image] * 8)})
  recipe = views.two_views(size=(20, 24), **BYOL)
  with batches(source, batch_size=4, views=recipe, seed=5, steps=4) as stream:
    for batch in stream:
      assert batch["views"].shape == (4, 2, 20, 24, 3) and batch["views"].dtype == np.uint8
  key = order.keys(5, [1], batch["index"][:1], "views").view(np.int64)[0]
  drawn = recipe.draw(tf.constant(key))
  for view, one, made in zip(recipe.each(), drawn, batch["views"][0]):
    np.testing.assert_array_equal(view.apply(tf.constant(image), one), made)
  crop = views.crop_flip(size=(20, 24), scale=(0.08, 1.0))
  plain = views.two_views(
    size=(20, 24), jitter=(0.0,) * 4, gray=(0.0, 0.0), blur=(0.0, 0.0), flip=0.5
  )
  with batches(source, batch_size=4, views=crop, steps=1) as a:
    with batches(source, batch_size=4, views=plain, steps=1) as b:
      single, pair = next(a)["image"], next(b)["views"]
  np.testing.assert_array_equal(pair[:, 0], single)  # the first view has the example's own key
  assert (pair[:, 1] != single).mean() > 0.9


def encoded(image, form="JPEG", **options):
  out = io.BytesIO()
  Image.fromarray(image).save(out, form, **options)
  return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """20 good pictures of several sizes and kinds, 4 that are damaged."""
  place = tmp_path_factory.mktemp("pairs")
  rng = np.random.default_rng(1)
  for i in range(20):
    h, w = rng.integers(24, 60, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((w, h), Image.BICUBIC))
    exif = Image.Exif()
    exif[0x0112] = 6 if i % 7 == 0 else 1
    form, more = (
      ("PNG", {}) if i % 5 == 0 else ("JPEG", dict(quality=85, subsampling=0, exif=exif.tobytes()))
    )
    (place / f"good_{i:02d}.{form.lower()}").write_bytes(encoded(smooth, form, **more))
  good = (place / "good_01.jpeg").read_bytes()
  (place / "bad_cut.jpg").write_bytes(good[: len(good) // 2])
  (place / "bad_empty.jpg").write_bytes(b"")
  (place / "bad_text.jpg").write_bytes(b"<html>404</html>" * 20)
  png = encoded(np.zeros((30, 30, 3), np.uint8), "PNG")
  (place / "bad_body.png").write_bytes(png[:60] + bytes(40) + png[100:])
  return place


PAIR = views.two_views(size=(24, 24), **BYOL)


def collect(place, steps, **options):
  source = open_source(f"folder:{place}")
  with batches(source, batch_size=8, seed=3, views=PAIR, steps=steps, **options) as stream:
    return list(stream), stream.damaged


@pytest.fixture(scope="module")
def reference(folder):
  return collect(folder, 16)


def test_damaged_images_are_replaced_by_whole_pairs(folder, reference):
  found, damaged = reference
  assert sorted(damaged) == ["bad_body.png", "bad_cut.jpg", "bad_empty.jpg", "bad_text.jpg"]
  source = open_source(f"folder:{folder}")
  names = [source.example_name(i) for i in range(source.size)]
  replaced = 0
  for step, batch in enumerate(found):
    _, _, index = order.places(step, 8, np.arange(8), source.size, 3, True)
    bad = np.array([names[i].startswith("bad") for i in index])
    replaced += bad.sum()
    assert (batch["index"][~bad] == index[~bad]).all()
    assert all(names[i].startswith("good") for i in batch["index"])
    assert batch["views"].shape == (8, 2, 24, 24, 3)
    assert batch["views"].std((2, 3, 4)).min() > 0
  assert replaced > 10


@pytest.mark.parametrize("hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_pairs_are_the_same_for_any_hosts(folder, reference, hosts):
  for host in np.arange(8).reshape(-1, hosts).T:
    for mine, whole in zip(collect(folder, 16, rows=host)[0], reference[0]):
      for key in whole:
        np.testing.assert_array_equal(mine[key], whole[key][host], err_msg=key)


def test_pairs_are_the_same_from_any_start(folder, reference):
  for again, first in zip(collect(folder, 5, start_step=11)[0], reference[0][11:]):
    for key in first:
      np.testing.assert_array_equal(again[key], first[key], err_msg=key)


def test_a_pass_in_order_marks_damaged_pairs(folder):
  source = open_source(f"folder:{folder}")
  with examples(source, batch_size=4, views=PAIR) as stream:
    found = list(stream)
  valid, pairs = (np.concatenate([b[k] for b in found]) for k in ("valid", "views"))
  assert valid.tolist() == [False] * 4 + [True] * 20
  assert not pairs[:4].any()  # a batch without one readable image
  assert pairs[4:].std((2, 3, 4)).min() > 0


def test_one_decoding_serves_all_views(folder):
  """The part around both windows is decoded; what each view gets is what the whole would give."""
  source = open_source(f"folder:{folder}", "train")
  plain = views.two_views(size=(24, 24), scale=(0.05, 0.3), jitter=(0.0,) * 4, blur=(0.0, 0.0))
  with examples(source, batch_size=24, views=plain) as stream:
    batch = next(stream)
  checked = 0
  for row in range(4, 24):
    data = source.fetch(np.array([row]))[0]
    if data[:2] != b"\xff\xd8" or Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6:
      continue
    whole = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    key = order.keys(0, [0], [row], "views").view(np.int64)[0]
    for view, drawn, made in zip(plain.each(), plain.draw(tf.constant(key)), batch["views"][row]):
      np.testing.assert_array_equal(made, view.apply(whole, drawn))
      checked += 1
  assert checked > 20


def test_multi_crop_is_one_more_recipe():
  large, small = views.crop_flip(size=(16, 16)), views.crop_flip(size=(8, 8), scale=(0.05, 0.14))
  recipe = views.Views({"global": (large,) * 2, "local": (small,) * 3, "image": large})
  source = open_source({"image": (picture(24, 24)[None] * 255).astype(np.uint8).repeat(6, 0)})
  with batches(source, batch_size=4, views=recipe, steps=1) as stream:
    batch = next(stream)
  shapes = {key: batch[key].shape[1:] for key in recipe.leaves}
  assert shapes == {"global": (2, 16, 16, 3), "local": (3, 8, 8, 3), "image": (16, 16, 3)}
  assert shapes == recipe.shapes((24, 24, 3))
  pictures = [batch["global"][0, 0], batch["global"][0, 1], batch["image"][0]]
  assert all((a != b).any() for a, b in zip(pictures, [*pictures[1:], pictures[0]]))


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (dict(gray=(0.2,)), r"gray \(0.2,\): one probability for each of the 2 views"),
    (dict(blur=(0.5, 0.5, 0.5)), "blur .* one probability for each"),
    (dict(solarize=(0.0, 1.2)), "solarize .* one probability for each"),
    (dict(jitter=(0.8, 0.8, 0.8, 0.8)), r"hue\) at most 0.5"),
    (dict(jitter=(0.8, 0.8)), "four numbers"),
    (dict(blur_sigma=(2.0, 0.1)), "blur_sigma"),
    (dict(blur_kernel=4), "blur_kernel 4: an odd number"),
    (dict(size=(16, 16)), "blur_kernel 1: an odd number .* 3 or more .* blur=.* switches it off"),
    (dict(size=(32, 32), blur_kernel=65), "below twice the view"),
    (dict(flip=1.5), "flip 1.5"),
    (dict(solarize_threshold=128.0), "solarize_threshold"),
    (dict(scale=(1.0, 0.2)), "scale"),
  ],
)
def test_errors_say_what_is_wrong(options, words):
  with pytest.raises(ValueError, match=words):
    views.two_views(**options)


GREY = dict(size=(8, 8), blur=(0.0, 0.0))


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (dict(gray=(0.0, 0.0)), "colour jitter needs RGB images, but channels is 1: set saturation"),
    (dict(jitter=(0.4, 0.4, 0.0, 0.0)), "grayscale needs RGB images.* set gray to zero"),
    (dict(jitter=(0.4, 0.4, 0.0, 0.0), gray=(0.0, 0.2)), "grayscale needs RGB"),
  ],
)
def test_colour_needs_rgb(options, words):
  source = open_source("digits", channels=1)
  with pytest.raises(ValueError, match=words):
    batches(source, batch_size=4, views=views.two_views(**GREY | options), channels=1)


def test_grey_data_may_be_brightened_blurred_and_solarised():
  source = open_source("digits", channels=1)
  recipe = views.two_views(
    size=(8, 8), scale=(1.0, 1.0), flip=0.0, jitter=(0.0, 0.4, 0.0, 0.0), gray=(0.0, 0.0),
    jitter_probability=(1.0, 0.0), blur=(1.0, 0.0), blur_kernel=3, solarize=(0.0, 1.0),
  )  # fmt: skip
  with batches(source, batch_size=16, views=recipe, channels=1, steps=1) as stream:
    batch = next(stream)
  found = batch["views"]
  assert found.shape == (16, 2, 8, 8, 1)
  place = batch["index"]
  whole = source.fetch(place).astype(int)
  np.testing.assert_array_equal(found[:, 1], np.where(whole < 128, whole, 255 - whole))
  # Brightness stays as it is on the mean, strokes are blurred.
  np.testing.assert_allclose(found[:, 0].mean((1, 2, 3)), whole.mean((1, 2, 3)), rtol=0.2)
  assert found[:, 0].std() < 0.8 * whole.std()
