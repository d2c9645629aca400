"""Image-text methods: the loss and its parts, starting values, limits, hidden places, zero-shot."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tokenizers")
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny

from ssljax import losses, optim, train
from ssljax.evals.features import Features
from ssljax.evals.zero_shot import zero_shot
from ssljax.methods.image_text import flip, image_text
from ssljax.models.convnext import convnext
from ssljax.models.resnet import resnet
from ssljax.models.text import text
from ssljax.models.vit import vit

KEY = jax.random.key(0)
SMALL = dict(width=16, depth=1, heads=2)
READER = functools.partial(text, **SMALL)
ENCODER = vit(**SMALL, patch=(4, 4), pool="mean")


def batch(b=6):
  rng = np.random.default_rng(0)
  ids = rng.integers(3, 30, (b, 7)).astype(np.int32)
  ids[:, 5] = 2
  return {
    "image": np.float32(rng.normal(size=(b, 8, 12, 3))),
    "views": np.float32(rng.normal(size=(b, 2, 8, 12, 3))),
    "hidden": np.tile(np.arange(6) < 4, (b, 1)),
    "text": ids,
    "index": np.arange(b),
  }


def start(method, one=None):
  one = one or batch()
  return *jax.jit(method.init)(KEY, one), one


@functools.lru_cache
def clip(**arguments):
  method = image_text(ENCODER, 6, 30, text_encoder=READER, width=8, **arguments)
  return method, *start(method)


def test_loss_is_clips_between_encoded_images_and_texts():
  method, params, extra, one = clip()
  loss, (stats, metrics) = jax.jit(method.loss)(params, extra, one, KEY, 0)
  image = jax.jit(method.encode)(params, extra, one)["joint"]
  said = jax.jit(method.encode_text)(params, extra, one["text"])
  np.testing.assert_allclose(loss, losses.clip_loss(image, said, 1 / 0.07).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["scale"], 1 / 0.07, rtol=1e-6)
  assert not stats and not extra and image.shape == (6, 8)


def test_siglip_starts_at_ten_and_minus_ten_and_projects_the_text_alone():
  method, params, extra, one = clip(loss="siglip", project="text", scale=10.0, bias=-10.0)
  assert "image_projection" not in params
  assert params["text_projection"]["layer_0"]["kernel"].shape == (16, 16)
  loss, (_, metrics) = jax.jit(method.loss)(params, extra, one, KEY, 0)
  out = jax.jit(method.encode)(params, extra, one)
  np.testing.assert_array_equal(out["joint"], out["pooled"])
  said = jax.jit(method.encode_text)(params, extra, one["text"])
  want = losses.siglip_loss(out["joint"], said, 10.0, -10.0).mean()
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  decays = optim.decayed(params)
  assert not decays["log_scale"] and not decays["bias"] and decays["text_encoder"]["embedding"]


def test_slip_is_clip_and_simclr_of_the_views():
  method, params, extra, one = clip(projector=(12, 8), views_weight=0.5)
  loss, (stats, metrics) = jax.jit(method.loss)(params, extra, one, KEY, 0)
  plain, same, *_ = clip()
  shared = {k: v for k, v in params.items() if k != "projector"}
  assert jax.tree.structure(shared) == jax.tree.structure(same)
  alone = jax.jit(plain.loss)(shared, {}, one, KEY, 0)[0]
  np.testing.assert_allclose(metrics["pairs"], alone, rtol=1e-5)
  np.testing.assert_allclose(loss, metrics["pairs"] + 0.5 * metrics["views"], rtol=1e-6)
  views = one["views"].reshape(12, 8, 12, 3)
  z = jax.jit(ENCODER.apply)({"params": params["encoder"]}, views)["pooled"]
  layers = params["projector"]
  found = []
  for view in (z[::2], z[1::2]):
    x = view @ layers["layer_0"]["kernel"]
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    found.append(jax.nn.relu(x) @ layers["layer_1"]["kernel"] + layers["layer_1"]["bias"])
  np.testing.assert_allclose(metrics["views"], losses.nt_xent(*found, 0.1).mean(), rtol=1e-4)
  after = method.update(params, extra, stats, 0)
  assert jax.tree.structure(after) == jax.tree.structure(extra)
  assert np.abs(after["stats"]["projector"]["norm_0"]["mean"]).max() > 0


def test_flip_sees_visible_places_alone():
  method = flip(ENCODER, 6, 30, 4, text_encoder=READER, width=8)
  params, extra, one = start(method)
  loss = jax.jit(lambda batch: method.loss(params, extra, batch, KEY, 0)[0])
  changed = np.array(one["image"])
  changed[:, :4] += 1  # the first row of patches: places 0, 1 and 2, all hidden
  assert one["hidden"][:, :3].all()
  np.testing.assert_array_equal(loss(one), loss(one | {"image": changed}))
  assert float(loss(one)) != float(loss(one | {"hidden": np.roll(one["hidden"], 1, 1)}))


def test_a_row_learns_from_itself_alone_where_asked():
  method, params, extra, one = clip(row_only_grad=True)
  value = lambda m: jax.jit(jax.value_and_grad(lambda p: m.loss(p, extra, one, KEY, 0)[0]))(params)  # noqa: E731
  (loss, grads), (same, others) = value(method), value(clip()[0])
  np.testing.assert_allclose(loss, same, rtol=1e-6)
  assert not np.allclose(grads["text_projection"]["layer_0"]["kernel"],
                         others["text_projection"]["layer_0"]["kernel"], rtol=1e-2)  # fmt: skip


def test_limits_hold_after_every_step():
  tx = optim.adamw(lambda step: 1.0, weight_decay=0.1, limits=(("log_scale", 0.0, 4.5),))
  params = {"a": {"log_scale": jnp.float32(4.0)}, "b": jnp.ones((2, 2))}
  state, free = tx.init(params), optim.adamw(lambda step: 1.0, weight_decay=0.1)
  for sign, want in ((-1, 4.5), (-1, 4.5), (1, None)):
    grads = jax.tree.map(lambda p: sign * jnp.ones_like(p), params)  # noqa: B023
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert want is None or params["a"]["log_scale"] == want
  assert 0 <= params["a"]["log_scale"] <= 4.5
  other, inner = {"b": jnp.ones((2, 2))}, free.init({"b": jnp.ones((2, 2))})
  for sign in (-1, -1, 1):
    updates, inner = free.update({"b": sign * jnp.ones((2, 2))}, inner, other)
    other = optax.apply_updates(other, updates)
  np.testing.assert_allclose(params["b"], other["b"], rtol=1e-6)


def test_pooling_of_texts():
  ids = np.array([[1, 5, 2, 2, 0], [1, 2, 0, 0, 0]], np.int32)
  tokens = {}
  for pool in ("end", "last", "first", "mean"):
    encoder = text(9, **SMALL, pool=pool)
    params = jax.jit(encoder.init)(KEY, ids)
    out = jax.jit(encoder.apply)(params, ids)
    tokens[pool] = out["pooled"], out["tokens"]
  x = np.asarray(tokens["end"][1])
  np.testing.assert_array_equal(tokens["end"][0], x[[0, 1], [2, 1]])
  np.testing.assert_array_equal(tokens["last"][0], x[:, -1])
  np.testing.assert_array_equal(tokens["first"][0], x[:, 0])
  np.testing.assert_allclose(tokens["mean"][0], [x[0, :4].mean(0), x[1, :2].mean(0)], atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_causal_texts_do_not_see_what_comes(causal):
  ids = np.array([[1, 5, 6, 2, 0]], np.int32)
  encoder = text(9, **SMALL, causal=causal)
  params = jax.jit(encoder.init)(KEY, ids)
  apply = jax.jit(encoder.apply)
  first, second = (apply(params, x)["tokens"] for x in (ids, ids + np.int32([[0, 0, 0, 0, 7]])))
  np.testing.assert_array_equal(first[:, -1] == second[:, -1], False)
  assert np.array_equal(first[:, :4], second[:, :4]) == causal


def test_zero_shot_against_loops():
  rng = np.random.default_rng(0)
  label = rng.integers(0, 7, 50)
  prompts = rng.normal(size=(7, 3, 4))
  features = prompts[label].mean(1) + 0.6 * rng.normal(size=(50, 4))
  right = in_five = 0
  for x, c in zip(features, label):
    cosines = []
    for several in prompts:
      w = np.mean([p / np.linalg.norm(p) for p in several], 0)
      cosines.append(x @ w / np.linalg.norm(w))
    order = np.argsort(cosines)[::-1]
    right += order[0] == c
    in_five += c in order[:5]
  got = zero_shot(Features(features, label), prompts)
  assert got == {"zero_shot/top1": right / 50, "zero_shot/top5": in_five / 50}
  assert 0.3 < got["zero_shot/top1"] < got["zero_shot/top5"] < 1
  collapsed = zero_shot(Features(np.ones((50, 4)), label), np.ones((7, 1, 4)))
  assert collapsed["zero_shot/top1"] == np.mean(label == 0)
  with pytest.raises(ValueError, match="labels from 0 to 6, but 5 classes"):
    zero_shot(Features(features, label), prompts[:5])


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(loss="infonce"), "method.loss 'infonce' is none of clip, siglip"),
    (dict(project="image"), "method.project 'image' is none of both, text"),
    (dict(scale=0.0), "method.scale 0.0 must be positive"),
  ],
)
def test_wrong_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    image_text(ENCODER, 6, 30, text_encoder=READER, **arguments)


def test_parts_that_do_not_go_together():
  with pytest.raises(ValueError, match="without batch norm"):
    image_text(resnet(variant="18"), 6, 30, text_encoder=READER)
  with pytest.raises(ValueError, match="an encoder of patches is needed"):
    flip(convnext(), 6, 30, 4, text_encoder=READER)
  for arguments, message in (
    (dict(pool="eos"), "text_encoder.pool 'eos' is none of end, last"),
    (dict(width=30, heads=4), "text_encoder.width 30 is not divisible by 4 heads"),
  ):
    with pytest.raises(ValueError, match=message):
      text(9, **arguments)


def test_a_run_evaluates_zero_shot(tmp_path):
  names = ("upper left", "upper right", "lower left", "lower right")
  data = dict(source=tiny.images(64), eval_train="train[:32]", eval_test="train[32:]")
  data["text"] = dict(name="ssljax.data.text.captions", length=8, vocabulary=300, names=names)
  config = tiny.config(
    "clip", total_steps=3, data=data,
    eval=dict(every=3, figures=False, zero_shot=dict(name="ssljax.evals.zero_shot"),
              best="zero_shot/top1"),
  )  # fmt: skip
  last = train.run(config, tmp_path)
  assert 0 <= last["eval/zero_shot/top1"] <= 1
  assert np.isfinite(last["eval/heldout/loss"])
  assert (tmp_path / "tokenizer.json").exists()
  config["data"]["text"]["names"] = names[:3]
  with pytest.raises(ValueError, match="labels from 0 to 3, but data.text.names holds 3 names"):
    train.run(config, tmp_path / "other")
  config["data"]["text"] = None
  with pytest.raises(ValueError, match="data.text is not set, and the method reads texts"):
    train.run(config, tmp_path / "another")
