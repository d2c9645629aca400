"""`digits_photo`: handwritten digits shifted, scaled and rotated onto crops of two photographs.

A person reads them at once, a linear classifier of pixels does not, because place, size and slant
vary: a set of seconds on which pre-training visibly learns something. Generated, not stored; the
same on every machine with the same JPEG decoder.
"""

import functools

import numpy as np

from ssljax.data.arrays import digits

SIZE = 24
GROUND, INK = 110, 215  # grey levels
COPIES = {"train": 8, "test": 2}


@functools.lru_cache(maxsize=1)
def photographs() -> np.ndarray:
  """scikit-learn's china and flower: uint8 [2 427 640 3]."""
  from sklearn.datasets import load_sample_images

  return np.stack(load_sample_images().images)


@functools.lru_cache(maxsize=2)
def digits_photo(name: str) -> tuple[np.ndarray, np.ndarray]:
  """A split, each digit several times, rendered once a process: uint8 [M 24 24 3], int [M]."""
  image, label = digits(name)
  rng = np.random.default_rng([2, len(name)])
  image, label = (np.tile(x, (COPIES[name],) + (1,) * (x.ndim - 1)) for x in (image, label))
  # In pieces that fit the processor's cache.
  parts = [render(image[i : i + 256], rng) for i in range(0, len(image), 256)]
  return np.concatenate(parts), label


def render(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Digits on crops of the photographs: uint8 [n 8 8 1] -> uint8 [n 24 24 3]."""
  ink = warp(image[..., 0] / np.float32(255), rng)[..., None]
  ground = backgrounds(len(image), rng)
  # One ink and one mean of the ground: varied, they were a quarter of the features' variance.
  out = ground + ink * (INK - ground)
  return np.clip(np.round(out), 0, 255).astype(np.uint8)


def warp(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Rotate (+-20 degrees), scale (14 to 20 px) and shift (+-3 px) each digit.

  [n 8 8] -> float32 [n 24 24], 0..1.
  """
  count = len(ink)
  turn = np.deg2rad(rng.uniform(-20, 20, count))
  scale = 8 / rng.uniform(14, 20, count)
  shift = rng.uniform(-3, 3, (2, count))
  y, x = (np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2)[:, None]
  shift = shift.astype(np.float32)
  y, x = y - shift[0][:, None, None], x - shift[1][:, None, None]
  cos, sin = (scale * np.cos(turn))[:, None, None], (scale * np.sin(turn))[:, None, None]
  # float32 throughout: nine million pixels are rendered.
  cos, sin = cos.astype(np.float32), sin.astype(np.float32)
  padded = np.pad(ink, ((0, 0), (2, 2), (2, 2)))
  soft = bilinear(padded, cos * y - sin * x + 5.5, sin * y + cos * x + 5.5)
  # Interpolated strokes are blurred; a steep ramp around one half makes them crisp again.
  return np.clip((soft - 0.25) / 0.35, 0, 1).astype(np.float32)


def bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Values of [N h w (c)] at real places y, x [N a b], the border repeated: [N a b (c)]."""
  rows = np.arange(len(image))[:, None, None]
  y = np.clip(y, 0, image.shape[1] - 1.001)
  x = np.clip(x, 0, image.shape[2] - 1.001)
  top, left = y.astype(int), x.astype(int)
  fy, fx = (y - top).astype(np.float32), (x - left).astype(np.float32)
  upper = image[rows, top, left] * (1 - fx) + image[rows, top, left + 1] * fx
  lower = image[rows, top + 1, left] * (1 - fx) + image[rows, top + 1, left + 1] * fx
  return upper * (1 - fy) + lower * fy


def backgrounds(count: int, rng: np.random.Generator) -> np.ndarray:
  """Square crops of 24 to 72 pixels of either photograph, shrunk to 24x24: float32 [count 24 24 3].

  A third of the colour and of the contrast are left, and nothing of the mean: what a crop looks
  like as a whole would otherwise fill the features.
  """
  photo = photographs()
  stride = rng.integers(1, 4, count)
  top = rng.integers(0, photo.shape[1] - SIZE * stride + 1)
  left = rng.integers(0, photo.shape[2] - SIZE * stride + 1)
  which = rng.integers(0, len(photo), count)
  steps = np.arange(SIZE)
  y = top[:, None] + stride[:, None] * steps
  x = left[:, None] + stride[:, None] * steps
  crop = photo[which[:, None, None], y[:, :, None], x[:, None, :]].astype(np.float32)
  grey = crop.mean(-1, keepdims=True)
  crop = grey + 0.3 * (crop - grey)
  mean = crop.mean((1, 2), keepdims=True)
  return GROUND + 0.3 * (crop - mean)
