"""The one training step, on a toy method whose numbers a person can compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssljax import losses
from ssljax.step import Method, State, coupled, example_keys, init_state, train_step

B = 12


def toy() -> Method:
  """Loss (w·x)² averaged; `extra` remembers a mean, a table of rows, and how often it was moved."""

  def init(rng, batch):
    params = {"w": jnp.arange(1.0, 1 + batch["x"].shape[1])}
    extra = {"mean": jnp.zeros(()), "rows": jnp.zeros(batch["x"].shape[0]), "moved": jnp.zeros(())}
    return params, extra | {"seen": jnp.zeros((), jnp.int32), "noise": jnp.zeros(len_of(batch))}

  def loss(params, extra, batch, rng, step):
    y = batch["x"] @ params["w"]
    noise = jax.vmap(jax.random.normal)(example_keys(rng, batch["index"]))
    stats = {"mean": {"y": y.mean()}, "rows": {"y": y, "noise": noise}}
    return jnp.mean(y**2), (stats, {"largest": y.mean() + extra["mean"]})

  def update(params, extra, stats, step):
    return {
      "mean": stats["mean"]["y"], "rows": stats["rows"]["y"], "moved": extra["moved"] + 1,
      "seen": step.astype(jnp.int32), "noise": stats["rows"]["noise"],
    }  # fmt: skip

  return Method(init, loss, update, lambda *a: {}, None, ("x",))


def len_of(batch):
  return batch["x"].shape[0]


def batch(seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(B, 3)).astype(np.float32),
    "index": np.arange(B, dtype=np.int32) + 7,
  }


@functools.cache
def stepped(accum: int, count: int = 1) -> tuple[State, State, dict]:
  """The state before, after `count` steps, and the metrics of the last."""
  method, tx = toy(), optax.sgd(0.1)
  before = init_state(method, tx, batch(), 3)
  step = jax.jit(functools.partial(train_step, method, tx, accum))
  state = before
  for number in range(count):
    state, metrics = step(state, batch(number))
  return before, state, metrics


def test_one_step_by_hand():
  before, after, metrics = stepped(1)
  x, w = batch()["x"].astype(np.float64), np.array([1.0, 2.0, 3.0])
  y = x @ w
  gradient = 2 * (y[:, None] * x).mean(0)
  np.testing.assert_allclose(after.params["w"], w - 0.1 * gradient, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], (y**2).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
  np.testing.assert_allclose(metrics["largest"], y.mean(), rtol=1e-5)
  np.testing.assert_allclose(after.extra["rows"], y, rtol=1e-5)
  assert int(before.step) == 0 and int(after.step) == 1
  assert int(after.extra["seen"]) == 0  # update is told the number of the step that was just done


@pytest.mark.parametrize("accum", [2, 3, 4, 12])
def test_microbatches_change_nothing(accum):
  _, whole, metrics = stepped(1)
  _, parts, other = stepped(accum)
  np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5)
  # Rows come back in the order of the batch, draws belong to examples, and extra moves once.
  np.testing.assert_allclose(parts.extra["rows"], whole.extra["rows"], rtol=1e-5)
  np.testing.assert_array_equal(parts.extra["noise"], whole.extra["noise"])
  np.testing.assert_allclose(parts.extra["mean"], whole.extra["mean"], rtol=1e-5)
  assert float(parts.extra["moved"]) == 1
  assert other.keys() == metrics.keys()
  for key in metrics:
    np.testing.assert_allclose(other[key], metrics[key], rtol=1e-5)


def test_microbatches_are_strided():
  """Rows i, i+accum, …: the method sees them so, whatever comes back."""
  seen = []

  def loss(params, extra, batch, rng, step):
    jax.debug.callback(lambda index: seen.append(index.tolist()), batch["index"], ordered=True)
    return jnp.sum(params["w"]) * 0.0, ({}, {})

  method = toy()._replace(loss=loss, update=lambda params, extra, stats, step: extra)
  state = init_state(method, optax.sgd(0.1), batch(), 0)
  after, _ = jax.jit(functools.partial(train_step, method, optax.sgd(0.1), 3))(state, batch())
  jax.block_until_ready(after)
  jax.effects_barrier()
  assert seen[-3:] == [[7, 10, 13, 16], [8, 11, 14, 17], [9, 12, 15, 18]]


def test_keys_are_those_of_the_step_and_of_the_example():
  before, after, _ = stepped(1)
  _, twice, _ = stepped(1, 2)
  np.testing.assert_array_equal(jax.random.key_data(after.rng), jax.random.key_data(before.rng))
  assert not np.allclose(after.extra["noise"], twice.extra["noise"])  # another step, other draws
  step_key = jax.random.fold_in(jax.random.key(3), 1)
  for row in (0, 5):
    wanted = jax.random.normal(jax.random.fold_in(step_key, 7 + row))
    np.testing.assert_array_equal(twice.extra["noise"][row], wanted)


def test_the_start_does_not_share_its_key_with_any_step():
  keys = [jax.random.key_data(jax.random.fold_in(jax.random.key(0), i)) for i in (0, 1, 0xFFFFFFFF)]
  assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 3
  method = toy()._replace(init=lambda rng, batch: ({"w": jax.random.normal(rng)}, {}))
  state = init_state(method, optax.sgd(0.1), batch(), 0)
  start = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0xFFFFFFFF))
  np.testing.assert_array_equal(state.params["w"], start)


def test_extra_is_never_differentiated():
  method, tx = toy(), optax.sgd(0.1)
  state = init_state(method, tx, batch(), 0)
  leaky = method._replace(
    loss=lambda params, extra, batch, rng, step: (
      jnp.mean(batch["x"] @ params["w"] * extra["mean"]),
      method.loss(params, extra, batch, rng, step)[1],
    )
  )
  extra = state.extra | {"mean": jnp.float32(2.0)}
  after, _ = train_step(leaky, tx, 1, state._replace(extra=extra), batch())
  gradient = 2 * batch()["x"].mean(0)
  np.testing.assert_allclose(after.params["w"], state.params["w"] - 0.1 * gradient, rtol=1e-5)


# Losses that couple the examples of a batch


def pairs(batch_norm: bool = False) -> Method:
  """NT-Xent between two noisy linear maps, with keys and means that `extra` remembers; the noise
  and the second factor of `couple` show wrong keys and lost gradients."""

  def init(rng, batch):
    rngs = jax.random.split(rng)
    params = {"w": jax.random.normal(rngs[0], (3, 4)), "scale": jnp.ones(4)}
    return params, {"keys": jnp.zeros((B, 4)), "mean": jnp.zeros(4), "embedded": jnp.zeros(3)}

  def embed(params, extra, batch, rng, step):
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, 3)))(example_keys(rng, batch["index"]))
    z = jnp.tanh((batch["x"][:, None] + 0.1 * noise) @ params["w"])
    return z, {"mean": {"x": batch["x"].mean(0)}}

  def couple(params, extra, z, batch, rng, step):
    z = (z - z.mean(0)) * params["scale"]  # what a batch norm does: rows meet before the loss
    value = losses.nt_xent(z[:, 0], z[:, 1], 0.5).mean()
    stats = {"mean": {"z": z.mean((0, 1))}, "rows": {"keys": z[:, 1]}}
    return value, (stats, {"size": jnp.abs(z).mean()})

  def update(params, extra, stats, step):
    mean = stats["mean"]
    return {"keys": stats["rows"]["keys"], "mean": mean["z"], "embedded": mean["x"]}

  loss = coupled(embed, couple)
  return Method(init, loss, update, lambda *a: {}, needs=("x",), embed=embed, couple=couple)


@functools.cache
def paired(accum: int, steps: int = 2):
  method, tx = pairs(), optax.sgd(0.5)
  state = init_state(method, tx, batch(), 3)
  step = jax.jit(functools.partial(train_step, method, tx, accum))
  for number in range(steps):
    state, metrics = step(state, batch(number))
  return state, metrics


@pytest.mark.parametrize("accum", [2, 3, 4, 12])
def test_coupled_losses_accumulate_exactly(accum):
  whole, metrics = paired(1)
  parts, other = paired(accum)
  for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params)):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
  for key, value in whole.extra.items():
    np.testing.assert_allclose(value, parts.extra[key], rtol=1e-4, atol=1e-5, err_msg=key)
  for key, value in metrics.items():
    np.testing.assert_allclose(value, other[key], rtol=1e-4, err_msg=key)


def test_plain_accumulation_of_a_coupled_loss_would_be_wrong():
  """What the test above would not notice if the loss hardly depended on the size of the batch."""
  method, tx = pairs(), optax.sgd(0.5)
  state = init_state(method, tx, batch(), 3)
  plain = method._replace(embed=None, couple=None)
  one = jax.tree.map(jnp.asarray, batch())
  whole, _ = train_step(method, tx, 1, state, one)
  parts, _ = train_step(plain, tx, 4, state, one)
  assert np.abs(whole.params["w"] - parts.params["w"]).max() > 1e-2
