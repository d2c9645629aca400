"""DINO, iBOT and DINOv2: whole steps against their formulas in NumPy, and what the config refuses.

The encoder's features are taken as given (it has tests of its own); heads, targets, losses, centres
and the teacher's average are written again, in float64. Gradients are compared with differences of
that loss along a random direction of the heads.
"""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import evaluate, train
from ssljax import job as job_lib
from ssljax.methods.self_distillation import self_distillation
from ssljax.models.vit import vit
from ssljax.step import init_state, train_step

B, K, MOST = 6, 7, 3
WEIGHTS = dict(student_temperature=0.1, teacher_temperature=0.05, momentum=0.8)
HEAD = dict(prototypes=K, head_hidden=12, head_bottleneck=5, head_start="torch")
KINDS = {
  "dino": {},
  "ibot": dict(patch_weight=0.5, patch_temperature=0.06),
  "attmask": dict(patch_weight=1.0, hide="attended"),
  "dinov2": dict(
    patch_weight=1.0, patch_head="separate", patch_prototypes=9, patch_center="hidden",
    koleo_weight=0.1, head_gain="trained",
  ),
  "dinov2 sinkhorn": dict(
    patch_weight=1.0, patch_head="separate", koleo_weight=0.1, balance="sinkhorn"
  ),
}  # fmt: skip


def batch(hidden: bool):
  rng = np.random.default_rng(0)
  made = {
    "global": rng.normal(size=(B, 2, 12, 8, 3)).astype(np.float32),
    "local": rng.normal(size=(B, 3, 8, 8, 3)).astype(np.float32),
    "index": np.arange(B, dtype=np.int32) + 5,
  }
  if hidden:
    count = np.array([[0, 3], [1, 2], [3, 3], [0, 0], [2, 0], [1, 3]])
    made["hidden"] = np.argsort(rng.random((B, 2, 6)), axis=-1) < count[..., None]
  return made


@functools.cache
def built(kind: str):
  """Encoder, method, batch, and a state whose teacher and centres are not those of the start."""
  encoder = vit(width=16, depth=1, heads=2, patch=(4, 4), init_kernels="normal")
  count = MOST if "patch_weight" in KINDS[kind] else 0
  method = self_distillation(encoder, B, count, **HEAD, **WEIGHTS, **KINDS[kind])
  one = batch(bool(count))
  state = init_state(method, optax.sgd(0.1), one, 0)
  other = init_state(method, optax.sgd(0.1), one, 1)
  extra = dict(other.extra)
  if "center" in extra:
    names = sorted(extra["center"])
    extra["center"] = {n: 0.3 * jnp.sin(jnp.arange(len(extra["center"][n])) + i)
                       for i, n in enumerate(names)}  # fmt: skip
  if count:
    state.params["mask_token"] = 0.5 * jnp.cos(jnp.arange(16.0))
  return encoder, method, one, state._replace(extra=extra)


def merged(x):
  return x.reshape(-1, *x.shape[2:])


def features(encoder, params, one, mask_token=None):
  """Pooled features of the views [b v d] and the global views' patches [b 2 n d], float64."""
  given = {}
  if mask_token is not None:
    given = dict(hidden=merged(one["hidden"]), mask_token=mask_token)
  out = encoder.apply({"params": params}, merged(one["global"]), **given)
  small = encoder.apply({"params": params}, merged(one["local"]))
  pooled = [np.float64(x["pooled"]).reshape(B, -1, 16) for x in (out, small)]
  return np.concatenate(pooled, 1), np.float64(out["patches"]).reshape(B, 2, -1, 16)


def head(p, x):
  for i in range(3):
    layer = p["mlp"][f"layer_{i}"]
    x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    if i < 2:
      x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  x = x / np.linalg.norm(x, axis=-1, keepdims=True)
  kernel = np.float64(p["last_layer"]["kernel"])
  scores = x @ (kernel / np.linalg.norm(kernel, axis=0))
  return scores * np.float64(p.get("last_layer_gain", 1.0))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def sinkhorn(scores, temperature):
  """Rows [n k]: three times prototypes to n/k, then rows to 1."""
  q = np.exp((scores - scores.max()) / temperature)
  for _ in range(3):
    q = q / q.sum(0) * (len(q) / q.shape[1])
    q = q / q.sum(1, keepdims=True)
  return q


def cross_entropy(q, scores):
  return -(q * np.log(softmax(scores / 0.1))).sum(-1)


def reference(kind, state, one, student, taught, params):
  """Loss by the cards' formulas, and the means that the centres move towards."""
  given, extra = KINDS[kind], state.extra
  center = jax.tree.map(np.float64, extra.get("center", {}))
  scores = head(params["head"], student[0])
  teacher = head(extra["teacher"]["head"], taught[0][:, :2])
  if center:
    q = softmax((teacher - center["views"]) / 0.05)
  else:
    q = sinkhorn(merged(teacher), 0.05).reshape(teacher.shape)
  terms = [
    cross_entropy(q[:, i], scores[:, j]).mean() for i in range(2) for j in range(5) if i != j
  ]
  loss, means = np.sum(terms) / 8, {"views": teacher.mean((0, 1))}
  if "patch_weight" in given:
    name = "patch_head" if given.get("patch_head") == "separate" else "head"
    wanted, hidden = head(extra["teacher"][name], taught[1]), one["hidden"]
    heat = given.get("patch_temperature", 0.05)
    if center:
      q = softmax((wanted - center["patches"]) / heat)
    else:
      q = np.zeros_like(wanted)
      q[hidden] = sinkhorn(wanted[hidden], heat)
    errors = cross_entropy(q, head(params[name], student[1])) * hidden
    each = errors.sum(-1) / np.maximum(hidden.sum(-1), 1)
    loss += given["patch_weight"] * each.mean()
    whole = given.get("patch_center", "all") == "all"
    means["patches"] = (wanted if whole else wanted[hidden][None, None]).mean((0, 1, 2))
  if "koleo_weight" in given:
    for view in range(2):
      x = student[0][:, view] / np.linalg.norm(student[0][:, view], axis=-1, keepdims=True)
      near = (x @ x.T - 3 * np.eye(B)).argmax(1)
      distance = np.linalg.norm(x - x[near] + 1e-8, axis=-1)
      loss -= given["koleo_weight"] * np.log(distance + 1e-8).mean()
  return loss, means


def attended(encoder, params, one):
  """As many places of each global view, those that the class token attends to most."""
  out = encoder.apply({"params": params}, merged(one["global"]), attention_layers=(0,))
  scores = np.float64(out["attention_0"])[..., 1:].mean(1).reshape(one["hidden"].shape)
  rank = (scores[..., None, :] > scores[..., None]).sum(-1)
  return one | {"hidden": rank < one["hidden"].sum(-1, keepdims=True)}


@functools.cache
def stepped(kind):
  encoder, method, one, state = built(kind)
  step = jax.jit(functools.partial(train_step, method, optax.sgd(0.1), 1))
  after, metrics = step(state, one)
  if "hide" in KINDS[kind]:
    drawn = one["hidden"]
    one = attended(encoder, state.extra["teacher"]["encoder"], one)
    assert (one["hidden"] != drawn).any()
  token = state.params.get("mask_token")
  student = features(encoder, state.params["encoder"], one, token)
  taught = features(encoder, state.extra["teacher"]["encoder"], one)
  return one, state, after, metrics, student, taught


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_formulas(kind):
  one, state, after, metrics, student, taught = stepped(kind)
  loss, means = reference(kind, state, one, student, taught, state.params)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
  assert ("center" in state.extra) == (kind != "dinov2 sinkhorn")
  for name, old in state.extra.get("center", {}).items():
    wanted = 0.9 * np.float64(old) + 0.1 * means[name]
    np.testing.assert_allclose(after.extra["center"][name], wanted, atol=2e-6)
  # The teacher follows what the step has made of the student; the mask token is the student's.
  assert set(after.extra["teacher"]) == set(state.params) - {"mask_token"}
  for name, old in state.extra["teacher"].items():
    pairs = (old, after.params[name], after.extra["teacher"][name])
    for a, b, c in zip(*map(jax.tree.leaves, pairs)):
      np.testing.assert_allclose(c, 0.8 * a + 0.2 * b, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_differences_of_the_formulas(kind):
  """Along a random direction of all heads; the step was one of plain descent at rate 0.1."""
  one, state, after, _, student, taught = stepped(kind)
  names = [n for n in state.params if n.endswith("head")]
  rng = np.random.default_rng(1)
  heads = {n: jax.tree.map(np.float64, state.params[n]) for n in names}
  way = jax.tree.map(lambda x: rng.normal(size=x.shape), heads)

  def at(h):
    moved = jax.tree.map(lambda x, d: x + h * d, heads, way)
    return reference(kind, state, one, student, taught, moved)[0]

  grads = jax.tree.map(lambda a, b: (a - b) / 0.1, state.params, after.params)
  ours = sum(
    (np.float64(g) * d).sum()
    for g, d in zip(*(jax.tree.leaves(x) for x in ({n: grads[n] for n in names}, way)))
  )
  np.testing.assert_allclose(ours, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=2e-3)
  assert np.abs(grads["encoder"]["stem"]["kernel"]).max() > 1e-6
  if "mask_token" in grads:
    assert np.abs(grads["mask_token"]).max() > 1e-6


def test_without_patches_ibot_is_dino():
  """λ₂ = 0: the same loss and the same student as DINO's, to the bit."""
  encoder, _, one, state = built("dino")
  method = self_distillation(encoder, B, MOST, **HEAD, **WEIGHTS, patch_weight=1e-30)
  given = batch(True)
  given["hidden"] = np.zeros_like(given["hidden"])
  extra = dict(state.extra) | {"center": dict(state.extra["center"], patches=jnp.zeros(K))}
  params = dict(state.params) | {"mask_token": jnp.zeros(16)}
  loss, _ = jax.jit(method.loss)(params, extra, given, state.rng, 0)
  plain, _ = jax.jit(built("dino")[1].loss)(state.params, state.extra, one, state.rng, 0)
  assert float(loss) == float(plain)


def test_no_hidden_place_gives_patches_no_gradient():
  _, method, one, state = built("ibot")
  one = dict(one, hidden=np.zeros_like(one["hidden"]))
  loss = jax.jit(jax.grad(lambda p: method.loss(p, state.extra, one, state.rng, 0)[0]))
  assert not np.asarray(loss(state.params)["mask_token"]).any()
  stats = method.loss(state.params, state.extra, one, state.rng, 0)[1][0]
  after = method.update(state.params, state.extra, stats, 0)
  for x in jax.tree.leaves(after):
    assert np.isfinite(x).all()


def test_the_loss_starts_near_log_k():
  """Of many prototypes and a teacher that is the student: 11.09 for 65536, 5.55 for 256."""
  encoder = built("dino")[0]
  method = self_distillation(encoder, B, prototypes=256, head_start="torch", head_hidden=32)
  state = init_state(method, optax.sgd(0.1), batch(False), 0)
  # At temperature 1 scores are nearly equal.
  extra = dict(state.extra)
  loss = self_distillation(
    encoder, B, prototypes=256, head_start="torch", head_hidden=32, student_temperature=10.0,
    teacher_temperature=10.0,
  ).loss  # fmt: skip
  found = loss(state.params, extra, batch(False), state.rng, 0)[0]
  np.testing.assert_allclose(found, math.log(256), rtol=1e-3)


def test_local_views_read_learned_positions():
  """Between those of the global views; without the option the mistake is named."""
  encoder = vit(width=16, depth=1, heads=2, patch=(4, 4), positions="learned",
                positions_size=(16, 16), positions_resize="offset")  # fmt: skip
  params = encoder.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  assert params["positions"].shape == (16, 16)
  params["positions"] = jnp.ones((16, 16)) * jnp.arange(16.0)
  small = jnp.ones((1, 8, 8, 3))
  found = encoder.apply({"params": params}, small)["patches"]
  assert found.shape == (1, 4, 16)
  # A table of equal rows reads the same at any size.
  np.testing.assert_allclose(found[0, 0], found[0, 3], atol=1e-5)
  strict = vit(width=16, depth=1, heads=2, patch=(4, 4), positions="learned")
  with pytest.raises(ValueError, match="grid .2, 2. have no place in the 16 learned positions"):
    strict.apply({"params": params}, small)
  with pytest.raises(ValueError, match='positions_size needs encoder.positions="learned"'):
    vit(positions_size=(16, 16))


def test_drop_path_may_be_uniform_over_depth():
  from ssljax.models.layers import drop_path

  keys = jax.random.split(jax.random.key(0), 2000)
  for rule, rates in (("linear", [0.0, 0.2, 0.4]), ("uniform", [0.4] * 3)):
    found = drop_path(keys, 0.4, 3, 2000, rule)
    np.testing.assert_allclose((found == 0).mean((1, 2)), rates, atol=0.03)
    np.testing.assert_allclose(found.mean((1, 2)), 1, atol=0.03)


def test_multi_crop_may_be_made_in_the_step():
  """The step is given whole pictures; what it makes of them is the loss's batch."""
  given = tiny.config("ibot", data=dict(views_on="device"))
  built = job_lib.assemble(config_lib.complete(given))
  assert set(built.given) == {"image", "index", "label", "hidden"}
  shapes = {leaf: built.batch[leaf].shape for leaf in ("global", "local", "hidden")}
  assert shapes == {
    "global": (16, 2, 32, 32, 3), "local": (16, 2, 16, 16, 3), "hidden": (16, 2, 64)
  }  # fmt: skip
  assert built.image.shape == (32, 32, 3) and built.grid == (8, 8)


@pytest.mark.slow
def test_the_heldout_loss_sees_all_views(tmp_path):
  """Global and local views and hidden places of epoch 0, in whole batches of the test split."""
  pytest.importorskip("tensorflow")
  given = tiny.config("ibot", eval=dict(every=6, figures=True))
  given["data"] |= dict(eval_train="train", eval_test="train[:42]")
  built = job_lib.assemble(config_lib.complete(given))
  evaluation = evaluate.Evaluation(built, tmp_path, log=lambda line: None)
  state = init_state(built.method, built.tx, built.batch, 0)
  wanted = []
  with built.examples(evaluation.test, hidden=True, views=built.views) as batches:
    for one in batches:
      if one["valid"].all():
        loss = built.method.loss(state.params, state.extra, one, jax.random.key(0), 0)
        wanted.append(loss[0])
  assert len(wanted) == 2
  found = evaluation(state, 6)
  assert found["eval/heldout/loss"] == pytest.approx(np.mean(wanted), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, frozen", [("dino", "last_layer"), ("swav_queue", "prototypes")])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path, name, frozen):
  """Teacher, centre, queue, and an optimizer whose last layer wakes up after the resumption."""
  pytest.importorskip("tensorflow")
  given = tiny.config(name, total_steps=6, mesh=dict(devices=1), checkpoint=dict(keep=4))
  given["optimizer"] |= dict(freeze=(frozen,), freeze_steps=4)

  def last():
    train.run(given, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]

  whole = last()
  for step in (4, 6):
    shutil.rmtree(tmp_path / "checkpoints" / str(step))
  assert last() == whole and len(whole) == 6


def changed(name, **changes):
  given = tiny.config(name)
  for key, value in changes.items():
    part, _, last = key.partition("__")
    given[part][last] = value
  return given


@pytest.mark.parametrize(
  "name, changes, words",
  [
    ("dino", dict(method__prototypes=1), "method.prototypes 1.*needs two or more"),
    ("dino", dict(method__patch_prototypes=8), 'needs method.patch_head "separate"'),
    ("dino", dict(method__balance="mean"), "method.balance 'mean' is none of center, sinkhorn"),
    ("dino", dict(data__views=tiny.PAIR), "needs global in the batch.*multi_crop"),
    ("dino", dict(method__patch_weight=1.0), "data.hidden=dict.*view_blocks"),
    ("dino", dict(data__channels=5, data__source={"image": np.zeros((64, 32, 32, 5), np.uint8)}),
     "colour jitter needs RGB images, but channels is 5"),
    ("dino", dict(encoder__positions_size=()), "have no place in the 64 learned positions"),
    ("dino", dict(data__views=tiny.CROPS | dict(local_size=(18, 18))), "18 .axis 0. is not div"),
    ("ibot", dict(data__hidden=dict(name="ssljax.data.masking.block", count=9)), "view_blocks"),
    ("attmask", dict(method__hide="high"), "method.hide 'high' is none of drawn, attended"),
    ("attmask", dict(encoder__class_token=False, encoder__pool="mean"), "with class_token=True"),
    ("ibot", dict(method__patch_weight=0.0), "data.hidden hides places that method.patch_weight"),
    ("dino_resnet", dict(method__patch_weight=1.0, data__hidden=dict(
      name="ssljax.data.masking.view_blocks")), "needs an encoder of patches"),
    ("swav", dict(method__prototypes=1), "method.prototypes 1: an assignment needs two"),
    ("swav", dict(method__queue=8), "method.queue 8 is smaller than a batch, 16"),
    ("swav", dict(method__queue=65), "method.queue 65 is larger than the 64 examples"),
    ("swav", dict(method__projector=()), "method.projector needs one layer"),
  ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_compiled(name, changes, words):
  pytest.importorskip("tensorflow")
  with pytest.raises(ValueError, match=words):
    job_lib.assemble(config_lib.complete(changed(name, **changes)))


@pytest.mark.parametrize("name", ["dinov2", "swav"])
def test_a_batch_of_one_is_refused_where_examples_meet(name):
  given = tiny.config(name, batch_size=1)
  given["mesh"] = dict(devices=1)
  with pytest.raises(ValueError, match="batch_size 1: .*two examples or more"):
    job_lib.assemble(config_lib.complete(given))
