"""The final table of a run: each metric's last and best value beside the two baselines."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ssljax.viz.curves import series

_ACCURACY = re.compile(r"/(top\d+|accuracy|miou|nmi|map)$")


class Row(NamedTuple):
  """One metric; better is 1 (more is better), -1 (less is better) or 0 (neither)."""

  key: str
  name: str
  last: float
  best: float | None
  best_step: int | None
  random: float | None
  pixels: float | None
  better: int
  percent: bool

  def text(self, value: float | None) -> str:
    """A value of this row as it is shown: "83.4 %", "0.0123", "–" for none."""
    if value is None:
      return "–"
    return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


def summary(records: Sequence[Mapping]) -> list[Row]:
  """The rows of a run's metrics, the scores first, then the rest; no evaluation, no rows."""
  keys = dict.fromkeys(key for record in records for key in record)
  chosen = [key for key in keys if key.startswith("eval/") and not key.startswith("eval/baseline_")]
  return [row for key in sorted(chosen, key=_order) if (row := _row(records, key))]


def table_text(rows: Sequence[Row]) -> str:
  """The table in plain letters, for a terminal."""
  head = ("metric", "last", "best", "at step", "random encoder", "raw pixels")
  lines: list[tuple[str, ...]] = [head]
  for row in rows:
    step = "–" if row.best_step is None else str(row.best_step)
    values = (row.text(value) for value in (row.last, row.best))
    lines.append((row.name, *values, step, row.text(row.random), row.text(row.pixels)))
  width = [max(len(line[i]) for line in lines) for i in range(len(head))]
  shown = []
  for line in lines:
    numbers = "  ".join(cell.rjust(size) for cell, size in zip(line[1:], width[1:], strict=True))
    shown.append(f"{line[0].ljust(width[0])}  {numbers}")
  shown.insert(1, "-" * len(shown[0]))
  return "\n".join(shown)


def _row(records: Sequence[Mapping], key: str) -> Row | None:
  step, value = series(records, key)
  if not len(step):
    return None
  better = 1 if _ACCURACY.search(key) or key == "eval/rank/effective" else 0
  better = -1 if key.endswith("loss") else better
  best = int((better * value).argmax()) if better else None
  return Row(
    key,
    _name(key),
    float(value[-1]),
    None if best is None else float(value[best]),
    None if best is None else int(step[best]),
    _baseline(records, key, "random"),
    _baseline(records, key, "pixels"),
    better,
    bool(_ACCURACY.search(key)) or key.endswith("train_top1"),
  )


def _baseline(records: Sequence[Mapping], key: str, name: str) -> float | None:
  value = series(records, key.replace("eval/", f"eval/baseline_{name}/", 1))[1]
  return float(value[-1]) if len(value) else None


def _name(key: str) -> str:
  if match := re.fullmatch(r"eval/knn_k(\d+)_T([^/]+)/top1", key):
    return f"k-NN top-1 (k = {match[1]}, T = {match[2]})"
  names = {
    "eval/linear/top1": "linear probe top-1",
    "eval/linear/train_top1": "linear probe top-1 on train",
    "eval/linear/l2": "linear probe: l2 chosen",
    "eval/linear/gradient": "linear probe: gradient left",
    "eval/heldout/loss": "held-out loss",
    "eval/rank/effective": "effective rank",
    "eval/rank/std": "deviation of a feature",
    "eval/rank/std_unit": "spread (0 collapsed, 1 even)",
    "eval/rank/dead": "share of constant features",
  }
  return names.get(key, key.removeprefix("eval/"))


def _order(key: str) -> tuple:
  k = re.search(r"knn_k(\d+)_", key)
  group = next(
    (
      i
      for i, start in enumerate(("eval/linear/top1", "eval/knn_k", "eval/heldout", "eval/rank/eff"))
      if key.startswith(start)
    ),
    3.5 if not _ACCURACY.search(key) else 1.5,
  )
  return group, int(k[1]) if k else 0
