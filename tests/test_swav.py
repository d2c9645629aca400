"""SwAV: a whole step against its formulas in NumPy, and the queue over several steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssljax import optim
from ssljax.methods.swav import swav
from ssljax.models.vit import vit
from ssljax.step import init_state, train_step

B, K, D = 6, 5, 8


def batch(seed: int = 0):
  rng = np.random.default_rng(seed)
  return {
    "global": rng.normal(size=(B, 2, 8, 8, 3)).astype(np.float32),
    "local": rng.normal(size=(B, 2, 4, 4, 3)).astype(np.float32),
    "index": np.arange(B, dtype=np.int32),
  }


def optimizer():
  return optim.sgd(
    lambda step: 0.5, weight_decay=0.0, freeze=("prototypes",), freeze_steps=2, unit=("prototypes",)
  )


@functools.cache
def built(**given):
  encoder = vit(width=16, depth=1, heads=2, patch=(4, 4))
  return encoder, swav(
    encoder, B, projector=(12, D), prototypes=K, prototypes_unit="start", **given
  )  # fmt: skip


def run(method, steps):
  """States before and after every step, and the metrics of each."""
  tx = optimizer()
  step = jax.jit(functools.partial(train_step, method, tx, 1))
  states, found = [init_state(method, tx, batch(), 0)], []
  for number in range(steps):
    state, metrics = step(states[-1], batch(number))
    states.append(state)
    found.append(metrics)
  return states, found


def projections(encoder, state, one):
  """Unit projections of all views [b 4 D] in float64, batch norm over all of them."""
  views = [encoder.apply({"params": state.params["encoder"]}, one[leaf].reshape(-1, s, s, 3))
           for leaf, s in (("global", 8), ("local", 4))]  # fmt: skip
  x = np.concatenate([np.float64(v["pooled"]).reshape(B, 2, -1) for v in views], 1)
  p = jax.tree.map(np.float64, state.params["projector"])
  x = x @ p["layer_0"]["kernel"]
  x = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5)
  x = np.maximum(x * p["norm_0"]["scale"] + p["norm_0"]["bias"], 0)
  x = x @ p["layer_1"]["kernel"] + p["layer_1"]["bias"]
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def codes(scores):
  """The official order: the whole to 1; three times prototypes to 1/k, examples to 1/n; times n."""
  q = np.exp(scores / 0.05).T
  q /= q.sum()
  for _ in range(3):
    q = q / q.sum(1, keepdims=True) / q.shape[0]
    q = q / q.sum(0, keepdims=True) / q.shape[1]
  return (q * q.shape[1]).T


def reference(z, kernel, memory=None):
  scores = z @ np.float64(kernel)
  logits = scores / 0.1
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  loss = 0.0
  for i in range(2):
    rows = scores[:, i]
    if memory is not None:
      rows = np.concatenate([np.float64(memory[i]) @ np.float64(kernel), rows])
    q = codes(rows)[-B:]
    loss += np.mean([-(q * log_p[:, v]).sum(-1).mean() for v in range(4) if v != i]) / 2
  return loss


def test_a_step_is_that_of_the_formulas():
  encoder, method = built()
  states, found = run(method, 3)
  for state, metrics, number in zip(states, found, range(3)):
    z = projections(encoder, state, batch(number))
    kernel = state.params["prototypes"]["kernel"]
    np.testing.assert_allclose(metrics["loss"], reference(z, kernel), rtol=2e-5)
  start, *_, last = (s.params["prototypes"]["kernel"] for s in states)
  np.testing.assert_allclose(states[2].params["prototypes"]["kernel"], start, atol=1e-7)  # frozen
  assert np.abs(last - start).max() > 1e-3
  np.testing.assert_allclose(np.linalg.norm(last, axis=0), 1, rtol=1e-6)


def test_gradients_are_differences_of_the_formulas():
  encoder, method = built()
  state = init_state(method, optax.sgd(0.1), batch(), 0)
  grad = jax.jit(jax.grad(lambda p: method.loss(p, state.extra, batch(), state.rng, 0)[0]))
  kernel = np.float64(state.params["prototypes"]["kernel"])
  way = np.random.default_rng(1).normal(size=kernel.shape)
  z = projections(encoder, state, batch())
  fixed = [codes(z[:, i] @ kernel) for i in range(2)]  # nothing flows through the codes

  def at(h):
    logits = z @ (kernel + h * way) / 0.1
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pairs = [(i, v) for i in range(2) for v in range(4) if i != v]
    return np.mean([-(fixed[i] * log_p[:, v]).sum(-1).mean() for i, v in pairs])

  ours = (np.float64(grad(state.params)["prototypes"]["kernel"]) * way).sum()
  np.testing.assert_allclose(ours, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-3)


def test_the_queue_fills_from_its_step_and_counts_when_it_is_full():
  """12 places for batches of 6, from step 1 on: full, and first used, at step 3."""
  encoder, method = built(queue=12, queue_from=1)
  states, found = run(method, 5)
  kept: list = []
  for number, (state, metrics) in enumerate(zip(states, found)):
    z = projections(encoder, state, batch(number))
    memory = np.concatenate(kept[-2:], 1) if len(kept) >= 2 else None
    loss = reference(z, state.params["prototypes"]["kernel"], memory)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=3e-5, err_msg=str(number))
    if number >= 1:
      kept.append(np.moveaxis(z[:, :2], 1, 0))
  assert [int(s.extra["filled"]) for s in states] == [0, 0, 6, 12, 12, 12]
  assert not np.asarray(states[1].extra["queue"]).any()
  plain = reference(projections(encoder, states[3], batch(3)),
                    states[3].params["prototypes"]["kernel"])  # fmt: skip
  assert abs(plain - float(found[3]["loss"])) > 1e-4  # the queue matters


def test_equal_scores_give_log_k():
  _, method = built()
  state = init_state(method, optax.sgd(0.1), batch(), 0)
  flat = {"kernel": jnp.full((D, K), D**-0.5)}
  loss, _ = method.loss(state.params | {"prototypes": flat}, state.extra, batch(), state.rng, 0)
  assert float(loss) == pytest.approx(np.log(K), rel=1e-5)
