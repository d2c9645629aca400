"""Queries and the train images whose features are nearest to theirs."""

from pathlib import Path

import numpy as np

from ssljax.viz.style import COLOURS, FAINT, INK, as_rgb, figure, heading, save, show


def neighbours_figure(
  path: str | Path,
  query: np.ndarray,
  neighbour: np.ndarray,
  *,
  query_label: np.ndarray | None = None,
  neighbour_label: np.ndarray | None = None,
  similarity: np.ndarray | None = None,
  title: str = "Nearest neighbours",
) -> Path:
  """Writes a PNG, one row a query: [q h w c], neighbours [q k h w c], nearest first.

  Args:
    query_label, neighbour_label: [q], [q k]; frames then tell same class (blue, solid) from
      another (orange, dashed). Both or none.
    similarity: [q k] cosines, written under the pictures.

  Raises:
    ValueError: shapes do not fit each other.
  """
  queries, k = np.shape(neighbour)[:2]
  labelled = query_label is not None and neighbour_label is not None
  tables = [x for x in (neighbour_label if labelled else None, similarity) if x is not None]
  if len(query) != queries or any(np.shape(table) != (queries, k) for table in tables):
    shapes = f"{np.shape(neighbour)}, their tables {[np.shape(table) for table in tables]}"
    raise ValueError(f"{len(query)} queries, but neighbours of shape {shapes}")
  note = "query at the left; train images by cosine of the features, nearest first"
  same = np.zeros((queries, k), bool)
  if labelled:
    same = np.asarray(neighbour_label) == np.asarray(query_label)[:, None]
    note += f"\nframe: blue = same class ({same.mean():.0%}), orange dashed = another"
  side, gap, left = 0.98, 0.12, 0.13
  line, top = (0.0 if similarity is None else 0.17), (0.82 if labelled else 0.66)
  width = max(2 * left + (k + 1) * (side + gap) + 0.2, 5.2)
  height = top + queries * (side + gap + line) + 0.1
  made = figure(width, height)
  heading(made, title, note)
  shown = as_rgb(np.asarray(neighbour).reshape(-1, *np.shape(neighbour)[2:]))
  rgb = np.concatenate([as_rgb(query)[:, None], shown.reshape(queries, k, *shown.shape[1:])], 1)
  for row in range(queries):
    bottom = height - top - row * (side + gap + line) - side
    for column in range(k + 1):
      x = left + column * (side + gap) + (0.2 if column else 0)
      axes = made.add_axes((x / width, bottom / height, side / width, side / height))
      frame = (COLOURS[0], "-") if same[row, column - 1] else (COLOURS[1], (0, (3, 1.5)))
      show(axes, rgb[row, column], *(frame if labelled and column else ()))
      inside = axes.transAxes
      if column and similarity is not None:
        text, below = f"{similarity[row, column - 1]:.2f}", {"ha": "center", "va": "top"}
        axes.text(0.5, -0.05, text, below, fontsize=7.5, color=FAINT, transform=inside)
      if query_label is not None and labelled and not column:
        text, box = str(query_label[row]), {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.5}
        axes.text(0.04, 0.95, text, va="top", fontsize=8, color=INK, bbox=box, transform=inside)
  return save(made, path)
