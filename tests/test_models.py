"""Models: what a port to flax silently gets wrong, one test each, and the parts' own promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import losses, targets
from ssljax.methods.masked import masked
from ssljax.models import attention, layers, positions, tokens
from ssljax.models.decoders import TransformerDecoder
from ssljax.models.vit import vit
from ssljax.optim import decayed

KEY = jax.random.key(0)
TINY = dict(width=32, depth=2, heads=4, patch=(4, 4))


def build(shape=(8, 12, 3), **arguments):
  """A tiny encoder, random parameters and two examples."""
  encoder = vit(**(TINY | arguments))
  x = np.float32(np.random.default_rng(1).normal(size=(2, *shape)))
  return encoder, numbers(jax.eval_shape(encoder.init, KEY, x)["params"]), x


def numbers(shapes):
  """Parameters in NumPy, nothing at its start value: the initialisers take seconds to compile."""
  rng = np.random.default_rng(0)

  def one(path, leaf):
    spread = leaf.shape[0] ** -0.5 if path[-1].key == "kernel" else 0.1
    return np.float32((path[-1].key == "scale") + spread * rng.normal(size=leaf.shape))

  return jax.tree_util.tree_map_with_path(one, shapes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(encoder, shape):
  return encoder.init(KEY, jnp.zeros(shape))["params"]


@functools.partial(jax.jit, static_argnums=0, static_argnames="layers")
def run(encoder, params, x, **arguments):
  return encoder.apply({"params": params}, x, **arguments)


def signal(shape, w, phase=0.0):
  """The deterministic input of the golden values: sin(w·n + phase) over the flat index."""
  n = np.arange(math.prod(shape), dtype=np.float64)
  return np.sin(w * n + phase).astype(np.float32).reshape(shape)


def paths(tree):
  """{"a/b": leaf}"""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {"/".join(k.key for k in path): leaf for path, leaf in flat}


@pytest.mark.parametrize(
  "arguments",
  [dict(registers=1), dict(scan=True, remat="dots"), dict(positions="relative", qkv_bias="qv"),
   dict(positions="rotary")],
  ids=lambda a: "-".join(a),
)  # fmt: skip
def test_attention_of_the_class_token_is_that_of_its_block(arguments):
  encoder, params, x = build(**arguments)
  given = dict(layers=(0,), attention_layers=(0, -1))
  taken = jax.jit(functools.partial(encoder.apply, **given))({"params": params}, x)
  n = 6 + encoder.prefix
  assert taken["attention_0"].shape == taken["attention_1"].shape == (2, 4, n)
  block = jax.tree.map(np.float64, params["blocks"]["block_1"])
  y = np.float64(taken["layer_0"])
  y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + encoder.eps)
  y = y * block["norm1"]["scale"] + block["norm1"]["bias"]
  qkv = y @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"].get("bias", 0.0)
  q, k, _ = np.moveaxis(qkv.reshape(2, n, 3, 4, 8), 2, 0)
  if "q_bias" in block["attn"]:
    q = q + block["attn"]["q_bias"].reshape(4, 8)
  if arguments.get("positions") == "rotary":
    angle = np.zeros((n, 4))
    angle[1:] = positions.rotary((2, 3), 8, encoder.rotary_base)
    q, k = (np.float64(attention.rotate(np.float32(a), pair(angle))) for a in (q, k))
  logits = np.einsum("bhe,bshe->bhs", q[:, 0], k) / 8**0.5
  if arguments.get("positions") == "relative":
    table = np.float64(params["relative_bias"])[positions.relative_index((2, 3), 1)]
    logits += np.moveaxis(table, -1, 0)[:, 0]
  want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(taken["attention_1"], want, rtol=2e-5)


def pair(angle):
  return np.float32(np.cos(angle))[None, :, None], np.float32(np.sin(angle))[None, :, None]


def test_attention_is_asked_of_a_class_token():
  encoder, params, x = build(class_token=False, pool="mean")
  with pytest.raises(ValueError, match="class_token=True"):
    encoder.apply({"params": params}, x, attention_layers=(0,))


# Places hidden by score


def test_the_highest_scores_are_hidden():
  scores = jnp.array([[0.1, 0.5, 0.2, 0.5, 0.4], [3.0, 2.0, 1.0, 0.0, -1.0], [0.0] * 5])
  got = tokens.hide_attended(scores, jnp.array([3, 2, 2]))
  want = [[0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
  np.testing.assert_array_equal(got, np.bool_(want))


def test_places_hidden_by_score_are_nested_in_their_number():
  scores = jax.random.normal(KEY, (1, 30))
  counts = range(31)
  masks = np.array([tokens.hide_attended(scores, jnp.array([c]))[0] for c in counts])
  assert (masks.sum(-1) == counts).all() and (masks[1:] >= masks[:-1]).all()


def test_a_hint_shows_a_few_of_the_first_tenth():
  """AttMask-Hint: int(share · n) places, share uniform in (.01, .05), of the first int(n / 10)."""
  n, b = 196, 2000
  scores = jnp.tile(jnp.arange(n, dtype=jnp.float32), (b, 1))
  keys, count = jax.random.split(KEY, b), jnp.full(b, 80)
  hint = jax.jit(functools.partial(tokens.hide_attended, reveal=(0.01, 0.05)))
  high, got = np.array(tokens.hide_attended(scores, count)), np.array(hint(scores, count, keys))
  assert not (got & ~high).any()
  shown = high & ~got
  assert not shown[:, : n - n // 10].any()
  number = shown.sum(-1)
  assert number.min() == 1 and number.max() == 9
  # E int(u) for u uniform in (1.96, 9.8): 1 for the first .04, 2 … 8 for 1 each, 9 for the last .8.
  assert number.mean() == pytest.approx((0.04 + 35 + 9 * 0.8) / 7.84, abs=0.15)
  where = shown.mean(0)[n - n // 10 :]
  np.testing.assert_allclose(where, number.mean() / (n // 10), atol=0.06)
  assert not tokens.hide_attended(scores, jnp.zeros(b, int), keys, (0.01, 0.05)).any()


# Layers


def test_gelu_is_the_exact_one():
  mlp = layers.Mlp(hidden=1)
  one, zero = jnp.ones((1, 1)), jnp.zeros(1)
  params = {"fc1": {"kernel": one, "bias": zero}, "fc2": {"kernel": one, "bias": zero}}
  got = mlp.apply({"params": params}, jnp.float32([[1.0], [-2.0]]))[:, 0]
  # The tanh form gives 0.8411920 and -0.0454023.
  np.testing.assert_allclose(got, [0.8413447, -0.0455003], atol=1e-7)


def test_gelu_over_its_range_in_every_precision():
  x = np.linspace(-8, 8, 257)
  exact = np.array([v * 0.5 * math.erfc(-v / 2**0.5) for v in x])
  np.testing.assert_allclose(layers.gelu(jnp.float32(x)), exact, atol=1e-6)
  # Computed in float32, so that what is left is the rounding of the result.
  half = layers.gelu(jnp.bfloat16(x))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(half), exact, rtol=2**-7, atol=1e-6)


def test_linear_layers_of_tokens_are_one_flat_product_on_a_cpu_alone(monkeypatch):
  rng = np.random.default_rng(0)
  x, kernel, dy = (np.float32(rng.normal(size=s)) for s in ((2, 5, 3), (3, 4), (2, 5, 4)))
  layer = layers.linear(4, use_bias=False)

  def gradient(kernel, x):
    return jax.grad(lambda k: (layer.apply({"params": {"kernel": k}}, x) * dy).sum())(kernel)

  def contracted():
    # A new function each time: traces are cached by it.
    equations = jax.make_jaxpr(lambda *given: gradient(*given))(kernel, x).jaxpr.eqns
    dots = [e for e in equations if e.primitive.name == "dot_general"]
    return {len(e.params["dimension_numbers"][0][0]) for e in dots}

  np.testing.assert_allclose(layer.apply({"params": {"kernel": kernel}}, x), x @ kernel, atol=1e-6)
  np.testing.assert_allclose(gradient(kernel, x), np.einsum("bnd,bne->de", x, dy), atol=2e-6)
  assert contracted() == {1}
  monkeypatch.setattr(attention, "compiled_platform", lambda: "tpu")
  assert max(contracted()) == 2


def test_layer_norm_epsilon_and_two_pass_variance():
  norm = layers.layer_norm("norm", 1e-6, jnp.float32)
  apply = lambda x: norm.apply(norm.init(KEY, x), x)  # noqa: E731
  x = jnp.float32([[-1e-3, 1e-3]])  # variance = epsilon: 1/sqrt 2; with 1e-5 it would be 0.30
  np.testing.assert_allclose(apply(x)[0, 1], 2**-0.5, rtol=1e-5)
  far = np.random.default_rng(0).normal(1000, 1e-1, (1, 64)).astype(np.float32)
  exact = (far - far.mean(dtype=np.float64)) / np.sqrt(far.astype(np.float64).var() + 1e-6)
  np.testing.assert_allclose(apply(jnp.asarray(far)), exact, atol=2e-3)


def test_encoder_and_decoder_use_their_epsilon():
  encoder, params, x = build(eps=1e-6)
  wide, *_ = build(eps=1e-1)
  changed = run(wide, params, x)["pooled"] - run(encoder, params, x)["pooled"]
  assert np.abs(changed).max() > 1e-2
  block = layers.Block(heads=4, eps=1e-1)
  assert block.eps == 1e-1 and vit().eps == 1e-6


@pytest.mark.parametrize(
  "kernel, deviation", [("normal", 0.02), ("beit", 0.0108), ("kaiming", (2 / 512) ** 0.5)]
)
def test_deviation_of_initialisers(kernel, deviation):
  w = layers.KERNELS[kernel](KEY, (512, 1024))
  np.testing.assert_allclose(w.std(), deviation, rtol=0.01)
  # The cut of "beit" is at one deviation; that of "normal" is so far out that it never bites.
  assert (np.abs(w).max() <= 0.02) if kernel == "beit" else (np.abs(w).max() > 0.07)


def test_xavier_bounds_of_fused_qkv_and_stem():
  encoder = vit(variant="Ti", depth=1, patch=(16, 16))
  params = init(encoder, (1, 16, 16, 3))
  d, p = 192, 16 * 16 * 3
  block = params["blocks"]["block_0"]
  bounds = [
    (block["attn"]["qkv"]["kernel"], (6 / (d + 3 * d)) ** 0.5),  # as one matrix, not three
    (block["mlp"]["fc1"]["kernel"], (6 / (d + 4 * d)) ** 0.5),
    (params["stem"]["kernel"], (6 / (p + d)) ** 0.5),  # fan-out d, not d·16·16
    (params["stem"]["bias"], p**-0.5),  # the convolution's own, not zero
  ]
  for w, bound in bounds:
    assert 0.95 * bound < np.abs(w).max() <= bound
    np.testing.assert_allclose(w.std(), bound / 3**0.5, rtol=0.12 if w.ndim == 1 else 0.02)
  zeros = [block["attn"]["qkv"]["bias"], block["attn"]["proj"]["bias"], block["mlp"]["fc1"]["bias"]]
  assert all(not leaf.any() for leaf in zeros)
  np.testing.assert_allclose(params["cls_token"].std(), 0.02, rtol=0.15)


@pytest.mark.parametrize("scan", [False, True])
def test_depth_scale_divides_output_projections(scan):
  encoder = vit(width=128, depth=3, heads=4, init_kernels="beit", depth_scale=True, patch=(4, 4))
  encoder = encoder.clone(scan=scan)
  blocks = init(encoder, (1, 4, 4, 3))["blocks"]
  for i in range(3):
    block = blocks[f"block_{i}"]
    scale = (2 * (i + 1)) ** -0.5
    for w, expected in [
      (block["attn"]["proj"]["kernel"], scale),
      (block["mlp"]["fc2"]["kernel"], scale),
      (block["attn"]["qkv"]["kernel"], 1.0),
      (block["mlp"]["fc1"]["kernel"], 1.0),
    ]:
      np.testing.assert_allclose(w.std(), 0.0108 * expected, rtol=0.02)


def test_blocks_start_from_different_weights():
  blocks = init(vit(**TINY), (1, 8, 8, 3))["blocks"]
  a, b = (blocks[f"block_{i}"]["attn"]["qkv"]["kernel"] for i in range(2))
  assert np.abs(a - b).max() > 0.1


def test_drop_path_rates():
  keys = jax.random.split(KEY, 4000)
  drop = np.asarray(layers.drop_path(keys, 0.3, 4, 4000))
  assert drop.shape == (4, 2, 4000)
  for i, rate in enumerate(np.linspace(0, 0.3, 4)):  # from 0 in the first block to 0.3 in the last
    np.testing.assert_allclose((drop[i] == 0).mean(), rate, atol=0.02)
    np.testing.assert_allclose(drop[i][drop[i] > 0], 1 / (1 - rate), rtol=1e-6)
  assert (drop[2, 0] != drop[2, 1]).any()  # the two branches are drawn apart
  np.testing.assert_array_equal(drop[:, :, 7:8], layers.drop_path(keys[7:8], 0.3, 4, 1))
  assert layers.drop_path(None, 0.3, 4, 2) is None


def test_drop_path_acts_per_example_and_not_in_evaluation():
  encoder, params, x = build(drop_path=0.9, depth=4)
  x = jnp.concatenate([x[:1]] * 8)
  out = run(encoder, params, x, keys=jax.random.split(KEY, 8))["pooled"]
  assert len(np.unique(np.round(out, 4), axis=0)) > 1
  evaluated = run(encoder, params, x)["pooled"]
  plain = run(build(depth=4)[0], params, x)["pooled"]
  np.testing.assert_array_equal(evaluated, plain)


def test_layer_scale_starts_at_its_value_and_multiplies():
  encoder, _, x = build(layer_scale=1e-4)
  params = init(encoder, x.shape)
  assert np.all(params["blocks"]["block_1"]["scale2"] == np.float32(1e-4))
  out = run(encoder, params, x, layers=(0, 1))
  assert np.abs(out["layer_1"] - out["layer_0"]).max() < 1e-2


@pytest.mark.parametrize("bias, names", [("qkv", {"bias"}), ("qv", set()), ("none", set())])
def test_attention_biases(bias, names):
  attn = init(vit(**TINY, qkv_bias=bias), (1, 8, 8, 3))["blocks"]["block_0"]["attn"]
  assert set(attn["qkv"]) == {"kernel"} | names
  assert ({"q_bias", "v_bias"} <= set(attn)) == (bias == "qv")


def test_qv_bias_is_a_qkv_bias_with_zero_keys():
  encoder, params, x = build(qkv_bias="qv")
  full = jax.tree.map(lambda leaf: leaf, params)
  for block in full["blocks"].values():
    q, v = block["attn"].pop("q_bias"), block["attn"].pop("v_bias")
    block["attn"]["qkv"]["bias"] = jnp.concatenate([q, 0 * q, v])
  got = run(encoder, params, x)["tokens"]
  want = run(build(qkv_bias="qkv")[0], full, x)["tokens"]
  np.testing.assert_allclose(got, want, atol=1e-6)


# Targets and the golden values


IMAGES = signal((2, 3, 16, 16), 0.37).transpose(0, 2, 3, 1)
HIDDEN = np.array([[1, 0, 1, 1], [0, 1, 1, 1]], bool)


def test_golden_normalised_pixels():
  patches = tokens.patchify(jnp.asarray(IMAGES), (8, 8))
  got = targets.normalised_pixels(patches)
  first = [-0.302867, 0.368343, 0.892639, 0.230742, 0.798131, 1.124535]
  np.testing.assert_allclose(got[0, 0, :6], first, atol=2e-6)
  # Mean of squares (n-1)/n·var/(var+eps): it would be 1 with the biased variance.
  np.testing.assert_allclose(np.square(got).mean(-1), 191 / 192, rtol=1e-4)
  np.testing.assert_allclose(targets.unnormalise(got, patches), patches, atol=1e-6)


@pytest.mark.parametrize(
  "normalise, golden", [("unbiased", 1.5720917), ("biased", 1.5774984), ("none", 1.0380005)]
)
def test_golden_mae_loss(normalise, golden):
  target = tokens.patchify(jnp.asarray(IMAGES), (8, 8))
  if normalise != "none":
    target = targets.normalised_pixels(target, unbiased=normalise == "unbiased")
  pred = jnp.asarray(signal((2, 4, 192), 0.23, 1.0))
  _, places = tokens.split_hidden(jnp.asarray(HIDDEN), 3)
  got = losses.masked_l2(tokens.take(pred, places), tokens.take(target, places)).mean()
  np.testing.assert_allclose(got, golden, rtol=3e-7)


def test_golden_simmim_loss():
  pred = signal((2, 3, 16, 16), 0.23, 1.0).transpose(0, 2, 3, 1)
  pred, target = (tokens.patchify(jnp.asarray(a), (8, 8)) for a in (pred, IMAGES))
  # 3 and 2 places: the sum of the paper runs over the whole batch.
  hidden = np.array([[1, 0, 1, 1], [0, 1, 0, 1]], bool)
  got = losses.masked_l1(pred[hidden][None], target[hidden][None]).mean()
  np.testing.assert_allclose(got, 0.8092964, rtol=3e-7)


def test_average_layers_normalises_twice_with_epsilon_1e_5():
  rng = np.random.default_rng(0)
  blocks = rng.normal(3, 5e-3, (3, 2, 4, 16))  # so little spread that the epsilon shows

  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

  want = norm(np.mean([norm(x) for x in blocks], axis=0))
  got = targets.average_layers([jnp.float32(x) for x in blocks])
  np.testing.assert_allclose(got, want, atol=2e-3)
  one = targets.average_layers([jnp.float32(rng.normal(0, 3, (2, 4, 16)))])
  np.testing.assert_allclose(one.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(one.var(-1), 1, atol=1e-4)


# Positions


def test_sincos_order_and_golden_values():
  table = positions.sincos((3, 4), 16)
  assert table.shape == (12, 16) and table.dtype == np.float32
  golden = [0.84147, 0.09983, 0.01, 0.001, 0.54030, 0.99500]
  np.testing.assert_allclose(table[1, :6], golden, atol=1e-5)  # row 0, column 1: columns come first
  np.testing.assert_allclose(table[1, 8:], [0] * 4 + [1] * 4, atol=0)
  np.testing.assert_allclose(table[4, 8:14], golden, atol=1e-5)  # row 1, column 0
  np.testing.assert_allclose(table[4, :8], [0] * 4 + [1] * 4, atol=0)


def test_sincos_over_one_and_three_axes():
  np.testing.assert_array_equal(positions.sincos((5,), 8)[3, :4], positions._sincos(
    np.array([3.0]), 8)[0, :4].astype(np.float32))  # fmt: skip
  # 1024 channels over three axes: 342 each, 1026, the last two cut off.
  assert positions.sincos((2, 2, 2), 1024).shape == (8, 1024)
  assert len(np.unique(positions.sincos((2, 3, 4), 48), axis=0)) == 24


def test_sincos_at_width_that_four_does_not_divide_keeps_sines_and_cosines():
  assert len(np.unique(positions.sincos((4, 4), 6), axis=0)) == 16


def test_relative_index_against_loops():
  grid, prefix = (2, 3), 2
  rows = (2 * 2 - 1) * (2 * 3 - 1) + 3
  assert positions.relative_rows(grid) == rows
  got = positions.relative_index(grid, prefix)
  places = [(i, j) for i in range(2) for j in range(3)]
  for q, (qi, qj) in enumerate(places):
    for k, (ki, kj) in enumerate(places):
      assert got[prefix + q, prefix + k] == (qi - ki + 1) * 5 + (qj - kj + 2)
  assert (got[:2, :2] == rows - 1).all()
  assert (got[:2, 2:] == rows - 3).all() and (got[2:, :2] == rows - 2).all()


def test_relative_bias_changes_attention_and_refuses_a_part_of_the_grid():
  encoder, params, x = build(positions="relative")
  assert params["relative_bias"].shape == (3 * 5 + 3, 4) and "positions" not in params
  zero = params | {"relative_bias": jnp.zeros((18, 4))}
  without, *_ = build(positions="none")
  plain = {k: v for k, v in zero.items() if k != "relative_bias"}
  got = run(encoder, zero, x)["tokens"]
  np.testing.assert_allclose(got, run(without, plain, x)["tokens"], atol=1e-6)
  assert np.abs(run(encoder, params, x)["tokens"] - got).max() > 1e-3
  with pytest.raises(ValueError, match='layout "replace"'):
    run(encoder, params, x, keep=jnp.zeros((2, 2), jnp.int32))


def test_resize_of_learned_positions():
  rng = np.random.default_rng(0)
  table = rng.normal(size=(4 * 6, 5)).astype(np.float32)
  assert positions.resize_table(table, (4, 6), (4, 6)) is table
  for antialias in (False, True):
    constant = positions.resize_table(np.ones((24, 2), np.float32), (4, 6), (7, 3), antialias)
    np.testing.assert_allclose(constant, 1, rtol=1e-6)
    # Both axes at once equals one after the other.
    both = positions.resize_table(table, (4, 6), (8, 3), antialias)
    rows = positions.resize_table(table, (4, 6), (8, 6), antialias)
    rows = positions.resize_table(rows, (8, 6), (8, 3), antialias)
    np.testing.assert_allclose(both, rows, atol=1e-5)
  volume = positions.resize_table(rng.normal(size=(8, 3)), (2, 2, 2), (4, 4, 4))
  assert volume.shape == (64, 3)
  # Taps of a = -0.75 half-way between two places: -0.09375, 0.59375, 0.59375, -0.09375.
  line = positions.resize_table(np.eye(4), (4,), (8,))
  np.testing.assert_allclose(line[3] @ np.ones(4), 1)
  np.testing.assert_allclose(positions._cubic(np.array([0.5, 1.5]), -0.75), [0.59375, -0.09375])


# The one token core, over one, two and three axes


AXES = {
  1: dict(shape=(12, 2), patch=(3,)),
  2: dict(shape=(6, 8, 3), patch=(3, 2)),
  3: dict(shape=(4, 6, 4, 1), patch=(2, 3, 2)),
}


@pytest.fixture(params=AXES, ids=lambda r: f"r{r}")
def axes(request):
  return AXES[request.param]


def test_patchify_against_loops_and_back(axes):
  shape, patch = axes["shape"], axes["patch"]
  x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
  got = np.asarray(tokens.patchify(jnp.asarray(x), patch))
  grid = tokens.grid_of(shape[:-1], patch)
  for n, place in enumerate(np.ndindex(*grid)):
    slices = tuple(slice(g * p, (g + 1) * p) for g, p in zip(place, patch))
    np.testing.assert_array_equal(got[:, n], x[(slice(None), *slices)].reshape(2, -1))
  np.testing.assert_array_equal(tokens.unpatchify(jnp.asarray(got), grid, patch), x)


def test_linear_stem_is_a_convolution(axes):
  shape, patch = axes["shape"], axes["patch"]
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *shape)).astype(np.float32)
  kernel = rng.normal(size=(*patch, shape[-1], 8)).astype(np.float32)
  letters = "HWD"[: len(patch)]
  spec = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
  want = jax.lax.conv_general_dilated(x, kernel, patch, "VALID", dimension_numbers=spec)
  got = tokens.patchify(jnp.asarray(x), patch) @ kernel.reshape(-1, 8)
  np.testing.assert_allclose(got, want.reshape(2, -1, 8), atol=2e-5)


def test_inflated_video_stem_equals_the_image_stem():
  image_encoder, params, x = build((8, 12, 3), positions="none")
  video_encoder = vit(**(TINY | dict(patch=(2, 4, 4), positions="none")))
  half = params["stem"]["kernel"] / 2
  inflated = params | {"stem": params["stem"] | {"kernel": np.concatenate([half, half])}}
  video = jnp.stack([x, x], axis=1)
  got = run(video_encoder, inflated, video)["tokens"]
  want = run(image_encoder, params, x)["tokens"]
  np.testing.assert_allclose(got, want, atol=1e-5)


def random_keep(n, count, b=2):
  rng = np.random.default_rng(2)
  hidden = np.zeros((b, n), bool)
  for row in hidden:
    row[rng.permutation(n)[:count]] = True
  return jnp.asarray(hidden), *tokens.split_hidden(jnp.asarray(hidden), count)


def test_drop_equals_blocking_attention_to_hidden_places(axes):
  encoder, params, x = build(**axes)
  x = x[:1]
  grid = encoder.grid(x.shape[1:-1])
  n, m = math.prod(grid), encoder.prefix
  hidden, keep, _ = random_keep(n, n // 2, 1)
  want = run(encoder, params, x, keep=keep)["tokens"]
  kept = tokens.take(tokens.patchify(x, encoder.patch), keep)
  kept = kept @ params["stem"]["kernel"] + params["stem"]["bias"]
  full = tokens.fill(kept, hidden, keep, jnp.full(32, 0.7)) + positions.sincos(grid, 32)
  full = jnp.concatenate([jnp.tile(params["cls_token"], (1, 1, 1)), full], axis=1)
  blocked = jnp.concatenate([jnp.zeros(m, bool), hidden[0]])
  bias = jnp.where(blocked, -1e30, 0.0)[None, None].repeat(n + m, 1).repeat(4, 0)
  stack = layers.Transformer(2, layers.Block(4, parent=None))
  out, _ = jax.jit(stack.apply)({"params": params["blocks"]}, full, None, bias)
  norm = layers.layer_norm("norm", 1e-6, jnp.float32)
  out = norm.apply({"params": params["norm"]}, out)
  got = jnp.concatenate([out[:, :m], tokens.take(out[:, m:], keep)], axis=1)
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("kind", ["sincos", "learned", "rotary", "none"])
def test_permuting_tokens_with_positions_permutes_outputs(axes, kind):
  encoder, params, x = build(**axes, positions=kind)
  n = math.prod(encoder.grid(x.shape[1:-1]))
  order = np.random.default_rng(3).permutation(n)
  keep = jnp.asarray(np.stack([order] * 2), jnp.int32)
  got = run(encoder, params, x, keep=keep)
  want = run(encoder, params, x)
  np.testing.assert_allclose(got["patches"], want["patches"][:, order], atol=1e-5)
  np.testing.assert_allclose(got["cls"], want["cls"], atol=1e-5)


def test_permuting_tokens_with_relative_positions_permutes_outputs(axes):
  encoder, params, x = build(**axes, positions="relative")
  grid = encoder.grid(x.shape[1:-1])
  n = math.prod(grid)
  rng = np.random.default_rng(3)
  order = np.concatenate([[0], 1 + rng.permutation(n)])
  bias = jnp.moveaxis(params["relative_bias"][positions.relative_index(grid, 1)], -1, 0)
  z = jnp.float32(rng.normal(size=(2, n + 1, 32)))
  stack = layers.Transformer(2, layers.Block(4, parent=None))
  run = jax.jit(lambda z, bias: stack.apply({"params": params["blocks"]}, z, None, bias)[0])
  got = run(z[:, order], bias[:, order][:, :, order])
  np.testing.assert_allclose(got, run(z, bias)[:, order], atol=1e-5)


def test_hidden_places_cannot_reach_what_is_dropped(axes):
  encoder, params, x = build(**axes)
  grid = encoder.grid(x.shape[1:-1])
  hidden, keep, places = random_keep(math.prod(grid), math.prod(grid) // 2)
  patches = tokens.patchify(x, encoder.patch)
  rows = jnp.arange(2)[:, None]
  other = tokens.unpatchify(jnp.asarray(patches).at[rows, places].set(9.0), grid, encoder.patch)
  got = run(encoder, params, other, keep=keep)["tokens"]
  np.testing.assert_array_equal(got, run(encoder, params, x, keep=keep)["tokens"])


def test_hidden_places_cannot_reach_what_is_replaced(axes):
  encoder, params, x = build(**axes, positions="relative")
  grid = encoder.grid(x.shape[1:-1])
  hidden, _, places = random_keep(math.prod(grid), math.prod(grid) // 2)
  patches = tokens.patchify(x, encoder.patch)
  rows = jnp.arange(2)[:, None]
  other = tokens.unpatchify(jnp.asarray(patches).at[rows, places].set(9.0), grid, encoder.patch)
  got, want = (run(encoder, params, a, hidden=hidden, mask_token=np.ones(32)) for a in (other, x))
  np.testing.assert_array_equal(got["tokens"], want["tokens"])


def test_split_and_fill_are_inverse():
  hidden, keep, places = random_keep(10, 6)
  assert keep.shape == (2, 4) and places.shape == (2, 6)
  everything = np.concatenate([keep, places], axis=1)
  np.testing.assert_array_equal(np.sort(everything, axis=1), np.arange(10)[None].repeat(2, 0))
  np.testing.assert_array_equal(np.sort(places, axis=1), places)
  assert np.take_along_axis(np.asarray(hidden), np.asarray(places), 1).all()
  z = jnp.float32(np.random.default_rng(0).normal(size=(2, 10, 3)))
  full = tokens.fill(tokens.take(z, keep), hidden, keep, jnp.full(3, 5.0))
  np.testing.assert_array_equal(full, np.where(np.asarray(hidden)[..., None], 5.0, z))


@pytest.mark.parametrize(
  "shape, patch, message",
  [
    ((30, 32), (16, 16), "image size 30 .axis 0. is not divisible by patch size 16; use 16 or 32"),
    ((32, 8), (16, 16), "axis 1. is not divisible by patch size 16; use 16, or another"),
    ((32,), (16, 16), "cannot be cut"),
  ],
)
def test_grid_errors_name_axis_size_and_patch(shape, patch, message):
  with pytest.raises(ValueError, match=message):
    tokens.grid_of(shape, patch)


# The encoder as a whole


def test_outputs_of_the_encoder():
  encoder, params, x = build(registers=3, pool="mean")
  out = run(encoder, params, x, layers=(0, -1))
  assert encoder.grid((8, 12, 3)) == encoder.grid((8, 12)) == (2, 3)
  shapes = {k: v.shape for k, v in out.items()}
  assert shapes == {
    "tokens": (2, 10, 32), "patches": (2, 6, 32), "cls": (2, 32), "registers": (2, 3, 32),
    "pooled": (2, 32), "layer_0": (2, 10, 32), "layer_1": (2, 10, 32),
  }  # fmt: skip
  np.testing.assert_allclose(out["pooled"], out["patches"].mean(1), atol=1e-6)
  np.testing.assert_array_equal(out["tokens"][:, 0], out["cls"])
  np.testing.assert_array_equal(out["tokens"][:, 1:4], out["registers"])
  norm = layers.layer_norm("norm", 1e-6, jnp.float32)
  last = norm.apply({"params": params["norm"]}, out["layer_1"])
  np.testing.assert_allclose(last, out["tokens"], atol=1e-6)


def test_registers_take_part_and_stand_outside_the_grid():
  encoder, params, x = build(registers=2, class_token=False, pool="mean")
  out = run(encoder, params, x)
  assert "cls" not in out and out["patches"].shape == (2, 6, 32)
  other = params | {"registers": params["registers"] * 2}
  assert np.abs(run(encoder, other, x)["patches"] - out["patches"]).max() > 1e-3


def grads(encoder, params, x):
  def value(params):
    out = run(encoder, params, x, layers=(0,), keys=jax.random.split(KEY, 2))
    return jnp.square(out["tokens"]).mean() + jnp.sin(out["layer_0"]).mean()

  return jax.jit(jax.value_and_grad(value))(params)


@pytest.mark.parametrize(
  "how",
  [
    dict(scan=True),
    dict(remat="full"),
    dict(scan=True, remat="full"),
    dict(scan=True, remat="dots"),
  ],
  ids=lambda how: "-".join(f"{k}={v}" for k, v in how.items()),
)
def test_scan_and_remat_keep_the_tree_numbers_and_gradients(how):
  settings = dict(drop_path=0.3, layer_scale=0.5)
  encoder, params, x = build(**settings)
  other, same, _ = build(**settings, **how)
  assert jax.tree.structure(params) == jax.tree.structure(same)
  value, grad = grads(encoder, params, x)
  got_value, got_grad = grads(other, params, x)
  np.testing.assert_allclose(got_value, value, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got_grad, grad)


def test_bfloat16_is_close_to_float32_with_float32_parameters():
  encoder, params, x = build(drop_path=0.1, layer_scale=0.5, registers=1)
  half, raw, _ = build(drop_path=0.1, layer_scale=0.5, registers=1, dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(raw)} == {jnp.dtype("float32")}
  got, want = (run(e, params, x) for e in (half, encoder))
  assert got["tokens"].dtype == jnp.bfloat16 and got["pooled"].dtype == jnp.float32
  error = np.abs(np.float32(got["tokens"]) - want["tokens"])
  assert 0 < error.max() < 0.1 and error.mean() < 0.02


def test_decoder_predicts_at_hidden_places_from_all_kept_tokens():
  decoder = TransformerDecoder(width=16, depth=1, heads=2, out=5, prefix=1)
  grid = (2, 3)
  hidden, keep, places = random_keep(6, 4)
  z = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 8)))
  make = lambda: decoder.init(KEY, z, grid, hidden, keep, places)["params"]  # noqa: E731
  params = numbers(jax.eval_shape(make))
  run = jax.jit(lambda z: decoder.apply({"params": params}, z, grid, hidden, keep, places))
  assert run(z).shape == (2, 4, 5)
  for token in range(3):  # the class token goes through the decoder too
    assert np.abs(run(z.at[:, token].add(1.0)) - run(z)).max() > 1e-4


def millions(tree):
  return round(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) / 1e6, 2)


@pytest.mark.parametrize(
  "variant, patch, encoder_size, decoder_size",
  [("B", 16, 85.65, 26.01), ("L", 16, 303.10, 26.14), ("H", 14, 630.44, 26.18)],
)
def test_parameter_counts(variant, patch, encoder_size, decoder_size):
  method = masked(vit(variant=variant, patch=(patch, patch)), (224 // patch) ** 2 * 3 // 4)
  batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
  params = jax.eval_shape(method.init, KEY, batch)[0]
  assert millions(params["encoder"]) == encoder_size
  # H/14 has 588 values a patch, not 768.
  assert millions(params["decoder"]) == decoder_size


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(variant="XL"), "variant 'XL' is none of Ti, S, B"),
    (dict(positions="sin"), "positions 'sin' is none of"),
    (dict(pool="avg"), "pool 'avg'"),
    (dict(remat="some"), "remat 'some'"),
    (dict(class_token=False), 'use pool="mean"'),
    (dict(width=100, heads=3), "width 100 is not divisible by 3 heads"),
  ],
)
def test_wrong_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    vit(**arguments)


# Which parameters decay


BLOCK_1D = {
  "norm1/scale", "norm1/bias", "norm2/scale", "norm2/bias",
  "attn/proj/bias", "mlp/fc1/bias", "mlp/fc2/bias",
}  # fmt: skip


def excluded(encoder, method_arguments, no_decay=()):
  """Paths without decay, with block numbers struck out."""
  method = masked(encoder, 3, **method_arguments)
  batch = {"image": jax.ShapeDtypeStruct((1, 8, 12, 3), jnp.float32)}
  params = jax.eval_shape(method.init, KEY, batch)[0]
  out = {k for k, decays in paths(decayed(params, no_decay)).items() if not decays}
  assert not any("block_0" in k and k.replace("block_0", "block_1") not in out for k in out)
  return {k.replace("block_0/", "").replace("block_1/", "") for k in out}, set(paths(params))


def test_decay_of_mae():
  encoder = vit(**TINY, registers=2, positions="learned")
  decoder = dict(decoder_width=16, decoder_depth=2, decoder_heads=2)
  got, everything = excluded(encoder, decoder)
  block = BLOCK_1D | {"attn/qkv/bias"}
  want = {f"encoder/blocks/{k}" for k in block} | {f"decoder/blocks/{k}" for k in block}
  want |= {f"encoder/{k}" for k in ("stem/bias", "norm/scale", "norm/bias")}
  want |= {f"decoder/{k}" for k in ("embed/bias", "norm/scale", "norm/bias", "head/bias")}
  assert got == want
  decays = {"encoder/cls_token", "encoder/registers", "encoder/positions", "decoder/mask_token"}
  assert decays <= everything - got


SIMMIM = dict(layout="replace", head="linear", target="pixels", loss="l1")
DATA2VEC = SIMMIM | dict(target="teacher", loss="smooth_l1", teacher_layers=2)


@pytest.mark.parametrize("norm, axis", [("layer", 2), ("instance", 1)])
def test_what_data2vec_is_to_predict(norm, axis):
  encoder, hidden = vit(**TINY), np.arange(6)[None] % 3 != 0
  method = masked(encoder, int(hidden.sum()), **DATA2VEC, teacher_norm=norm)
  image = np.random.default_rng(0).normal(size=(4, 8, 12, 3)).astype(np.float32)
  batch = {"image": image, "hidden": hidden.repeat(4, 0), "index": np.arange(4)}
  params, extra = method.init(jax.random.key(0), batch)
  _, (_, metrics) = method.loss(params, extra, batch, jax.random.key(1), 0)

  def normal(x, axis):
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)

  out = encoder.apply({"params": extra["teacher"]["encoder"]}, image, layers=(-2, -1))
  blocks = [np.float64(out[f"layer_{i}"])[:, encoder.prefix :] for i in range(encoder.depth)[-2:]]
  want = normal(np.mean([normal(x, axis) for x in blocks], 0), 2)[:, hidden[0]]
  np.testing.assert_allclose(metrics["target_std"], want.std((0, 1)).mean(), rtol=1e-4)


@pytest.mark.parametrize("arguments", [SIMMIM, DATA2VEC], ids=["simmim", "data2vec"])
def test_decay_of_simmim_and_data2vec(arguments):
  encoder = vit(**TINY, positions="relative", layer_scale=0.1, qkv_bias="qv", init_kernels="beit")
  got, everything = excluded(encoder, arguments, ("cls_token", "positions"))
  want = BLOCK_1D | {"attn/q_bias", "attn/v_bias", "scale1", "scale2"}
  want = {f"encoder/blocks/{k}" for k in want}
  want |= {f"encoder/{k}" for k in ("stem/bias", "norm/scale", "norm/bias", "cls_token")}
  assert got == want | {"head/head/bias"}
  assert {"mask_token", "encoder/relative_bias"} <= everything - got
