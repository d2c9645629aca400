"""How losses read their arguments: names, shapes and types are checked while tracing."""

import math
from typing import Any

import jax
import jax.numpy as jnp

KINDS = {"float": jnp.floating, "int": jnp.integer, "bool": jnp.bool_}


def read(**named: tuple[Any, str]) -> tuple[Any, ...]:
  """Arrays checked against their letters, in order; floats in at least float32.

  A specification is letters, one an axis, and perhaps a kind: "b d", "b:int", "b n:bool". Equal
  letters are equal sizes; a number is that size; "*" first stands for any leading axes; "?" before
  all allows None.

  >>> anchors, labels, weights = read(
  ...   anchors=(jnp.ones((4, 2), jnp.bfloat16), "b d"), labels=(jnp.arange(4), "b:int"),
  ...   weights=(None, "?b"))
  >>> anchors.dtype.name, weights
  ('float32', None)

  Raises:
    TypeError: no array, or of another kind than it should be.
    ValueError: another number of axes, or sizes that disagree.
  """
  sizes: dict[str, tuple[int, str]] = {}
  return tuple(_one(name, array, letters, sizes) for name, (array, letters) in named.items())


def _one(name: str, array: Any, specification: str, sizes: dict[str, tuple[int, str]]) -> Any:
  if array is None and specification.startswith("?"):
    return None
  letters, _, kind = specification.lstrip("?").partition(":")
  kind = kind or "float"
  if not hasattr(array, "dtype") or not hasattr(array, "shape"):
    raise TypeError(f"{name} must be an array [{letters}], not {type(array).__name__}")
  if not jnp.issubdtype(array.dtype, KINDS[kind]):
    raise TypeError(f"{name} [{letters}] must be of kind {kind}, not {array.dtype}")
  axes, shape = letters.split(), tuple(array.shape)
  if axes[:1] == ["*"]:
    axes, shape = axes[1:], shape[max(len(shape) - len(axes) + 1, 0) :]
  if len(axes) != len(shape):
    raise ValueError(f"{name} must have shape [{letters}], not {tuple(array.shape)}")
  for letter, size in zip(axes, shape):
    wanted, where = (
      (int(letter), "") if letter.isdigit() else sizes.setdefault(letter, (size, name))
    )
    if size != wanted:
      why = f": {letter} is {wanted} in {where}" if where else ""
      raise ValueError(f"{name} must have shape [{letters}], not {tuple(array.shape)}{why}")
  return widen(jnp.asarray(array)) if kind == "float" else jnp.asarray(array)


def widen(x: jax.Array) -> jax.Array:
  """At least float32: bfloat16 becomes float32, float64 stays."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def numbers(weights: Any) -> Any:
  """Weights that are bool or integers as float32, for `read`; anything else as it is."""
  dtype = getattr(weights, "dtype", None)
  if dtype is None or jnp.issubdtype(dtype, jnp.floating):
    return weights
  return jnp.asarray(weights, jnp.float32)


def positive(**named: Any) -> None:
  """Refuses Python numbers that are not above zero (arrays pass: a learnt temperature is one).

  Raises:
    ValueError: which argument, and what it was.
  """
  for name, value in named.items():
    if isinstance(value, (int, float)) and not (value > 0 and math.isfinite(value)):
      raise ValueError(f"{name} must be a positive number, not {value!r}")


def at_least(number: int, **named: jax.Array) -> int:
  """The number of rows of one array, which must be `number` or more.

  Raises:
    ValueError: which array, and how many it has.
  """
  ((name, array),) = named.items()
  if len(array) < number:
    raise ValueError(f"{name} must have at least {number} rows, not {len(array)}")
  return len(array)
