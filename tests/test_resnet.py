"""ResNet and batch norm: shapes, statistics, what PyTorch does and linen does not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssljax import config as config_lib
from ssljax import flops
from ssljax.leaves import named
from ssljax.methods.masked import masked
from ssljax.models.norms import BatchNorm, moments
from ssljax.models.resnet import resnet

KEY = jax.random.key(0)
TINY = dict(variant="18", stem="cifar", width=8, blocks=(1, 1))
MUTABLE = ["batch_stats"]


def build(shape=(8, 12, 3), b=8, **arguments):
  """A tiny encoder, random variables (nothing at its start value) and images [b h w c]."""
  encoder = resnet(**(TINY | arguments))
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(0.5, 2, size=(b, *shape)))
  shapes = jax.eval_shape(encoder.init, KEY, x)

  def one(path, leaf):
    spread = leaf.size**-0.5 * leaf.shape[-1] ** 0.5 if path[-1].key == "kernel" else 0.2
    positive = path[-1].key in ("scale", "var")
    return np.float32(positive + spread * rng.uniform(-1, 1, size=leaf.shape))

  return encoder, jax.tree_util.tree_map_with_path(one, shapes), x


@functools.partial(jax.jit, static_argnums=0)
def train(encoder, variables, x):
  return encoder.apply(variables, x, train=True, mutable=MUTABLE)


@functools.partial(jax.jit, static_argnums=0, static_argnames="layers")
def evaluate(encoder, variables, x, layers=()):
  return encoder.apply(variables, x, layers=layers)


# Batch norm


def test_batch_norm_against_numpy_with_the_unbiased_running_variance():
  rng = np.random.default_rng(0)
  x = rng.normal(3, 2, (4, 2, 5)).astype(np.float32)
  norm = BatchNorm()
  stats = {"mean": np.float32(rng.normal(size=5)), "var": np.float32(rng.uniform(1, 2, 5))}
  params = {"scale": np.float32(rng.normal(size=5)), "bias": np.float32(rng.normal(size=5))}
  variables = {"params": params, "batch_stats": stats}
  y, new = norm.apply(variables, x, train=True, mutable=MUTABLE)
  flat = x.reshape(-1, 5).astype(np.float64)
  mean, var = flat.mean(0), flat.var(0)
  want = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
  np.testing.assert_allclose(y, want, atol=2e-6)
  new = new["batch_stats"]
  np.testing.assert_allclose(new["mean"], 0.9 * stats["mean"] + 0.1 * mean, rtol=1e-6)
  np.testing.assert_allclose(new["var"], 0.9 * stats["var"] + 0.1 * var * 8 / 7, rtol=1e-6)
  y = norm.apply(variables, x)
  want = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
  np.testing.assert_allclose(y, want, atol=2e-6)


def test_batch_norm_differs_from_linens_in_the_running_variance_alone():
  x = np.random.default_rng(0).normal(3, 2, (6, 5)).astype(np.float32)
  ours, theirs = BatchNorm(), nn.BatchNorm(use_running_average=False, momentum=0.9)
  start = theirs.init(KEY, x)
  y, new = ours.apply(start, x, train=True, mutable=MUTABLE)
  want, other = theirs.apply(start, x, mutable=MUTABLE)
  np.testing.assert_allclose(y, want, atol=2e-6)
  np.testing.assert_allclose(new["batch_stats"]["mean"], other["batch_stats"]["mean"], rtol=1e-6)
  excess = (new["batch_stats"]["var"] - 0.9) / (other["batch_stats"]["var"] - 0.9)
  np.testing.assert_allclose(excess, 6 / 5, rtol=1e-5)


def test_variance_does_not_cancel_around_the_running_mean():
  """What a collapsing projector sees: one pass about zero gives noise, or zero."""
  x = np.random.default_rng(0).normal(1000, 1e-2, (256, 4)).astype(np.float32)
  exact = x.astype(np.float64).var(0)
  mean, var = moments(jnp.asarray(x), jnp.full(4, 999.9))
  np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-7)
  np.testing.assert_allclose(var, exact, rtol=1e-2)
  careless = moments(jnp.asarray(x), jnp.zeros(4))[1]
  assert np.abs(careless / exact - 1).max() > 1 and careless.min() >= 0


@pytest.mark.parametrize("scale, bias", [(True, False), (False, False), (False, True)])
def test_batch_norm_without_scale_or_shift(scale, bias):
  norm = BatchNorm(use_scale=scale, use_bias=bias)
  params = norm.init(KEY, jnp.ones((2, 3))).get("params", {})
  assert ("scale" in params, "bias" in params) == (scale, bias)


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
  x = jnp.asarray(np.random.default_rng(0).normal(1, 1, (512, 3)), jnp.bfloat16)
  norm = BatchNorm(dtype=jnp.bfloat16)
  y, new = norm.apply(norm.init(KEY, x), x, train=True, mutable=MUTABLE)
  assert y.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new))
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * exact.mean(0), rtol=1e-5)


def test_batch_norm_refuses_one_value_and_frozen_statistics():
  norm = BatchNorm()
  variables = norm.init(KEY, jnp.ones((1, 3)))
  with pytest.raises(ValueError, match="more than one value per channel"):
    norm.apply(variables, jnp.ones((1, 3)), train=True, mutable=MUTABLE)
  with pytest.raises(Exception, match="immutable"):  # forgotten statistics are no silent failure
    norm.apply(variables, jnp.ones((2, 3)), train=True)


# ResNet


@pytest.mark.parametrize(
  "variant, millions, width",
  [("18", 11.177, 512), ("34", 21.285, 512), ("50", 23.508, 2048), ("101", 42.500, 2048)],
)
def test_variants_on_shapes(variant, millions, width):
  """Numbers of parameters without the classifier, as published for torchvision's."""
  encoder = resnet(variant=variant)
  x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(encoder.init, KEY, x)
  assert set(variables) == {"params", "batch_stats"}
  count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  np.testing.assert_allclose(count / 1e6, millions, atol=1e-3)
  assert encoder.width == width and encoder.depth == 4 and encoder.grid((224, 224, 3)) == (7, 7)
  out = jax.eval_shape(lambda v, x: encoder.apply(v, x, layers=(0, -1)), variables, x)
  factor = width // 512
  assert {k: v.shape for k, v in out.items()} == {
    "pooled": (2, width),
    "patches": (2, 49, width),
    "layer_0": (2, 56 * 56, 64 * factor),
    "layer_3": (2, 49, width),
  }


def test_flops_of_resnet50():
  """4.09 GMAC at 224 without the classifier."""
  encoder = resnet()
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(encoder.init, KEY, x)
  assert flops.count_flops(encoder.apply, variables, x) == pytest.approx(2 * 4.087e9, rel=1e-3)


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "cifar_pool", "cifar_pad2"])
@pytest.mark.parametrize("shape", [(32, 32), (33, 47)])
def test_grid_is_that_of_the_last_map(stem, shape):
  encoder = resnet(variant="18", stem=stem, width=4)
  x = jax.ShapeDtypeStruct((2, *shape, 1), jnp.float32)
  out, _ = jax.eval_shape(encoder.init_with_output, KEY, x)
  grid = encoder.grid(shape)
  assert out["patches"].shape == (2, grid[0] * grid[1], 32)
  if shape == (32, 32):
    assert grid == {"imagenet": (1, 1), "cifar_pool": (2, 2), "cifar_pad2": (5, 5)}.get(
      stem, (4, 4)
    )


def test_training_uses_the_batch_and_evaluation_does_not():
  encoder, variables, x = build()
  whole, part = evaluate(encoder, variables, x)["pooled"], evaluate(encoder, variables, x[:3])
  np.testing.assert_allclose(whole[:3], part["pooled"], atol=1e-6)
  trained, new = train(encoder, variables, x)
  other, _ = train(encoder, variables, x[:3])
  assert np.abs(trained["pooled"][:3] - other["pooled"]).max() > 1e-2
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), variables["batch_stats"], new["batch_stats"]
  )
  assert min(jax.tree.leaves(moved)) > 1e-4
  assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


def test_keys_mean_training_and_change_nothing_else():
  encoder, variables, x = build()
  keys = jax.random.split(KEY, len(x))
  out, new = encoder.apply(variables, x, keys=keys, mutable=MUTABLE)
  want, stats = train(encoder, variables, x)
  np.testing.assert_allclose(out["pooled"], want["pooled"], atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), new, stats)


def test_outputs_are_the_maps_row_by_row():
  encoder, variables, x = build()
  out = evaluate(encoder, variables, x, layers=(-1, 0))
  assert out["patches"].shape == (8, 4 * 6, 16) and out["layer_0"].shape == (8, 8 * 12, 8)
  np.testing.assert_array_equal(out["layer_1"], out["patches"])
  np.testing.assert_allclose(out["pooled"], out["patches"].mean(1), atol=1e-6)
  # Upside down, with kernels upside down: rows come out in reverse.
  first = evaluate(encoder, flipped(variables), x[:, ::-1], layers=(0,))["layer_0"]
  first = first.reshape(8, 8, 12, 8)[:, ::-1].reshape(8, 96, 8)
  np.testing.assert_allclose(first, out["layer_0"], atol=1e-5)


def flipped(variables):
  """Every kernel upside down."""
  turn = lambda leaf: leaf[::-1] if leaf.ndim == 4 else leaf  # noqa: E731
  return jax.tree.map(turn, variables)


def test_zero_init_makes_every_block_the_identity():
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  for zero_init in (True, False):
    encoder = resnet(**(TINY | dict(blocks=(1,))), zero_init=zero_init)
    variables = jax.jit(encoder.init)(KEY, x)
    first = variables["params"]["stage_0_block_0"]
    assert np.all(first["norm2"]["scale"] == (0 if zero_init else 1))
    assert np.all(first["norm1"]["scale"] == 1)
    out = evaluate(encoder, variables, x)["patches"]
    stem = variables["params"]["stem_conv"]["kernel"]
    spec = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, stem, (1, 1), ((1, 1), (1, 1)), dimension_numbers=spec)
    plain = nn.relu(y * (1 + 1e-5) ** -0.5).reshape(2, 64, 8)
    assert np.allclose(out, plain, atol=1e-5) == zero_init


def test_kernels_start_as_kaiming_fan_out():
  encoder = resnet(variant="50", width=32, blocks=(1, 1), stem="imagenet")
  params = jax.jit(encoder.init)(KEY, jnp.zeros((1, 32, 32, 3)))["params"]
  for name in ("stem_conv", "conv1", "conv2", "conv3", "down_conv"):
    kernel = params[name] if name == "stem_conv" else params["stage_1_block_0"][name]
    kernel = kernel["kernel"]
    fan_out = kernel.shape[0] * kernel.shape[1] * kernel.shape[3]
    np.testing.assert_allclose(kernel.std(), (2 / fan_out) ** 0.5, rtol=0.05)


def test_bottleneck_has_its_stride_in_the_middle():
  encoder = resnet(variant="50", width=4, stem="cifar", blocks=(1, 1))
  x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  jaxpr = jax.make_jaxpr(lambda x: encoder.init_with_output(KEY, x)[0])(x).jaxpr
  strided = [e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
  strided = [e.invars[1].aval.shape for e in strided if e.params["window_strides"] == (2, 2)]
  assert sorted(strided) == [(1, 1, 16, 32), (3, 3, 8, 8)]


def test_one_and_eight_devices_see_the_same_batch():
  encoder, variables, x = build()

  def loss(params, x):
    variables_ = variables | {"params": params}
    out, new = encoder.apply(variables_, x, train=True, mutable=MUTABLE)
    return jnp.square(out["pooled"]).sum(), new

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    many = step(variables["params"], sharded)
  one = step(variables["params"], x)
  many, one = jax.tree.map(np.asarray, (many, one))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), many, one)
  alone = train(encoder, variables, x[:1])[1]["batch_stats"]["stem_norm"]["mean"]
  assert np.abs(alone - one[0][1]["batch_stats"]["stem_norm"]["mean"]).max() > 1e-3


def test_remat_changes_neither_names_nor_numbers():
  encoder, variables, x = build()
  again = encoder.clone(remat="full")
  got = jax.eval_shape(again.init, KEY, x)
  assert jax.tree.structure(got) == jax.tree.structure(variables)

  def gradient(encoder):
    def loss(params):
      out, new = encoder.apply(variables | {"params": params}, x, train=True, mutable=MUTABLE)
      return jnp.square(out["pooled"]).sum(), new

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, gradient(again), gradient(encoder))
  work = [flops.count_flops(lambda e=e: gradient(e)) for e in (again, encoder)]
  assert work[0] > work[1]


def test_bfloat16_computes_in_it_and_pools_in_float32():
  encoder, variables, x = build(dtype="bfloat16")
  out, new = train(encoder, variables, x)
  assert out["patches"].dtype == jnp.bfloat16 and out["pooled"].dtype == jnp.float32
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(new)} == {"float32"}
  exact = train(build()[0], variables, x)[0]["pooled"]
  np.testing.assert_allclose(out["pooled"], exact, atol=0.1 * np.abs(exact).max())


def test_errors():
  for arguments, message in (
    (dict(variant="19"), "encoder.variant '19' is none of 18, 34, 50, 101"),
    (dict(stem="tiny"), "encoder.stem 'tiny' is none of imagenet, cifar"),
    (dict(remat="dots"), "encoder.remat 'dots' is none of none, full"),
    (dict(width=0), "encoder.width 0"),
    (dict(blocks=(1, 0)), "must be positive"),
    (dict(momentum=1.0), "encoder.momentum 1.0"),
  ):
    with pytest.raises(ValueError, match=message):
      resnet(**arguments)
  with pytest.raises(ValueError, match="an encoder of patches"):
    masked(resnet(**TINY), 4)


def test_the_config_builds_it():
  spec = dict(name="ssljax.models.resnet", **TINY) | {"blocks": [1, 1]}
  assert config_lib.build(spec, dtype="bfloat16") == resnet(**TINY, dtype="bfloat16")


def test_names_do_not_depend_on_the_stem():
  a, b = (build(stem=stem)[1] for stem in ("cifar", "imagenet"))
  assert set(named(a)) == set(named(b))
