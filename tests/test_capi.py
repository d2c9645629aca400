"""CAPI: the part that couples a batch in NumPy, what gets which gradient, the teacher's pace."""

import jax
import numpy as np
import pytest

from ssljax.data.multiblock import contexts, rolled
from ssljax.methods.capi import capi
from ssljax.models.predictors import CrossPredictor
from ssljax.models.vit import vit
from ssljax.optim import adamw

TINY = dict(width=16, depth=1, heads=2, patch=(4, 4))
GRID = (4, 4)


@pytest.fixture(scope="module")
def made():
  method = capi(
    vit(**TINY), 6, 100, clusters=10, predictor_depth=1, teacher_rate=0.1, teacher_warmup=10
  )
  index = np.arange(6)
  image = np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype(np.float32)
  batch = {"image": image, "index": index} | rolled(GRID, predict=0.3).batch(0, 0, index)
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
  return method, params, extra, batch


def unit(x, axis=-1):
  return x / np.linalg.norm(x, axis=axis, keepdims=True)


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_what_couples_in_numpy(made):
  method, params, _, batch = made
  rng = np.random.default_rng(2)
  z = {"student": rng.normal(size=(6, 3, 16)), "teacher": rng.normal(size=(6, 16, 16))}
  z = jax.tree.map(np.float32, z)
  value, (_, metrics) = method.couple(params, {}, z, batch, None, 0)
  p = jax.tree.map(np.float64, {k: params[k] for k in ("head", "clustering")})
  scores = unit(z["teacher"]) @ p["clustering"]["kernel"] + p["clustering"]["bias"]
  assigned = np.exp(scores / 0.06)
  for _ in range(3):  # over the batch at each place, then over the clusters
    assigned /= assigned.sum(0, keepdims=True)
    assigned /= assigned.sum(-1, keepdims=True)
  logits = unit(z["student"]) @ unit(p["head"]["kernel"], 0) * p["head"]["gain"]
  wanted = np.take_along_axis(assigned, batch["targets"][:, 0, 0, :, None], 1)
  prediction = -(wanted * log_softmax(logits / 0.12)).sum(-1).mean()
  clustering = -(assigned * log_softmax(scores / 0.12)).sum(-1).mean()
  np.testing.assert_allclose(metrics["prediction"], prediction, rtol=1e-4)
  np.testing.assert_allclose(metrics["clustering"], clustering, rtol=1e-4)
  np.testing.assert_allclose(value, prediction + clustering, rtol=1e-4)
  assert {"std", "rank", "teacher_entropy", "prototype_use"} <= set(metrics)


def test_each_loss_teaches_its_own_part(made):
  method, params, extra, batch = made

  def part(name):
    loss = lambda p: method.loss(p, extra, batch, jax.random.key(1), 0)[1][1][name]  # noqa: E731
    return jax.jit(jax.grad(loss))(params)

  size = lambda tree: max(np.abs(x).max() for x in jax.tree.leaves(tree))  # noqa: E731
  prediction, clustering = part("prediction"), part("clustering")
  assert size(prediction["clustering"]) == 0 < size(clustering["clustering"])
  for name in ("encoder", "predictor", "head"):
    assert size(clustering[name]) == 0 < size(prediction[name])


def test_a_prediction_does_not_depend_on_what_else_is_asked_for():
  head = CrossPredictor(16, 2, 2, prefix=1)
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(2, 6, 16)).astype(np.float32)
  places = np.stack([rng.permutation(16) for _ in range(2)])
  context, targets = places[:, :5], places[:, 5:9]
  params = head.init(jax.random.key(0), tokens, GRID, context, targets)
  whole = head.apply(params, tokens, GRID, context, targets)
  some = head.apply(params, tokens, GRID, context, targets[:, 2:])
  np.testing.assert_allclose(some, whole[:, 2:], atol=1e-6)
  order = np.array([3, 1, 4, 0, 2])
  moved = np.concatenate([tokens[:, :1], tokens[:, 1:][:, order]], 1)
  again = head.apply(params, moved, GRID, context[:, order], targets)
  np.testing.assert_allclose(again, whole, atol=1e-5)


def test_the_teacher_begins_to_move_with_the_warm_up(made):
  method, params, extra, _ = made
  teacher, student = extra["teacher"]["encoder"], params["encoder"]
  for step, share in ((0, 0.0), (5, 0.05), (10, 0.1), (100, 0.0)):
    moved = method.update(params, extra, {}, step)["teacher"]["encoder"]
    want = jax.tree.map(lambda t, s: (1 - share) * t + share * s, teacher, student)  # noqa: B023
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_clustering_has_its_own_rate_and_decay():
  params = {"encoder": np.ones((2, 2)), "clustering": {"bias": np.ones(2)}}
  own = dict(factor=0.5, weight_decay=0.2, decay_vectors=True)
  tx = adamw(lambda step: 0.1, groups={"clustering": own}, weight_decay=0.4)
  updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates["encoder"], -0.1 * (1 + 0.4), rtol=1e-5)
  np.testing.assert_allclose(updates["clustering"]["bias"], -0.05 * (1 + 0.2), rtol=1e-5)


@pytest.mark.parametrize(
  ("encoder", "settings", "words"),
  [
    ({}, dict(evaluate="ema"), "is none of teacher, student"),
    ({}, dict(batch_size=1), "balanced over the batch"),
    (dict(positions="relative"), {}, "not relative"),
  ],
)
def test_errors_say_what_is_wrong(encoder, settings, words):
  with pytest.raises(ValueError, match=words):
    capi(vit(**TINY | encoder), **dict(batch_size=6, total_steps=9) | settings)


def test_several_contexts_are_refused(made):
  method, _, _, batch = made
  many = batch | contexts(GRID, clones=2, keep=0.5, adjust=0.5).batch(0, 0, np.arange(6))
  with pytest.raises(ValueError, match="one context and one list"):
    method.init(jax.random.key(0), many)
