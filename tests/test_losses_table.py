"""One table over all losses and targets: values, gradients, types, devices, completeness."""

import doctest
import importlib
import pkgutil
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from loss_cases import all_cases

from ssljax import losses, targets

CASES = {case.name: case for case in all_cases()}
assert len(CASES) == len(all_cases()), "two cases of one name"


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
  return request.param


# Of "loss", "loss/variant", … the first: what takes longest to compile; for the others when slow.
FIRST = {n.partition("/")[0]: n for n in reversed(CASES)}.values()
FIRST = [pytest.param(c, marks=() if n in FIRST else pytest.mark.slow) for n, c in CASES.items()]


@pytest.fixture(params=FIRST, ids=CASES)
def first(request):
  return request.param


def make(case, b=8, seed=0):
  return case.make(np.random.default_rng([seed, b, zlib.crc32(case.name.encode())]), b)


def cast(arrays, dtype):
  """Floats in `dtype`, integers and booleans as JAX has them."""

  def to(x):
    if isinstance(x, jax.Array):
      return x
    return jnp.asarray(x, dtype if x.dtype.kind == "f" else None)

  return jax.tree.map(to, arrays)


def close(got, want, rtol):
  """Leaf by leaf; small numbers are held to the size of the largest."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    w = np.asarray(w)
    assert g.shape == w.shape
    if w.dtype.kind in "bi":
      np.testing.assert_array_equal(g, w)
    else:
      scale = max(float(np.abs(w).max(initial=0.0)), 1e-3)
      np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=rtol, atol=rtol * scale)


def floats(arrays, without=()):
  """Names of the arrays with a gradient."""
  return [
    k for k, x in arrays.items() if hasattr(x, "dtype") and x.dtype.kind == "f" and k not in without
  ]


def weighted(case, arrays, call=None):
  """A scalar of the output in which every number counts differently, as a function of floats."""

  def scalar(floating):
    total = 0.0
    for leaf in jax.tree.leaves((call or case.call)(**(arrays | floating))):
      if jnp.issubdtype(leaf.dtype, jnp.floating):
        total += (
          leaf * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)
        ).sum()
    return total

  return scalar


def test_equals_its_numpy_statement(case):
  arrays = make(case)
  close(jax.jit(case.call)(**cast(arrays, jnp.float32)), case.numpy(**arrays), case.rtol)


def test_takes_bfloat16(case):
  arrays = make(case)
  if case.low is None:
    pytest.skip("bfloat16 makes no sense here, says the case")
  low = cast(arrays, jnp.bfloat16)
  got = jax.jit(case.call)(**low)
  assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(got)), "float32 at least"
  # The same rounded numbers in float32: what is left is how the loss computes.
  rounded = jax.tree.map(
    lambda x: np.asarray(x, np.float64) if x.dtype == jnp.bfloat16 else np.asarray(x), low
  )
  close(got, case.numpy(**rounded), case.low)


def test_in_float64_and_gradient_by_finite_differences(case):
  plain = make(case, 6)
  with jax.enable_x64(True):
    arrays = cast(plain, jnp.float64)
    names = floats(arrays, case.fixed) if case.gradient else []
    at = {k: arrays[k] for k in names}

    def both(floating):
      return weighted(case, arrays)(floating), case.call(**(arrays | floating))

    # One program to compile, for values, gradient and differences.
    program = jax.jit(jax.value_and_grad(both, has_aux=True) if at else lambda at: (both(at), {}))
    (_, out), gradient = program(at)
    assert all(x.dtype != jnp.float32 for x in jax.tree.leaves(out))
    close(out, case.numpy(**plain), 1e-8)
    if case.gradient:
      check_gradient(case, arrays, at, lambda now: program(now)[0][0], gradient)
  if not case.gradient:
    _has_no_gradient(case)


def check_gradient(case, arrays, at, scalar, gradient):
  """Along three directions, against central differences; what a loss stops (`case.stopped`) is held
  in them."""
  if case.stopped:
    base = jax.tree.map(np.asarray, arrays)

    def frozen(**now):
      return case.stopped(base, **jax.tree.map(np.asarray, now))

    scalar = weighted(case, arrays, frozen)
  for turn in range(3):
    keys = jax.random.split(jax.random.key(turn), len(at))
    along = {k: jax.random.normal(key, at[k].shape, jnp.float64) for k, key in zip(at, keys)}
    step = 1e-5
    ahead, behind = ({k: at[k] + s * step * along[k] for k in at} for s in (1, -1))
    want = (scalar(ahead) - scalar(behind)) / (2 * step)
    got = sum((gradient[k] * along[k]).sum() for k in at)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def _has_no_gradient(case):
  arrays = cast(make(case), jnp.float32)
  at = {k: arrays[k] for k in floats(arrays)}
  for leaf in jax.tree.leaves(jax.jit(jax.grad(weighted(case, arrays)))(at)):
    np.testing.assert_array_equal(leaf, 0.0)


def test_nothing_flows_into_what_is_fixed(case):
  arrays = cast(make(case), jnp.float32)
  if not case.fixed:
    return
  at = {name: arrays[name] for name in case.fixed}
  for name, gradient in jax.jit(jax.grad(weighted(case, arrays)))(at).items():
    np.testing.assert_array_equal(gradient, 0.0, err_msg=name)


def test_eight_devices_give_what_one_gives(first):
  case = first
  arrays = cast(make(case, 16), jnp.float32)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = {}
  for k, x in arrays.items():
    where = NamedSharding(mesh, P() if k in case.whole else P("data"))
    spread[k] = jax.tree.map(lambda leaf, where=where: jax.device_put(leaf, where), x)
  names = floats(arrays, case.fixed) if case.gradient else []

  def both(arrays):
    at = {k: arrays[k] for k in names}
    return case.call(**arrays), jax.grad(weighted(case, arrays))(at) if at else {}

  one, eight = jax.jit(both)(arrays), jax.jit(both)(spread)
  close(jax.device_get(eight), jax.device_get(one), max(case.rtol, 2e-5))


def test_permuting_the_batch(case):
  if not case.rows:
    return
  b = 8
  arrays = make(case, b)
  order = np.random.default_rng(3).permutation(b)
  moved = {
    k: x if k in case.whole else jax.tree.map(lambda y: y[order], x) for k, x in arrays.items()
  }
  program = jax.jit(case.call)
  plain, got = program(**cast(arrays, jnp.float32)), program(**cast(moved, jnp.float32))
  permuted = jax.tree.map(
    lambda x: x[order] if x.ndim and x.shape[0] == b else x, jax.device_get(plain)
  )
  close(got, permuted, max(case.rtol, 2e-5))


def test_program_is_pure_and_single_precision(case):
  arrays = cast(make(case), jnp.float32)
  text = str(jax.make_jaxpr(case.call)(**arrays))
  assert "callback" not in text
  with jax.enable_x64(True):  # without it nothing could be float64
    text = str(jax.make_jaxpr(case.call)(**arrays))
  assert not re.search(r"f64\[\d", text)


def test_every_public_name_has_a_case():
  named = {name.split("/")[0] for name in CASES}
  public = set(losses.__all__) | set(targets.__all__)
  assert public - named == set(), "without a case"
  assert named - public == set(), "not public"


MODULES = [
  f"{package.__name__}.{module.name}"
  for package in (losses, targets)
  for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name):
  module = importlib.import_module(name)
  known = {"jax": jax, "jnp": jnp, "np": np, "losses": losses, "targets": targets}
  result = doctest.testmod(module, extraglobs=known)
  assert result.failed == 0
  public = getattr(module, "__all__", ())
  bare = [n for n in public if ">>>" not in (getattr(module, n).__doc__ or "")]
  assert not bare, f"without an example: {bare}"
