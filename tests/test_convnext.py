"""ConvNeXt: published sizes, grid, drop path, what the outputs are, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import config as config_lib
from ssljax import flops
from ssljax.interop.convert import check_exportable
from ssljax.methods.masked import masked
from ssljax.models.convnext import convnext
from ssljax.optim import decayed

KEY = jax.random.key(0)
TINY = dict(stem=2, blocks=(1, 2), widths=(4, 8), layer_scale=0.5)


def build(**arguments):
  """A tiny encoder, random parameters (nothing at its start value) and images [4 9 12 3]."""
  encoder = convnext(**(TINY | arguments))
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(4, 9, 12, 3)))

  def one(path, leaf):
    spread = (leaf.size / leaf.shape[-1]) ** -0.5 if path[-1].key == "kernel" else 0.2
    return np.float32((path[-1].key == "scale") + spread * rng.normal(size=leaf.shape))

  shapes = jax.eval_shape(encoder.init, KEY, x)["params"]
  return encoder, jax.tree_util.tree_map_with_path(one, shapes), x


@functools.partial(jax.jit, static_argnums=0, static_argnames="layers")
def run(encoder, params, x, keys=None, layers=()):
  return encoder.apply({"params": params}, x, keys=keys, layers=layers)


@pytest.mark.parametrize(
  "variant, millions",
  [("atto", 3.7), ("femto", 5.22), ("pico", 9.05), ("nano", 15.59), ("tiny", 28.59),
   ("small", 50.22), ("base", 88.59), ("large", 197.77)],
)  # fmt: skip
def test_variants_on_shapes(variant, millions):
  """Numbers of parameters with a classifier of 1,000 classes, as timm publishes them."""
  encoder = convnext(variant=variant)
  x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(encoder.init, KEY, x)
  assert set(variables) == {"params"}
  count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  count += 1000 * (encoder.width + 1)
  np.testing.assert_allclose(count / 1e6, millions, atol=0.006)
  assert encoder.grid((224, 224, 3)) == (7, 7) and encoder.depth == 4
  out = jax.eval_shape(lambda v, x: encoder.apply(v, x, layers=(0, -1)), variables, x)
  assert {k: v.shape for k, v in out.items()} == {
    "pooled": (2, encoder.width),
    "patches": (2, 49, encoder.width),
    "layer_0": (2, 56 * 56, encoder.widths[0]),
    "layer_3": (2, 49, encoder.width),
  }


def test_flops_of_tiny():
  """4.47 GMAC at 224 without the classifier, 4.5 in the paper."""
  encoder = convnext()
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(encoder.init, KEY, x)
  assert flops.count_flops(encoder.apply, variables, x) == pytest.approx(2 * 4.454e9, rel=5e-3)


def test_outputs_are_the_maps_row_by_row():
  encoder, params, x = build()
  out = run(encoder, params, x, layers=(0, 1))
  assert encoder.grid(x.shape[1:]) == (2, 3)  # 9 -> 4 -> 2: what does not fill a patch is cut
  assert out["patches"].shape == (4, 6, 8) and out["layer_0"].shape == (4, 4 * 6, 4)
  scale, bias = (np.asarray(params["norm"][k]) for k in ("scale", "bias"))

  def norm(y):
    y = np.asarray(y, np.float64)
    return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * scale + bias

  np.testing.assert_allclose(out["patches"], norm(out["layer_1"]), atol=1e-4)
  np.testing.assert_allclose(out["pooled"], norm(out["layer_1"].mean(1)), atol=1e-4)
  # Upside down, with kernels upside down, where the stem cuts nothing off.
  turn = lambda leaf: leaf[::-1] if leaf.ndim == 4 else leaf  # noqa: E731
  turned = run(encoder, jax.tree.map(turn, params), x[:, :8][:, ::-1], layers=(0,))["layer_0"]
  turned = np.asarray(turned).reshape(4, 4, 6, 4)[:, ::-1].reshape(4, 24, 4)
  np.testing.assert_allclose(
    turned, run(encoder, params, x[:, :8], layers=(0,))["layer_0"], atol=1e-5
  )


def test_drop_path_acts_per_example_and_not_in_evaluation():
  encoder, params, x = build(drop_path=0.5)
  same = np.repeat(x[:1], 4, 0)
  keys = jax.random.split(KEY, 4)
  out = run(encoder, params, same, keys)["pooled"]
  assert len(np.unique(np.round(out, 3), axis=0)) > 1
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(
    run(encoder, params, same, keys[order])["pooled"], out[order], atol=1e-5
  )
  plain = run(encoder, params, same)["pooled"]
  np.testing.assert_allclose(plain, np.repeat(plain[:1], 4, 0), atol=1e-5)
  off, _, _ = build()
  np.testing.assert_array_equal(run(off, params, same, keys)["pooled"], plain)


def test_layer_scale_starts_at_its_value_and_does_not_decay():
  x = jnp.zeros((1, 8, 8, 3))
  encoder, _, _ = build(layer_scale=0.3)
  block = jax.jit(encoder.init)(KEY, x)["params"]["stage_1_block_1"]
  np.testing.assert_allclose(block["scale"], 0.3)
  assert not decayed(block)["scale"] and decayed(block)["conv"] == {"kernel": True, "bias": False}
  without = jax.eval_shape(build(layer_scale=0.0)[0].init, KEY, x)["params"]
  assert "scale" not in without["stage_1_block_1"]


def test_remat_and_bfloat16():
  encoder, params, x = build()

  def gradient(encoder):
    return jax.jit(jax.grad(lambda p: jnp.square(run(encoder, p, x)["pooled"]).sum()))(params)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, gradient(encoder.clone(remat="full")), gradient(encoder))
  out = run(encoder.clone(dtype=jnp.bfloat16), params, x)
  assert out["patches"].dtype == jnp.bfloat16 and out["pooled"].dtype == jnp.float32
  exact = run(encoder, params, x)["pooled"]
  np.testing.assert_allclose(out["pooled"], exact, atol=0.1 * np.abs(exact).max())


def test_errors():
  for arguments, message in (
    (dict(variant="huge"), "encoder.variant 'huge' is none of atto"),
    (dict(remat="dots"), "encoder.remat 'dots' is none of none, full"),
    (dict(blocks=(1, 1)), "must name the same stages"),
    (dict(stem=0), "encoder.stem 0"),
  ):
    with pytest.raises(ValueError, match=message):
      convnext(**arguments)
  with pytest.raises(ValueError, match="smaller than the 32 pixels of one place"):
    convnext().grid((28, 28, 3))
  with pytest.raises(ValueError, match="an encoder of patches"):
    masked(convnext(**TINY), 4)
  with pytest.raises(ValueError, match="weights of a ConvNeXt are neither read nor written"):
    check_exportable(convnext(), "timm")


def test_the_config_builds_it():
  spec = dict(name="ssljax.models.convnext", **TINY) | {"blocks": [1, 2]}
  assert config_lib.build(spec, dtype="bfloat16") == convnext(**TINY, dtype="bfloat16")
