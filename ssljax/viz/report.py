"""report.html: everything a person wants to know of a run, in one file that opens offline."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssljax.records import read_metrics
from ssljax.viz.curves import curve_svgs, series
from ssljax.viz.page import PAGE
from ssljax.viz.table import Row, summary

# File names in figures/ (before a step number), heading, explanation.
PICTURES = (
  (
    "reconstruction",
    "Reconstructions",
    "Held-out images: the input, what the encoder sees of it, what the model makes of the rest.",
  ),
  (
    "neighbour",
    "Nearest neighbours",
    "Test images and the train images whose features are closest to theirs.",
  ),
  ("batch", "A training batch", "What goes into the encoder: the views, and their hidden places."),
)


def write_report(
  workdir: str | Path, *, title: str | None = None, damaged: Mapping[str, str] | None = None
) -> Path:
  """Writes workdir/report.html from metrics.jsonl, config.json, environment.json and figures/*.png.

  Whatever is missing is left out. Of `figures/NAME_STEP.png` the newest step is shown. `damaged` is
  {example name: reason}; without it workdir/damaged.json is read where it exists.

  Raises:
    FileNotFoundError: the workdir does not exist.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"no run at {workdir}")
  metrics = workdir / "metrics.jsonl"
  records = read_metrics(metrics) if metrics.exists() else []
  config = _read_json(workdir / "config.json")
  if damaged is None:
    damaged = _read_json(workdir / "damaged.json") or {}
  rows = summary(records)
  body = [
    _head(title or _title(config), config, records, rows),
    _results(rows),
    _curves(records),
    *_pictures(workdir / "figures"),
    _damaged(damaged),
    _settings("Settings", "config.json", config),
    _settings("Environment", "environment.json", _read_json(workdir / "environment.json")),
  ]
  if not records:
    body.insert(1, "<section>Nothing has been measured yet.</section>")
  text = PAGE.replace("{{title}}", _text(title or _title(config))).replace(
    "{{body}}", "".join(body)
  )
  part = workdir / "report.html.part"
  part.write_text(text, encoding="utf-8")
  return part.replace(workdir / "report.html")


def _head(title: str, config: Any, records: Sequence[Mapping], rows: Sequence[Row]) -> str:
  """Title, one line of facts, and the headline numbers with their baselines."""
  facts = []
  if isinstance(config, dict):
    data = config.get("data")
    if isinstance(data, dict) and "source" in data:
      facts.append(f"on {data['source']}")
    facts += [
      f"{name} {config[key]}"
      for key, name in (("batch_size", "batch"), ("seed", "seed"))
      if key in config
    ]
  if records:
    total = config.get("total_steps") if isinstance(config, dict) else None
    step = max(record["step"] for record in records)
    facts.append(f"step {step:,} of {total:,}" if isinstance(total, int) else f"step {step:,}")
  tiles = [_tile(row.name, row.text(row.last), _beside(row)) for row in _headlines(rows)]
  _, loss = series(records, "train/loss")
  if len(loss):
    tiles.append(_tile("training loss", f"{loss[-1]:.4g}", [f"from {loss[0]:.4g}"]))
  line = f'<p class="facts">{_text(" · ".join(facts))}</p>' if facts else ""
  shown = f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""
  return f"<header><h1>{_text(title)}</h1>{line}{shown}</header>"


def _headlines(rows: Sequence[Row]) -> list[Row]:
  """At most three rows: linear probe, k-NN (k = 20 where it was measured), effective rank."""
  chosen = [row for row in rows if row.key == "eval/linear/top1"]
  knn = [row for row in rows if row.key.startswith("eval/knn_")]
  chosen += sorted(knn, key=lambda row: not row.key.startswith("eval/knn_k20_"))[:1]
  return chosen + [row for row in rows if row.key == "eval/rank/effective"]


def _beside(row: Row) -> list[str]:
  pairs = (("random encoder", row.random), ("raw pixels", row.pixels))
  return [f"{name} {row.text(value)}" for name, value in pairs if value is not None]


def _tile(name: str, value: str, notes: Sequence[str]) -> str:
  below = "".join(f'<div class="note">{_text(note)}</div>' for note in notes)
  head = f'<div class="name">{_text(name)}</div><div class="value">{_text(value)}</div>'
  return f'<div class="tile">{head}{below}</div>'


def _results(rows: Sequence[Row]) -> str:
  if not rows:
    return ""
  verdict = _verdict(rows)
  scores = [row for row in rows if row.better]
  rest = [row for row in rows if not row.better]
  shown = _table(scores) if scores else ""
  if rest:
    shown += f"<details><summary>More numbers of the evaluation</summary>{_table(rest)}</details>"
  return _section("Results", f"{verdict}{shown}")


def _verdict(rows: Sequence[Row]) -> str:
  """One sentence on the headline score against both baselines, good or bad."""
  row = next((row for row in _headlines(rows) if row.percent), None)
  if row is None or (row.random is None and row.pixels is None):
    return ""
  parts = []
  for name, value in (("the untrained encoder", row.random), ("raw pixels", row.pixels)):
    if value is not None:
      points = 100 * (row.last - value)
      word = "above" if points > 0 else "below"
      parts.append(
        f"{abs(points):.1f} points {word} {name}" if abs(points) >= 0.05 else f"level with {name}"
      )
  name = row.name[0].upper() + row.name[1:]
  sentence = f"{name}: {row.text(row.last)}, {' and '.join(parts)}."
  return f"<p>{_text(sentence)}</p>"


def _table(rows: Sequence[Row]) -> str:
  head = "".join(
    f"<th>{cell}</th>"
    for cell in ("metric", "this run", "best", "at step", "random encoder", "raw pixels")
  )
  lines = []
  for row in rows:
    step = "–" if row.best_step is None else f"{row.best_step:,}"
    cells = [row.text(row.best), step, row.text(row.random), row.text(row.pixels)]
    rest = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
    lines.append(
      f'<tr><th scope="row">{_text(row.name)}</th>'
      f"<td><b>{_text(row.text(row.last))}</b></td>{rest}</tr>"
    )
  return (
    f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table></div>"
  )


def _curves(records: Sequence[Mapping]) -> str:
  drawn = [
    f"<figure><figcaption>{_text(title)}</figcaption>{svg}</figure>"
    for title, svg in curve_svgs(records)
  ]
  return _section("Curves", f'<div class="curves">{"".join(drawn)}</div>') if drawn else ""


def _pictures(folder: Path) -> list[str]:
  """Sections of the known pictures, then one of all others; the newest of each name."""
  newest: dict[str, tuple[int, Path]] = {}
  for path in sorted(folder.glob("*.png")):
    name = re.sub(r"[_-]?\d*$", "", path.stem)
    digits = re.search(r"\d+$", path.stem)
    step = int(digits[0]) if digits else -1
    if not name.startswith("curve") and step >= newest.get(name, (-2,))[0]:
      newest[name] = (step, path)
  sections = []
  for start, heading, explanation in PICTURES:
    found = [newest.pop(name) for name in sorted(newest) if name.startswith(start)]
    if found:
      shown = "".join(_picture(heading, *one) for one in found)
      sections.append(_section(heading, f"<p>{explanation}</p>{shown}"))
  if newest:
    shown = "".join(_picture(name, *one) for name, one in sorted(newest.items()))
    sections.append(_section("More pictures", shown))
  return sections


def _picture(name: str, step: int, path: Path) -> str:
  data = base64.b64encode(path.read_bytes()).decode()
  caption = f"{path.stem}" if step < 0 else f"at step {step:,}"
  return (
    f'<figure class="picture"><img alt="{_text(name)}" src="data:image/png;base64,{data}">'
    f"<figcaption>{_text(caption)}</figcaption></figure>"
  )


def _damaged(damaged: Mapping[str, str], most: int = 200) -> str:
  if not isinstance(damaged, Mapping) or not damaged:
    return ""
  lines = "".join(
    f"<tr><th scope=row>{_text(name)}</th><td>{_text(reason)}</td></tr>"
    for name, reason in sorted(damaged.items())[:most]
  )
  more = f"<p>… and {len(damaged) - most:,} more.</p>" if len(damaged) > most else ""
  count = "1 image" if len(damaged) == 1 else f"{len(damaged):,} images"
  return _section(
    "Damaged images",
    f"<p>{count} could not be used; others of the source took their places.</p>"
    f"<details><summary>Which, and why</summary><div class=wide><table>{lines}</table></div>{more}"
    "</details>",
  )


def _settings(heading: str, name: str, settings: Any) -> str:
  if not settings:
    return ""
  lines = "".join(
    f"<tr><th scope=row>{_text(key)}</th><td><code>{_text(value)}</code></td></tr>"
    for key, value in _flat(settings)
  )
  table = f"<div class=wide><table>{lines}</table></div>"
  return _section(heading, f"<details><summary>{_text(name)}</summary>{table}</details>")


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
  """Nested settings as (dotted key, JSON) lines."""
  if isinstance(value, dict) and value:
    return [line for key in value for line in _flat(value[key], f"{path}.{key}" if path else key)]
  return [(path, json.dumps(value, ensure_ascii=False))]


def _title(config: Any) -> str:
  """The names of method and encoder, as far as the config tells."""
  parts = []
  for key in ("method", "encoder"):
    part = config.get(key) if isinstance(config, dict) else None
    if isinstance(part, dict) and isinstance(part.get("name"), str):
      parts.append(part["name"].rpartition(".")[2])
  return " · ".join(parts) or "Pre-training run"


def _section(heading: str, content: str) -> str:
  return f"<section><h2>{_text(heading)}</h2>{content}</section>"


def _read_json(path: Path) -> Any:
  """The content, None where there is no file; a file that is no JSON is shown as such."""
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    return {"could not be read": str(error)}


def _text(value: Any) -> str:
  return html.escape(str(value), quote=True)
