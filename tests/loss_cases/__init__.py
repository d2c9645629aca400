"""One list of cases per family of losses; tests/test_losses_table.py runs them all."""

import importlib
import pkgutil

from loss_cases.case import Case


def all_cases() -> list[Case]:
  """The CASES of every family."""
  found = []
  for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
    if module.name != "case":
      found += importlib.import_module(f"{__name__}.{module.name}").CASES
  return found
