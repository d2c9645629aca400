"""Targets made of pixels: patches, gradients, spectra."""

import numpy as np

from loss_cases.case import Case
from ssljax import targets


def patches(rng, b):
  return dict(patches=rng.normal(1, 3, (b, 4, 12)))


def statistics(patches, ddof):
  mean = patches.mean(-1, keepdims=True)
  square = ((patches - mean) ** 2).sum(-1, keepdims=True) / (patches.shape[-1] - ddof)
  return mean, np.sqrt(square + 1e-6)


def normalised(patches, ddof=1):
  mean, deviation = statistics(patches, ddof)
  return (patches - mean) / deviation


def unnormalise(pred, patches):
  mean, deviation = statistics(patches, 1)
  return pred * deviation + mean


def images(rng, b):
  return dict(x=rng.normal(size=(b, 16, 16, 3)))


def hog(x, bins=9, cell=8, window=0):
  """Pixel by pixel, over images and channels at once."""
  b, h, w, c = x.shape
  p = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
  out = np.zeros((b, h // cell, w // cell, c, bins))
  line = np.exp(-0.5 * ((np.arange(window) - (window - 1) / 2) / max(window // 2, 1)) ** 2)
  kernel = np.outer(line, line) / max(line.sum() ** 2, 1e-9)
  for i, j in np.ndindex(h, w):
    near = p[:, i : i + 3, j : j + 3]
    sides = near * np.array([1, 2, 1])[:, None, None]
    gx = sides[:, :, 0].sum(1) - sides[:, :, 2].sum(1)
    sides = near * np.array([1, 2, 1])[:, None]
    gy = sides[:, 0].sum(1) - sides[:, 2].sum(1)
    place = np.floor(np.arctan2(gx, gy) / np.pi * bins).astype(int) % bins
    vote = np.hypot(gx, gy) * (kernel[i % window, j % window] if window else 1)
    np.add.at(out[:, i // cell, j // cell], (*np.indices((b, c)), place), vote)
  return out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-12)


def tokens(x):
  """One patch after another, one value after another."""
  cells = hog(x, cell=4)
  out = []
  for i, j in np.ndindex(2, 2):
    block = cells[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
    out.append(block.transpose(0, 3, 4, 1, 2).reshape(len(x), -1))
  return np.stack(out, 1)


def spectrum(x):
  h, w = x.shape[1:3]
  rows, columns = (np.exp(-2j * np.pi * np.outer(range(n), range(n)) / n) for n in (h, w))
  f = np.einsum("uh,vw,bhwc->buvc", rows, columns, x) / np.sqrt(h * w)
  return np.stack([f.real, f.imag], -1)


def amplitudes(x):
  return np.sqrt((spectrum(x) ** 2).sum(-1))


def small(rng, b):
  return dict(x=rng.normal(size=(b, 6, 4, 2)))


CASES = [
  Case("normalised_pixels", patches, targets.normalised_pixels, normalised),
  Case(
    "normalised_pixels/biased",
    patches,
    lambda patches: targets.normalised_pixels(patches, unbiased=False),
    lambda patches: normalised(patches, 0),
  ),
  Case(
    "unnormalise",
    lambda rng, b: patches(rng, b) | dict(pred=rng.normal(size=(b, 4, 12))),
    targets.unnormalise,
    unnormalise,
  ),
  Case("hog", images, targets.hog, hog, gradient=False),
  Case(
    "hog/window",
    images,
    lambda x: targets.hog(x, bins=6, cell=4, window=8),
    lambda x: hog(x, bins=6, cell=4, window=8),
    gradient=False,
  ),
  Case(
    "hog_tokens",
    images,
    lambda x: targets.hog_tokens(x, (8, 8), cell=4),
    tokens,
    gradient=False,
  ),
  Case("spectrum", small, targets.spectrum, spectrum),
  Case("amplitudes", small, targets.amplitudes, amplitudes),
]
