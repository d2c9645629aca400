"""Configs: the signature of what a config names is its schema, and its defaults live there alone.

A component is `dict(name="dotted.path", **arguments)`. The path of a module stands for the function
of the same name in it: "ssljax.methods.masked" is `ssljax.methods.masked.masked`. Its positional
parameters without a default (and `dtype`, which is one key for the whole run, and `hidden_count`,
which follows from data.hidden) are given by the run, the others are the config's.
"""

import ast
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from ssljax import schedules
from ssljax.names import nearest, resolve

GIVEN = ("dtype", "hidden_count")
REQUIRED = ("total_steps", "batch_size", "method", "encoder", "data")
DEFAULTS: dict[str, Any] = {
  "seed": 0,
  "dtype": "float32",
  "accum": 1,
  "init_from": "",
  "optimizer": {"name": "ssljax.optim.adamw"},
  "schedule": {"name": "ssljax.schedules.warmup_cosine"},
  "data": {
    "source": "digits_photo",
    "split": "train",
    "eval_train": "train",
    "eval_test": "test",
    "channels": 3,
    "mean": None,  # per channel, on the 0…1 scale; None: ImageNet's for RGB, else measured
    "std": None,
    "views": None,
    "eval_views": None,
    "hidden": None,
    "text": None,
    "views_on": "host",  # or "device": made inside the step
    "hidden_on": "host",
    "canvas": None,  # (height, width) the host brings images to, where the step makes the views
    "cache": "none",  # or "device": the whole data set lives on every device
    "workers": 0,  # threads that decode; 0 lets tf.data choose
    "max_pixels": 100_000_000,
  },
  # A linear probe that learns along: its rate, 0 is none; classes, 0 counts them in the labels.
  "probe": {"rate": 0.0, "classes": 0},
  "checkpoint": {"every": 1000, "keep": 2, "keep_every": 0},
  "log": {"every": 10, "tensorboard": True, "watchdog": 1800.0},  # seconds for a step; 0: any time
  "eval": {"every": 0, "batch_size": 0, "heldout": True, "figures": True, "best": ""},
  "mesh": {"devices": 0, "state": "replicated", "min_size": 65536, "replica": 1, "tensor": 1},
}
COMPONENTS = ("method", "encoder", "optimizer", "schedule")
# Of a function in a group of them, such as method.terms, besides its own arguments.
TERM: dict[str, Any] = {"weight": 1.0, "on": "projected"}
SECTIONS = (*COMPONENTS, "data", "probe", "checkpoint", "log", "eval", "mesh")
DTYPES = ("float32", "bfloat16", "float16")
# Which keys may differ between a run and its resumption. The first match decides.
FREE = (
  "mesh", "log", "eval", "checkpoint", "data.workers", "data.cache", "data.eval_train",
  "data.eval_test", "data.eval_views", "encoder.scan", "encoder.remat",
)  # fmt: skip


def complete(config: Mapping) -> Any:
  """The config with every default filled in, of the type that was given (a dict or a ConfigDict).

  Raises:
    ValueError: an unknown key or component (naming the nearest right ones), a missing key, or a
      value of another type than its default.
  """
  given = plain(config)
  missing = [key for key in REQUIRED if key not in given]
  if missing:
    raise ValueError(f"the config lacks {', '.join(missing)}")
  _known(given, [*DEFAULTS, *REQUIRED], "")
  filled = {}
  for key in sorted({*DEFAULTS, *given}):
    value = given.get(key, DEFAULTS.get(key))
    filled[key] = _section(key, value) if key in SECTIONS else value
  _typed(DEFAULTS, {k: filled[k] for k in ("seed", "dtype", "init_from")}, "")
  _ranges(filled)
  kind: Any = type(config)
  return filled if kind is dict else kind(filled)


def _ranges(filled: dict) -> None:
  """Values that no signature checks."""
  flat = {key: filled[key] for key in ("total_steps", "batch_size", "accum")}
  for key, value in (flat | {"log.every": filled["log"]["every"]}).items():
    if type(value) is not int or value < 1:
      raise ValueError(f"{key} must be a positive whole number, not {value!r}")
  if filled["eval"]["every"] < 0:
    raise ValueError(f"eval.every must be 0 (off) or more, not {filled['eval']['every']}")
  if filled["dtype"] not in DTYPES:
    raise ValueError(f"dtype {filled['dtype']!r} is none of {', '.join(DTYPES)}")


def _section(key: str, value: Any) -> dict:
  """One top-level section: a component by its signature, any other by the table above."""
  if not isinstance(value, dict):
    raise ValueError(f"{key} must be a section, {key}=dict(…), not {value!r}")
  if key in COMPONENTS:
    return _component(key, value)
  defaults = DEFAULTS[key]
  if key == "eval":  # eval.linear=None switches off what a config file switched on
    value = {k: v for k, v in value.items() if v is not None or k in defaults}
  parts = {k: v for k, v in value.items() if isinstance(v, dict)}
  if key not in ("eval", "data"):
    parts = {}
  if key == "data":
    for place in ("views", "eval_views", "hidden", "text"):
      if value.get(place) is not None and place not in parts:
        raise ValueError(f"data.{place} must be dict(name='ssljax.data.…') or None")
  # Evaluations have names of the user's choice; everything else is fixed.
  _known({k: 0 for k in value if not (key == "eval" and k in parts)}, defaults, f"{key}.")
  for name, part in parts.items():
    if key == "eval" and "name" not in part:  # a misspelt evaluation, or one that has no name yet
      others = [n for n in (*parts, *defaults) if n != name]
      raise ValueError(f"eval.{name} lacks its name{nearest(name, others, 'eval.')}")
  arrays = {k for k, v in value.items() if k == "source" and isinstance(v, Mapping)}
  plain_keys = {k: v for k, v in value.items() if k not in parts and k not in arrays}
  _typed(defaults, plain_keys, f"{key}.")
  made = {k: _component(f"{key}.{k}", part) for k, part in parts.items() if k not in arrays}
  return defaults | value | plain_keys | made


def _component(where: str, spec: dict) -> dict:
  if not isinstance(spec.get("name"), str):
    raise ValueError(f"{where} lacks its name, e.g. {where}=dict(name='ssljax.…')")
  defaults = _defaults(resolve(spec["name"], where))
  arguments = {k: v for k, v in spec.items() if k != "name"}
  _known(arguments, defaults, f"{where}.")
  lacking = [k for k, v in (defaults | arguments).items() if v is inspect.Parameter.empty]
  if lacking:
    raise ValueError(f"{where} lacks {', '.join(lacking)}")
  inner = {k: _function(f"{where}.{k}", v) for k, v in arguments.items() if _named(v)}
  for k, group in arguments.items():
    if _group(group):
      inner[k] = {n: _function(f"{where}.{k}.{n}", v, TERM) for n, v in group.items()}
  plain_arguments = {k: v for k, v in arguments.items() if k not in inner}
  _typed(defaults, plain_arguments, f"{where}.")
  return {"name": spec["name"], **defaults, **plain_arguments, **inner}


def _named(value: Any) -> bool:
  """Whether an argument of a component is itself a function by name, such as a method's loss."""
  return isinstance(value, dict) and "name" in value


def _group(value: Any) -> bool:
  """Whether an argument is several functions, each with a name of the user's choice."""
  return isinstance(value, dict) and bool(value) and all(map(_named, value.values()))


def _function(where: str, spec: dict, more: Mapping = {}) -> dict:
  """A function that a component will call: its arguments but those that the component gives."""
  parameters = inspect.signature(resolve(spec["name"], where)).parameters
  defaults = {k: p.default for k, p in parameters.items()} | {**more}
  arguments = {k: v for k, v in spec.items() if k != "name"}
  _known(arguments, defaults, f"{where}.")
  _typed(defaults, arguments, f"{where}.")
  given = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty and v is not None}
  return {"name": spec["name"], **given, **arguments}


def _defaults(function: Callable) -> dict[str, Any]:
  """The arguments that a config may set; `Parameter.empty` marks those that it must."""
  parameters = inspect.signature(function).parameters.values()
  return {p.name: p.default for p in parameters if not _given(p)}


def _given(parameter: inspect.Parameter) -> bool:
  """Whether the run, not the config, supplies this parameter."""
  if parameter.name in GIVEN:
    return True
  return parameter.default is parameter.empty and parameter.kind != parameter.KEYWORD_ONLY


def _known(given: Mapping, known: Any, prefix: str) -> None:
  for key in given:
    if key not in known:
      raise ValueError(f"unknown config key {prefix}{key}{nearest(key, known, prefix)}")


def _typed(defaults: Mapping, given: dict, prefix: str) -> None:
  """Checks types against the defaults; whole numbers become floats where floats are due."""
  for key, value in given.items():
    default = defaults[key]
    if default is None or default is inspect.Parameter.empty:
      continue
    moving = isinstance(value, dict) and "schedule" in value
    if moving or (value is None and isinstance(default, str)):
      continue
    if isinstance(default, float) and type(value) is int:
      given[key] = float(value)
    elif isinstance(default, tuple) and isinstance(value, list):
      given[key] = tuple(value)
    elif type(value) is not type(default) and not (
      isinstance(default, float) and type(value) is float
    ):
      want = type(default).__name__
      raise ValueError(f"{prefix}{key} wants a {want} like {default!r}, not {value!r}")


def build(spec: Mapping, **given: Any) -> Any:
  """Calls the component: its arguments from `spec`, those it requires from `given`.

  Arguments such as dict(schedule="cosine", start=.996, end=1.) become functions of the step.
  """
  arguments: dict[str, Any] = plain(spec)
  function = resolve(arguments.pop("name"))
  parameters = inspect.signature(function).parameters
  for name, parameter in parameters.items():
    if name in given and _given(parameter):
      arguments[name] = given[name]
    elif parameter.default is parameter.empty and name not in arguments:
      raise ValueError(f"{function.__module__}.{function.__name__} needs {name!r}")
  moving = {
    k: schedules.moving(v, given.get("total_steps", 0))
    for k, v in arguments.items()
    if isinstance(v, dict) and "schedule" in v
  }
  inner: dict[str, Any] = {k: _partial(v) for k, v in arguments.items() if _named(v)}
  inner |= {k: {n: _called(v) for n, v in g.items()} for k, g in arguments.items() if _group(g)}
  fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
  return function(**fixed | moving | inner)


def _called(spec: Mapping) -> dict[str, Any]:
  """A function of a group, as "call", with what `TERM` has of it."""
  own = {k: v for k, v in spec.items() if k not in TERM}
  return {k: spec[k] for k in TERM} | {"call": _partial(own)}


def _partial(spec: Mapping) -> Callable:
  arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "name"}
  return functools.partial(resolve(spec["name"]), **arguments)


def plain(config: Any) -> Any:
  """Nested dicts without any type of their own: a ConfigDict or Mapping becomes a dict."""
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {k: v if k == "source" else plain(v) for k, v in config.items()}
  return config


def as_json(config: Mapping) -> dict:
  """The config as it is written to config.json. Arrays in memory are written as their shapes."""

  def other(value):
    return f"array {list(value.shape)}" if hasattr(value, "shape") else repr(value)

  return json.loads(json.dumps(plain(config), default=other))


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
  """Nested keys as dotted ones."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def differences(saved: Mapping, now: Mapping, new_schedule: bool = False) -> list[str]:
  """Keys that must agree between a run and its resumption and do not, as «key: old -> new».

  An argument that is newer than the run had, in it, the value of its default.
  """
  before, after = flatten(as_json(_brought_up(saved))), flatten(as_json(now))
  free = FREE + (("total_steps", "schedule") if new_schedule else ())
  changed = []
  for key in sorted({*before, *after}):
    if any(key == f or key.startswith(f"{f}.") for f in free):
      continue
    if before.get(key) != after.get(key):
      changed.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
  return changed


def _brought_up(saved: Mapping) -> Mapping:
  try:
    return complete(saved)
  except ValueError:  # it names what no longer exists: the comparison says what that is now
    return saved


def override(config: Mapping, settings: Mapping[str, str]) -> dict:
  """A plain config with dotted keys set from text: {"data.source": "digits"}.

  Values are Python literals; what is none is a string. A key must exist once defaults are filled.
  """
  changed = plain(config)
  known = flatten(complete(changed))
  for key, text in settings.items():
    *path, last = key.split(".")
    inner = changed
    for part in path:
      if isinstance(inner, dict) and inner.get(part) is None:  # a section that is off
        inner[part] = {}
      inner = inner[part] if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
      raise ValueError(f"unknown config key {key}{nearest(key, known)}")
    if last == "name" and inner.get("name") not in (None, text):
      _forget(inner, text, key, settings)
    inner[last] = _literal(text)
  return complete(changed)


def _forget(spec: dict, name: str, key: str, settings: Mapping[str, str]) -> None:
  """Drops what a file set for another component, where the new one has no such argument."""
  known = inspect.signature(resolve(name, key.removesuffix(".name"))).parameters
  prefix = key.removesuffix("name")
  for argument in [k for k in spec if k not in known and f"{prefix}{k}" not in settings]:
    if argument != "name":
      del spec[argument]


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return {"true": True, "false": False}.get(text, text)
