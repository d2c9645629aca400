"""One table over all methods (DESIGN §7.10). A new method is one line in `tests/tiny.py`."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax import sharding, train
from ssljax.evals.rank import effective_rank
from ssljax.leaves import named
from ssljax.step import init_state, train_step

# Where another row runs the same code with another loss, the whole row is for `make test-all`.
SLOW = (
  "barlow_twins", "vicreg", "simsiam", "mocov3", "dino_resnet", "ibot", "pmsn", "swav", "densecl",
  "stop", "lejepa_resnet", "simclr_convnext", "siglip", "slip", "flip", "dcl", "vibcreg",
  "ssl_ey", "mmcr", "w_mse", "supcon", "tico", "nnclr", "mochi", "terms", "rotation", "diet",
  "latent_mim", "attmask", "msn", "deepcluster", "dinov2", "byol", "swav_queue", "jigsaw",
  "vicregl", "vicregl_crops", "lejepa", "data2vec2", "simclr",
)  # fmt: skip
ROWS = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in tiny.METHODS]
pytestmark = pytest.mark.parametrize("name", ROWS)
DEVICES = (1, 8)


@functools.cache
def job(name: str, devices: int = 1, state: str = "replicated", accum: int = 1) -> job_lib.Job:
  mesh = dict(devices=devices, state=state, min_size=64)
  config = tiny.config(name, mesh=mesh, accum=accum, total_steps=40)
  return job_lib.assemble(config_lib.complete(config))


@functools.cache
def step_fn(*args):
  built = job(*args)
  with jax.set_mesh(built.mesh):
    return train.compiled_step(built)


def batch(name: str, number: int = 0) -> dict[str, np.ndarray]:
  with job(name).batches(number) as batches:
    return next(batches)


def seen(name: str) -> dict[str, np.ndarray]:
  """A batch with what `encode` takes: pictures."""
  one = batch(name)
  leaf = next(key for key in ("image", "views", "global") if key in one)
  return one if leaf == "image" else one | {"image": one[leaf][:, 0]}


def losses(name: str, *args, steps: int = 3, same: bool = False) -> tuple[list[float], object]:
  """Losses of the first steps, and the state after them; `same`: always on the first batch, and
  with the `extra` of the start."""
  built = job(name, *args)
  found = []
  with jax.set_mesh(built.mesh):
    state = train.start(built)
    first = jax.tree.map(jnp.copy, state.extra)
    with built.batches(0) as batches:
      one = next(batches)
      for _ in range(steps):
        placed = sharding.to_global(one, built.mesh, built.config["batch_size"])
        state, metrics = step_fn(name, *args)(state, placed)
        found.append(float(metrics["loss"]))
        if same:
          state = state._replace(extra=jax.tree.map(jnp.copy, first))
        else:
          one = next(batches)
  return found, state


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_init_works_on_shapes_alone(name):
  built = job(name)
  made = jax.eval_shape(lambda: init_state(built.method, built.tx, built.batch, 0))
  assert shapes(made) == shapes(built.state)
  params, _ = built.method.init(jax.random.key(0), batch(name))
  assert shapes(params) == shapes(built.state.params)


def test_step_keeps_the_form_of_the_state(name):
  built = job(name)
  step = functools.partial(train_step, built.method, built.tx, 1)
  after, metrics = jax.eval_shape(step, built.state, built.batch)
  assert shapes(after) == shapes(built.state)
  assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


@functools.cache
def learnt(name: str) -> tuple[list[float], object]:
  """Losses of forty steps on one batch, and the parameters after them. What a step remembers is
  held, too: a queue would fill with the keys of this one batch."""
  found, state = losses(name, steps=40, same=True)
  return found, state


def test_loss_falls_on_one_batch(name):
  found, _ = learnt(name)
  assert np.isfinite(found).all()
  first = np.mean(found[:2])
  assert np.mean(found[-5:]) < first - 0.05 * abs(first)  # some losses are below zero


@pytest.mark.parametrize("state", [pytest.param("replicated", marks=pytest.mark.slow), "full"])
def test_same_losses_on_one_and_eight_devices(name, state):
  one, _ = losses(name)
  many, after = losses(name, 8, state)
  np.testing.assert_allclose(one, many, rtol=1e-5)
  split = [x for x in jax.tree.leaves(after) if not x.sharding.is_fully_replicated]
  assert bool(split) == (state == "full")


def test_accumulation_equals_the_large_batch(name):
  if job(name).method.whole:
    with pytest.raises(ValueError, match='accum 4: .* method.batch_norm="microbatch"'):
      job(name, 1, "replicated", 4)
    return
  whole, _ = losses(name)
  parts, _ = losses(name, 1, "replicated", 4)
  np.testing.assert_allclose(whole, parts, rtol=1e-5)
  # After one step: later ones carry Adam's answer to gradients that are nothing but rounding.
  _, state = losses(name, steps=1)
  _, accumulated = losses(name, 1, "replicated", 4, steps=1)
  for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(accumulated.extra)):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_no_gradient_into_extra(name):
  built = job(name)
  params, extra = built.method.init(jax.random.key(0), batch(name))

  def loss(extra):
    return built.method.loss(params, extra, batch(name), jax.random.key(1), 0)[0]

  for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, allow_int=True))(extra)):
    assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()


def test_update_moves_extra_towards_the_parameters(name):
  built = job(name)
  params, extra = built.method.init(jax.random.key(0), batch(name))
  _, (stats, _) = jax.jit(built.method.loss)(params, extra, batch(name), jax.random.key(1), 0)
  moved = jax.tree.map(lambda x: x + 1, params)
  after = built.method.update(moved, extra, stats, 0)
  assert shapes(after) == shapes(extra)
  for before, now in zip(*(jax.tree.leaves(x.get("teacher", {})) for x in (extra, after))):
    np.testing.assert_allclose(now, before + 0.1, atol=1e-6)  # momentum 0.9 in the table
  taught = {"data2vec", "moco", "byol", "mocov3", "dino", "dino_resnet", "ibot", "dinov2"}
  taught |= {"ijepa", "stop", "data2vec2", "capi", "latent_mim", "attmask", "msn", "pmsn"}
  taught |= {"densecl", "mmcr", "tico", "mochi"}
  assert ("teacher" in extra) == (name in taught)
  before, now = (named(x.get("stats", {})) for x in (extra, after))
  for place in before:
    # The mean of a predictor's input is zero where the projector ends in a norm.
    if not (place.startswith("predictor") and place.endswith("mean")):
      assert np.abs(now[place] - before[place]).max() > 1e-6, place
  if name == "moco":
    assert int(after["position"]) == 16
    np.testing.assert_array_equal(after["queue"][16:], extra["queue"][16:])
    np.testing.assert_allclose(np.linalg.norm(after["queue"], axis=-1), 1, rtol=1e-5)


def test_does_not_collapse(name):
  built = job(name)
  _, state = learnt(name)
  out = jax.jit(built.method.encode)(state.params, state.extra, seen(name))
  pooled = np.asarray(out["pooled"])
  # Centred: class tokens share a large mean from the start, which would hide the spread.
  assert effective_rank(pooled - pooled.mean(0)) > 3


def test_draws_belong_to_examples_not_to_rows(name):
  built = job(name)
  params, extra = built.method.init(jax.random.key(0), batch(name))
  loss = jax.jit(built.method.loss)
  one = batch(name)
  turned = {key: value[::-1] for key, value in one.items()}
  first, _ = loss(params, extra, one, jax.random.key(1), 0)
  second, _ = loss(params, extra, turned, jax.random.key(1), 0)
  # Rows summed in another order: a batch norm adds up more of them than a mean of losses does.
  np.testing.assert_allclose(first, second, rtol=1e-5 if name in tiny.COUPLED else 1e-6)


def test_one_compile_serves_all_steps(name):
  """The program is compiled ahead of time, and refuses what it was not compiled for."""
  built = job(name)
  with jax.set_mesh(built.mesh):
    state = train.start(built)
    for number in range(3):
      placed = sharding.to_global(batch(name, number), built.mesh, 16)
      state, _ = step_fn(name)(state, placed)
    with pytest.raises(TypeError, match="compiled"):
      step_fn(name)(state, {k: v[:8] for k, v in placed.items()})


def test_encode_returns_what_it_says(name):
  built = job(name)
  params, extra = built.method.init(jax.random.key(0), batch(name))
  encode = jax.jit(functools.partial(built.method.encode, layers=(0, -1)))
  out = encode(params, extra, seen(name))
  assert out["pooled"].shape == (16, 32) and out["pooled"].dtype == jnp.float32
  assert out["patches"].shape == (16, np.prod(built.grid), 32)
  assert out[f"layer_{built.encoder.depth - 1}"].shape == out["patches"].shape
  if built.encoder.patch:
    assert out["layer_0"].shape == (16, 64, 32)
  again = encode(params, extra, seen(name))
  np.testing.assert_array_equal(out["pooled"], again["pooled"])  # evaluation mode: no draws


def test_reconstruction_keeps_what_is_visible(name):
  built = job(name)
  if built.method.reconstruct is None:
    assert name not in ("mae", "simmim")
    return
  one = batch(name)
  params, extra = built.method.init(jax.random.key(0), one)
  made = built.method.reconstruct(params, extra, one, jax.random.key(0), 0)
  cells = lambda x: np.asarray(x).reshape(16, 8, 4, 8, 4, 3).swapaxes(2, 3).reshape(16, 64, -1)  # noqa: E731
  difference = np.abs(cells(made) - cells(one["image"] / 255)).max(-1)
  assert difference[~one["hidden"]].max() < 1e-5
  assert (difference[one["hidden"]] > 1e-3).mean() > 0.9


def test_a_missing_key_is_named(name):
  config = tiny.config(name)
  says = {
    "text": "data.text is not set", "views": "needs (views|global)(, boxes)? in the batch",
    "hidden": "data.hidden is not set", "image": "needs image in the batch, which has views",
  }  # fmt: skip
  place = next((key for key in says if config["data"].get(key)), "image")
  config["data"] |= {place: None} if place != "image" else {"views": tiny.PAIR}
  says = says[place]
  with pytest.raises(ValueError, match=says):
    job_lib.assemble(config_lib.complete(config))
