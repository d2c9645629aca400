"""Tiled and ring forms: equal to the plain ones in value and gradient, in little memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssljax import losses

I, J = np.arange(8)[:, None], np.arange(6)[None]
Z1 = np.sin(1.7 * (I + 1) * (J + 1) * 0.37 + 0.3 * J)
Z2 = Z1 + 0.3 * np.cos(1.1 * I - 0.5 * J)
# Plain form, its numbers; numbers and value of the golden check.
FORMS = {
  "info_nce": (losses.info_nce, (0.3,), (0.2,), 0.086489912692),
  "nt_xent": (losses.nt_xent, (0.3,), (0.5,), 1.063480717498),
  "clip": (losses.clip_loss, (6.5,), (1 / 0.07,), 0.000830629548),
  "siglip": (losses.siglip_loss, (7.0, -4.0), (10.0, -10.0), 0.884387728829),
}
tiled = {name: getattr(losses, f"{name}_tiled") for name in FORMS}
ring = {name: getattr(losses, f"{name}_ring") for name in FORMS}
names = pytest.mark.parametrize("name", FORMS)


def make_mesh(shape=(8,), axes=("data",)):
  count = int(np.prod(shape))
  auto = (jax.sharding.AxisType.Auto,) * len(axes)
  return jax.make_mesh(shape, axes, axis_types=auto, devices=jax.devices()[:count])


def two(b, d=5, seed=0):
  first, second = np.random.default_rng(seed).normal(size=(2, b, d))
  return first, first + 0.7 * second


def value_and_gradients(loss, *inputs):
  """[b] and the gradients of a sum in which every example counts differently."""

  def scalar(*inputs):
    value = loss(*inputs)
    return (value * jnp.cos(jnp.arange(len(value)))).sum(), value

  (_, value), gradients = jax.jit(
    jax.value_and_grad(scalar, argnums=range(len(inputs)), has_aux=True)
  )(*inputs)
  return jax.device_get((value, *gradients))


@functools.cache
def plain(name, b):
  loss, numbers, _, _ = FORMS[name]
  return value_and_gradients(loss, *(jnp.asarray(x) for x in (*two(b), *numbers)))


def same(got, want, rtol=1e-9):
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=rtol, atol=rtol * np.abs(w).max())


@names
def test_golden_values(name):
  _, _, numbers, want = FORMS[name]
  with jax.enable_x64(True):
    one, two = jnp.asarray(Z1), jnp.asarray(Z2)
    by_tile = np.asarray(tiled[name](one, two, *numbers, tile=3))
    around = np.asarray(ring[name](one, two, *numbers, "data", make_mesh()))
  np.testing.assert_allclose(by_tile.mean(), want, rtol=1e-9)
  np.testing.assert_allclose(around.mean(), want, rtol=1e-9)


@names
@pytest.mark.parametrize(("b", "tile"), [(7, 3), (8, 4), (7, 100)])
def test_tiles_equal_the_plain_form(name, b, tile):
  with jax.enable_x64(True):
    inputs = (jnp.asarray(x) for x in (*two(b), *FORMS[name][1]))
    got = value_and_gradients(lambda *x: tiled[name](*x, tile=tile), *inputs)
    same(got, plain(name, b))


@names
@pytest.mark.parametrize(("devices", "tile"), [(1, None), (2, 3), (8, None)])
def test_ring_equals_the_plain_form(name, devices, tile):
  mesh = make_mesh((devices,))
  with jax.enable_x64(True):
    place = NamedSharding(mesh, P("data"))
    inputs = *(jax.device_put(x, place) for x in two(8)), *map(jnp.asarray, FORMS[name][1])
    got = value_and_gradients(lambda *x: ring[name](*x, "data", mesh, tile), *inputs)
    same(got, plain(name, 8))


def test_ring_on_one_axis_of_the_mesh_that_is_set():
  with jax.enable_x64(True), jax.set_mesh(make_mesh((4, 2), ("data", "model"))):
    inputs = (jnp.asarray(x) for x in (*two(8), 0.3))
    got = value_and_gradients(lambda *x: losses.info_nce_ring(*x, "data"), *inputs)
  with jax.enable_x64(True):
    same(got, plain("info_nce", 8))


@names
def test_tiles_of_a_sharded_batch(name):
  """Under jit a sharded batch is global: nothing but the placing differs."""
  place = NamedSharding(make_mesh(), P("data"))
  with jax.enable_x64(True):
    inputs = *(jax.device_put(x, place) for x in two(16)), *map(jnp.asarray, FORMS[name][1])
    got = value_and_gradients(lambda *x: tiled[name](*x, tile=4), *inputs)
    same(got, plain(name, 16))


def extra_bytes(loss, b, d=256, sharding=None):
  """What the compiled value and gradient needs beside its arguments and results, on one device."""
  x = jax.ShapeDtypeStruct((b, d), jnp.float32, sharding=sharding)
  compiled = jax.jit(jax.value_and_grad(lambda a, b: loss(a, b).mean(), (0, 1))).lower(x, x)
  return compiled.compile().memory_analysis().temp_size_in_bytes


@names
def test_memory_of_tiles(name):
  loss, numbers, _, _ = FORMS[name]
  few, many = (extra_bytes(lambda a, b: tiled[name](a, b, *numbers), b) for b in (4096, 32768))
  assert many < 1e9 and many < 10 * few  # 8 times the batch
  assert extra_bytes(lambda a, b: loss(a, b, *numbers), 32768) > 4 * 32768**2


def test_memory_of_the_textbook():
  def textbook(q, k):
    return -jnp.diag(jax.nn.log_softmax(q @ k.T / 0.1))

  assert extra_bytes(textbook, 32768) > 8e9


def test_memory_of_the_ring():
  mesh = make_mesh()
  sharding = NamedSharding(mesh, P("data"))
  around = functools.partial(losses.info_nce_ring, temperature=0.1, axis="data", mesh=mesh)
  matrix = 4 * 32768**2
  assert extra_bytes(around, 32768, sharding=sharding) < 4 * matrix / 64


def forms(b):
  """Each form as a function of two arrays and its numbers, with those numbers."""
  mesh = make_mesh((2 if b % 2 == 0 else 1,))
  for name, (_, numbers, _, _) in FORMS.items():
    yield functools.partial(tiled[name], tile=3), numbers
    if name in ("info_nce", "siglip"):
      yield functools.partial(ring[name], axis="data", mesh=mesh), numbers


@pytest.mark.parametrize("b", [1, 4])
def test_extreme_inputs_stay_finite(b):
  some = jnp.asarray(two(b)[0], jnp.float32)
  zero, back = jnp.zeros_like(some), some[::-1]
  for loss, numbers in forms(b):
    compiled = jax.jit(
      jax.value_and_grad(lambda *x, loss=loss: loss(*x).sum(), argnums=range(2 + len(numbers)))
    )
    for number in (1e-30, 0.1, 1e30):
      rest = jnp.float32(number), *map(jnp.float32, numbers[1:])
      for arrays in ((some, back), (some, zero), (zero, zero), (some, some)):
        value, gradients = compiled(*arrays, *rest)
        assert np.isfinite(value) and value >= 0
        assert all(np.isfinite(g).all() for g in gradients)


def test_one_example_has_no_negatives():
  one = jnp.asarray(two(1)[0], jnp.float32)
  for loss in (losses.info_nce_tiled, losses.nt_xent_tiled, losses.clip_tiled):
    assert float(loss(one, -one, 0.1)[0]) == 0.0


def test_equal_rows():
  equal = jnp.ones((6, 3))
  np.testing.assert_allclose(losses.info_nce_tiled(equal, equal, 0.1, 4), np.log(6), rtol=1e-6)
  np.testing.assert_allclose(losses.nt_xent_tiled(equal, equal, 0.1, 4), np.log(11), rtol=1e-6)
  zero = jnp.zeros((4096, 1))
  np.testing.assert_allclose(losses.siglip_tiled(zero, zero, 10.0, -10.0), 10.186, atol=1e-3)


def test_tiny_losses_are_exact():
  apart = jnp.eye(8)
  want = 7 * np.exp(-1 / 0.05)
  np.testing.assert_allclose(losses.info_nce_tiled(apart, apart, 0.05, 3), want, rtol=1e-5)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.floats(0.01, 100.0), st.integers(1, 9))
def test_neither_size_nor_tile_matters(seed, size, tile):
  q, k = (jnp.asarray(x, jnp.float32) for x in two(6, seed=seed))
  got = losses.info_nce_tiled(size * q, k, 0.3, tile)
  np.testing.assert_allclose(got, losses.info_nce_tiled(q, k, 0.3, 6), rtol=1e-4, atol=1e-6)


def test_weights_of_zero_are_padding():
  first, second = (jnp.asarray(x, jnp.float32) for x in two(8))
  some = jnp.arange(8) < 4
  filled = [jnp.where(some[:, None], x, jnp.nan) for x in (first, second)]
  for loss, numbers in forms(4):
    got = value_and_gradients(functools.partial(loss, weights=some), *filled, *numbers)
    want = value_and_gradients(loss, first[:4], second[:4], *numbers)
    same([x[:4] for x in got[:3]], want[:3], 1e-5)
    same(got[3:], want[3:], 1e-4)
    for leaf in got[:3]:
      np.testing.assert_array_equal(leaf[4:], 0.0)


def test_weights_of_zero_everywhere():
  arrays = [jnp.asarray(x, jnp.float32) for x in two(4)]
  for loss, numbers in forms(4):
    none = functools.partial(loss, weights=jnp.zeros(4))
    for leaf in value_and_gradients(none, *arrays, *numbers):
      np.testing.assert_array_equal(leaf, 0.0)


X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
  ("call", "error", "text"),
  [
    (lambda: losses.info_nce_tiled(X, X[:3], 0.1, 2), ValueError, "k must have shape"),
    (lambda: losses.info_nce_tiled(X[0], X, 0.1, 2), ValueError, "q must have shape"),
    (lambda: losses.info_nce_tiled(X, X, 0.0, 2), ValueError, "temperature must be a positive"),
    (lambda: losses.info_nce_tiled(X, X, X[0], 2), ValueError, "temperature must have shape"),
    (lambda: losses.info_nce_tiled(X, X, 0.1, 0), ValueError, "tile must be"),
    (lambda: losses.info_nce_tiled(X, X, 0.1, 2.5), ValueError, "tile must be"),
    (lambda: losses.nt_xent_tiled(X, X.astype(int), 0.1), TypeError, "z2 .* kind float"),
    (lambda: losses.clip_tiled(X, X, -1.0), ValueError, "scale must be a positive"),
    (lambda: losses.siglip_tiled(X, X, 0.0, 0.0), ValueError, "t must be a positive"),
    (lambda: losses.siglip_tiled(X, X, 1.0, X), ValueError, "b must have shape"),
    (lambda: losses.info_nce_ring(X, X, 0.1, "rows", make_mesh()), ValueError, "axis must be one"),
    (lambda: losses.info_nce_ring(X, X, 0.1, "data"), ValueError, "mesh must be given"),
    (lambda: losses.clip_ring(X, X, 1.0, "data", make_mesh()), ValueError, "batch 4 .* 8 devices"),
  ],
)
def test_bad_input(call, error, text):
  with pytest.raises(error, match=text):
    call()
