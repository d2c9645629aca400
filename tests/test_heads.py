"""Projectors, prototypes and DINO's head: forms, starts, statistics, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssljax import flops
from ssljax.leaves import named
from ssljax.models.heads import DINOHead, Predictor, Projector, Prototypes, unit, unit_columns

KEY = jax.random.key(0)
MUTABLE = ["batch_stats"]
X = np.random.default_rng(0).normal(1, 2, (16, 6)).astype(np.float32)

# What the literature puts on a ResNet -> arguments, and the parameters of the layers.
FORMS = {
  "SimCLR": (
    dict(sizes=(8, 4), last="scale"),
    {"layer_0/kernel", "norm_0/scale", "norm_0/bias", "layer_1/kernel", "norm_1/scale"},
  ),
  "MoCo v2": (
    dict(sizes=(8, 4), norm="none"),
    {"layer_0/kernel", "layer_0/bias", "layer_1/kernel", "layer_1/bias"},
  ),
  "BYOL": (
    dict(sizes=(8, 4), bias="hidden"),
    {"layer_0/kernel", "layer_0/bias", "norm_0/scale", "norm_0/bias", "layer_1/kernel"},
  ),
  "Barlow Twins": (
    dict(sizes=(8, 4), bias="none"),
    {"layer_0/kernel", "norm_0/scale", "norm_0/bias", "layer_1/kernel"},
  ),
  "SimSiam": (
    dict(sizes=(8, 4), last="plain"),
    {"layer_0/kernel", "norm_0/scale", "norm_0/bias", "layer_1/kernel"},
  ),
  "SimSiam's predictor": (
    dict(sizes=(8, 4)),
    {"layer_0/kernel", "norm_0/scale", "norm_0/bias", "layer_1/kernel", "layer_1/bias"},
  ),
  "NNCLR": (
    dict(sizes=(4,), last="batch"),
    {"layer_0/kernel", "norm_0/scale", "norm_0/bias"},
  ),
  "Latent MIM": (
    dict(sizes=(8, 4), norm="layer", last="layer"),
    {
      "layer_0/kernel",
      "norm_0/scale",
      "norm_0/bias",
      "layer_1/kernel",
      "norm_1/scale",
      "norm_1/bias",
    },
  ),
  "linear": (dict(sizes=(4,)), {"layer_0/kernel", "layer_0/bias"}),
  "nothing": (dict(sizes=()), set()),
}


def build(head, x=X):
  """Random variables in NumPy, nothing at its start value: initialisers take long to compile."""
  rng = np.random.default_rng(1)

  def one(path, leaf):
    positive = path[-1].key in ("scale", "var", "last_layer_gain")
    return np.float32(positive + 0.5 * rng.uniform(-1, 1, size=leaf.shape))

  return jax.tree_util.tree_map_with_path(one, jax.eval_shape(head.init, KEY, x))


@functools.partial(jax.jit, static_argnums=0)
def train(head, variables, x):
  return head.apply(variables, x, train=True, mutable=MUTABLE)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(head, variables, x):
  return head.apply(variables, x)


@pytest.mark.parametrize("form", FORMS)
def test_forms_on_shapes(form):
  arguments, names = FORMS[form]
  head = Projector(**arguments)
  variables = jax.eval_shape(head.init, KEY, jax.ShapeDtypeStruct((2, 6), jnp.float32))
  assert set(named(variables.get("params", {}))) == names
  norms = {n for n in named(variables) if n.startswith("batch_stats")}
  last = arguments.get("last", "none") != "none"
  batch = arguments.get("norm", "batch") == "batch"  # the others keep no statistics
  expected = len(arguments["sizes"]) - 1 + last if batch else 0
  assert len(norms) == 2 * max(expected, 0)
  out, _ = jax.eval_shape(
    functools.partial(head.apply, train=True, mutable=MUTABLE), variables, jnp.asarray(X)
  )
  assert out.shape == (16, (6, *arguments["sizes"])[-1])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_projector_against_numpy(activation):
  from scipy.special import erf

  head = Projector((8, 4), last="scale", activation=activation)
  variables = build(head)
  y, new = train(head, variables, X)

  def norm(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)

  act = {"relu": lambda x: x * (x > 0), "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2}[activation]
  p = jax.tree.map(np.asarray, variables["params"])
  hidden = X @ p["layer_0"]["kernel"]
  y0 = norm(hidden) * p["norm_0"]["scale"] + p["norm_0"]["bias"]
  want = norm(act(y0) @ p["layer_1"]["kernel"]) * p["norm_1"]["scale"]
  np.testing.assert_allclose(y, want, atol=2e-5)
  stats = new["batch_stats"]["norm_0"]
  old = variables["batch_stats"]["norm_0"]
  np.testing.assert_allclose(stats["mean"], 0.9 * old["mean"] + 0.1 * hidden.mean(0), atol=1e-6)
  np.testing.assert_allclose(
    stats["var"], 0.9 * old["var"] + 0.1 * hidden.var(0, ddof=1), rtol=1e-5
  )
  evaluated = evaluate(head, variables, X[:2])  # running statistics: rows do not see each other
  np.testing.assert_allclose(evaluated, evaluate(head, variables, X)[:2], atol=1e-6)
  assert np.abs(evaluated - y[:2]).max() > 0.1


def test_projector_over_places():
  """[b n d]: statistics over examples and places."""
  head = Projector((8, 4))
  variables = build(head)
  x = X.reshape(4, 4, 6)
  flat, stats = train(head, variables, X)
  deep, other = train(head, variables, x)
  np.testing.assert_allclose(deep.reshape(16, 4), flat, atol=1e-6)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), stats, other)


def test_no_layers_are_the_identity():
  head = Predictor(())
  np.testing.assert_array_equal(head.apply({}, X, train=True), X)


@pytest.mark.parametrize("start", ["torch", "normal"])
def test_starts(start):
  head = Projector((400, 300), "none", start=start)
  params = jax.jit(head.init)(KEY, jnp.ones((1, 500)))["params"]
  for i, fan_in in ((0, 500), (1, 400)):
    kernel, bias = params[f"layer_{i}"]["kernel"], params[f"layer_{i}"]["bias"]
    bound = fan_in**-0.5
    deviation = bound / 3**0.5 if start == "torch" else 0.02
    np.testing.assert_allclose(kernel.std(), deviation, rtol=0.02)
    if start == "torch":
      assert 0.98 * bound < np.abs(kernel).max() <= bound
      assert 0.9 * bound < np.abs(bias).max() <= bound
    else:
      assert np.abs(kernel).max() > 0.06 and not bias.any()


def test_one_and_eight_devices():
  head = Projector((8, 4), last="batch")
  variables = build(head)
  step = functools.partial(train, head)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    many = jax.tree.map(np.asarray, step(variables, jax.device_put(X, rows)))
  one = jax.tree.map(np.asarray, step(variables, X))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), many, one)
  assert np.abs(step(variables, X[:2])[0] - one[0][:2]).max() > 0.1  # two rows are not the batch


# Prototypes


@pytest.mark.parametrize("way", ["no", "start", "use"])
def test_prototypes(way):
  head = Prototypes(5, way)
  params = head.init(KEY, X)["params"]
  kernel = np.asarray(params["kernel"])
  length = np.linalg.norm(kernel, axis=0)
  assert kernel.shape == (6, 5) and np.allclose(length, 1, atol=1e-6) == (way == "start")
  scores = head.apply({"params": params}, X, train=True)
  unit_kernel = kernel / length if way == "use" else kernel
  np.testing.assert_allclose(scores, X @ unit_kernel, rtol=1e-5, atol=1e-5)
  scaled = head.apply({"params": {"kernel": 3 * kernel}}, X)
  np.testing.assert_allclose(scaled, scores * (1 if way == "use" else 3), rtol=1e-5, atol=1e-5)


def test_gradients_through_unit_prototypes_are_tangent():
  head = Prototypes(5)
  params = head.init(KEY, X)["params"]
  grads = jax.grad(lambda p: jnp.square(head.apply({"params": p}, X)).sum())(params)["kernel"]
  assert np.abs(grads).max() > 1
  np.testing.assert_allclose((grads * params["kernel"]).sum(0), 0, atol=1e-4)


def test_unit_at_zero_and_in_bfloat16():
  zero = jnp.zeros((2, 3))
  assert not unit(zero).any() and np.isfinite(jax.grad(lambda x: unit(x).sum())(zero)).all()
  assert unit(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.float32
  np.testing.assert_allclose(np.linalg.norm(unit_columns(X), axis=0), 1, rtol=1e-6)


# DINO


@pytest.mark.parametrize("gain", ["fixed", "trained", "none"])
def test_dino_head(gain):
  head = DINOHead(out=12, hidden=8, bottleneck=4, gain=gain)
  variables = build(head)
  params = variables["params"]
  assert set(variables) == {"params"}
  assert ("last_layer_gain" in params) == (gain == "trained")
  assert set(named(params["mlp"])) == {
    f"layer_{i}/{k}" for i in range(3) for k in ("kernel", "bias")
  }
  mlp = Projector((8, 8, 4), "none", activation="gelu")
  z = unit(evaluate(mlp, {"params": params["mlp"]}, X))
  kernel = params["last_layer"]["kernel"]
  kernel = kernel if gain == "none" else kernel / np.linalg.norm(kernel, axis=0)
  scores = evaluate(head, variables, X)
  np.testing.assert_allclose(scores, z @ kernel * params.get("last_layer_gain", 1), atol=1e-5)
  if gain == "fixed":
    assert np.abs(scores).max() <= 1 + 1e-6
  loss = lambda p: jnp.square(head.apply({"params": p}, X)).sum()  # noqa: E731
  grads = jax.jit(jax.grad(loss))(params)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_dino_head_starts():
  head = DINOHead(out=500, hidden=300, bottleneck=64)
  params = jax.jit(head.init)(KEY, jnp.ones((1, 200)))["params"]
  np.testing.assert_allclose(params["mlp"]["layer_1"]["kernel"].std(), 0.02, rtol=0.02)
  assert not params["mlp"]["layer_0"]["bias"].any()
  # The directions are drawn after the others were: PyTorch's default, bound 1/sqrt(64).
  assert 0.12 < np.abs(params["last_layer"]["kernel"]).max() <= 0.125
  head = DINOHead(out=500, hidden=30, gain="none")
  plain = jax.jit(head.init)(KEY, jnp.ones((1, 20)))["params"]
  np.testing.assert_allclose(plain["last_layer"]["kernel"].std(), 0.02, rtol=0.02)


def test_bfloat16_heads_score_in_float32():
  head = DINOHead(out=12, hidden=8, bottleneck=4, norm="batch", dtype=jnp.bfloat16)
  scores, new = jax.eval_shape(functools.partial(train, head), build(head), X)
  assert scores.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
  plain = Projector((4,), dtype=jnp.bfloat16)
  assert jax.eval_shape(functools.partial(evaluate, plain), build(plain), X).dtype == jnp.bfloat16


def test_flops_of_a_projector():
  head = Projector((8, 4), last="plain")
  variables = jax.eval_shape(head.init, KEY, X)
  work = flops.count_flops(
    functools.partial(head.apply, train=True, mutable=MUTABLE), variables, jnp.asarray(X)
  )
  assert work == 2 * 16 * (6 * 8 + 8 * 4)


def test_errors():
  for head, message in (
    (Projector((4,), norm="group"), "Projector.norm 'group' is none of batch, layer, none"),
    (
      Projector((4,), last="affine"),
      "Projector.last 'affine' is none of none, batch, layer, scale, plain",
    ),
    (Projector((4,), bias="some"), "Projector.bias 'some' is none of auto"),
    (Projector((4,), activation="tanh"), "Projector.activation 'tanh'"),
    (Projector((4,), start="orthogonal"), "Projector.start 'orthogonal'"),
    (Prototypes(4, unit="yes"), "Prototypes.unit 'yes'"),
    (DINOHead(4, gain="free"), "DINOHead.gain 'free' is none of fixed, trained, none"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(head.init, KEY, jnp.asarray(X))
