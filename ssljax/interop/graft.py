"""Released weights, or those of an earlier run, into a state that is about to train."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ssljax.interop import convert, files
from ssljax.leaves import named
from ssljax.models import positions as positions_lib

KEPT = ("teacher", "teacher_stats", "center")  # of an earlier run's `extra`, what goes on
STATED = ("heads", "eps", "grid")  # of what a file says of itself, what is looked at


def graft(
  path: str, job: Any, params: Any, extra: Any, log: Callable[[str], None] = print
) -> tuple[Any, Any]:
  """`params` and `extra` with the weights at `path` in place; what is missing stays as it is.

  path: a weight file, a folder of Transformers, or the workdir of a run. job: `ssljax.job.Job`;
  its encoder and the shape of its images decide. A teacher in `extra` starts from that of the run,
  or else from the same encoder; centres and running statistics of batch norm come along.
  What was read, what the file lacks and what was not used is told by `log`.

  Raises:
    FileNotFoundError, ValueError: no weights there, or they do not fit; one line that says why.
  """
  shape = job.image.shape
  try:
    if (pathlib.Path(path) / "checkpoints").is_dir():
      new, kept, lines = _from_run(pathlib.Path(path), job.encoder, shape, params)
    else:
      new, kept, lines = _from_file(path, job.encoder, shape, params)
  except FileNotFoundError as error:
    raise FileNotFoundError(f"init_from: {error}") from None
  except (ValueError, ImportError) as error:
    raise ValueError(f"init_from: {error}") from error
  merged = _with(params, new)
  for line in lines:
    log(f"init_from {path}: {line}")
  teacher = {f"teacher/{name}": leaf for name, leaf in named(merged).items()}
  return merged, _with(extra, teacher | kept)


def _with(tree: Any, leaves: dict[str, Any]) -> Any:
  """The tree with leaves of these names and of its shapes in place; empty parts of it stay."""

  def one(path, leaf):
    new = leaves.get(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    return new if np.shape(new) == np.shape(leaf) else leaf

  return jax.tree_util.tree_map_with_path(one, tree)


def _from_file(path, encoder, shape, params):
  """Parameters and running statistics by name, and what to tell."""
  tensors = files.read_weights(path)
  stated = {k: json.loads(v) for k, v in files.read_metadata(path).items() if k in STATED}
  heads = getattr(encoder, "heads", None)
  if heads and stated.get("heads", heads) != heads:  # no shape would tell
    raise ValueError(f"{path} has {stated['heads']} heads, encoder.heads is {heads}")
  found, report = convert.to_params(tensors, encoder, shape, stated.get("grid"))
  stats = {}
  if encoder.patch is None:
    found, stats = found["params"], {"encoder": found["batch_stats"]}
  new, used, lines = {"encoder": found}, set(), [*report.notes]
  if stated.get("eps", encoder.eps) != encoder.eps:
    lines.append(f"it was made with eps {stated['eps']}, encoder.eps is {encoder.eps}")
  others = sorted(set(params) - {"encoder"})
  left = [f"encoder/{path}" for path in report.missing]
  for part in others:
    if part == "decoder":
      try:
        new["decoder"], names = convert.to_decoder(tensors, params["decoder"])
        used |= set(names)
        continue
      except ValueError as error:
        lines.append(f"the decoder is not taken: {error}")
    left.append(part)
  lines.insert(0, f"{len(named(new))} parameters read")
  if left:
    lines.append(f"not in the file, left at their start: {', '.join(left)}")
  if unused := [name for name in report.unused if name not in used]:
    lines.append(f"in the file, not used: {_some(unused)}")
  return named(new), _statistics(stats), lines


def _from_run(workdir, encoder, shape, params):
  """The same from an earlier run of this package."""
  from ssljax.load import load

  earlier = load(workdir)
  old, wanted, new = named(earlier.params), named(params), {}
  kept = named({name: earlier.extra[name] for name in KEPT if name in earlier.extra})
  grids = _table_grid(earlier.encoder, earlier.shape), _table_grid(encoder, tuple(shape))
  for names, place in ((old, "encoder/positions"), (kept, "teacher/encoder/positions")):
    if place in names and "encoder/positions" in wanted:
      names[place] = positions_lib.resize_table(names[place], *grids)
  lost = [k for k in wanted if k.startswith("encoder/") and k not in old]
  if lost:
    raise ValueError(f"the encoder of {workdir} has no {_some(lost)}")
  for path, leaf in wanted.items():
    if path in old and np.shape(old[path]) == leaf.shape:
      new[path] = old[path]
    elif path in old and path.startswith("encoder/"):
      was = list(np.shape(old[path]))
      raise ValueError(f"{path} is {was} in {workdir}, this run wants {list(leaf.shape)}")
  lines = [f"{len(new)} parameters read from step {earlier.step}"]
  if left := sorted({k.split("/")[0] for k in wanted if k not in new}):
    lines.append(f"of another shape or not there, left at their start: {', '.join(left)}")
  if unused := [k for k in old if k not in new]:
    lines.append(f"in the run, not used: {_some(unused)}")
  return new, _statistics(earlier.extra.get("stats", {})) | kept, lines


def _table_grid(encoder, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The grid of learned positions: of `positions_size` where it is set, else of the images."""
  return encoder.grid(getattr(encoder, "positions_size", ()) or shape[:-1])


def _statistics(stats) -> dict[str, Any]:
  """Those of the encoder, by their names in `extra`, a teacher's too."""
  return {
    f"{place}/{k}": v for place in ("stats", "teacher_stats") for k, v in named(stats).items()
  }


def _some(names: list[str]) -> str:
  more = f" and {len(names) - 6} more" if len(names) > 6 else ""
  return ", ".join(names[:6]) + more
