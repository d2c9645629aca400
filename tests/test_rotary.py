"""Rotary positions: angles, what is turned, and that they know differences alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.interop.convert import check_exportable
from ssljax.models import attention, positions
from ssljax.models.vit import vit

TINY = dict(width=32, depth=2, heads=2, patch=(4, 4), positions="rotary", registers=1)


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_angles_against_loops(grid):
  width, base = 26, 50.0
  got = positions.rotary(grid, width, base)
  pairs = width // (2 * len(grid))
  want = np.zeros((int(np.prod(grid)), width // 2))
  for n, place in enumerate(np.ndindex(*grid)):
    for axis, (i, g) in enumerate(zip(place, grid)):
      coordinate = 2 * (i + 0.5) / g - 1
      for k in range(pairs):
        want[n, axis * pairs + k] = 2 * np.pi * coordinate / base ** (k / pairs)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_rotation_against_complex_numbers_and_in_bfloat16():
  rng = np.random.default_rng(0)
  x, angle = rng.normal(size=(2, 5, 3, 8)), rng.normal(size=(1, 5, 1, 4))
  got = attention.rotate(jnp.float32(x), (jnp.cos(angle), jnp.sin(angle)))
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
  np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-6)
  half = attention.rotate(jnp.asarray(x, jnp.bfloat16), (jnp.cos(angle), jnp.sin(angle)))
  assert half.dtype == jnp.bfloat16


def test_products_depend_on_differences_alone():
  """One query and one key at all places: q·k is the same wherever the difference is."""
  grid = (4, 5)
  angle = positions.rotary(grid, 16)[None, :, None]
  q, k = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
  turn = lambda x: attention.rotate(jnp.tile(x, (1, 20, 1, 1)), (np.cos(angle), np.sin(angle)))  # noqa: E731
  products = jnp.einsum("bnhe,bmhe->nm", turn(q), turn(k))
  seen = {}
  for n, m in np.ndindex(20, 20):
    step = tuple(np.subtract(np.unravel_index(n, grid), np.unravel_index(m, grid)))
    seen.setdefault(step, []).append(float(products[n, m]))
  assert max(np.ptp(v) for v in seen.values()) < 1e-5
  assert np.ptp([v[0] for v in seen.values()]) > 1


def test_scan_remat_and_part_of_the_grid_keep_numbers_and_gradients():
  x = np.float32(np.random.default_rng(0).normal(size=(2, 8, 12, 3)))
  keep = jnp.asarray([[0, 2, 5], [1, 3, 4]], jnp.int32)
  plain = vit(**TINY)
  params = jax.jit(plain.init)(jax.random.key(0), x)["params"]

  def found(encoder):
    def value(params):
      return jnp.square(encoder.apply({"params": params}, x, keep=keep)["tokens"]).sum()

    return jax.jit(jax.value_and_grad(value))(params)

  want = found(plain)
  got = found(vit(**TINY, scan=True, remat="full"))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
  whole = plain.apply({"params": params}, x, keep=jnp.tile(jnp.arange(6), (2, 1)))
  np.testing.assert_allclose(
    whole["tokens"], plain.apply({"params": params}, x)["tokens"], atol=1e-5
  )


def test_prefix_is_not_turned():
  """Angles of zero: what a table of ones and zeros would give."""
  encoder = vit(**TINY)
  cos, sin = encoder._rotary((2, 3), None)
  assert cos.shape == sin.shape == (1, 2 + 6, 1, 8)
  assert (cos[:, :2] == 1).all() and (sin[:, :2] == 0).all()
  np.testing.assert_allclose(sin[0, 2:, 0], np.sin(positions.rotary((2, 3), 16)), atol=1e-6)


def test_errors():
  with pytest.raises(ValueError, match="over 2 axes need an even head width of 4 or more, not 2"):
    vit(**TINY | dict(heads=16))
  with pytest.raises(ValueError, match="over 3 axes need an even head width of 6"):
    vit(**TINY | dict(heads=8, patch=(2, 4, 4)))
  with pytest.raises(ValueError, match="activation 'relu' is none of gelu"):
    vit(activation="relu")
  with pytest.raises(ValueError, match='positions="rotary" cannot be exported'):
    check_exportable(vit(**TINY), "timm")
  with pytest.raises(ValueError, match='activation="quick_gelu" cannot be exported'):
    check_exportable(vit(activation="quick_gelu"), "timm")
  with pytest.raises(ValueError, match='pool="attention" cannot be exported'):
    check_exportable(vit(pool="attention"), "timm")
