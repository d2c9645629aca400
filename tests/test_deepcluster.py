"""DeepCluster-v2: k-means against NumPy, whole steps over two epochs against their formulas, exact
resume in the middle, and what the config refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.methods import deepcluster as module
from ssljax.methods.deepcluster import deepcluster, spherical_kmeans
from ssljax.models.vit import vit
from ssljax.step import init_state, train_step

B, N, D = 6, 12, 8


def rows(count, d=5, seed=0):
  x = np.random.default_rng(seed).normal(size=(count, d)).astype(np.float32)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def kmeans(x, centroids, iterations):
  """Of rows that count; the original's loop: assign, and but for the last time move."""
  x, centroids = np.float64(x), np.float64(centroids)
  for i in range(iterations + 1):
    labels = (x @ centroids.T).argmax(1)
    if i == iterations:
      return centroids, labels
    for j in range(len(centroids)):
      if (labels == j).any():
        mean = x[labels == j].mean(0)
        centroids[j] = mean / np.linalg.norm(mean)


def first_rows(key, x, k):
  """The rows at which k-means begins: those of the k largest numbers."""
  there = (x != 0).any(1)
  return x[np.argsort(np.where(there, -jax.random.uniform(key, (len(x),)), 1.0), kind="stable")[:k]]


@pytest.mark.parametrize("part", [8192, 7])
def test_kmeans_is_that_of_the_formulas(part, monkeypatch):
  """However many rows it takes at a time; rows of zeros are no rows."""
  monkeypatch.setattr(module, "ROWS", part)
  x = np.concatenate([rows(40), np.zeros((4, 5), np.float32)])[np.r_[40:42, :40, 42:44]]
  key = jax.random.key(3)
  centroids, labels = spherical_kmeans(key, jnp.asarray(x), 4, 5)
  there = (x != 0).any(1)
  wanted, want = kmeans(x[there], first_rows(key, x, 4), 5)
  np.testing.assert_allclose(centroids, wanted, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(labels)[there], want)
  assert (np.asarray(labels)[~there] == -1).all()


def test_kmeans_gets_better_and_keeps_clusters_without_rows():
  x = rows(60, seed=1)
  found = [spherical_kmeans(jax.random.key(0), jnp.asarray(x), 5, i) for i in (1, 2, 4, 8)]
  score = [(x * np.asarray(c)[np.asarray(labels)]).sum() for c, labels in found]
  assert (np.diff(score) >= -1e-4).all() and score[-1] > score[0]
  same = jnp.asarray(np.tile(x[:1], (6, 1)))
  centroids, labels = spherical_kmeans(jax.random.key(0), same, 3, 2)
  np.testing.assert_allclose(centroids, same[:3], atol=1e-6)
  assert not np.asarray(labels).any()


def batch(number: int):
  """An epoch is two batches."""
  rng = np.random.default_rng(number % 2)
  return {
    "global": rng.normal(size=(B, 2, 8, 8, 3)).astype(np.float32),
    "local": rng.normal(size=(B, 1, 4, 4, 3)).astype(np.float32),
    "index": (np.arange(B) + B * (number % 2)).astype(np.int32),
  }


@functools.cache
def built():
  encoder = vit(width=16, depth=1, heads=2, patch=(4, 4))
  given = dict(examples=N, projector=(12, D), clusters=(4, 3, 2), iterations=3)
  return encoder, deepcluster(encoder, B, **given)


@functools.cache
def run(steps: int = 5):
  method, tx = built()[1], optax.sgd(0.1)
  step = jax.jit(functools.partial(train_step, method, tx, 1))
  states, found = [init_state(method, tx, batch(0), 0)], []
  for number in range(steps):
    state, metrics = step(states[-1], batch(number))
    states.append(state)
    found.append(metrics)
  return step, states, found


def projections(encoder, state, one):
  """Unit projections of all views [b 3 D] in float64, batch norm over all of them."""
  views = [encoder.apply({"params": state.params["encoder"]}, one[leaf].reshape(-1, s, s, 3))
           for leaf, s in (("global", 8), ("local", 4))]  # fmt: skip
  x = np.concatenate([np.float64(v["pooled"]).reshape(B, -1, 16) for v in views], 1)
  p = jax.tree.map(np.float64, state.params["projector"])
  x = x @ p["layer_0"]["kernel"]
  x = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5)
  x = np.maximum(x * p["norm_0"]["scale"] + p["norm_0"]["bias"], 0)
  x = x @ p["layer_1"]["kernel"] + p["layer_1"]["bias"]
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_steps_are_those_of_the_formulas():
  """Nearest centroids in the first epoch, then clusters of the bank that it has left."""
  encoder, _ = built()
  _, states, found = run()
  bank = np.zeros((2, N, D))
  for number, (state, after) in enumerate(zip(states, states[1:])):
    one, extra = batch(number), state.extra
    z = projections(encoder, state, one)
    terms = []
    for i in range(3):
      scores = z @ np.float64(extra["centroids"][f"set_{i}"]).T
      labels = np.asarray(extra["labels"][f"set_{i}"])[one["index"]]
      assert (labels < 0).all() == (number < 2)
      labels = scores[:, i % 2].argmax(-1) if number < 2 else labels
      log_p = scores / 0.1 - np.log(np.exp(scores / 0.1).sum(-1, keepdims=True))
      terms.append(-np.take_along_axis(log_p, labels[:, None, None], -1).mean())
    np.testing.assert_allclose(found[number]["loss"], np.mean(terms), rtol=2e-5)
    bank[:, one["index"]] = z[:, :2].swapaxes(0, 1)
    np.testing.assert_allclose(after.extra["bank"], bank, atol=1e-5)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), extra["centroids"],
                        after.extra["centroids"])  # fmt: skip
    assert not any(same.values()) if number % 2 else all(same.values())
    if number % 2:
      keys = jax.random.fold_in(jax.random.wrap_key_data(extra["key"]), number)
      for i, key in enumerate(jax.random.split(keys, 3)):
        x = np.asarray(after.extra["bank"][i % 2])
        wanted, labels = kmeans(x, first_rows(key, x, (4, 3, 2)[i]), 3)
        np.testing.assert_allclose(after.extra["centroids"][f"set_{i}"], wanted, atol=1e-4)
        np.testing.assert_array_equal(after.extra["labels"][f"set_{i}"], labels)


def test_a_run_goes_on_as_if_it_had_not_stopped():
  """From what a checkpoint holds after three of five steps: to the bit."""
  step, states, _ = run()
  kept = jax.tree.map(np.asarray, states[3]._replace(rng=jax.random.key_data(states[3].rng)))
  state = kept._replace(rng=jax.random.wrap_key_data(kept.rng))
  for number in (3, 4):
    state, _ = step(state, batch(number))
  for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(states[5].extra)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"method.examples": "63"}, "method.examples 63: arrays in memory has 64, each of"),
    ({"method.clusters": "(6, 65)"}, "must name sets of 2 to method.examples, 64"),
    ({"method.clusters": "()"}, "must name sets of 2 to"),
    ({"method.projector": "()"}, "method.projector needs one layer"),
    ({"method.iterations": "0"}, "method.iterations 0 1"),
    ({"method.batch_norm": "'local'"}, "'local' is none of global, microbatch"),
    ({"batch_size": "1", "mesh.devices": "1"}, "needs two examples or more"),
    ({"data.views": "None"}, "multi_crop.* makes global"),
  ],
)
def test_what_a_config_must_not_say(settings, message):
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.override(tiny.config("deepcluster"), settings))
