"""The plan: numbers by hand against its own, and what it says of steps that do not fit."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssljax import chips, flops, hlo, main, plan, topology, train
from ssljax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def load(name):
  return config_lib.plain(main.load_config(f"{ROOT}/configs/{name}"))


def planned(name, count=8, **mesh):
  config = load(name)
  config["mesh"] |= mesh
  return plan.planned_job(config, jax.devices()[:count])


# FLOPs


def blocks(tokens, width, depth, ratio=4):
  """Forward FLOPs of a stack on one example: projections, MLP, scores and weighted values."""
  return depth * (2 * tokens * width * width * (4 + 2 * ratio) + 4 * tokens * tokens * width)


def mae_by_hand(width, depth, patch, side, ratio, d_width, d_depth, channels=3):
  """Three times the forward pass, less the gradient in the pixels, which nobody asks for."""
  places = (side // patch) ** 2
  seen = int(places * (1 - ratio))
  values = patch * patch * channels
  stem = 2 * places * values * width
  encoder = blocks(seen + 1, width, depth)
  embed = 2 * (seen + 1) * width * d_width
  decoder = blocks(places + 1, d_width, d_depth)
  head = 2 * (places - seen) * d_width * values
  return 3 * (encoder + embed + decoder + head) + 2 * stem


def data2vec_by_hand(width, depth, side, patch):
  """The student thrice, the teacher once and its stem; all places are seen, the head at some."""
  places = (side // patch) ** 2
  stem = 2 * places * patch * patch * 3 * width
  return 4 * blocks(places, width, depth) + 3 * stem


HAND = {
  "mae_vitb.py:vitl16": mae_by_hand(1024, 24, 16, 224, 0.75, 512, 8),
  "mae_vitb.py:vitb16": mae_by_hand(768, 12, 16, 224, 0.75, 512, 8),
  "data2vec_vitb.py": data2vec_by_hand(768, 12, 224, 16),
}


@pytest.mark.parametrize("name", HAND)
def test_model_flops_are_those_of_a_hand_count(name):
  job = planned(name, devices=0)
  assert train.model_flops(job) / job.config["batch_size"] == pytest.approx(HAND[name], rel=0.02)


def test_what_is_computed_again_counts_as_executed_only():
  config = tiny.config(encoder=dict(remat="full", scan=True))
  config["data"]["views"] = dict(name="ssljax.data.views.crop_flip", size=(32, 32))
  found = plan.work(plan.planned_job(config, jax.devices()[:1]))
  plain = plan.work(plan.planned_job(tiny.config(), jax.devices()[:1]))
  assert found["model_flops_per_step"] == plain["executed_flops_per_step"]
  assert 1.2 < found["executed_flops_per_step"] / found["model_flops_per_step"] < 1.4


# Memory


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("mae_vitb.py:vitl16", marks=pytest.mark.slow),
    "mae_vitb.py:vitb16",
    pytest.param("data2vec_vitb.py", marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("state", ["full", "replicated"])
def test_bytes_of_a_device_are_those_of_the_placement_rule(name, state):
  job = planned(name, state=state)
  want = 0
  for leaf in jax.tree.leaves(job.state.params):
    split = state == "full" and leaf.size >= 65536 and any(s % 8 == 0 for s in leaf.shape)
    want += leaf.size * 4 // (8 if split else 1)
  assert plan.sizes(job, "cpu:8")["state_bytes_per_device"]["parameters"] == want


@pytest.fixture(scope="module")
def made():
  """The plan of a tiny step, its state sharded over eight devices, compiled once."""
  config = tiny.config(mesh=dict(state="full", min_size=64), dtype="bfloat16")
  return plan.plan(config, "cpu:8", hbm=1.0)


def test_the_plan_of_a_step(made):
  assert made["fits"] and made["mesh"] == {"data": 8} and made["memory_of_a_device"] == 2**30
  held = sum(made["state_bytes_per_device"].values())
  rows = 2 * (32 * 32 * 3 + 64 + 4 + 4)  # two examples: picture, hidden places, index, label
  assert made["memory"]["arguments"] == pytest.approx(held + rows, rel=0.02)
  assert made["peak_bytes"] > made["memory"]["arguments"] + made["memory"]["temporaries"]
  text = plan.table(made)
  for words in ("cpu:8: 8 × cpu", "all-gather", "matmul FLOPs", "Computed:", "Assumed", "1.00 GiB"):
    assert words in text, words
  assert {key.split()[0] for key in made["sent_bytes"]} >= {"all-gather", "all-reduce"}
  json.dumps(made)


def test_a_plan_with_every_time_in_it(made):
  """As for a chip that is known: the numbers of the roofline are those of the parts."""
  job = plan.planned_job(tiny.config(), jax.devices())
  found = made | {"device_kind": "TPU v5 lite"}
  found |= plan.roofline(found, job, chips.chip("TPU v5 lite"))
  found |= plan.estimate(found, job, 0.25)
  assert found["seconds"]["memory"] == found["memory_traffic_bytes"] / 819e9
  assert found["seconds"]["links"] == sum(found["sent_bytes"].values()) / 50e9
  assert found["seconds"]["compute"] > 0 and found["bound_by"] in found["seconds"]
  assert found["step_seconds"] >= max(found["seconds"].values())
  assert found["chip_hours"] == pytest.approx(found["step_seconds"] * 6 * 8 / 3600)
  assert "<- the bound" in plan.table(found) and "chip-hours" in plan.table(found)


@pytest.mark.parametrize("jump, best", [(0, 90), (40, 85)])
def test_the_largest_batch(made, monkeypatch, jump, best):
  """Memory grows by 10 an example above 100; past 88 the compiler may need 40 more."""
  compiled = []

  def fake(job, room):
    b = job.config["batch_size"] // 8
    compiled.append(b)
    peak = 100 + 10 * b + jump * (b > 88)
    return {"peak_bytes": peak, "fits": peak <= room}

  monkeypatch.setattr(plan, "compiled", fake)
  config = tiny.config()
  found = plan.largest_batch(config, jax.devices(), 1000, made | {"peak_bytes": 120})
  assert found["batch_per_device"] == best and found["batch_size"] == 8 * best
  assert len(compiled) <= 3  # the step that was planned is one of the two


def test_no_batch_that_fits(made, monkeypatch):
  monkeypatch.setattr(plan, "compiled", lambda job, room: {"peak_bytes": 5e3, "fits": False})
  given = made | {"peak_bytes": 9e3, "fits": False}
  found = plan.largest_batch(tiny.config(), jax.devices(), 1000, given)
  assert found["batch_per_device"] == 0
  text = plan.table(given | {"fit": found})
  assert "DOES NOT FIT: a batch of 16" in text and "none was found" in text
  with pytest.raises(ValueError, match="is not known: give --hbm"):
    plan.largest_batch(tiny.config(), jax.devices(), 0, made)


def test_the_compilers_own_words_on_memory():
  message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.80G of 15.75G hbm."
  assert plan.oom(message) == 19.8 * 2**30
  assert plan.oom("RESOURCE_EXHAUSTED: something else") == float("inf")
  assert plan.oom("INVALID_ARGUMENT: no such thing") is None


# Communication


def compiled_text(function, *specs, shape=(64, 64), dtype="float32", out=None):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  given = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for spec in specs]
  out = None if out is None else NamedSharding(mesh, out)
  return jax.jit(function, out_shardings=out).lower(*given).compile().as_text()


def test_bytes_of_collectives_whose_number_is_known():
  whole = 64 * 64 * 4
  gathered = compiled_text(lambda x: x * 2, P("data"), out=P())
  assert hlo.collectives(gathered, 8) == {("all-gather", "f32"): whole * 7 / 8}
  summed = compiled_text(lambda x: x.sum(0), P("data"), out=P())
  assert hlo.collectives(summed, 8) == {("all-reduce", "f32"): 2 * 64 * 4 * 7 / 8}
  turned = compiled_text(lambda x: x + 1, P("data"), out=P(None, "data"))
  assert hlo.collectives(turned, 8) == {("all-to-all", "f32"): whole / 8 * 7 / 8}


def test_collectives_in_loops_count_as_often_as_they_run():
  def loop(x):
    step = lambda c, _: (jnp.tanh(c @ x), None)  # noqa: E731
    return jax.lax.scan(step, x, length=5)[0]

  once = hlo.collectives(compiled_text(lambda x: jnp.tanh(x @ x), P("data")), 8)
  found = hlo.collectives(compiled_text(loop, P("data")), 8)
  assert sum(found.values()) in (5 * sum(once.values()), sum(once.values()))  # or it was hoisted
  outer = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(24)
  %p = (s32[], f32[8]{0:T(128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}
%gather (q: bf16[64]) -> bf16[512] {
  %q = bf16[64]{0} parameter(0)
  ROOT %g = bf16[512]{0} all-gather(%q), channel_id=7, replica_groups=mesh['a'=8,'b'=2] {'a'}, \
frontend_attributes={chain_id="0"}
}
%all-reduce-scatter.1 (q: bf16[512]) -> bf16[64] {
  %q = bf16[512]{0} parameter(0)
  ROOT %r = bf16[512]{0} all-reduce(%q), channel_id=8, replica_groups=[2,8]<=[16], to_apply=%add
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = bf16[64]{0} fusion(%p), kind=kLoop, calls=%gather
  %y = bf16[64]{0} fusion(%p), kind=kLoop, calls=%gather2
  %z = bf16[64]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], f32[8]{0}) tuple(%p)
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%body
  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %d = f32[8]{0} all-gather-done(%s)
}
"""
  assert hlo.collectives(outer.replace("%gather2", "%gather"), 16) == {
    ("all-gather", "bf16"): 2 * 24 * 1024 * 7 / 8,
    ("reduce-scatter", "bf16"): 24 * 1024 * 7 / 8,
    ("all-gather", "f32"): pytest.approx(256 * 7 / 8, abs=1),
  }


def test_the_gradients_of_a_replicated_state_are_summed_once():
  params = sum(
    x.size for x in jax.tree.leaves(plan.planned_job(tiny.config(), jax.devices()).state.params)
  )
  found = plan.plan(tiny.config(), "cpu:8")
  assert found["sent_bytes"]["all-reduce f32"] == pytest.approx(2 * 4 * params * 7 / 8, rel=0.02)


def test_memory_traffic_of_a_program_that_is_known():
  """A product of 256 × 256 reads two operands and writes one; a loop of ten does so ten times."""
  one = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  product = jax.jit(lambda a, b: a @ b).lower(one, one).compile().as_text()
  assert hlo.traffic(product) == 3 * 256 * 256 * 4

  def loop(a, stack):
    return jax.lax.scan(lambda c, w: (c @ w, None), a, stack)[0]

  stack = jax.ShapeDtypeStruct((10, 256, 256), jnp.float32)
  text = jax.jit(loop).lower(one, stack).compile().as_text()
  # At least operands and result of ten products; slices of the stack and the carry are copied, too.
  assert 30 <= hlo.traffic(text) / (256 * 256 * 4) <= 80


@pytest.mark.parametrize(
  "groups, wanted",
  [
    ("{{0,1,2,3},{4,5,6,7}}", 4),
    ("[4,2]<=[8]", 2),
    ("[2,4]<=[4,2]T(1,0)", 4),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", 2),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
    ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 2),
    ("{}", 8),
  ],
)
def test_sizes_of_groups_as_the_compiler_writes_them(groups, wanted):
  rest = f", channel_id=1, replica_groups={groups}, dimensions={{1}}, use_global_device_ids=true"
  assert hlo.group_size(rest, 8) == wanted


# Topologies and chips


@pytest.mark.parametrize("name", ["v5e", "v5e:", "tpu:8", "v5e:axb", "gpu:8", "cpu:x"])
def test_a_topology_that_is_none_is_one_line(name):
  with pytest.raises(ValueError, match="is not like v5e:16x16"):
    topology.topology_devices(name)


def test_more_cpu_devices_than_there_are():
  jax.devices()  # JAX has begun: later the number of its CPU devices cannot change
  with pytest.raises(ValueError, match="JAX has begun with 8"):
    topology.topology_devices("cpu:9")


def test_chips_and_their_links():
  assert chips.chip("TPU v5 lite").name == "TPU v5 lite" and chips.chip("TPU v5").hbm == 95.0
  assert chips.chip("TPU v5p").name == "TPU v5" and chips.chip("cpu") is None
  assert all(flops.device_peak_flops(chip.name) for chip in chips.CHIPS)

  class Device:
    def __init__(self, *coords):
      self.coords = coords

  square = [Device(x, y, 0) for x in range(16) for y in range(16)]
  assert chips.links(square, 16) == 4 and chips.links(square[:16], 16) == 2
  assert chips.links([Device(x, y, 0) for x in range(2) for y in range(4)], 16) == 2
  assert (
    chips.links([Device(x, y, z) for x in range(4) for y in range(4) for z in range(4)], 4) == 6
  )
  assert chips.links(square, 0) == 1


@pytest.mark.parametrize("name", FILES)
def test_every_config_can_be_planned(name, monkeypatch):
  """Without its data and without compiling."""
  monkeypatch.setattr(train, "compiled_step", lambda job: pytest.fail("compiled"))
  job = plan.planned_job(load(name), jax.devices()[:2])
  found = plan.sizes(job, "cpu:2")
  assert found["parameters"] > 10_000 and found["mesh"] == {"data": 2}


def test_the_command(tmp_path, capsys):
  (tmp_path / "conf.py").write_text(
    "import tiny\ndef get_config():\n"
    "  return tiny.config(data=dict(source='tfds:nowhere', eval_train='', eval_test='',"
    " views=dict(name='ssljax.data.views.crop_flip', size=(32, 32))))\n"
  )
  arguments = [f"--config={tmp_path}/conf.py", "--topology=cpu:2"]
  assert plan.main([*arguments, f"--json={tmp_path}/plan.json", "--hbm=1"]) == 0
  assert json.loads((tmp_path / "plan.json").read_text())["batch_size"] == 16
  assert plan.main([*arguments, "--hbm=0.0001"]) == plan.DOES_NOT_FIT
  assert "DOES NOT FIT" in capsys.readouterr().out
  assert plan.main([*arguments, "--config.batch_size=15"]) == 1
  assert "batch_size 15 is not divisible by 2 devices" in capsys.readouterr().err


def test_a_tiny_step_for_a_tpu():
  """In a process of its own: libtpu stays loaded, and its compiler does not like forks."""
  if not importlib.util.find_spec("libtpu") and "TPU_LIBRARY_PATH" not in os.environ:
    pytest.skip("libtpu is not installed: pip install 'ssljax[tpu]'")
  script = (
    "import json, sys, tiny\nfrom ssljax import plan\nimport jax\n"
    "jax.config.update('jax_platforms', 'cpu')\n"
    "config = tiny.config(mesh=dict(state='full', min_size=64), dtype='bfloat16',"
    " encoder=dict(depth=1))\n"
    "found = plan.plan(config, 'v5e:2x2')\nprint(plan.table(found))\n"
    "json.dump(found, open(sys.argv[1], 'w'))\n"
  )
  import tempfile

  with tempfile.TemporaryDirectory() as folder:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", script, f"{folder}/plan.json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(pathlib.Path(folder, "plan.json").read_text())
  assert found["fits"] and found["device_kind"] == "TPU v5 lite" and found["mesh"] == {"data": 4}
  assert found["bound_by"] in ("compute", "memory", "links") and found["chip_hours"] > 0
  kinds = {kind.split()[0] for kind in found["sent_bytes"]}
  assert "all-gather" in kinds and "<- the bound" in done.stdout
  # Weights are gathered as bfloat16, not as the float32 that they are kept in. In float32 are the
  # features [16 32] of whose spread the step tells, three quarters of them from other chips.
  assert np.isclose(found["sent_bytes"].get("all-gather f32", 0.0), 16 * 32 * 4 * 3 / 4)
