"""LeJEPA's step against NumPy, and what its parts see."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import losses
from ssljax.methods.lejepa import lejepa
from ssljax.models.vit import vit

TINY = dict(width=16, depth=1, heads=2, patch=(4, 4))
LEAVES = ("global", "local")


def batch():
  rng = np.random.default_rng(0)
  shapes = {"global": (6, 2, 16, 16, 3), "local": (6, 3, 8, 8, 3)}
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()} | {
    "index": np.arange(6)
  }


@pytest.fixture(scope="module")
def made():
  method = lejepa(
    vit(**TINY), 6, views=LEAVES, projector=(16, 8), weight=0.3, directions=32, center="first"
  )
  params, extra = method.init(jax.random.key(0), batch())
  value, (stats, metrics) = jax.jit(method.loss)(params, extra, batch(), jax.random.key(5), 0)
  return method, params, extra, value, stats, metrics


def projected(params, pooled):
  """Two layers with batch norm over all views between them, eps 1e-5: [n d] -> [n k], and the
  mean before the norm."""
  p = jax.tree.map(np.asarray, params["projector"])
  x = pooled @ p["layer_0"]["kernel"] + p["layer_0"]["bias"]
  mean = x.mean(0)
  x = (x - mean) / np.sqrt(x.var(0) + 1e-5) * p["norm_0"]["scale"] + p["norm_0"]["bias"]
  return np.maximum(x, 0) @ p["layer_1"]["kernel"] + p["layer_1"]["bias"], mean


def test_step_in_numpy(made):
  method, params, extra, value, stats, metrics = made
  encoder = vit(**TINY)
  one = batch()
  pooled = []
  for leaf in LEAVES:
    folded = one[leaf].reshape(-1, *one[leaf].shape[2:])
    out = encoder.apply({"params": params["encoder"]}, folded)
    pooled.append(np.asarray(out["pooled"]).reshape(6, -1, 16))
  pooled = np.concatenate(pooled, axis=1)
  z, mean = projected(params, pooled.reshape(-1, 16))
  z = z.reshape(6, 5, 8)
  invariance = np.square(z[:, :2].mean(1, keepdims=True) - z).mean()
  key = jax.random.fold_in(jax.random.key(5), zlib.crc32(b"directions"))
  normal = np.asarray(jax.random.normal(key, (8, 32)))
  x = z @ (normal / np.linalg.norm(normal, axis=0))
  t = np.linspace(0, 3, 17)
  wave = t * x[..., None]
  error = np.square(np.cos(wave).mean(0) - np.exp(-(t**2) / 2)) + np.square(np.sin(wave).mean(0))
  step = np.full(17, 2 * 3 / 16)
  step[[0, -1]] /= 2
  sigreg = 6 * (error * step * np.exp(-(t**2) / 2)).sum(-1).mean()
  np.testing.assert_allclose(metrics["sigreg"], sigreg, rtol=1e-4)
  np.testing.assert_allclose(metrics["invariance"], invariance, rtol=1e-4)
  np.testing.assert_allclose(value, 0.3 * sigreg + 0.7 * invariance, rtol=1e-4)
  running = method.update(params, extra, stats, 0)["stats"]["projector"]["norm_0"]["mean"]
  np.testing.assert_allclose(running, 0.1 * mean, rtol=1e-3, atol=1e-6)


def test_gradients_flow_into_all_views_and_directions_change_with_the_step(made):
  method, params, extra, value, _, _ = made
  slope = jax.grad(lambda b: method.loss(params, extra, b, jax.random.key(5), 0)[0], allow_int=True)
  found = slope(batch())
  assert all(np.abs(found[leaf]).max((0, 2, 3, 4)).min() > 1e-8 for leaf in LEAVES)
  other, (_, metrics) = jax.jit(method.loss)(params, extra, batch(), jax.random.key(6), 0)
  assert other != value
  np.testing.assert_allclose(metrics["invariance"], made[5]["invariance"], rtol=1e-6)


def test_center_of_all_views():
  method = lejepa(vit(**TINY), 6, views=LEAVES, projector=(), weight=0.0, directions=8)
  params, extra = method.init(jax.random.key(0), batch())
  z, _ = method.embed(params, extra, batch(), jax.random.key(1), 0)
  z = jnp.concatenate([z[leaf] for leaf in LEAVES], axis=1)
  want = jnp.square(z - z.mean(1, keepdims=True)).mean()
  np.testing.assert_allclose(
    method.loss(params, extra, batch(), jax.random.key(1), 0)[0], want, rtol=1e-5
  )
  assert losses.sigreg(jnp.zeros((256, 4)), jax.random.key(0)) > 100  # what a collapse looks like


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    (dict(center="last"), "is none of all, first"),
    (dict(batch_norm="local"), "is none of global, microbatch"),
    (dict(batch_size=1), "two examples or more"),
  ],
)
def test_errors_say_what_is_wrong(settings, words):
  with pytest.raises(ValueError, match=words):
    lejepa(vit(**TINY), **dict(batch_size=6) | settings)
