"""Signs of collapse that a step can afford: of features, and of assignments to prototypes.

Each function returns scalar float32 metrics for the step's own; nothing flows back through them.
"""

import jax
import jax.numpy as jnp


def features(x: jax.Array) -> dict[str, jax.Array]:
  """Spread of features [… d] over all leading axes -> {"std": [], "rank": []}.

  "std" is the mean deviation of unit vectors' coordinates, times sqrt(d): 1 is spread over the
  sphere, 0 a point (Chen and He 2020, 2011.10566). "rank" is the effective rank of the centred
  features by their participation ratio, (Σλ)² / Σλ² of the covariance's eigenvalues λ: between 1
  and min(n - 1, d), never above the exponential of their entropy (Roy and Vetterli 2007), and
  without a decomposition, which accelerators do slowly.
  """
  x = _rows(x)
  n, d = x.shape
  length = jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  std = (x / length).std(axis=0).mean() * d**0.5
  centred = x - x.mean(0)
  # Of one magnitude: squares of squares leave float32's range early.
  centred /= jnp.maximum(jnp.abs(centred).max(), 1e-12)
  gram = centred.T @ centred if d <= n else centred @ centred.T
  square = jnp.square(gram).sum()
  rank = jnp.where(square > 0, jnp.square(jnp.trace(gram)) / jnp.maximum(square, 1e-30), 1.0)
  return {"std": std, "rank": rank}


def assignments(p: jax.Array) -> dict[str, jax.Array]:
  """Use of prototypes by probabilities [… k] -> {"teacher_entropy": [], "prototype_use": []}.

  "teacher_entropy" is the mean entropy of an assignment over log k: 1 is uniform (nothing is
  told apart), 0 one-hot. "prototype_use" is exp of the entropy of the mean assignment over k: 1
  where all prototypes are used alike, 1/k where one is.
  """
  p = _rows(p)
  k = p.shape[-1]
  scale = jnp.log(float(max(k, 2)))
  mean = p.mean(0)
  return {
    "teacher_entropy": _entropy(p).mean() / scale,
    "prototype_use": jnp.exp(_entropy(mean)) / k,
  }


def _entropy(p: jax.Array) -> jax.Array:
  return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0.0), axis=-1)


def _rows(x: jax.Array) -> jax.Array:
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  return x.reshape(-1, x.shape[-1])
