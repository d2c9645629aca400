"""Signs of collapse against NumPy, and what they say of features that are and are not collapsed."""

import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import collapse


@pytest.mark.parametrize("shape", [(64, 8), (6, 32), (4, 16, 8)])
def test_rank_is_the_participation_ratio_of_the_covariance(shape):
  x = np.random.default_rng(0).normal(size=shape) * np.geomspace(1, 10, shape[-1])
  rows = x.reshape(-1, shape[-1])
  values = np.linalg.eigvalsh(np.cov(rows.T))
  found = collapse.features(jnp.asarray(x))
  np.testing.assert_allclose(found["rank"], values.sum() ** 2 / (values**2).sum(), rtol=1e-4)
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  np.testing.assert_allclose(found["std"], unit.std(0).mean() * shape[-1] ** 0.5, rtol=1e-5)


def test_a_point_a_line_and_a_sphere_differ():
  rng = np.random.default_rng(1)
  point, line, sphere = (
    np.ones((512, 16)),
    rng.normal(size=(512, 1)) * np.ones(16),
    rng.normal(size=(512, 16)),
  )
  assert collapse.features(jnp.asarray(point)) == {"std": 0, "rank": 1}
  np.testing.assert_allclose(collapse.features(jnp.asarray(line))["rank"], 1, rtol=1e-5)
  found = collapse.features(jnp.asarray(sphere))
  assert found["rank"] > 14 and 0.9 < found["std"] < 1.01


def test_large_and_small_features_have_the_rank_of_their_directions():
  x = np.random.default_rng(2).normal(size=(64, 8)).astype(np.float32)
  ranks = [float(collapse.features(jnp.asarray(x * s))["rank"]) for s in (1e-12, 1.0, 1e15)]
  np.testing.assert_allclose(ranks, ranks[1], rtol=1e-4)


def test_assignments_to_one_to_all_and_to_each():
  k = 8
  uniform, one, each = np.full((16, k), 1 / k), np.eye(k)[[3] * 16], np.eye(k)[np.arange(16) % k]
  for p, entropy, use in ((uniform, 1, 1), (one, 0, 1 / k), (each, 0, 1)):
    found = collapse.assignments(jnp.asarray(p))
    np.testing.assert_allclose(found["teacher_entropy"], entropy, atol=1e-6)
    np.testing.assert_allclose(found["prototype_use"], use, rtol=1e-5)
