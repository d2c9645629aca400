"""Cases of the tiled forms, and of the ring forms on those of the 8 devices that divide a batch."""

import math

import jax
import numpy as np

from loss_cases.case import Case
from loss_cases.image_text import (
  clip,
  counts,
  kept,
  siglip,
  unit,
  weighted,
  with_scale,
  with_t_and_b,
)
from ssljax import losses


def mesh(b):
  count = math.gcd(8, b)
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((count,), ("data",), axis_types=auto, devices=jax.devices()[:count])


def two(rng, b):
  q = rng.normal(size=(b, 5))
  return {"q": q, "k": q + 0.7 * rng.normal(size=(b, 5)), "temperature": np.array(0.3)}


def views(rng, b):
  arrays = two(rng, b)
  return {"z1": arrays["q"], "z2": arrays["k"], "temperature": np.array(0.4)}


def info_nce(q, k, temperature, weights=None):
  shares = np.exp(unit(q) @ unit(k).T / temperature)
  total = (counts(weights, len(q)) * shares).sum(1)
  return kept(-np.log(np.diag(shares) / total), weights)


def nt_xent(z1, z2, temperature):
  b = len(z1)
  z = unit(np.concatenate([z1, z2]))
  shares = np.exp(z @ z.T / temperature)
  np.fill_diagonal(shares, 0.0)
  partner = (np.arange(2 * b) + b) % (2 * b)
  each = -np.log(shares[np.arange(2 * b), partner] / shares.sum(1))
  return (each[:b] + each[b:]) / 2


def ring(loss, **options):
  """The loss on the mesh of its batch."""

  def call(**arrays):
    b = max(x.shape for x in arrays.values())[0]
    return loss(**arrays, axis="data", mesh=mesh(b), **options)

  return call


T = ("temperature",)
CASES = [
  Case("info_nce_tiled", two, lambda **x: losses.info_nce_tiled(**x, tile=3), info_nce, whole=T),
  Case("nt_xent_tiled", views, lambda **x: losses.nt_xent_tiled(**x, tile=3), nt_xent, whole=T),
  Case(
    "clip_tiled", with_scale, lambda **x: losses.clip_tiled(**x, tile=5), clip, whole=("scale",)
  ),
  Case(
    "siglip_tiled",
    with_t_and_b,
    lambda **x: losses.siglip_tiled(**x, tile=3),
    siglip,
    whole=("t", "b"),
  ),
  Case(
    "info_nce_tiled/weights",
    weighted(two),
    lambda **x: losses.info_nce_tiled(**x, tile=4),
    info_nce,
    whole=T,
    fixed=("weights",),
  ),
  Case(
    "siglip_ring/weights",
    weighted(with_t_and_b),
    ring(losses.siglip_ring, tile=2),
    siglip,
    whole=("t", "b"),
    fixed=("weights",),
  ),
  Case("info_nce_ring", two, ring(losses.info_nce_ring), info_nce, whole=T),
  Case("info_nce_ring/tiles", two, ring(losses.info_nce_ring, tile=2), info_nce, whole=T),
  Case("nt_xent_ring", views, ring(losses.nt_xent_ring), nt_xent, whole=T),
  Case("clip_ring", with_scale, ring(losses.clip_ring), clip, whole=("scale",)),
  Case("siglip_ring", with_t_and_b, ring(losses.siglip_ring), siglip, whole=("t", "b")),
]
