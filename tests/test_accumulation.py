"""Two views under accumulation: exactly the gradients of the whole batch where the encoder sees
examples one by one; with batch norm in the encoder, what `batch_norm="microbatch"` says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssljax import losses
from ssljax.methods.two_view import two_view
from ssljax.models.heads import Projector
from ssljax.models.resnet import resnet
from ssljax.models.vit import vit
from ssljax.step import init_state, train_step

B = 8
# Its update is nothing, and its state the gradient that it was given.
GRADIENTS = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda grads, _, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
nt_xent = functools.partial(losses.nt_xent, temperature=0.2)
with_queue = functools.partial(losses.info_nce_queue, temperature=0.2)


def batch(seed=0):
  rng = np.random.default_rng(seed)
  views = rng.normal(size=(B, 2, 16, 16, 3)).astype(np.float32)
  return {"views": views, "index": np.arange(B, dtype=np.int32) + 5}


def begun(method):
  return jax.jit(functools.partial(init_state, method, GRADIENTS, batch()))(0)


def close(found, wanted, tolerance):
  """Leaf by leaf, against the largest number of the leaf, or a hundredth of the largest of all: the
  gradients of a shift that a batch norm takes out again are nothing but rounding."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  largest = [float(np.abs(leaf).max(initial=0)) for leaf in jax.tree.leaves(wanted)]
  pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), largest)
  for (path, a), b, scale in pairs:
    error = np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)
    error /= max(scale, 1e-2 * max(largest))
    assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


# An encoder that sees examples one by one: exactly the whole batch

EXACT = {
  "NT-Xent": dict(loss=nt_xent, projector_last="batch"),
  "VICReg": dict(loss=losses.vicreg),
  "MoCo": dict(
    loss=with_queue, projector_norm="none", target="teacher", symmetric=False, queue=20
  ),
}  # fmt: skip


def exact(name, drop_path=0.3):
  encoder = vit(width=32, depth=2, heads=2, patch=(4, 4), drop_path=drop_path, scan=True)
  return two_view(encoder, B, projector=(32, 16), **EXACT[name])


@functools.cache
def stepped(name: str, accum: int, drop_path: float = 0.3, steps: int = 2):
  """The start, and metrics, gradients and `extra` after some steps that move no parameter."""
  method = exact(name, drop_path)
  start = state = begun(method)
  step = jax.jit(functools.partial(train_step, method, GRADIENTS, accum))
  for number in range(steps):
    state, metrics = step(state, batch(number))
  return start, metrics, state


@pytest.mark.parametrize("accum", [2, 4])
@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_the_whole_batch(name, accum):
  _, metrics, whole = stepped(name, 1)
  _, other, parts = stepped(name, accum)
  assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(whole.opt) if x.ndim == 2)
  close(parts.opt, whole.opt, 2e-5)
  close(parts.extra, whole.extra, 1e-5)
  close(other, metrics, 1e-5)


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_keys_enter_the_queue_in_the_order_of_the_batch(accum):
  """Three batches of eight into twenty places: the last one wraps. Made by hand, for no parameter
  moves and nothing is dropped."""
  start, _, state = stepped("MoCo", accum, 0.0, 3)
  encoder = vit(width=32, depth=2, heads=2, patch=(4, 4), scan=True)
  head, teacher = Projector((32, 16), "none"), start.extra["teacher"]
  encode = jax.jit(encoder.apply)
  queue = np.array(start.extra["queue"])
  for number in range(3):
    view = batch(number)["views"][:, 1]
    pooled = encode({"params": teacher["encoder"]}, view)["pooled"]
    keys = np.asarray(head.apply({"params": teacher["projector"]}, pooled))
    for row, key in enumerate(keys):
      queue[(B * number + row) % 20] = key / np.linalg.norm(key)
  np.testing.assert_allclose(state.extra["queue"], queue, atol=2e-6)
  assert int(state.extra["position"]) == 4


# An encoder with batch norm: each microbatch has its own statistics

MICRO = {
  "together": dict(loss=nt_xent, projector_last="scale", norm_views="together"),
  "apart": dict(loss=losses.vicreg),
  "teacher": dict(loss=with_queue, target="teacher", symmetric=False, queue=20),
}


def network(module, params, stats, views, together):
  """In training mode on views [b v …]: once over all of them, or view after view."""

  def once(stats, x):
    given = {"params": params, "batch_stats": stats}
    out, new = module.apply(given, x, train=True, mutable=["batch_stats"])
    return out["pooled"] if isinstance(out, dict) else out, new["batch_stats"]

  b, v = views.shape[:2]
  if together:
    z, stats = once(stats, views.reshape(b * v, *views.shape[2:]))
    return z.reshape(b, v, -1), stats
  z = []
  for i in range(v):
    one, stats = once(stats, views[:, i])
    z.append(one)
  return jnp.stack(z, 1), stats


def by_microbatches(module, params, stats, views, together, accum):
  """Rows i, i + accum, … after each other: features in the order of the batch. The running
  statistics of each begin at the old ones, and their mean is kept."""
  z, found = [None] * len(views), []
  for i in range(accum):
    part, new = network(module, params, stats, views[i::accum], together)
    found.append(new)
    for row, features in zip(range(i, len(views), accum), part):
      z[row] = features
  return jnp.stack(z), jax.tree.map(lambda *x: sum(x) / accum, *found)


def by_hand(name, accum, encoder, state, views):
  """Loss, gradients, and the running statistics of all networks after the step."""
  spec, together = MICRO[name], name == "together"
  head = Projector((32, 16), last=spec.get("projector_last", "none"))

  def project(params, stats, views):
    z, moved = by_microbatches(encoder, params["encoder"], stats["encoder"], views, together, accum)
    z, own = network(head, params["projector"], stats["projector"], z, together)
    return z, {"encoder": moved, "projector": own}

  def loss(params):
    extra = state.extra
    if name == "teacher":
      z, stats = project(params, extra["stats"], views[:, :1])
      keys, theirs = project(extra["teacher"], extra["teacher_stats"], views[:, 1:])
      found = spec["loss"](z[:, 0], jax.lax.stop_gradient(keys[:, 0]), extra["queue"])
      return jnp.mean(found), (stats, theirs, keys[:, 0])
    z, stats = project(params, extra["stats"], views)
    found = spec["loss"](z[:, 0], z[:, 1])
    return jnp.mean(found[0] if isinstance(found, tuple) else found), (stats, None, None)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)


@pytest.mark.parametrize("accum", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", MICRO)
def test_batch_norm_over_microbatches_is_what_it_says(name, accum):
  encoder = resnet(variant="18", stem="cifar_pool", width=8, blocks=(1, 1, 1))
  method = two_view(encoder, B, projector=(32, 16), batch_norm="microbatch", **MICRO[name])
  state = begun(method)
  after, metrics = jax.jit(functools.partial(train_step, method, GRADIENTS, accum))(state, batch())
  found = by_hand(name, accum, encoder, state, batch()["views"])
  (value, (stats, theirs, keys)), grads = found
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  # The predictor of these methods is none: it has neither parameters nor statistics.
  params = {k: after.opt["params"][k] for k in grads} if "params" in after.opt else after.opt
  close(params, grads, 1e-4)
  ours = {k: v for k, v in after.extra["stats"].items() if k in stats}
  close(ours, stats, 1e-5)
  if name == "teacher":
    close(after.extra["teacher_stats"], theirs, 1e-5)
    unit = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    np.testing.assert_allclose(after.extra["queue"][:B], unit, atol=1e-5)


def test_the_size_of_a_microbatch_matters_to_batch_norm():
  """What the test above would not notice if statistics were those of the whole batch."""
  encoder = resnet(variant="18", stem="cifar_pool", width=8, blocks=(1, 1, 1))
  method = two_view(encoder, B, projector=(32, 16), batch_norm="microbatch", **MICRO["apart"])
  state = begun(method)
  views = batch()["views"]
  (one, _), _ = by_hand("apart", 1, encoder, state, views)
  (four, _), _ = by_hand("apart", 4, encoder, state, views)
  assert abs(float(one) - float(four)) > 1e-3 * float(one)
