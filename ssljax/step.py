"""A method as data, the state of a run, and the one training step that serves every method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Method(NamedTuple):
  """A self-supervised method: pure functions, hyper-parameters in their closure."""

  init: Callable  # (rng, batch) -> params, extra                works on shapes alone
  loss: Callable  # (params, extra, batch, rng, step) -> loss, (stats, metrics)    extra read-only
  # … where stats["rows"]["pooled"] [b d] are the encoder's features in this step, of several views
  # those of the first, the teacher's where it alone sees whole examples: for `combine.with_probe`.
  update: Callable  # (params, extra, stats, step) -> extra      once per optimizer step
  encode: Callable  # (params, extra, batch, layers=()) -> {"pooled": [b d], …}    evaluation mode
  # (params, extra, batch, rng, step) -> pictures [b h w c] of what the method predicts, visible
  # places copied from the input; None where the target is not pixels.
  reconstruct: Callable | None = None
  needs: tuple[str, ...] = ("image",)  # keys of the batch; a missing one is an error at start-up
  # A loss that couples the examples of a batch is `couple` after `embed` (see `coupled`): with both
  # the step accumulates exactly.
  embed: Callable | None = None  # (params, extra, batch, rng, step) -> z, stats     per example
  # (params, extra, z, batch, rng, step) -> loss, (stats, metrics)                over the batch
  couple: Callable | None = None
  whole: str = ""  # why a batch must not be cut into microbatches; "" where it may
  chance: float = 0.0  # the loss of one that tells nothing apart, log K; 0: none that is known
  # (params, extra, ids [k l]) -> [k d], where encode's "joint" [b d] is: methods that read texts
  encode_text: Callable | None = None


class State(NamedTuple):
  """Everything a checkpoint holds. `extra` is carried but never differentiated."""

  step: jax.Array
  params: Any
  extra: Any
  opt: optax.OptState
  rng: jax.Array  # the constant base key of the run


def init_state(
  method: Method, tx: optax.GradientTransformation, batch: Any, seed: int | jax.Array
) -> State:
  """The state before the first step. `batch` may be arrays or shapes."""
  base = jax.random.key(seed)
  params, extra = method.init(jax.random.fold_in(base, 0xFFFFFFFF), batch)
  return State(jnp.zeros((), jnp.int32), params, extra, tx.init(params), base)


def example_keys(rng: jax.Array, index: jax.Array) -> jax.Array:
  """One key per example, [b], from the step's key and the examples' stable ids: what is drawn for
  an example depends neither on its row in the batch nor on devices or microbatches."""
  return jax.vmap(lambda i: jax.random.fold_in(rng, i))(index)


def coupled(embed: Callable, couple: Callable) -> Callable:
  """The loss of a method whose examples meet only in `couple`: their composition."""

  def loss(params, extra, batch, rng, step):
    z, embedded = embed(params, extra, batch, rng, step)
    value, (stats, metrics) = couple(params, extra, z, batch, rng, step)
    return value, (join(embedded, stats), metrics)

  return loss


def join(first: Any, second: Any) -> dict[str, dict]:
  """The stats of two parts of a loss, each of which names its own."""
  kinds = {*first, *second}
  return {kind: {**first.get(kind, {}), **second.get(kind, {})} for kind in kinds}


def train_step(
  method: Method, tx: optax.GradientTransformation, accum: int, state: State, batch: Any
) -> tuple[State, dict[str, jax.Array]]:
  """One optimizer step on one global batch -> the next state and scalar metrics."""
  rng = jax.random.fold_in(state.rng, state.step)

  def loss(params, microbatch):
    return method.loss(params, state.extra, microbatch, rng, state.step)

  value_and_grad = jax.value_and_grad(loss, has_aux=True)
  if accum == 1:
    (value, (stats, metrics)), grads = value_and_grad(state.params, batch)
  elif method.embed is not None:
    value, stats, metrics, grads = _accumulate_coupled(method, state, batch, rng, accum)
  else:
    value, stats, metrics, grads = _accumulate(value_and_grad, state.params, batch, accum)
  updates, opt = tx.update(grads, state.opt, state.params)
  params = optax.apply_updates(state.params, updates)
  extra = method.update(params, state.extra, stats, state.step)
  metrics = {"loss": value, "grad_norm": optax.global_norm(grads), **metrics}
  return State(state.step + 1, params, extra, opt, state.rng), metrics


def _accumulate(value_and_grad, params, batch, accum):
  """Means over `accum` microbatches; `stats["rows"]` come back in the order of the batch."""
  split = _split(batch, accum)

  def one(i):
    return value_and_grad(params, _part(split, i))

  def body(total, i):
    (value, (stats, metrics)), grads = one(i)
    means = (value, stats.get("mean", {}), metrics, grads)
    return jax.tree.map(jnp.add, total, means), stats.get("rows", {})

  (value, (stats, metrics)), grads = jax.eval_shape(one, 0)
  zeros = _zeros((value, stats.get("mean", {}), metrics, grads))
  total, rows = jax.lax.scan(body, zeros, jnp.arange(accum))
  value, mean, metrics, grads = jax.tree.map(lambda x: x / accum, total)
  return value, {"mean": mean, "rows": _join(rows)}, metrics, grads


def _accumulate_coupled(method, state, batch, rng, accum):
  """The gradients of the whole batch: embed every microbatch, couple them all, and go back through
  `embed` one microbatch at a time with the same keys. Nothing of the first pass is kept but z."""
  split = _split(batch, accum)

  def embed(params, i):
    return method.embed(params, state.extra, _part(split, i), rng, state.step)

  def forward(total, i):
    z, stats = embed(state.params, i)
    return jax.tree.map(jnp.add, total, stats.get("mean", {})), (z, stats.get("rows", {}))

  mean = _zeros(jax.eval_shape(embed, state.params, 0)[1].get("mean", {}))
  total, (z, rows) = jax.lax.scan(forward, mean, jnp.arange(accum))
  embedded = {"mean": jax.tree.map(lambda x: x / accum, total), "rows": _join(rows)}

  def couple(params, z):
    return method.couple(params, state.extra, z, batch, rng, state.step)

  value_and_grad = jax.value_and_grad(couple, argnums=(0, 1), has_aux=True)
  (value, (stats, metrics)), (grads, dz) = value_and_grad(state.params, _join(z))
  dz = _split(dz, accum)

  def backward(total, i):
    pull = jax.vjp(lambda params: embed(params, i)[0], state.params)[1]
    return jax.tree.map(jnp.add, total, pull(_part(dz, i))[0]), None

  grads, _ = jax.lax.scan(backward, grads, jnp.arange(accum))
  return value, join(embedded, stats), metrics, grads


def _split(batch, accum):
  """[b …] -> [b/accum accum …]. Microbatches are strided (rows i, i + accum, …): every device keeps
  its own rows and nothing is moved between devices, as it would be with contiguous blocks."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // accum, accum, *x.shape[1:]), batch)


def _part(split, i):
  """Microbatch i of what `_split` made."""
  return jax.tree.map(lambda x: x[:, i], split)


def _join(parts):
  """Microbatches as a scan stacks them, [accum b/accum …], in the order of the batch: [b …]."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def _zeros(shapes):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
