"""Schedules at hand-computed points, the clip factor, and which parameters decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ssljax import config as config_lib
from ssljax import groups, optim, schedules
from ssljax import job as job_lib

EPOCH = 1_281_167 // 4096  # 312 steps


def at(schedule, steps):
  return [float(schedule(step)) for step in steps]


# Schedules


def test_mae_recipe():
  """1600 epochs of batch 4096: 1.5e-4·4096/256 after 40 epochs, half a cosine to 0."""
  total, warm = 1600 * EPOCH, 40 * EPOCH
  rate = schedules.warmup_cosine(total, 4096, base=1.5e-4, per=256, warmup_steps=warm)
  middle = warm + (total - warm) // 2
  third = warm + (total - warm) // 3
  wanted = [0, 1.2e-3, 2.4e-3, 1.2e-3, 1.8e-3, 0]
  found = at(rate, [0, warm // 2, warm, middle, third, total])
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)
  assert float(rate(total + 1000)) == pytest.approx(0, abs=1e-9)  # does not come up again
  assert float(rate(warm - 1)) == pytest.approx(2.4e-3 * (warm - 1) / warm)


def test_simmim_recipe():
  """800 epochs of batch 2048: 1e-4·2048/512 after 10 epochs from 2e-6, a tenth after epoch 700."""
  epoch = 1_281_167 // 2048
  rate = schedules.warmup_multistep(
    800 * epoch, 2048, base=1e-4, per=512, warmup_steps=10 * epoch, warmup_start=2e-6,
    milestones=(700 * epoch,), factor=0.1,
  )  # fmt: skip
  steps = [0, 5 * epoch, 10 * epoch, 700 * epoch - 1, 700 * epoch, 800 * epoch]
  np.testing.assert_allclose(at(rate, steps), [2e-6, 2.01e-4, 4e-4, 4e-4, 4e-5, 4e-5], rtol=1e-5)
  twice = schedules.warmup_multistep(100, 1, base=1.0, per=0, milestones=(10, 20), factor=0.5)
  assert at(twice, [9, 10, 20]) == [1, 0.5, 0.25]


def test_the_peak_itself_and_floors():
  rate = schedules.warmup_cosine(
    110, 7, base=2e-3, per=0, warmup_steps=10, warmup_start=1e-4, end=1e-5
  )
  found = at(rate, [0, 5, 10, 60, 110])
  np.testing.assert_allclose(found, [1e-4, 1.05e-3, 2e-3, 1.005e-3, 1e-5], rtol=1e-5)
  assert at(schedules.constant(10, 512, base=1e-3, per=256), [0, 9]) == pytest.approx([2e-3] * 2)
  assert at(schedules.warmup_cosine(10, 256, base=1.0), [0]) == [1]  # no warm-up: begins at the top


def test_a_stretched_cosine_is_the_beginning_of_a_longer_run():
  given = dict(base=1e-3, per=0, warmup_steps=15, warmup_start=2e-4, end=1e-6)
  steps = [0, 7, 15, 60, 100]
  long = at(schedules.warmup_cosine(125, 256, **given), steps)
  assert at(schedules.warmup_cosine(100, 256, stretch=1.25, **given), steps) == long
  with pytest.raises(ValueError, match="schedule.stretch 0.5 must be at least 1"):
    schedules.warmup_cosine(100, 256, stretch=0.5)


@pytest.mark.parametrize("make", [schedules.warmup_cosine, schedules.warmup_multistep])
@pytest.mark.parametrize("warm", [10, 11, -1])
def test_a_warm_up_as_long_as_the_run_is_an_error(make, warm):
  with pytest.raises(ValueError, match=f"warmup_steps {warm} must be less than total_steps 10"):
    make(10, 256, warmup_steps=warm)


def test_schedules_give_the_same_inside_jit():
  rate = schedules.warmup_cosine(1000, 256, base=1.0, warmup_steps=100, end=0.1)
  steps = jnp.array([0, 37, 100, 550, 1000])
  np.testing.assert_allclose(jax.jit(jax.vmap(rate))(steps), at(rate, steps), rtol=1e-6)


def test_moving_values():
  cosine = schedules.moving(dict(schedule="cosine", start=0.996, end=1.0), 100)
  np.testing.assert_allclose(at(cosine, [0, 50, 100, 200]), [0.996, 0.998, 1, 1], rtol=1e-6)
  linear = schedules.moving(dict(schedule="linear", start=0.0, end=1.0, steps=10), 100)
  np.testing.assert_allclose(at(linear, [0, 5, 10, 50]), [0, 0.5, 1, 1], rtol=1e-6)
  assert at(schedules.moving(0.25), [0, 9]) == [0.25, 0.25]
  assert schedules.moving(linear) is linear
  with pytest.raises(ValueError, match="needs the number of steps"):
    schedules.moving(dict(schedule="linear", start=0.0, end=1.0))


def test_moving_values_held_for_an_epoch():
  """DINO's teacher temperature: linspace(.04, .07, 30) over epochs of 7 steps, then constant."""
  spec = dict(schedule="linear", start=0.04, end=0.07, steps=29 * 7, every=7)
  found = at(schedules.moving(spec), range(0, 40 * 7, 3))
  each = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(10, 0.07)])
  np.testing.assert_allclose(found, each[np.arange(0, 280, 3) // 7], rtol=1e-5)
  with pytest.raises(ValueError, match="every must be a positive whole number"):
    schedules.moving(spec | dict(every=0))


# Clipping


def test_each_tensor_is_clipped_by_its_own_norm():
  grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]]), "c": jnp.zeros(2)}
  clipped, _ = optim.clip_tensor_norms(6.0).update(grads, optax.EmptyState())
  np.testing.assert_array_equal(clipped["a"], grads["a"])
  np.testing.assert_allclose(clipped["b"], 6.0, rtol=1e-6)
  np.testing.assert_array_equal(clipped["c"], 0)
  parts = {"encoder": grads, "head": {"d": jnp.array([5.0])}}  # of norm 13 and 5
  clipped, _ = optim.clip_part_norms(6.5).update(parts, optax.EmptyState())
  np.testing.assert_allclose(clipped["encoder"]["b"], 6.0, rtol=1e-6)
  np.testing.assert_array_equal(clipped["head"]["d"], 5.0)
  with pytest.raises(ValueError, match="clip_by 'block' is none of global, part, tensor"):
    optim.adamw(lambda step: 0.1, clip=1.0, clip_by="block")


@pytest.mark.parametrize(
  "limit, factor", [(1.0, 1 / (13 + 1e-6)), (6.5, 6.5 / (13 + 1e-6)), (14, 1)]
)
def test_the_clip_factor(limit, factor):
  grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}  # global norm 13
  tx = optim.clip_global_norm(limit)
  clipped, _ = tx.update(grads, tx.init(grads))
  for key in grads:
    np.testing.assert_allclose(clipped[key], grads[key] * np.float32(factor), rtol=1e-6)


def test_zero_gradients_stay_zero():
  tx = optim.clip_global_norm(1.0)
  clipped, _ = tx.update({"a": jnp.zeros(3)}, tx.init(None))
  np.testing.assert_array_equal(clipped["a"], np.zeros(3))


def test_no_clip_means_none():
  params = {"a": jnp.ones((2, 2))}
  grads = {"a": jnp.full((2, 2), 50.0)}

  def first_moment(clip):
    tx = optim.adamw(lambda step: 1.0, clip=clip)
    _, state = tx.update(grads, tx.init(params), params)
    return next(x for x in jax.tree.leaves(state) if x.shape == (2, 2))

  np.testing.assert_allclose(first_moment(0.0), 0.1 * 50, rtol=1e-4)  # b2 is 0.95, b1 0.9
  np.testing.assert_allclose(first_moment(1.0), 0.1 * 0.5, rtol=1e-4)  # norm 100 -> 1


# Decay


def decaying(method: str, **optimizer) -> dict[str, bool]:
  params = job_lib.assemble(config_lib.complete(tiny.config(method))).state.params
  mask = optim.decayed(params, **optimizer)
  leaves = jax.tree_util.tree_leaves_with_path(mask)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def test_what_decays_in_mae():
  found = decaying("mae")
  for name, decays in found.items():
    last = name.rsplit("/", 1)[-1]
    assert decays == (last in ("kernel", "cls_token", "mask_token")), name
  assert found["encoder/cls_token"] and found["decoder/mask_token"]
  assert not found["encoder/blocks/block_0/norm1/scale"] and not found["encoder/stem/bias"]


def test_what_decays_with_names_left_out():
  found = decaying("simmim", no_decay=("cls_token",))
  assert not found["encoder/cls_token"] and found["mask_token"] and found["encoder/relative_bias"]
  assert not found["encoder/blocks/block_0/scale1"]  # layer scale
  assert not decaying("data2vec", no_decay=("mask_token", "relative_bias"))["encoder/relative_bias"]


def test_registers_and_positions_decay_like_matrices():
  params = {"registers": jnp.ones((4, 8)), "positions": jnp.ones((9, 8)), "bias": jnp.ones(8)}
  assert optim.decayed(params) == {"registers": True, "positions": True, "bias": False}
  assert not optim.decayed(params, ("positions",))["positions"]


def test_decay_is_multiplied_by_the_rate_and_spares_the_rest():
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  grads = jax.tree.map(jnp.zeros_like, params)
  tx = optim.adamw(lambda step: 0.1 * (step + 1), weight_decay=0.5)
  state = tx.init(params)
  for rate in (0.1, 0.2):
    updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["kernel"], -rate * 0.5 * params["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], np.zeros(2))
    params = optax.apply_updates(params, updates)


def test_decay_may_follow_a_schedule():
  params = {"kernel": jnp.ones((2, 2))}
  tx = optim.adamw(lambda step: 0.1, weight_decay=lambda step: 0.5 * (step + 1))
  state = tx.init(params)
  for decay in (0.5, 1.0):
    updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * decay, rtol=1e-6)


def test_rates_fall_towards_the_stem():
  """DINOv2: .9 a layer, from the heads down, and a fifth of that for the patches' layer."""
  leaf = jnp.ones((2, 2))
  blocks = {f"block_{i}": {"attn": {"kernel": leaf}} for i in range(2)}
  encoder = {"stem": {"kernel": leaf}, "positions": leaf, "blocks": blocks, "norm": {"scale": leaf}}
  params = {"encoder": encoder, "head": {"kernel": leaf}, "mask_token": leaf[0]}
  tx = groups.layered(0.9, 0.2)
  found, _ = tx.update(params, tx.init(params), params)
  first = 0.9**3
  np.testing.assert_allclose(found["encoder"]["stem"]["kernel"], 0.2 * first, rtol=1e-6)
  np.testing.assert_allclose(found["encoder"]["positions"], first, rtol=1e-6)
  np.testing.assert_allclose(found["mask_token"], first, rtol=1e-6)
  for i, factor in enumerate((0.81, 0.9)):
    kernel = found["encoder"]["blocks"][f"block_{i}"]["attn"]["kernel"]
    np.testing.assert_allclose(kernel, factor, rtol=1e-6)
  np.testing.assert_array_equal(found["encoder"]["norm"]["scale"], 1)
  np.testing.assert_array_equal(found["head"]["kernel"], 1)


# Frozen for a while, and on the sphere

HEAD = {"head": {"last_layer": {"kernel": jnp.ones((3, 2))}, "mlp": jnp.ones((3, 2))}}


def frozen_run(how: str, make=optim.adamw, steps: int = 6, **given):
  """Parameters and states of six steps of gradients 1, the last layer being held for four; rates
  are 1, 2, … hundredths."""
  schedule = lambda step: 0.01 * (step + 1)  # noqa: E731
  by = {} if how == "" else dict(freeze_by=how)
  tx = make(schedule, freeze=("last_layer",), freeze_steps=4, **by, **given)
  params, found = HEAD, []
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(steps):
    updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    params = optax.apply_updates(params, updates)
    found.append((params["head"]["last_layer"]["kernel"], params["head"]["mlp"], state))
  return found


@pytest.mark.parametrize("how", ["gradient", "rate"])
def test_a_frozen_last_layer_stays_to_the_bit(how):
  found = frozen_run(how, weight_decay=0.5)
  for last, _, _ in found[:4]:
    np.testing.assert_array_equal(last, np.ones((3, 2)))
  assert np.abs(found[0][1] - 1).min() > 1e-3  # the others move
  assert (found[4][0] < 1 - 0.04).all()  # at the rate of the run, 0.05, not that of its own start


def test_without_a_gradient_moments_and_counter_wait():
  """The first update after the freeze has size 1·rate, as in PyTorch where there is no gradient;
  with moments that gather, gradients 1, 1, … give the same, gradients 0, then 1, do not."""
  found = frozen_run("gradient", weight_decay=0.0)
  moments = [x for x in jax.tree.leaves(found[3][2]) if x.shape == (3, 2)]
  assert sum(not np.asarray(x).any() for x in moments) == 2 and len(moments) == 4
  np.testing.assert_allclose(found[4][0], 1 - 0.05, rtol=1e-6)
  np.testing.assert_allclose(found[5][0], 1 - 0.05 - 0.06, rtol=1e-6)
  gathered = frozen_run("rate", weight_decay=0.0)[3][2]
  assert all(np.asarray(x).any() for x in jax.tree.leaves(gathered) if x.shape == (3, 2))


@pytest.mark.parametrize("make", [optim.lars, optim.sgd])
def test_momentum_waits_as_well(make):
  found = frozen_run("", make, weight_decay=0.0, momentum=0.9)
  np.testing.assert_array_equal(found[3][0], np.ones((3, 2)))
  plain, shifted = HEAD["head"]["mlp"], make(lambda step: 0.01 * (step + 5), weight_decay=0.0)
  state = shifted.init({"kernel": plain})
  for last, _, _ in found[4:]:
    updates, state = shifted.update({"kernel": jnp.ones((3, 2))}, state, {"kernel": plain})
    plain = optax.apply_updates({"kernel": plain}, updates)["kernel"]
    np.testing.assert_allclose(last, plain, rtol=1e-6)


@pytest.mark.parametrize("make", [optim.adamw, optim.lars, optim.sgd])
def test_prototypes_stay_on_the_sphere(make):
  rng = np.random.default_rng(0)
  start = rng.normal(size=(5, 3)).astype(np.float32)
  params = {"prototypes": {"kernel": start / np.linalg.norm(start, axis=0)}, "other": start}
  tx = make(lambda step: 0.1, unit=("prototypes",))
  plain = make(lambda step: 0.1)
  grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
  moved = optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
  free = optax.apply_updates(params, plain.update(grads, plain.init(params), params)[0])
  kernel = free["prototypes"]["kernel"]
  wanted = kernel / np.linalg.norm(kernel, axis=0)
  np.testing.assert_allclose(moved["prototypes"]["kernel"], wanted, atol=1e-6)
  np.testing.assert_array_equal(moved["other"], free["other"])


@pytest.mark.parametrize(
  "given, words",
  [
    (dict(freeze=("last",)), "freeze_steps 0 need each other"),
    (dict(freeze_steps=5), "need each other"),
    (dict(freeze=("a",), freeze_steps=5, freeze_by="name"), "freeze_by 'name' is none of"),
    (dict(freeze=("nothing",), freeze_steps=5), "optimizer.freeze nothing is in the name of no"),
    (dict(unit=("nothing",)), "optimizer.unit nothing is in the name of no"),
  ],
)
def test_mistakes_in_groups_are_named(given, words):
  with pytest.raises(ValueError, match=words):
    tx = optim.adamw(lambda step: 0.1, **given)
    tx.update(HEAD, tx.init(HEAD), HEAD)


# SGD and LARS


def lars_by_hand(steps, rate, trust, momentum, decay, inside, clip, vector_rate):
  """Kernel [2 2] and bias [2] after `steps`, gradients 1, 2, … times a fixed pattern."""
  p = {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]]), "bias": np.array([1.0, -1.0])}
  v = {k: np.zeros_like(x) for k, x in p.items()}
  for step in range(steps):
    for key, x in p.items():
      g = (step + 1) * np.cos(np.arange(x.size)).reshape(x.shape)
      lr = rate(step) * (vector_rate if key == "bias" else 1.0)
      if key == "kernel":
        g = g + decay * x
        ratio = trust * np.linalg.norm(x) / np.linalg.norm(g)
        if clip:
          ratio = min(ratio / rate(step), 1.0) if rate(step) > 0 else 1.0
        g = g * ratio
      v[key] = momentum * v[key] + (lr * g if inside else g)
      p[key] = x - (v[key] if inside else lr * v[key])
  return p


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("vector_rate", [1.0, 0.024])
def test_lars_against_its_formula(inside, clip, vector_rate):
  rate = schedules.warmup_cosine(12, 256, base=0.3, per=0, warmup_steps=3)
  trust = 0.2 if clip else 0.001
  tx = optim.lars(
    rate, momentum=0.9, weight_decay=0.1, trust=trust, clip_trust=clip, rate_inside=inside,
    vector_rate=vector_rate,
  )  # fmt: skip
  params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, -1.0])}
  state, update = tx.init(params), jax.jit(tx.update)
  for step in range(8):
    pattern = lambda x: (step + 1) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)  # noqa: B023, E731
    updates, state = update(jax.tree.map(pattern, params), state, params)
    params = optax.apply_updates(params, updates)
  wanted = lars_by_hand(8, lambda s: float(rate(s)), trust, 0.9, 0.1, inside, clip, vector_rate)
  for key, value in wanted.items():
    np.testing.assert_allclose(params[key], value, rtol=2e-5)


def test_lars_of_a_zero_gradient_moves_by_decay_alone_and_stays_finite():
  tx = optim.lars(schedules.constant(1, 1, base=1.0, per=0), weight_decay=0.0)
  params = {"kernel": jnp.zeros((2, 2)), "other": jnp.ones((2, 2))}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("vectors", [True, False])
def test_sgd_decays_what_it_says(vectors):
  rate = schedules.constant(1, 1, base=0.5, per=0)
  tx = optim.sgd(rate, momentum=0.0, weight_decay=0.1, decay_vectors=vectors)
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05)
  np.testing.assert_allclose(updates["bias"], -0.05 if vectors else 0.0)


# Groups


def test_groups_have_rates_and_decays_of_their_own():
  """Against each group's optimizer alone, over steps of a moving rate."""
  params = {"encoder": {"stem": {"w": jnp.ones((3, 2))}, "block": {"w": jnp.ones((3, 2))}}}
  params |= {"predictor": {"w": jnp.full((2, 2), 2.0)}, "probe": {"w": jnp.ones((2, 2))}}
  rate = schedules.warmup_cosine(10, 1, base=0.1, per=0, warmup_steps=2)
  groups = {
    "encoder": dict(weight_decay=0.5), "encoder/stem": dict(factor=0), "predictor": dict(hold=2),
    "probe": dict(factor=3.0),
  }  # fmt: skip
  tx = optim.sgd(rate, weight_decay=1e-2, groups=groups)
  alone = {
    "block": optim.sgd(rate, weight_decay=0.5),
    "predictor": optim.sgd(lambda step: 0.1, weight_decay=1e-2),
    "probe": optim.sgd(lambda step: 3 * rate(step), weight_decay=1e-2),
  }
  pick = lambda p: {"block": p["encoder"]["block"]} | {k: p[k] for k in ("predictor", "probe")}  # noqa: E731
  state, ours = tx.init(params), params
  theirs = pick(params)
  states = {k: tx.init(theirs[k]) for k, tx in alone.items()}
  for step in range(4):
    grads = jax.tree.map(lambda x: jnp.sin(x + step), ours)  # noqa: B023
    updates, state = tx.update(grads, state, ours)
    for name, one in alone.items():
      moved, states[name] = one.update(pick(grads)[name], states[name], theirs[name])
      theirs[name] = optax.apply_updates(theirs[name], moved)
    ours = optax.apply_updates(ours, updates)
    for a, b in zip(jax.tree.leaves(pick(ours)), jax.tree.leaves(theirs)):
      np.testing.assert_allclose(a, b, rtol=1e-6)
  np.testing.assert_array_equal(ours["encoder"]["stem"]["w"], params["encoder"]["stem"]["w"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_every_optimizer_has_groups_and_says_what_is_wrong(name):
  make = functools.partial(getattr(optim, name), lambda step: 0.1)
  params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
  tx = make(groups={"b": dict(factor=0)})
  updates, _ = tx.update(params, tx.init(params), params)
  assert not updates["b"].any() and updates["a"].all()
  with pytest.raises(ValueError, match="optimizer.groups.b: rate is none of factor, hold"):
    make(groups={"b": dict(rate=1.0)})
  with pytest.raises(ValueError, match="optimizer.groups: no parameter lies under c/d"):
    make(groups={"c/d": dict(factor=0)}).init(params)


def test_a_part_beside_the_others_leaves_them_alone():
  params = {"a": jnp.ones((2, 2)), "probe": jnp.ones(3)}
  grads = {"a": jnp.full((2, 2), 3.0), "probe": jnp.full(3, 100.0)}
  inner = optim.sgd(lambda step: 0.1, clip=1.0)
  tx = groups.beside(inner, probe=optax.sgd(1.0))
  updates, _ = tx.update(grads, tx.init(params), params)
  alone, _ = inner.update({"a": grads["a"]}, inner.init({"a": params["a"]}), {"a": params["a"]})
  np.testing.assert_array_equal(updates["a"], alone["a"])
  np.testing.assert_allclose(updates["probe"], -100.0)
