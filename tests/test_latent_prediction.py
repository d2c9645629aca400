"""What holds for the predictors and for several contexts, whatever the weights are."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny

from ssljax import config as config_lib
from ssljax import dry_run, records, train
from ssljax import job as job_lib
from ssljax.data.multiblock import contexts, multiblock
from ssljax.load import load
from ssljax.methods.latent_prediction import latent_prediction
from ssljax.models.cued import CuedPredictor
from ssljax.models.predictors import PlacePredictor
from ssljax.models.vit import vit

TINY = dict(width=16, depth=1, heads=2, patch=(4, 4))
GRID = (8, 8)


def predictor(noise: bool):
  """A predictor, its parameters off their start, and arguments."""
  head = PlacePredictor(16, 1, 2, 16, prefix=1)
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(2, 6, 16)).astype(np.float32)
  places = np.stack([rng.permutation(64) for _ in range(2)])
  context, targets = places[:, :5], places[:, 5:13].reshape(2, 2, 4)
  drawn = np.zeros((2, 2, 4, 16), np.float32) if noise else None
  params = head.init(jax.random.key(0), tokens, GRID, context, targets, drawn)["params"]
  params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
  return head, params, (tokens, GRID, context, targets, drawn)


def test_the_order_of_the_context_does_not_matter_and_lists_are_predicted_apart():
  head, params, (tokens, grid, context, targets, _) = predictor(False)
  whole = head.apply({"params": params}, tokens, grid, context, targets)
  order = np.array([3, 1, 4, 0, 2])
  moved = np.concatenate([tokens[:, :1], tokens[:, 1:][:, order]], 1)
  again = head.apply({"params": params}, moved, grid, context[:, order], targets)
  np.testing.assert_allclose(again, whole, atol=1e-5)
  alone = head.apply({"params": params}, tokens, grid, context, targets[:, 1:])
  np.testing.assert_allclose(alone[:, 0], whole[:, 1], atol=1e-5)


def test_noise_of_zero_is_a_token_of_the_embedding_bias():
  """FlexPredict's query is E(n) + position: without noise the bias of E stands for the token."""
  head, params, args = predictor(True)
  noisy = head.apply({"params": params}, *args)
  token = params | {"mask_token": params["embed"]["bias"]}
  np.testing.assert_allclose(noisy, head.apply({"params": token}, *args[:4]), atol=1e-6)


def method_and_batch(encoder, hidden, **settings):
  method = latent_prediction(encoder, **settings)
  rng = np.random.default_rng(1)
  index = np.arange(3)
  image = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
  return method, {"image": image, "index": index} | hidden.batch(0, 0, index)


def test_several_contexts_are_the_mean_of_each_alone():
  method, batch = method_and_batch(
    vit(**TINY, norm="post"), contexts(GRID, clones=3), predictor="convolution", predictor_width=16,
    predictor_depth=1, predictor_groups=2, target_layers=1, loss="l2", class_weight=0.5,
  )  # fmt: skip
  params, extra = method.init(jax.random.key(0), batch)
  value = jax.jit(
    jax.value_and_grad(lambda p, b: method.loss(p, extra, b, jax.random.key(1), 0)[0])
  )
  alone = [
    value(params, batch | {k: batch[k][:, i : i + 1] for k in ("context", "targets")})
    for i in range(3)
  ]
  mean = jax.tree.map(lambda *x: sum(x) / 3, *alone)
  for got, want in zip(*map(jax.tree.leaves, (value(params, batch), mean))):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def in_numpy(pred, seen, taught, goal=0.0, weight=0.0, temperature=0.3):
  """Latent MIM's loss from predictions and targets [b t d] and what was seen [b k d]."""

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  found, cosines = [], {"pred": [], "seen": []}
  for p, s, t in zip(*(np.asarray(x, np.float64) for x in (pred, seen, taught))):
    alone = (p - p.mean(0)) / (p.std(0, ddof=1) + 1e-4)
    scores = unit(alone) @ unit(t).T / temperature
    found.append((np.log(np.exp(scores).sum(-1)) - np.diag(scores)).mean())
    cosines["pred"].append(np.mean([a @ b for a in unit(p) for b in unit(p)]))
    cosines["seen"].append(np.mean([a @ b for a in unit(s) for b in unit(s)]))
  penalty = sum((np.mean(x) - goal) ** 2 for x in cosines.values())
  return 2 * temperature * np.mean(found) + weight * penalty, cosines


CONTRAST = dict(
  predictor_width=16, predictor_depth=1, loss="info_nce", temperature=0.3, teacher_sees="targets"
)
FEW = dict(clones=1, keep=0.25, adjust=0.0, block=1)


def test_contrast_with_a_teacher_that_sees_the_targets_alone_in_numpy():
  """No place that was seen takes part in a target."""
  encoder = vit(**TINY)
  method, batch = method_and_batch(encoder, contexts(GRID, **FEW), **CONTRAST)
  params, extra = method.init(jax.random.key(0), batch)
  extra = jax.tree.map(lambda x: 1.1 * x + 0.01, extra)  # not the student
  value, _ = jax.jit(method.loss)(params, extra, batch, jax.random.key(1), 0)
  context, places = batch["context"][:, 0], batch["targets"][:, 0]
  seen = encoder.apply({"params": params["encoder"]}, batch["image"], keep=context)["tokens"]
  head = PlacePredictor(16, 1, 2, 16, prefix=1)
  pred = head.apply({"params": params["predictor"]}, seen, GRID, context, places)[:, 0]
  teacher = {"params": extra["teacher"]["encoder"]}
  taught = encoder.apply(teacher, batch["image"], keep=places[:, 0])["patches"]
  taught = taught - taught.mean(-1, keepdims=True)
  assert pred.shape == taught.shape == (3, 48, 16)
  assert float(value) == pytest.approx(in_numpy(pred, seen[:, 1:], taught)[0], rel=1e-4)


def whole_latent_mim(weight=0.5):
  encoder = vit(**TINY)
  return encoder, *method_and_batch(
    encoder, contexts(GRID, **FEW), **CONTRAST, predictor="cued", projector=(24, 12),
    similarity_weight=weight, similarity_goal=lambda step: 0.75 - 0.1 * step,
  )  # fmt: skip


def projected(params, x):
  """Two linear layers without bias, layer norms, GELU between them."""
  from scipy.special import erf

  for i in range(2):
    x = np.asarray(x, np.float64) @ np.asarray(params[f"layer_{i}"]["kernel"], np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params[f"norm_{i}"]["scale"] + params[f"norm_{i}"]["bias"]
    x = x if i else x * (1 + erf(x / 2**0.5)) / 2
  return x


def test_the_whole_of_latent_mim_in_numpy():
  """Projectors after both encoders, whose output is not normalised again; the similarities' goal
  moves, and they are squared as means over the batch."""
  encoder, method, batch = whole_latent_mim()
  params, extra = method.init(jax.random.key(0), batch)
  same = jax.tree.map(np.array_equal, extra["teacher"], {k: params[k] for k in extra["teacher"]})
  assert set(extra["teacher"]) == {"encoder", "projector"} and all(jax.tree.leaves(same))
  rng = np.random.default_rng(2)
  params, extra = (
    jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), tree)
    for tree in (params, extra)
  )
  value, (_, metrics) = jax.jit(method.loss)(params, extra, batch, jax.random.key(1), 2)
  context, places = batch["context"][:, 0], batch["targets"][:, 0]
  seen = encoder.apply({"params": params["encoder"]}, batch["image"], keep=context)["tokens"]
  seen = projected(params["projector"], seen)
  head = CuedPredictor(16, 1, 2, 12, prefix=1)
  given = jnp.asarray(seen, jnp.float32), GRID, context, places
  pred = head.apply({"params": params["predictor"]}, *given)[:, 0]
  teacher = extra["teacher"]
  taught = encoder.apply({"params": teacher["encoder"]}, batch["image"], keep=places[:, 0])
  taught = projected(teacher["projector"], taught["patches"])
  expected, cosines = in_numpy(pred, seen[:, 1:], taught, goal=0.55, weight=0.5)
  assert float(value) == pytest.approx(expected, rel=1e-4)
  assert metrics["similarity_predicted"] == pytest.approx(np.mean(cosines["pred"]), rel=1e-4)
  assert metrics["similarity_seen"] == pytest.approx(np.mean(cosines["seen"]), rel=1e-4)
  assert np.std(cosines["pred"]) > 1e-3  # the mean of squares would be another number


def test_without_its_similarities_examples_of_latent_mim_do_not_meet():
  _, method, batch = whole_latent_mim(weight=0.0)
  params, extra = method.init(jax.random.key(0), batch)
  loss = jax.jit(lambda b: method.loss(params, extra, b, jax.random.key(1), 0)[0])
  alone = [loss({k: v[i : i + 1] for k, v in batch.items()}) for i in range(3)]
  assert loss(batch) == pytest.approx(np.mean(alone), rel=1e-5)
  assert method.embed is None  # microbatches need one pass


@pytest.mark.parametrize("settings", [dict(loss="info_nce"), dict(teacher_sees="targets")])
def test_what_needs_one_list_of_targets_says_so(settings):
  method, batch = method_and_batch(vit(**TINY), multiblock(GRID), **settings)
  with pytest.raises(ValueError, match="need one list of targets, not 4: .*clones=1"):
    method.init(jax.random.key(0), batch)


def test_noise_is_of_the_stated_size_and_changes_with_the_step_and_the_example():
  """The convolution's places that are not seen hold nothing but noise."""
  encoder = vit(**TINY)
  settings = dict(
    predictor="convolution", predictor_width=16, predictor_depth=1, predictor_groups=2
  )
  method, batch = method_and_batch(encoder, contexts(GRID, clones=2), noise=0.5, **settings)
  params, extra = method.init(jax.random.key(0), batch)
  loss = jax.jit(method.loss)
  first, second, again = (loss(params, extra, batch, jax.random.key(k), 0)[0] for k in (1, 2, 1))
  assert first == again and first != second
  still, _ = method_and_batch(encoder, contexts(GRID, clones=2), noise=0.0, **settings)
  quiet = [still.loss(params, extra, batch, jax.random.key(k), 0)[0] for k in (1, 2)]
  assert quiet[0] == quiet[1]


def test_collapse_shows_although_tokens_differ():
  """An encoder that says where a token is, and nothing of the picture, has no spread."""
  encoder = vit(**TINY, class_token=False, pool="mean")
  method, batch = method_and_batch(encoder, multiblock(GRID), predictor_width=16, predictor_depth=1)
  params, extra = method.init(jax.random.key(0), batch)
  blind = jax.tree.map(jnp.copy, extra)
  stem = blind["teacher"]["encoder"]["stem"]
  blind["teacher"]["encoder"]["stem"] = jax.tree.map(jnp.zeros_like, stem)
  loss = jax.jit(method.loss)
  seeing, collapsed = (loss(params, e, batch, jax.random.key(0), 0)[1][1] for e in (extra, blind))
  assert collapsed["std"] < 1e-3 < seeing["std"]
  assert collapsed["rank"] < 1.001 < seeing["rank"]


@pytest.mark.parametrize(
  ("encoder", "settings", "words"),
  [
    ({}, dict(loss="huber"), "is none of l1, l2, smooth_l1"),
    ({}, dict(evaluate="ema"), "is none of teacher, student"),
    ({}, dict(target_layers=2), "between 0 and the 1 blocks"),
    (dict(positions="relative"), {}, "positions are not relative"),
    ({}, dict(teacher_sees="context"), "is none of all, targets"),
    ({}, dict(loss="info_nce", class_weight=1.0), "tells places apart, and the class token is one"),
    (dict(class_token=False, pool="mean"), dict(class_weight=1.0), "needs encoder.class_token"),
    ({}, dict(target_layers=1, projector=(8,)), "is what the projector makes of the last layer"),
    ({}, dict(predictor="cued", noise=0.1), 'method.noise 0.1: the queries of .* "cued" have none'),
    ({}, dict(predictor="cross"), "is none of transformer, convolution, cued"),
    ({}, dict(predictor="cued", predictor_width=16, predictor_heads=3), "not divisible by 3 heads"),
  ],
)
def test_errors_say_what_is_wrong(encoder, settings, words):
  with pytest.raises(ValueError, match=words):
    latent_prediction(vit(**TINY | encoder), **settings)


def test_a_run_draws_scores_and_encodes_with_the_teacher(tmp_path):
  config = tiny.config(
    "ijepa", total_steps=2, batch_size=8, mesh=dict(devices=1), encoder=dict(depth=1),
    data=dict(source=tiny.images(16), eval_train="train", eval_test="train"),
    eval=dict(every=2, heldout=True, figures=True), schedule=dict(warmup_steps=1),
  )  # fmt: skip
  job = job_lib.assemble(config_lib.complete(config))
  assert dry_run.draw_batch(job, tmp_path).stat().st_size > 1000
  train.run(config, tmp_path / "run")
  assert (tmp_path / "run" / "figures" / "reconstructions.png").stat().st_size > 1000
  rows = records.read_metrics(tmp_path / "run" / "metrics.jsonl")
  assert any("eval/heldout/loss" in row for row in rows)
  assert all(np.isfinite(row["train/std"]) for row in rows if "train/std" in row)
  run = load(tmp_path / "run")
  teacher, student = run.extra["teacher"]["encoder"], run.params["encoder"]
  assert run.weights() is teacher
  differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), teacher, student)
  assert any(jax.tree.leaves(differ))
