"""DenseCL: a step against its formulas in NumPy and, without its second loss, against MoCo v2's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax import losses
from ssljax.methods.densecl import densecl
from ssljax.methods.two_view import two_view
from ssljax.models.resnet import resnet
from ssljax.models.vit import vit
from ssljax.step import init_state, train_step

B, QUEUE, D = 6, 9, 8
SIZES = dict(projector=(12, D), momentum=0.8, queue=QUEUE)


def batch(seed=0):
  views = np.random.default_rng(seed).normal(size=(B, 2, 16, 16, 3)).astype(np.float32)
  return {"views": views, "index": np.arange(B, dtype=np.int32)}


def stepped(method, state, steps=1):
  step = jax.jit(functools.partial(train_step, method, optax.sgd(0.1), 1))
  for number in range(steps):
    state, metrics = step(state, batch(number))
  return state, metrics


def head(params, x):
  p = jax.tree.map(np.float64, params)
  x = np.maximum(x @ p["layer_0"]["kernel"] + p["layer_0"]["bias"], 0)
  return x @ p["layer_1"]["kernel"] + p["layer_1"]["bias"]


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(q, k, queue):
  """Of the first among all scores: q, k [… d], queue [m d]."""
  scores = np.concatenate([(q * k).sum(-1, keepdims=True), q @ queue.T], -1) / 0.3
  return (np.log(np.exp(scores).sum(-1)) - scores[..., 0]).mean()


@pytest.mark.parametrize("step, weight", [(0, 0.0), (1, 0.7)])
def test_a_step_is_that_of_the_formulas(step, weight):
  """Whole views alone before `dense_from`; cells are matched by features of the encoder."""
  encoder = vit(width=16, depth=1, heads=2, patch=(4, 4))
  given = dict(dense_projector=(10, 5), temperature=0.3, dense_weight=0.7, dense_from=1)
  method = densecl(encoder, B, **SIZES, **given)
  state, other = (init_state(method, optax.sgd(0.1), batch(), seed) for seed in (0, 1))
  state = state._replace(extra=other.extra, step=jnp.int32(step))
  after, metrics = stepped(method, state)
  teacher, queue = state.extra["teacher"], jax.tree.map(np.float64, state.extra["queue"])
  out = [
    jax.tree.map(np.float64, encoder.apply({"params": p["encoder"]}, batch()["views"][:, i]))
    for i, p in enumerate((state.params, teacher))
  ]
  q, k = (unit(head(p["projector"], o["pooled"])) for p, o in zip((state.params, teacher), out))
  whole = cross_entropy(q, k, queue["projector"])
  q_map, raw = (head(p["dense"], o["patches"]) for p, o in zip((state.params, teacher), out))
  near = (unit(out[0]["patches"]) @ unit(out[1]["patches"]).swapaxes(1, 2)).argmax(-1)
  matched = np.stack([cells[i] for cells, i in zip(unit(raw), near)])
  dense = cross_entropy(unit(q_map), matched, queue["dense"])
  np.testing.assert_allclose(metrics["loss"], (1 - weight) * whole + weight * dense, rtol=2e-5)
  np.testing.assert_allclose(metrics["dense"], dense, rtol=2e-5)
  pairs = (("projector", k), ("dense", unit(raw.mean(1))))
  for name, keys in pairs:
    found = after.extra["queue"][name]
    np.testing.assert_allclose(found[:B], keys, atol=2e-6)
    np.testing.assert_array_equal(found[B:], state.extra["queue"][name][B:])
  assert int(after.extra["position"]) == B
  for name, old in teacher.items():
    trees = (old, after.params[name], after.extra["teacher"][name])
    for a, b, c in zip(*map(jax.tree.leaves, trees)):
      np.testing.assert_allclose(c, 0.8 * a + 0.2 * b, atol=1e-6)
  before, now = (s.params["dense"]["layer_0"]["kernel"] for s in (state, after))
  assert bool((before != now).any()) == bool(weight)


def test_without_the_loss_of_places_it_is_moco():
  """Three steps with batch norm: the same losses, parameters, teacher, statistics and queue."""
  encoder = resnet(variant="18", stem="cifar_pool", width=8, blocks=(1, 1, 1))
  loss = functools.partial(losses.info_nce_queue, temperature=0.2)
  moco = two_view(
    encoder, B, loss=loss, projector_norm="none", target="teacher", symmetric=False, **SIZES
  )
  ours = densecl(encoder, B, dense_weight=0.0, **SIZES)
  state, plain = (init_state(m, optax.sgd(0.1), batch(), 0) for m in (ours, moco))
  params = {name: state.params[name] for name in ("encoder", "projector")}
  extra = plain.extra | {
    "teacher": params,
    "queue": state.extra["queue"]["projector"],
  }
  plain = plain._replace(params=plain.params | params, extra=extra)
  state, metrics = stepped(ours, state, 3)
  plain, wanted = stepped(moco, plain, 3)
  np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)
  pairs = [
    (state.extra["queue"]["projector"], plain.extra["queue"]),
    (state.params["encoder"], plain.params["encoder"]),
    (state.extra["teacher"]["encoder"], plain.extra["teacher"]["encoder"]),
    (state.extra["stats"]["encoder"], plain.extra["stats"]["encoder"]),
    (state.extra["teacher_stats"]["encoder"], plain.extra["teacher_stats"]["encoder"]),
  ]
  for a, b in pairs:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"method.dense_weight": "1.5"}, "method.dense_weight 1.5 is not between 0 and 1"),
    ({"method.queue": "8"}, "method.queue 8 is smaller than the 16 new keys"),
    ({"method.queue": "128"}, "method.queue 128 is larger than the 64 examples"),
    ({"method.dense_projector": "()"}, "method.dense_projector need one layer"),
    ({"method.batch_norm": "'local'"}, "'local' is none of global, microbatch"),
    ({"data.views": "None"}, "two_views.* makes views"),
  ],
)
def test_what_a_config_must_not_say(settings, message):
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.override(tiny.config("densecl"), settings))
