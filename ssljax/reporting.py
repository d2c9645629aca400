"""What a run leaves for people to look at: damaged images, curves, the report."""

import json
import pathlib
from collections.abc import Callable, Mapping


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
  say(f"{len(new)} unreadable images replaced by others: {named}{more}; all are in {path}")
  path.write_text(json.dumps(known | new, indent=2, sort_keys=True) + "\n")


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Draws the curves and writes report.html; -> its path."""
  # Imported here: matplotlib takes half a second that a run without pictures need not pay.
  from ssljax.viz.curves import curves_figure, read_metrics
  from ssljax.viz.report import write_report

  figures = workdir / "figures"
  figures.mkdir(parents=True, exist_ok=True)
  if len(read_metrics(workdir / "metrics.jsonl")) > 0:
    curves_figure(figures / "curves.png", workdir / "metrics.jsonl")
  return write_report(workdir)
