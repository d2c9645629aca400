"""Names in a config: components by their dotted paths, choices, and what a misspelt word may have
meant."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

# Where ssljax keeps them: what a misspelt name is compared with.
HOMES = {
  "method": "ssljax.methods", "encoder": "ssljax.models", "optimizer": "ssljax.optim",
  "schedule": "ssljax.schedules", "eval": "ssljax.evals", "data": "ssljax.data.views",
  "method.loss": "ssljax.losses",
}  # fmt: skip


def resolve(name: str, where: str = "") -> Callable:
  """The function that a dotted path names.

  Raises:
    ValueError: there is none; lists what there is nearby.
  """
  parent, _, last = name.rpartition(".")
  for module, attribute in ((name, last), (parent, last)):
    if module and (found := _import(module)) is not None:
      function = getattr(found, attribute, None)
      if callable(function):
        return function
  raise ValueError(f"no component {name!r}{f' for {where}' if where else ''}{_hint(name, where)}")


def choices(given: Mapping[str, str], known: Mapping[str, Collection[str]]) -> None:
  """Raises ValueError where an argument of a method is none of the names that are known for it."""
  for argument, value in given.items():
    if value not in known[argument]:
      raise ValueError(f"method.{argument} {value!r} is none of {', '.join(known[argument])}")


def _hint(name: str, where: str) -> str:
  """What there is instead of a component that was not found."""
  parent, _, last = name.rpartition(".")
  if name and _import(name) is not None:
    return f"; module {name} has no function {last}"
  there = _siblings(parent) if parent else []
  if there:
    return nearest(last, there, f"{parent}.")
  home = HOMES.get(where, HOMES.get(where.split(".")[0], "ssljax"))
  return f"; no module {parent or name!r}{nearest(last, _siblings(home), f'{home}.')}"


def _import(module: str) -> Any:
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    # A missing dependency of the user's module must not read as "no such module".
    if error.name and (module == error.name or module.startswith(f"{error.name}.")):
      return None
    raise


def _siblings(package: str) -> list[str]:
  found = _import(package)
  if found is None:
    return []
  if hasattr(found, "__all__"):
    return list(found.__all__)
  if hasattr(found, "__path__"):
    return [m.name for m in pkgutil.iter_modules(found.__path__)]
  own = inspect.getmembers(found, inspect.isfunction)
  return [n for n, f in own if not n.startswith("_") and f.__module__ == package]


def nearest(word: str, known: Any, prefix: str = "") -> str:
  """«; did you mean …?», or the whole list where nothing is near."""
  near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
  if near:
    return f"; did you mean {' or '.join(prefix + n for n in near)}?"
  return f"; there are {', '.join(sorted(set(map(str, known))))}"
