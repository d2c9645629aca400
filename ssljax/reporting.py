"""What a run leaves for people to look at: damaged images, curves, the report."""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file that a kill leaves either as it was or whole."""
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(value, indent=2) + "\n")
  part.replace(path)


def tell_damaged(
  workdir: pathlib.Path, damaged: Mapping[str, str], say: Callable[[str], None]
) -> None:
  """Adds damaged images to damaged.json and says those that are new since it was last written."""
  path = workdir / "damaged.json"
  known = json.loads(path.read_text()) if path.exists() else {}
  new = {name: reason for name, reason in list(damaged.items()) if name not in known}
  if not new:
    return
  named = ", ".join(f"{name} ({reason})" for name, reason in list(new.items())[:10])
  more = f" and {len(new) - 10} more" if len(new) > 10 else ""
  say(f"{len(new)} unreadable images left out or replaced: {named}{more}; all are in {path}")
  write_json(path, dict(sorted((known | new).items())))


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Draws the curves and writes report.html; -> its path."""
  # Imported here: matplotlib takes half a second that a run without pictures need not pay.
  from ssljax.records import read_metrics
  from ssljax.viz.curves import curves_figure
  from ssljax.viz.report import write_report

  figures = workdir / "figures"
  figures.mkdir(parents=True, exist_ok=True)
  if len(read_metrics(workdir / "metrics.jsonl")) > 0:
    curves_figure(figures / "curves.png", workdir / "metrics.jsonl")
  return write_report(workdir)


def main(workdir: str) -> None:
  """Prints the final table of a run and where its report is."""
  from ssljax.records import read_metrics
  from ssljax.viz.table import summary, table_text

  folder = pathlib.Path(workdir)
  print(table_text(summary(read_metrics(folder / "metrics.jsonl"))))
  print(f"\nopen {folder / 'report.html'}")


if __name__ == "__main__":
  main(sys.argv[1])
