"""Where arrays live: the placement rule, rows of the batch, and the same losses everywhere."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from ssljax import config as config_lib
from ssljax import hlo, sharding, train
from ssljax import job as job_lib
from ssljax.models import attention
from ssljax.models.vit import vit


def spec(shape, devices=8, placement="full", min_size=64, dtype="float32"):
  leaf = jax.ShapeDtypeStruct(shape, dtype)
  mesh = sharding.make_mesh(devices)
  found = sharding.state_shardings({"x": leaf}, mesh, placement=placement, min_size=min_size)
  return tuple(found["x"].spec)


@pytest.mark.parametrize(
  "shape, wanted",
  [
    ((32, 96), (None, "data")),  # the largest axis
    ((96, 32), ("data",)),
    ((32, 100), ("data",)),  # the largest is not divisible, the other is
    ((30, 100), ()),  # none is
    ((64,), ("data",)),
    ((56,), ()),  # fewer values than min_size
    ((12, 3072, 8), (None, "data")),
    ((16, 16), ("data",)),  # the first of equals
    ((), ()),
    ((0, 8), ()),
  ],
)
def test_the_placement_rule(shape, wanted):
  assert spec(shape) == wanted
  assert spec(shape, placement="replicated") == ()


def test_the_smallest_leaf_that_is_split():
  assert spec((8, 8), min_size=64) == ("data",) and spec((8, 8), min_size=65) == ()


def test_one_rule_for_parameters_moments_and_teacher():
  config = tiny.config("data2vec", mesh=dict(devices=8, state="full", min_size=64))
  state = job_lib.assemble(config_lib.complete(config)).state
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("block_0/mlp/fc1/kernel"):
      found[name.split("/")[0]] = leaf.sharding.spec
  assert set(found) == {"params", "extra", "opt"} and set(found.values()) == {P(None, "data")}
  per_device = sum(
    np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state) if x.size >= 64
  )
  whole = sum(x.size for x in jax.tree.leaves(state) if x.size >= 64)
  # 1/8 of everything but the relative-position tables [228 2], which eight does not divide.
  assert per_device < 0.14 * whole


@pytest.mark.parametrize(
  "size, accum, message",
  [
    (100, 1, "batch_size 100 is not divisible by 8 devices"),
    (16, 4, "batch_size 16 is not divisible by 8 devices × accum 4"),
    (12, 2, "batch_size 12 is not divisible by 8 devices"),
  ],
)
def test_batches_that_cannot_be_dealt_out(size, accum, message):
  with pytest.raises(ValueError, match=message):
    sharding.check_batch(size, sharding.make_mesh(8), accum)


def test_batches_that_can():
  for size, accum in ((8, 1), (64, 8), (96, 3)):
    sharding.check_batch(size, sharding.make_mesh(8), accum)


def test_meshes():
  assert sharding.make_mesh().size == 8 and sharding.make_mesh(2).size == 2
  for count, word in ((9, "more than the 8 devices there are"), (-1, "negative")):
    with pytest.raises(ValueError, match=f"mesh.devices {count} is {word}"):
      sharding.make_mesh(count)
  with pytest.raises(ValueError, match="mesh.state 'ful' is none of replicated, full"):
    spec((8, 8), placement="ful")


def test_every_device_holds_its_own_rows():
  mesh = sharding.make_mesh(4)
  assert sharding.local_rows(12, mesh).tolist() == list(range(12))
  batch = {"x": np.arange(24).reshape(12, 2), "y": np.arange(12) % 2 == 0}
  placed = sharding.to_global(batch, mesh, 12)
  for shard in placed["x"].addressable_shards:
    assert shard.data.shape == (3, 2)
    np.testing.assert_array_equal(shard.data, batch["x"][shard.index])
  np.testing.assert_array_equal(placed["x"], batch["x"])
  assert placed["y"].dtype == bool and placed["y"].sharding.spec == P("data")


@pytest.mark.parametrize("dtype", ["float64", "float32", "uint8", "uint16"])
def test_images_of_any_type_reach_the_step(dtype):
  """float64 is what NumPy makes of random images; the device holds it as float32."""
  image = tiny.images(16)["image"].astype(dtype)
  config = tiny.config(mesh=dict(devices=1))
  config["data"] |= dict(source={"image": image / image.max() if "float" in dtype else image})
  job = job_lib.assemble(config_lib.complete(config))
  with job.batches(0, steps=1) as batches:
    placed = sharding.to_global(next(batches), job.mesh, 16)
  assert {k: (v.shape, v.dtype) for k, v in placed.items()} == {
    k: (v.shape, v.dtype) for k, v in job.batch.items()
  }


def losses(**mesh):
  encoder = dict(scan=True, remat="full", drop_path=0.2)
  config = config_lib.complete(tiny.config(encoder=encoder, mesh=mesh | dict(min_size=64)))
  job = job_lib.assemble(config)
  found = []
  with jax.set_mesh(job.mesh), job.batches(0) as batches:
    state = train.start(job)
    step = train.compiled_step(job)
    for _ in range(3):
      state, metrics = step(state, sharding.to_global(next(batches), job.mesh, 16))
      found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
  return found


def test_replicated_and_sharded_agree_with_scan_and_rematerialisation():
  whole = losses(devices=2, state="replicated")
  np.testing.assert_allclose(losses(devices=2, state="full"), whole, rtol=1e-5)


MESHES: dict[str, dict] = {
  "one device": dict(devices=1),
  "replica": dict(state="full", replica=2),
  "tensor": dict(tensor=2),
  "all three": dict(state="full", replica=2, tensor=2),
}


@pytest.fixture(scope="module")
def reference():
  return losses(**MESHES["one device"])


@pytest.mark.parametrize(
  "name",
  [
    name if name == "all three" else pytest.param(name, marks=pytest.mark.slow)
    for name in MESHES
    if name != "one device"
  ],
)
def test_losses_are_those_of_one_device_on_every_mesh(name, reference):
  np.testing.assert_allclose(losses(**MESHES[name]), reference, rtol=2e-5)


@pytest.mark.parametrize(
  "leaf, shape, wanted",
  [
    ("attn/qkv/kernel", (64, 192), ("data", "tensor")),  # columns
    ("attn/qkv/bias", (192,), ("tensor",)),
    ("attn/proj/kernel", (64, 64), ("tensor", "data")),  # rows
    ("attn/proj/bias", (64,), ("data",)),
    ("mlp/fc1/kernel", (64, 256), ("data", "tensor")),
    ("mlp/fc2/kernel", (256, 64), ("tensor", "data")),
    ("norm1/scale", (64,), ("data",)),
    ("stem/kernel", (48, 64), (None, "data")),
  ],
)
def test_the_tensor_axis_splits_pairs_of_matrices(leaf, shape, wanted):
  tree = jax.ShapeDtypeStruct(shape, "float32")
  for key in reversed(leaf.split("/")):
    tree = {key: tree}
  mesh = sharding.make_mesh(tensor=2)
  assert dict(mesh.shape) == {"data": 4, "tensor": 2}
  found = sharding.state_shardings(tree, mesh, placement="full", min_size=1)
  assert tuple(jax.tree.leaves(found)[0].spec) == wanted
  kept = sharding.state_shardings(tree, mesh, placement="replicated", min_size=1)
  assert set(jax.tree.leaves(kept)[0].spec) <= {None, "tensor"}


def test_the_replica_axis_holds_whole_copies_and_shares_the_batch():
  mesh = sharding.make_mesh(replica=2)
  assert dict(mesh.shape) == {"replica": 2, "data": 4}
  found = sharding.state_shardings(
    {"x": jax.ShapeDtypeStruct((64, 64), "float32")}, mesh, placement="full", min_size=1
  )
  assert found["x"].shard_shape((64, 64)) == (16, 64)
  assert sharding.batch_sharding(mesh).shard_shape((16, 3)) == (2, 3)


def test_what_the_tensor_axis_sends():
  """The compiled gradient of a ViT whose blocks lie on two devices each: two sums of activations
  forward and two backward in every block (Shoeybi et al. 2019, 1909.08053), and no weight is
  gathered. What their layout would not need: the columns of `qkv` lie q, k, v and not by heads, so
  that a half of them is no half of the heads, and the activations are gathered once each way."""
  d, mesh = 64, sharding.make_mesh(tensor=2)
  encoder = vit(width=d, depth=2, heads=4, patch=(4, 4), scan=True)
  x = jax.ShapeDtypeStruct((16, 16, 16, 3), "float32", sharding=sharding.batch_sharding(mesh))
  params = jax.eval_shape(encoder.init, jax.random.key(0), x)["params"]
  where = sharding.state_shardings(params, mesh, placement="replicated", min_size=1)
  for name, split in (("attn/qkv", 1), ("attn/proj", 0), ("mlp/fc1", 1), ("mlp/fc2", 0)):
    part, layer = name.split("/")
    for block in ("block_0", "block_1"):
      kernel, place = (tree["blocks"][block][part][layer]["kernel"] for tree in (params, where))
      halved = [side // (2 if axis == split else 1) for axis, side in enumerate(kernel.shape)]
      assert list(place.shard_shape(kernel.shape)) == halved
  given = jax.tree.map(
    lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, where
  )

  def loss(params, x):
    return jnp.square(encoder.apply({"params": params}, x)["pooled"]).mean()

  with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(loss), out_shardings=where).lower(given, x).compile()
  program, found = hlo.parse(step.as_text()), collections.Counter()
  for name, count in hlo.times(program)[0].items():
    for one in program.computations.get(name, []):
      kind = one.op.removesuffix("-start")
      if kind in hlo.COLLECTIVES and hlo.group_size(one.rest, 8) == 2:
        found[kind, sum(n for _, n in hlo.pieces(one.type))] += count
  activations = (16 // 4) * 17 * d * 4  # bytes of the rows of one pair of devices
  assert found == {("all-reduce", activations): 8, ("all-gather", 3 * activations): 4}


@pytest.mark.parametrize(
  "mesh, message",
  [
    (dict(replica=3), "mesh.replica 3 does not divide 8 devices"),
    (dict(replica=2, tensor=8), "does not divide 8 devices"),
    (dict(tensor=0), "mesh.tensor 0 does not divide"),
  ],
)
def test_axes_that_do_not_divide_the_devices(mesh, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**mesh)


def test_heads_that_the_tensor_axis_does_not_divide():
  config = tiny.config(mesh=dict(tensor=4))
  with pytest.raises(ValueError, match="mesh.tensor 4 does not divide the 2 heads"):
    job_lib.assemble(config_lib.complete(config))


def test_a_batch_is_dealt_out_to_groups_of_devices():
  with pytest.raises(ValueError, match="batch_size 6 is not divisible by 4 groups of devices"):
    sharding.check_batch(6, sharding.make_mesh(tensor=2))
  sharding.check_batch(4, sharding.make_mesh(tensor=2))


def test_attention_follows_the_platform_that_is_compiled_for(monkeypatch):
  """Not that of this machine: a plan is made for a TPU where there is none."""
  taken = []

  def plain(q, k, v, **given):
    taken.append(given["implementation"])
    return q

  monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
  q = jnp.ones((2, 4, 2, 8), jnp.bfloat16)
  attention.attend(q, q, q, None)
  assert not taken
  monkeypatch.setattr(attention, "compiled_platform", lambda: "tpu")
  attention.attend(q, q, q, None)
  monkeypatch.setattr(attention, "compiled_platform", lambda: "gpu")
  attention.attend(q, q, q, None)  # no GPU is here that could say what it can do
  monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
  attention.attend(q, q, q, None)
  odd, bias = q[:, :3], jnp.zeros((1, 2, 3, 3), jnp.bfloat16)
  attention.attend(odd, odd, odd, bias)
  attention.attend(q.astype(jnp.float32), q, q, None)
  assert taken == ["xla", "xla", "cudnn", "xla", "xla"]


def test_the_platform_of_the_mesh_counts():
  with jax.set_mesh(sharding.make_mesh(2)):
    assert jax.jit(lambda x: (seen.append(attention.compiled_platform()), x)[1])(1) == 1
  assert seen == ["cpu"]


seen: list[str] = []
