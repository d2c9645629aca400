"""python -m ssljax.main --config=configs/mae_digits.py --workdir=runs/x [--config.KEY=VALUE …]

Several processes: docs/scale.md.
"""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from ssljax import config as config_lib
from ssljax import environment, processes
from ssljax.errors import explain


def load_config(where: str) -> Any:
  """The config of a file, `configs/mae_vitb.py` or `configs/mae_vitb.py:vitl16`.

  Raises:
    FileNotFoundError: no such file; names the nearest ones.
    ValueError: the file has no `get_config`.
  """
  path, _, argument = where.partition(":")
  file = pathlib.Path(path)
  if not file.is_file():
    near = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
    hint = config_lib.nearest(file.name, near, f"{file.parent}/") if near else ""
    raise FileNotFoundError(f"no config file {path}{hint}")
  spec = importlib.util.spec_from_file_location(f"ssljax_config_{file.stem}", file)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"{path} has no function get_config")
  return module.get_config(argument) if argument else module.get_config()


def settings(arguments: Sequence[str]) -> dict[str, str]:
  """`--config.data.source=digits` (or with a space) as {"data.source": "digits"}."""
  found, rest = {}, list(arguments)
  while rest:
    word = rest.pop(0)
    if not word.startswith("--config."):
      known = [*parser()._option_string_actions, "--config.KEY=VALUE"]
      raise ValueError(f"unknown argument {word}{config_lib.nearest(word.split('=')[0], known)}")
    key, equals, value = word.removeprefix("--config.").partition("=")
    if not equals and not rest:
      raise ValueError(f"{word} has no value: write {word}=VALUE")
    found[key] = value if equals else rest.pop(0)
  return found


def parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = argparse.ArgumentParser("ssljax.main", description=__doc__, allow_abbrev=False)
  parser.add_argument("--config", required=True, help="FILE.py or FILE.py:VARIANT")
  parser.add_argument("--workdir", required=True, help="where everything of the run is written")
  parser.add_argument("--dry_run", action="store_true", help="check all, compile a step, stop")
  parser.add_argument(
    "--allow_new_schedule", action="store_true",
    help="resume with another total_steps or schedule than the workdir was begun with",
  )  # fmt: skip
  parser.add_argument(
    "--profile", type=int, default=0, metavar="STEP", help="trace three steps into WORKDIR/profile"
  )
  several = parser.add_argument_group("several processes", "elsewhere than on a known cluster")
  several.add_argument("--coordinator", default="", help="HOST:PORT where process 0 listens")
  several.add_argument("--num_processes", type=int, default=0)
  several.add_argument("--process_id", type=int, default=-1, help="from 0")
  several.add_argument(
    "--distributed", action="store_true",
    help="stop where no cluster (SLURM, TPU slice, GKE…) is recognised instead of running alone",
  )  # fmt: skip
  several.add_argument(
    "--start_timeout", type=int, default=300, help="seconds to wait for the other processes"
  )
  return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict]:
  """Flags and the complete config."""
  flags, rest = parser().parse_known_args(argv)
  return flags, config_lib.override(load_config(flags.config), settings(rest))


def run(flags: argparse.Namespace, config: dict) -> None:
  """What the flags ask for."""
  from ssljax import train

  if flags.dry_run:
    from ssljax.dry_run import dry_run

    dry_run(config, flags.workdir, new_schedule=flags.allow_new_schedule)
  else:
    given = dict(new_schedule=flags.allow_new_schedule, profile=flags.profile)
    train.run(config, flags.workdir, **given)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; -> the exit code. What the user can mend is one line, else a traceback."""
  try:
    argv = sys.argv[1:] if argv is None else argv
    flags, _ = parser().parse_known_args(argv)
    processes.start(  # first of all: what a config imports might use devices
      flags.coordinator,
      flags.num_processes,
      flags.process_id,
      cluster=flags.distributed,
      timeout=flags.start_timeout,
    )
    with processes.together():
      run(*parse(argv))
  except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
    return explain(error)
  return 0


if __name__ == "__main__":
  environment.prepare()  # not in `main`: a notebook or a test that calls it has its own
  sys.exit(main())
