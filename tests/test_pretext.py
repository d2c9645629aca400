"""Rotation, jigsaw and DIET: steps against NumPy, and what a question must not give away."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.methods import pretext
from ssljax.models.vit import vit
from ssljax.step import example_keys

TINY = dict(width=16, depth=1, heads=2, patch=(4, 4))
RNG = jax.random.key(5)


def batch(side=24, count=6):
  rng = np.random.default_rng(0)
  image = rng.normal(size=(count, side, side, 3)).astype(np.float32)
  return {"image": image, "index": np.arange(10, 10 + count, dtype=np.int32)}


def step(method, one):
  params, extra = method.init(jax.random.key(0), one)
  value, (stats, metrics) = jax.jit(method.loss)(params, extra, one, RNG, 0)
  return params, value, stats, metrics


def ce(logits, labels):
  logits = logits - logits.max(-1, keepdims=True)
  return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]


def layer(params, name, x, part="head"):
  p = jax.tree.map(np.asarray, params[part][name])
  return x @ p["kernel"] + p.get("bias", 0.0)


def pooled(params, images):
  return np.asarray(vit(**TINY).apply({"params": params["encoder"]}, images)["pooled"])


def test_rotation_step_in_numpy():
  one = batch()
  params, value, stats, metrics = step(pretext.rotation(vit(**TINY)), one)
  found, right = [], []
  for k in range(4):
    turned = np.rot90(one["image"], k, axes=(1, 2))
    logits = layer(params, "layer_0", pooled(params, turned))
    found.append(ce(logits, np.full(6, k)))
    right.append(logits.argmax(-1) == k)
  assert float(value) == pytest.approx(np.mean(found), rel=1e-5)
  assert float(metrics["top1"]) == pytest.approx(np.mean(right))
  # A probe sees the picture as it was.
  upright = pooled(params, one["image"])
  np.testing.assert_allclose(stats["rows"]["pooled"], upright, atol=1e-5)


@pytest.mark.parametrize("standardise", [True, False])
def test_jigsaw_step_in_numpy(standardise):
  one, grid, tile = batch(25), 3, 4
  method = pretext.jigsaw(
    vit(**TINY), 6, tile=tile, permutations=20, projector=(8,), standardise=standardise
  )
  # Of a whole image of 24: the encoder's patches do not divide 25.
  params, _ = method.init(jax.random.key(0), batch(24))
  table = pretext.far_apart(grid, 20)
  keys = jax.vmap(jax.random.split)(example_keys(RNG, one["index"]))[:, 0]
  tiles, labels = [], []
  for image, key in zip(one["image"], keys):
    which, where = jax.random.split(key)
    labels.append(int(jax.random.randint(which, (1,), 0, 20)[0]))
    # A tile of 4 in a cell of 25 // 3 = 8 begins at 0 … 4.
    offset = np.asarray(jax.random.randint(where, (9, 2), 0, 5))
    for n, (dy, dx) in zip(table[labels[-1]], offset):
      y, x = 8 * (n // 3) + dy, 8 * (n % 3) + dx
      cut = image[y : y + tile, x : x + tile]
      tiles.append((cut - cut.mean((0, 1))) / np.sqrt(cut.var((0, 1)) + 1e-5))
      if not standardise:
        tiles[-1] = cut
  assert len(set(labels)) > 2
  z = layer(params, "layer_0", pooled(params, np.stack(tiles)), "projector")
  norm = jax.tree.map(np.asarray, params["projector"]["norm_0"])
  z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) * norm["scale"] + norm["bias"]
  logits = layer(params, "layer_0", np.maximum(z, 0).reshape(6, -1))
  extra = method.init(jax.random.key(0), batch(24))[1]
  value, (stats, _) = jax.jit(method.loss)(params, extra, one, RNG, 0)
  assert float(value) == pytest.approx(ce(logits, np.array(labels)).mean(), rel=1e-4)
  assert stats["rows"]["pooled"].shape == (6, 16)


def test_diet_step_in_numpy():
  one = batch()
  params, value, _, metrics = step(pretext.diet(vit(**TINY), examples=20, smoothing=0.8), one)
  assert list(params["head"]["layer_0"]) == ["kernel"]  # no bias
  logits = layer(params, "layer_0", pooled(params, one["image"]))
  logp = logits - logits.max(-1, keepdims=True)
  logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
  wanted = np.full((6, 20), 0.8 / 20)
  wanted[np.arange(6), one["index"]] += 0.2
  assert float(value) == pytest.approx(-(wanted * logp).sum(-1).mean(), rel=1e-5)
  assert float(metrics["top1"]) == pytest.approx((logits.argmax(-1) == one["index"]).mean())


def test_turns_are_those_of_numpy_and_four_are_none():
  image = batch()["image"]
  turned = np.asarray(pretext._turned(jnp.asarray(image), None))
  for k in range(4):
    np.testing.assert_array_equal(turned[:, k], np.rot90(image, k, axes=(1, 2)))
  again = np.asarray(pretext._turned(jnp.asarray(turned[:, 3]), None))[:, 1]
  np.testing.assert_array_equal(again, image)


@pytest.mark.parametrize("grid, count, apart", [(2, 24, 2), (3, 9, 9), (3, 100, 4)])
def test_orders_are_different_and_far_apart(grid, count, apart):
  table = pretext.far_apart(grid, count)
  np.testing.assert_array_equal(
    np.sort(table, -1), np.broadcast_to(np.arange(grid**2), table.shape)
  )
  distance = (table[:, None] != table[None]).sum(-1)[~np.eye(count, dtype=bool)]
  assert distance.min() == apart


def test_the_next_order_disagrees_the_most():
  table = pretext.far_apart(3, 12)
  every = np.array(list(itertools.permutations(range(9))))
  for n in (3, 9, 11):
    distance = (every[:, None] != table[None, :n]).sum(-1)
    distance[(every[:, None] == table[None, :n]).all(-1).any(-1)] = 0
    assert (table[n] != table[:n]).sum() == distance.sum(-1).max()


def test_tiles_put_back_are_the_picture():
  image = jnp.asarray(batch(24)["image"])
  keys = jax.random.split(jax.random.key(0), 6)
  table = pretext.far_apart(3, 50)
  tiles = np.asarray(pretext._tiles(table, 3, 8, False, image, keys))
  which = np.asarray(pretext._orders(50, None, keys))[:, 0]
  for n, one in enumerate(tiles):
    rows = one[np.argsort(table[which[n]])].reshape(3, 3, 8, 8, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(rows.reshape(24, 24, 3), image[n])


@pytest.mark.parametrize(
  "name, settings, message",
  [
    (
      "rotation", {"data.views": "{'name': 'ssljax.data.views.crop_flip', 'size': (32, 48)}"},
      "images of 32 x 48 pixels are not square",
    ),
    ("jigsaw", {"method.tile": "20"}, "tile 20 does not fit into the cells of 10 pixels"),
    ("jigsaw", {"method.grid": "4"}, "method.grid 4 is neither 2 nor 3"),
    ("jigsaw", {"method.grid": "2", "method.permutations": "25"}, "not between 2 and 24"),
    ("jigsaw", {"encoder.positions": "relative"}, "belongs to one size of images"),
    ("jigsaw", {"encoder.positions": "learned"}, "have no place in the 64 learned positions"),
    ("jigsaw", {"method.projector_norm": "group"}, "Projector.norm 'group' is none of"),
    ("jigsaw", {"method.batch_norm": "none"}, "method.batch_norm 'none' is none of"),
    ("diet", {"method.examples": "63"}, "examples 63: arrays in memory has 64, each of"),
    ("diet", {"data.split": "train[:32]"}, "examples 64: arrays in memory .* has 32"),
    ("diet", {"method.examples": "1"}, "method.examples 1: two or more can be told apart"),
    ("diet", {"method.smoothing": "1.5"}, "method.smoothing 1.5 is not between 0 and 1"),
    ("rotation", {"accum": "2"}, "accum 2: the encoder's batch norm sees the whole batch"),
  ],
)  # fmt: skip
def test_what_a_config_must_not_say(name, settings, message):
  with pytest.raises(ValueError, match=message):
    job_lib.assemble(config_lib.override(tiny.config(name), settings))
