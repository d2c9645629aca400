"""Cases of losses of pairs from two modalities."""

import numpy as np

from loss_cases.case import Case
from ssljax import losses


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def pairs(rng, b):
  """Texts near their images."""
  image = rng.normal(size=(b, 5))
  return {"image": image, "text": image + 0.7 * rng.normal(size=(b, 5))}


def with_scale(rng, b):
  return pairs(rng, b) | {"scale": np.array(6.5)}


def with_t_and_b(rng, b):
  return pairs(rng, b) | {"t": np.array(7.0), "b": np.array(-4.0)}


def weighted(make):
  """Examples that count differently as negatives."""
  return lambda rng, b: make(rng, b) | {"weights": rng.uniform(0.5, 2.0, b)}


def counts(weights, b):
  """How much column j counts in row i: [b b]; a positive always counts once."""
  return np.where(np.eye(b, dtype=bool), 1.0, np.ones(b) if weights is None else weights)


def kept(loss, weights):
  return loss if weights is None else np.where(weights > 0, loss, 0.0)


def clip(image, text, scale, weights=None):
  shares = np.exp(scale * unit(image) @ unit(text).T)
  own, count = np.diag(shares), counts(weights, len(image))
  rows, columns = (count * shares).sum(1), (count.T * shares).sum(0)
  return kept(-0.5 * (np.log(own / rows) + np.log(own / columns)), weights)


def siglip(image, text, t, b, weights=None):
  logits = t * unit(image) @ unit(text).T + b
  signs = 2 * np.eye(len(image)) - 1
  terms = np.log1p(np.exp(-signs * logits))
  return kept((counts(weights, len(image)) * terms).sum(1), weights)


def branches(rng, b):
  """Two branches with 5 patches of 3 values, one place hidden in the first, three in the other."""
  arrays = {name: rng.normal(size=(b, 4)) for name in ("z_weak", "z_strong")}
  for name in ("reconstruction_weak", "reconstruction_strong", "patches"):
    arrays[name] = rng.normal(size=(b, 5, 3))
  for name, count in (("hidden_weak", 1), ("hidden_strong", 3)):
    arrays[name] = rng.permuted(np.tile(np.arange(5) < count, (b, 1)), axis=1)
  return arrays


def masked_contrast(
  z_weak,
  z_strong,
  reconstruction_weak,
  reconstruction_strong,
  patches,
  hidden_weak,
  hidden_strong,
):
  b = len(z_weak)
  z = unit(np.concatenate([z_weak, z_strong]))
  shares = np.exp(z @ z.T / 0.2)
  np.fill_diagonal(shares, 0.0)
  loss = np.zeros(b)
  for i in range(b):
    for anchor, positive in ((i, i + b), (i + b, i)):
      loss[i] -= 0.5 * np.log(shares[anchor, positive] / shares[anchor].sum())
    for made, hidden in (
      (reconstruction_weak, hidden_weak),
      (reconstruction_strong, hidden_strong),
    ):
      loss[i] += 0.7 * np.abs(made[i] - patches[i])[hidden[i]].mean()
  return loss


CASES = [
  Case(
    "masked_contrast",
    branches,
    lambda **x: losses.masked_contrast(**x, temperature=0.2, reconstruction_weight=0.7),
    masked_contrast,
  ),
  Case(
    "clip_loss",
    with_scale,
    losses.clip_loss,
    clip,
    whole=("scale",),
  ),
  Case(
    "clip_loss/weights",
    weighted(pairs),
    lambda image, text, weights: losses.clip_loss(image, text, 6.5, weights=weights),
    lambda image, text, weights: clip(image, text, 6.5, weights),
  ),
  Case(
    "siglip_loss/weights",
    weighted(with_t_and_b),
    losses.siglip_loss,
    siglip,
    whole=("t", "b"),
  ),
  Case(
    "siglip_loss",
    with_t_and_b,
    losses.siglip_loss,
    siglip,
    whole=("t", "b"),
  ),
]
