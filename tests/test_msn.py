"""MSN and PMSN: whole steps against their formulas in NumPy, and what the config refuses.

The encoder's features are taken as given (it has tests of its own); head, targets, loss and the
teacher's average are written again, in float64. The gradient is compared with differences of that
loss along a random direction of head and prototypes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.methods.msn import msn
from ssljax.models.vit import vit
from ssljax.step import init_state, train_step

B, K, HIDDEN = 6, 7, 2
KINDS = {
  "msn": {},
  "pmsn": dict(iterations=0, prior_exponent=0.5, prior_weight=0.7),
  "no batch norm": dict(head_norm="none", iterations=1),
}


def batch():
  rng = np.random.default_rng(0)
  return {
    "global": rng.normal(size=(B, 2, 12, 8, 3)).astype(np.float32),
    "local": rng.normal(size=(B, 3, 8, 8, 3)).astype(np.float32),
    "hidden": np.argsort(rng.random((B, 6)), axis=-1) < HIDDEN,
    "index": np.arange(B, dtype=np.int32) + 5,
  }


@functools.cache
def stepped(kind: str):
  """A state whose teacher is not the student, and that after a step of plain descent."""
  encoder = vit(width=16, depth=1, heads=2, patch=(4, 4))
  given = dict(head=(12, 5), head_start="torch", prototypes=K, momentum=0.8, temperature=0.2)
  method = msn(encoder, B, HIDDEN, **given, **KINDS[kind])
  state, other = (init_state(method, optax.sgd(0.1), batch(), seed) for seed in (0, 1))
  state = state._replace(extra=other.extra)
  step = jax.jit(functools.partial(train_step, method, optax.sgd(0.1), 1))
  after, metrics = step(state, batch())
  return state, after, metrics, features(encoder, state)


def features(encoder, state):
  """Pooled features, float64: of the anchor without its hidden places, of the local views, and the
  teacher's of the whole second global view."""
  one, params = batch(), {"params": state.params["encoder"]}
  seen = [np.flatnonzero(~row) for row in one["hidden"]]
  anchor = [
    encoder.apply(params, x[None], keep=places[None])["pooled"][0]
    for x, places in zip(one["global"][:, 0], seen)
  ]
  small = encoder.apply(params, one["local"].reshape(-1, 8, 8, 3))["pooled"]
  taught = encoder.apply({"params": state.extra["teacher"]["encoder"]}, one["global"][:, 1])
  anchor, small, taught = (np.float64(x) for x in (np.stack(anchor), small, taught["pooled"]))
  return anchor[:, None], small.reshape(B, 3, -1), taught


def head(params, x):
  """Batch norm over all rows given, GELU."""
  params = jax.tree.map(np.float64, params)
  shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
  x = x @ params["layer_0"]["kernel"] + params["layer_0"].get("bias", 0.0)
  if "norm_0" in params:
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    x = x * params["norm_0"]["scale"] + params["norm_0"]["bias"]
  x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  x = x @ params["layer_1"]["kernel"] + params["layer_1"]["bias"]
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(*shape, -1)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def reference(kind, params, teacher, seen):
  """The card's loss: sharpened probabilities, Sinkhorn on them, cross-entropy, mean prediction."""
  iterations = KINDS[kind].get("iterations", 3)
  kernel = np.float64(params["prototypes"]["kernel"])
  kernel = kernel / np.linalg.norm(kernel, axis=0)
  sharp = softmax(head(teacher["head"], seen[2]) @ kernel / 0.2) ** 4
  q = sharp / sharp.sum(1, keepdims=True)
  for _ in range(iterations):
    q = q / q.sum(0) / K
    q = q / q.sum(1, keepdims=True)
  z = np.concatenate([head(params["head"], part) for part in seen[:2]], axis=1)
  p = softmax(z @ kernel / 0.2)
  prior = np.arange(1, K + 1) ** -KINDS[kind].get("prior_exponent", 0.0)
  mean = p.mean((0, 1))
  gap = (mean * np.log(mean / (prior / prior.sum()))).sum()
  return -(q[:, None] * np.log(p)).sum(-1).mean() + KINDS[kind].get("prior_weight", 1.0) * gap


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_formulas(kind):
  state, after, metrics, seen = stepped(kind)
  loss = reference(kind, state.params, state.extra["teacher"], seen)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
  assert set(state.extra["teacher"]) == {"encoder", "head"}
  assert ("stats" in state.extra) == (kind != "no batch norm")
  for name, old in state.extra["teacher"].items():
    trees = (old, after.params[name], after.extra["teacher"][name])
    for a, b, c in zip(*map(jax.tree.leaves, trees)):
      np.testing.assert_allclose(c, 0.8 * a + 0.2 * b, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_differences_of_the_formulas(kind):
  """Along a random direction; the target, of the teacher and of prototypes that stay, is fixed."""
  state, after, _, seen = stepped(kind)
  rng = np.random.default_rng(1)
  start = jax.tree.map(np.float64, {n: state.params[n] for n in ("head", "prototypes")})
  way = {"head": jax.tree.map(lambda x: rng.normal(size=x.shape), start["head"])}

  def at(h):
    moved = jax.tree.map(lambda x, d: x + h * d, start["head"], way["head"])
    return reference(kind, start | {"head": moved}, state.extra["teacher"], seen)

  grads = jax.tree.map(lambda a, b: (np.float64(a) - b) / 0.1, state.params, after.params)
  pairs = zip(*(jax.tree.leaves(x) for x in (grads["head"], way["head"])))
  ours = sum((g * d).sum() for g, d in pairs)
  np.testing.assert_allclose(ours, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=2e-3)
  assert np.abs(grads["prototypes"]["kernel"]).max() > 1e-4
  assert np.abs(grads["encoder"]["stem"]["kernel"]).max() > 1e-6


def test_running_statistics_take_a_step_for_each_size_of_views():
  state, after, _, seen = stepped("msn")
  kernel = np.float64(state.params["head"]["layer_0"]["kernel"])
  mean = np.zeros(12)
  for part in seen[:2]:
    mean = 0.9 * mean + 0.1 * (part @ kernel).mean((0, 1))
  np.testing.assert_allclose(after.extra["stats"]["head"]["norm_0"]["mean"], mean, atol=1e-6)


def test_equal_scores_give_log_k_and_places_that_are_hidden_do_not_matter():
  encoder = vit(width=16, depth=1, heads=2, patch=(4, 4))
  method = msn(encoder, B, HIDDEN, head=(12, 5), prototypes=K)
  state, one = init_state(method, optax.sgd(0.1), batch(), 0), batch()
  loss = jax.jit(lambda params, one: method.loss(params, state.extra, one, state.rng, 0)[0])
  flat = {"kernel": jnp.broadcast_to(state.params["prototypes"]["kernel"][:, :1], (5, K))}
  flat_loss = loss(state.params | {"prototypes": flat}, one)
  assert float(flat_loss) == pytest.approx(math.log(K), rel=1e-5)
  before = loss(state.params, one)
  cells = one["global"][:, 0].reshape(B, 3, 4, 2, 4, 3)  # a view into the batch
  hidden = one["hidden"].reshape(B, 3, 2)
  cells += 9.0 * hidden[:, :, None, :, None, None]
  assert float(loss(state.params, one)) == float(before)
  one["global"][:, 1] += 1.0
  assert float(loss(state.params, one)) != float(before)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"method.prior_exponent": "0.25"}, "iterations 3 balances the targets to equal shares"),
    ({"method.iterations": "-1"}, "method.iterations -1 and .*: 0 or more"),
    ({"method.prototypes": "1"}, "method.prototypes 1: a distribution needs two"),
    ({"method.head": "()"}, "method.head needs one layer"),
    ({"method.evaluate": "'pupil'"}, "'pupil' is none of teacher, student"),
    ({"encoder.positions": "relative", "encoder.positions_size": "()"}, "positions are not rel"),
    ({"batch_size": "1", "mesh.devices": "1"}, "need two examples or more"),
    ({"data.hidden": "None"}, "data.hidden is not set"),
    ({"data.hidden": "{'name': 'ssljax.data.masking.view_blocks'}"}, "one set of hidden places"),
  ],
)
def test_what_a_config_must_not_say(settings, message):
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.override(tiny.config("msn"), settings))
