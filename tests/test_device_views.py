"""Views as JAX functions: against the host's with the same parameters, Pillow and plain Python."""

import colorsys
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssljax import views
from ssljax.data import masking as host_masking
from ssljax.data import views as host
from ssljax.views import colour, crop, masking

RECIPES = [name for name in views.__all__ if name.islower()]


def photo(height, width, seed=0):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def torchvision_crop(height, width, u, scale, ratio):
  """RandomResizedCrop.get_params as a loop over the same uniforms: top, left, height, width."""
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for area_u, ratio_u, top_u, left_u in zip(*u):
    target = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
    aspect = math.exp(low + (high - low) * ratio_u)
    w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w
  w, h = width, height
  if width / height < min(ratio):
    h = round(width / min(ratio))
  elif width / height > max(ratio):
    w = round(height * max(ratio))
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("name", RECIPES)
def test_the_config_is_the_same_on_host_and_device(name):
  ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (views, host))
  assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


@pytest.mark.parametrize("height, width", [(32, 32), (300, 500), (20, 400), (400, 20), (7, 5)])
def test_crop_geometry_is_torchvisions(height, width):
  scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
  u = np.random.default_rng(0).random((60, 4, 10), dtype=np.float32)
  window = jax.vmap(lambda u: crop.inception_window(height, width, u, scale, ratio))
  ours = np.stack(jax.jit(window)(u), 1)
  theirs = [torchvision_crop(height, width, one.astype(float), scale, ratio) for one in u]
  np.testing.assert_array_equal(ours, theirs)


def test_crops_cover_the_scale_and_the_image():
  u = jax.random.uniform(jax.random.key(0), (4000, 4, 10))
  window = jax.vmap(lambda u: crop.inception_window(200, 300, u, (0.2, 1.0), (3 / 4, 4 / 3)))
  y, x, h, w = map(np.asarray, jax.jit(window)(u))
  assert (y + h).max() == 200 and (x + w).max() == 300 and y.min() == x.min() == 0
  area = h * w / 60000
  assert 0.19 < area.min() < 0.21 and area.max() > 0.8
  assert abs(np.log(w / h)[area < 0.5].mean()) < 0.02  # larger ones do not fit at every ratio
  assert 3 / 4 - 0.02 < (w / h).min() and (w / h).max() < 4 / 3 + 0.02


@pytest.mark.parametrize("size", [(24, 24), (80, 112)])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_resized_crop_is_pillows(size, method):
  """Within 1e-3 of 255 grey levels, the error of Pillow's float kernel; shrunk and enlarged."""
  image = photo(60, 75)
  y, x, h, w = 7, 5, 50, 61
  window = tuple(map(jnp.float32, (y, x, h, w)))
  ours = jax.jit(lambda image: crop.resize_window(image, window, size, method))(np.float32(image))
  filters = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}
  for channel in range(3):
    part = Image.fromarray(np.float32(image[y : y + h, x : x + w, channel]))
    theirs = np.asarray(part.resize(size[::-1], filters[method]))
    np.testing.assert_allclose(ours[..., channel], theirs, atol=1e-3)


def test_a_mirrored_crop_is_the_mirror_image():
  image, window = np.float32(photo(20, 20)), tuple(map(jnp.float32, (2, 3, 15, 16)))
  make = jax.jit(lambda flip: crop.resize_window(image, window, (12, 14), "bicubic", flip))
  np.testing.assert_allclose(make(True), make(False)[:, ::-1], atol=1e-4)


PAIRS = {
  "crop_flip": dict(size=(24, 32)),
  "crop_flip bilinear": dict(size=(24, 32), method="bilinear", flip=False, scale=(0.5, 1.0)),
  "crop_flip jitter": dict(size=(24, 32), jitter=(0.4, 0.4, 0.4, 0.1)),
  "crop_flip strong": dict(
    size=(24, 32), jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.5, gray=0.5, blur=0.5
  ),
  "two_views": dict(size=(32, 32), solarize=(0.5, 0.2), gray=(0.5, 0.5)),
  "two_views byol": dict(
    size=(40, 30), jitter=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2), blur_kernel=9
  ),
  "multi_crop": dict(size=(32, 40), local_size=(16, 20), local_views=3, gray=(0.5, 0.5, 0.5)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_apply_is_the_hosts(case):
  """The host's parameters and both `apply`s: within one grey level, half of it the host's own
  rounding."""
  tf = pytest.importorskip("tensorflow")
  name = case.split()[0]
  theirs, ours = getattr(host, name)(**PAIRS[case]), getattr(views, name)(**PAIRS[case])
  theirs = theirs.each() if hasattr(theirs, "each") else [theirs]
  apply = jax.jit(ours.apply)
  for number in range(8):
    image = photo(45, 60, number)
    wanted, drawn = [], []
    for n, view in enumerate(theirs):
      parameters = view.draw(tf.constant([7, 10 * number + n], tf.int64))
      wanted.append(view.apply(tf.constant(image), parameters).numpy())
      drawn.append({k: jnp.asarray(v.numpy()) for k, v in parameters.items()})
    leaves = apply(image, tuple(drawn)).values()
    made = [one for leaf in leaves for one in (leaf if leaf.ndim == 4 else leaf[None])]
    for one, view in zip(made, wanted, strict=True):
      assert one.dtype == np.float32
      assert np.abs(one * 255 - view).max() < 1


def test_colour_steps_against_plain_statements():
  image = np.float32(photo(6, 7)) / 255
  grey = image @ np.float32([0.299, 0.587, 0.114])
  factors, clip = jnp.array([1.3, 0.7, 1.4, 0.15]), lambda x: np.clip(x, 0, 1)

  def jitter(which, order=(0, 1, 2, 3)):
    strengths = [0.4 if i in which else 0.0 for i in range(4)]
    return jax.jit(lambda x: colour.jitter(x, factors, jnp.array(order), strengths))(image)

  bright = clip(1.3 * image)
  np.testing.assert_allclose(jitter([0]), bright, atol=1e-6)
  contrast = clip(0.7 * image + 0.3 * grey.mean())
  np.testing.assert_allclose(jitter([1]), contrast, atol=1e-6)
  np.testing.assert_allclose(jitter([2]), clip(1.4 * image - 0.4 * grey[..., None]), atol=1e-6)
  turned = np.empty_like(image)
  for place in np.ndindex(image.shape[:2]):
    h, s, v = colorsys.rgb_to_hsv(*map(float, image[place]))
    turned[place] = colorsys.hsv_to_rgb((h + 0.15) % 1, s, v)
  np.testing.assert_allclose(jitter([3]), turned, atol=1e-5)
  np.testing.assert_allclose(jitter([0, 1], (1, 3, 0, 2)), clip(1.3 * contrast), atol=1e-6)
  np.testing.assert_array_equal(
    colour.solarise(jnp.array([0.0, 0.4, 0.5, 1.0])), np.float32([0.0, 0.4, 0.5, 0.0])
  )


@pytest.mark.parametrize("kernel, sigma", [(3, 0.1), (9, 1.3), (23, 2.0)])
def test_blur_is_the_convolution_with_a_mirrored_border(kernel, sigma):
  image = np.float32(photo(30, 26)) / 255
  side = kernel // 2
  weight = np.exp(-0.5 * (np.arange(-side, side + 1) / sigma) ** 2)
  weight /= weight.sum()
  wide = np.pad(image, ((side, side), (side, side), (0, 0)), mode="reflect")
  rows = sum(w * wide[i : i + 30] for i, w in enumerate(weight))
  wanted = sum(w * rows[:, i : i + 26] for i, w in enumerate(weight))
  blur = jax.jit(lambda wanted: colour.gaussian_blur(image, jnp.float32(sigma), kernel, wanted))
  np.testing.assert_allclose(blur(True), wanted, atol=1e-6)
  np.testing.assert_allclose(blur(False), image, atol=1e-7)


def test_what_is_drawn_has_the_frequencies_of_the_recipe():
  recipe = views.two_views(jitter=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2))
  first, second = jax.jit(jax.vmap(recipe.draw))(jax.random.split(jax.random.key(0), 4000))
  share = lambda drawn: {k: np.mean(v) for k, v in drawn.items() if v.dtype == bool}  # noqa: E731
  wanted = dict(flip=0.5, jitter=0.8, gray=0.2)
  for drawn, own in ((first, dict(blur=1.0, solarize=0.0)), (second, dict(blur=0.1, solarize=0.2))):
    for name, value in share(drawn).items():
      assert abs(value - (wanted | own)[name]) < 0.03, name
    low, high = np.min(drawn["factors"], 0), np.max(drawn["factors"], 0)
    np.testing.assert_allclose(low, [0.6, 0.6, 0.8, -0.1], atol=0.01)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.2, 0.1], atol=0.01)
    assert 0.1 <= drawn["sigma"].min() < 0.11 and 1.99 < drawn["sigma"].max() <= 2
    orders, counts = np.unique(np.asarray(drawn["order"]), axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 100
  # The two views of an example are drawn apart.
  for name in ("crop", "factors", "sigma"):
    pair = np.corrcoef(np.ravel(first[name]), np.ravel(second[name]))
    assert abs(pair[0, 1]) < 0.05 if name != "factors" else (first[name] != second[name]).any()


def test_multi_crop_draws_dinos_recipe():
  """Global views cover 40 % of the picture or more, local ones at most that; every view has draws
  of its own, with the probabilities of its kind."""
  recipe = views.multi_crop()
  drawn = jax.jit(jax.vmap(recipe.draw))(jax.random.split(jax.random.key(0), 4000))
  assert len(drawn) == 10
  scales = [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 8
  wanted = dict(blur=[1.0, 0.1] + 8 * [0.5], solarize=[0.0, 0.2] + 8 * [0.0])
  for i, (one, scale) in enumerate(zip(drawn, scales)):
    for name, shares in (
      wanted | dict(flip=10 * [0.5], jitter=10 * [0.8], gray=10 * [0.2])
    ).items():
      assert abs(np.mean(one[name]) - shares[i]) < 0.03, (i, name)
    window = lambda u, scale=scale: crop.inception_window(400, 400, u, scale, (3 / 4, 4 / 3))  # noqa: E731
    _, _, h, w = map(np.asarray, jax.jit(jax.vmap(window))(one["crop"]))
    area = h * w / 160000
    assert scale[0] * 0.98 < area.min() < scale[0] * 1.05 and area.max() < scale[1] * 1.02
  assert len({np.asarray(one["crop"]).tobytes() for one in drawn}) == 10


def test_a_view_is_a_function_of_its_key():
  recipe, image = views.two_views(size=(16, 16)), photo(20, 24)
  make = jax.jit(lambda key: recipe.apply(image, recipe.draw(key))["views"])
  one, again, other = (np.asarray(make(jax.random.key(k))) for k in (1, 1, 2))
  assert one.shape == (2, 16, 16, 3)
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).mean() > 0.01 and np.abs(one[0] - one[1]).mean() > 0.01


@pytest.mark.parametrize(
  "name, grid, arguments",
  [
    ("random", (14, 14), dict(ratio=0.75)),
    ("random", (10, 10), dict(ratio=0.9, rounding="keep_floor")),
    ("units", (12, 12), dict(unit=2, ratio=0.6)),
    ("units", (4, 6, 6), dict(unit=(1, 3, 3), ratio=0.5)),
  ],
)
def test_hidden_places_have_the_hosts_count_and_are_uniform(name, grid, arguments):
  count = getattr(host_masking, name)(grid, **arguments).count
  draw = getattr(masking, name)(grid, count, **arguments)
  hidden = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 3000)))
  assert hidden.dtype == bool and (hidden.sum(1) == count).all()
  share = count / math.prod(grid)
  assert np.abs(hidden.mean(0) - share).max() < 5 * math.sqrt(share * (1 - share) / 3000)
  if name == "units" and len(grid) == 2:
    cells = hidden.reshape(-1, 6, 2, 6, 2)
    assert (cells == cells[:, :, :1, :, :1]).all()
