"""Signs of collapse that a step can afford: of features, and of assignments to prototypes.

`features` and `assignments` return scalar float32 metrics for the step's own; nothing flows back
through them. `warnings` reads them in what a run has logged.
"""

from collections.abc import Callable, Mapping, Sequence

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
  """Use of prototypes by probabilities [… k] -> {"teacher_entropy", "prototype_use", "prototypes"}.

  "teacher_entropy" is the mean entropy of an assignment over log k: 1 is uniform (nothing is
  told apart), 0 one-hot. "prototype_use" is exp of the entropy of the mean assignment over k: 1
  where all prototypes are used alike, 1/k where one is. "prototypes" is the same times k: how many
  are in use.
  """
  p = _rows(p)
  k = p.shape[-1]
  scale = jnp.log(float(max(k, 2)))
  used = jnp.exp(_entropy(p.mean(0)))
  return {
    "teacher_entropy": _entropy(p).mean() / scale,
    "prototype_use": used / k,
    "prototypes": used,
  }


# Metric, from which value on it is a sign (and on which side), what is said. A constant direction
# that all features share, as class tokens have at the start, makes `std` small, but not this small.
RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
  (
    "std", lambda x: x < 0.02,
    "the features of all examples are nearly the same (std near 0): look at the stop-gradient, the"
    " predictor, the teacher's momentum, a rate that is too high",
  ),
  (
    "rank", lambda x: x < 1.5,
    "the features vary along one direction only (rank near 1): look at the rate, batch norm in the"
    " projector, the weight of what spreads features",
  ),
  (
    "prototypes", lambda x: x < 1.5,
    "one prototype takes all examples: centre or balance the teacher's scores, or raise its"
    " temperature",
  ),
  (
    "teacher_entropy", lambda x: x > 0.99,
    "the teacher is uniform over the prototypes and says nothing: lower its temperature or weaken"
    " its centre",
  ),
)  # fmt: skip


def warnings(history: Sequence[Mapping[str, float]], chance: float = 0.0) -> list[str]:
  """The classic failures that all of the logged metrics agree on, a line with a hint for each.

  history: what a run logged, {"train/loss": …, "train/std": …}; a failure that one entry does not
  show, or does not measure, is none. chance: the loss of a method that tells nothing apart
  (`Method.chance`); 0 is unknown.
  """

  def always(name, sign):
    values = [entry.get(f"train/{name}") for entry in history]
    return bool(values) and all(value is not None and sign(value) for value in values)

  found = [f"collapse? {text}" for name, sign, text in RULES if always(name, sign)]
  if chance and always("loss", lambda loss: abs(loss - chance) < 0.01 * abs(chance)):
    found.append(
      f"collapse? the loss stays at {chance:.3f}, where nothing is told apart: look at the rate,"
      " the temperature, views that share too little"
    )
  return found


def _entropy(p: jax.Array) -> jax.Array:
  return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0.0), axis=-1)


def _rows(x: jax.Array) -> jax.Array:
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  return x.reshape(-1, x.shape[-1])
