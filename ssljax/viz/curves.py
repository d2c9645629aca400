"""Curves of a run from its metrics.jsonl: one PNG, or one themed SVG a panel for the report."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ssljax.records import read_metrics
from ssljax.viz.style import COLOURS, FAINT, INK, RULE, figure, heading, save

# A fixed slot of the palette and of the dashes for each role, the same in every panel.
DASHES = {"run": "-", "random encoder": (0, (4, 2)), "raw pixels": (0, (1, 1.5))}


class Line(NamedTuple):
  """One curve: its name, steps [n], values [n], place in the palette, and its role (see DASHES)."""

  name: str
  step: np.ndarray
  value: np.ndarray
  colour: int = 0
  role: str = "run"


class Panel(NamedTuple):
  """Curves that share axes; kind "percent" shows 0..1 as 0..100 %, "zero" starts the axis at 0."""

  title: str
  lines: list[Line]
  kind: str = ""  # "", "percent", "log", "zero"


def series(records: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and finite values of one key: -> int [n], float [n]."""
  pairs = [
    (record["step"], record[key])
    for record in records
    if isinstance(record.get(key), int | float) and math.isfinite(record[key])
  ]
  step, value = zip(*pairs, strict=True) if pairs else ((), ())
  return np.asarray(step, int), np.asarray(value, float)


def panels(records: Sequence[Mapping], groups: Mapping[str, Sequence[str]] | None = None) -> list:
  """The panels that a run has something for; `groups` = {title: keys} replaces the usual ones."""
  keys = list(dict.fromkeys(key for record in records for key in record))
  if groups is not None:
    chosen = [
      (title, [(key.removeprefix("eval/"), key) for key in group], "")
      for title, group in groups.items()
    ]
  else:
    chosen = _usual(keys)
  made = []
  for title, named, kind in chosen:
    lines = [
      Line(name, *series(records, key), colour % len(COLOURS))
      for colour, (name, key) in enumerate(named)
    ]
    # Baselines of one curve only, that of the usual k: four pairs of levels hide the curves.
    for known, key in [one for one in named if one[0] == "k = 20"] or named[:1]:
      for role in list(DASHES)[1:]:
        name = role if len(named) == 1 else f"{role}, {known}"
        lines.append(Line(name, *series(records, _of(role, key)), role=role))
    lines = [line for line in lines if len(line.step)]
    if any(line.role == "run" for line in lines):
      made.append(Panel(title, lines, kind))
  return made


def curves_figure(
  path: str | Path, metrics: str | Path, groups: Mapping[str, Sequence[str]] | None = None
) -> Path:
  """Writes one PNG with all panels of a metrics.jsonl.

  Raises:
    ValueError: there is nothing to draw.
  """
  drawn = panels(read_metrics(metrics), groups)
  if not drawn:
    raise ValueError(f"{metrics} holds none of the metrics that are drawn")
  columns = min(len(drawn), 3)
  rows = -(-len(drawn) // columns)
  width, height = 4.1 * columns + 0.2, 3.0 * rows + 0.5
  made = figure(width, height)
  heading(made, "Curves")
  for i, panel in enumerate(drawn):
    row, column = divmod(i, columns)
    beside = drawn[row * columns : (row + 1) * columns]
    x, y = 0.1 + 4.1 * column + 0.62, height - 0.5 - 3.0 * (row + 1) + 0.45
    draw(
      made.add_axes((x / width, y / height, 3.25 / width, 2.05 / height)),
      panel,
      max(map(_legend_rows, beside)),
    )
  return save(made, path)


def curve_svgs(records: Sequence[Mapping]) -> list[tuple[str, str]]:
  """(title, SVG) a panel; colours are CSS variables --ink, --faint, --rule, --c0 … --c5."""
  made = []
  # fonttype none: letters stay text, so the page's own type and colour apply; the salt makes ids
  # repeatable.
  settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "ssljax"}
  for number, panel in enumerate(panels(records)):
    with matplotlib.rc_context(settings):
      drawn = figure(4.4, 2.5)
      tall = 0.79 - 0.068 * _legend_rows(panel)
      draw(drawn.add_axes((0.12, 0.165, 0.865, tall)), panel, None)
      data = io.StringIO()
      drawn.savefig(data, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    made.append((panel.title, _themed(data.getvalue(), f"p{number}-")))
  return made


def draw(axes, panel: Panel, title_rows: int | None = 2) -> None:
  """One panel: solid lines are the run, broken grey ones its two baselines.

  `title_rows`: rows of legend that the title leaves room for, as its neighbours; None: no title.
  """
  scale = 100 if panel.kind == "percent" else 1
  end = max(int(line.step[-1]) for line in panel.lines)
  for line in panel.lines:
    step, value = line.step, line.value * scale
    few = len(step) <= 25
    look = {"color": COLOURS[line.colour], "linewidth": 1.7 if few else 1.2}
    look |= {"marker": "o", "markersize": 3} if few else {}
    if line.role != "run":
      # Baselines are measured once or seldom: a level across the panel.
      step, value = np.array([0, end]), np.repeat(value[-1], 2)
      look = {"color": FAINT, "linewidth": 1.1, "linestyle": DASHES[line.role]}
    axes.plot(step, value, label=line.name, **look)
  every = np.concatenate([line.value for line in panel.lines])
  if panel.kind == "log" and every.min() > 0 and every.max() > 10 * every.min():
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
  elif panel.kind == "zero":
    axes.set_ylim(bottom=0)
  elif panel.kind == "percent":
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
  axes.set_xlim(0, max(end, 1) * 1.02)
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(lambda value, _: _short(value))
  _dress(axes, panel, title_rows)


def _dress(axes, panel: Panel, title_rows: int | None) -> None:
  """Title, legend between title and axes (never over a curve), pale frame and grid."""
  rows = _legend_rows(panel)
  if rows:
    axes.legend(
      loc="lower left",
      bbox_to_anchor=(-0.02, 0.99),
      ncols=-(-len(panel.lines) // rows),
      fontsize=7.5,
      frameon=False,
      labelcolor=FAINT,
      handlelength=1.8,
      columnspacing=1.3,
      borderaxespad=0,
    )
  if title_rows is not None:
    axes.set_title(
      panel.title, loc="left", fontsize=9.5, color=INK, fontweight="bold", pad=7 + 12 * title_rows
    )
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set_color(RULE)
  axes.tick_params(which="both", colors=FAINT, labelsize=8, length=0)
  axes.grid(axis="y", color=RULE, linewidth=0.7)
  axes.set_axisbelow(True)
  axes.set_xlabel("step", fontsize=8, color=FAINT)


def _legend_rows(panel: Panel) -> int:
  return 0 if len(panel.lines) < 2 else 1 if len(panel.lines) <= 3 else 2


def _usual(keys: Sequence[str]) -> list[tuple[str, list[tuple[str, str]], str]]:
  """Title, [(name, key)], kind: what every run is looked at for."""
  found = [re.fullmatch(r"eval/knn_k(\d+)_T([^/]+)/top1", key) for key in keys]
  knn = sorted((match for match in found if match), key=lambda match: int(match[1]))
  named = [(f"k = {match[1]}", match[0]) for match in knn]
  protocol = knn[0][2] if knn else ""
  taken = {"eval/linear/top1", *(match[0] for match in knn)}
  other = [
    key for key in keys if re.fullmatch(r"eval/(?!baseline_).+/top1", key) and key not in taken
  ]
  return [
    ("Loss", [("train", "train/loss"), ("held out", "eval/heldout/loss")], ""),
    ("Linear probe, top-1", [("run", "eval/linear/top1")], "percent"),
    (f"k-NN, top-1 (T = {protocol})", named, "percent"),
    *[(key.removeprefix("eval/"), [("run", key)], "percent") for key in other],
    ("Effective rank of the features", [("run", "eval/rank/effective")], ""),
    ("Learning rate", [("run", "train/lr")], ""),
    ("Gradient norm", [("run", "train/grad_norm")], "log"),
    ("Images per second", [("run", "throughput/images_per_sec")], "zero"),
  ]


def _of(role: str, key: str) -> str:
  """The key of a metric for the run or for one of its baselines."""
  prefix = {"run": "", "random encoder": "baseline_random/", "raw pixels": "baseline_pixels/"}[role]
  if not prefix:
    return key
  return f"eval/{prefix}{key.removeprefix('eval/')}" if key.startswith("eval/") else ""


def _short(value: float) -> str:
  """12000 -> 12k: steps on an axis."""
  for size, letter in ((1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:g}{letter}"
  return f"{value:g}"


def _themed(svg: str, prefix: str) -> str:
  """An SVG for inline use: no header, ids of its own, colours from the page, as wide as its box."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
  svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
  svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 width="100%"', svg, count=1)
  svg = re.sub(r'\bid="', f'id="{prefix}', svg)
  svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
  for i, colour in enumerate(COLOURS):
    svg = svg.replace(colour.lower(), f"var(--c{i})")
  for colour, name in ((INK, "ink"), (FAINT, "faint"), (RULE, "rule")):
    svg = svg.replace(colour, f"var(--{name})")
  return svg.replace("'DejaVu Sans', ", "").replace("<svg ", '<svg role="img" ', 1)
