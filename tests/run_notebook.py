"""Executes the code cells of a notebook in this process, without Jupyter.

python tests/run_notebook.py NOTEBOOK [TAG=CODE …] [--keep]
CODE runs after the cell with that tag. What each cell prints and displays goes to standard output,
after a line with the cell's id; --keep also writes it into the notebook.
"""

import base64
import contextlib
import functools
import io
import json
import pathlib
import sys
import types
from collections.abc import Callable


class Image:
  """In place of IPython's: the file of a picture."""

  def __init__(self, filename: str, width: int | None = None) -> None:
    self.data, self.width = pathlib.Path(filename).read_bytes(), width


def output(shown: Image) -> dict:
  """A displayed picture as notebooks keep it: no larger than it is shown, in few colours."""
  from PIL import Image as pillow

  picture = pillow.open(io.BytesIO(shown.data)).convert("RGB")
  width = min(shown.width or picture.width, picture.width)
  picture = picture.resize((width, width * picture.height // picture.width), pillow.LANCZOS)
  data = io.BytesIO()
  picture.quantize(64, dither=pillow.Dither.NONE).save(data, "png", optimize=True)
  kept = {"image/png": base64.b64encode(data.getvalue()).decode()}
  return {"output_type": "display_data", "data": kept, "metadata": {}}


def execute(cells: list[dict], after: dict[str, str], report: Callable, keep: bool) -> None:
  """Runs the cells in one namespace; `keep` fills in their outputs."""
  shown: list[Image] = []
  module = types.ModuleType("IPython.display")
  module.__dict__.update(Image=Image, display=shown.append)
  parent = types.ModuleType("IPython")
  parent.__dict__.update(version_info=(9, 0))  # matplotlib looks at it
  sys.modules |= {"IPython": parent, "IPython.display": module}
  space: dict = {"__name__": "__main__"}
  for number, cell in enumerate(cells, 1):
    printed = io.StringIO()
    report(f"[{cell['id']}]")
    try:
      with contextlib.redirect_stdout(printed):
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
        for tag in cell["metadata"].get("tags", ()):
          exec(after.get(tag, ""), space)
    finally:
      report(printed.getvalue(), end="")
    for picture in shown:
      report(f"picture of {len(picture.data)} bytes, {picture.data[:8]!r}")
    if keep:
      text = printed.getvalue().splitlines(keepends=True)
      cell["execution_count"] = number
      cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
      cell["outputs"] += map(output, shown)
    shown.clear()


def main(path: str, *arguments: str) -> None:
  file = pathlib.Path(path)
  notebook = json.loads(file.read_text())
  after = dict(argument.split("=", 1) for argument in arguments if argument != "--keep")
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  keep = "--keep" in arguments
  report = functools.partial(print, file=sys.__stdout__, flush=True)
  execute(cells, after, report, keep)
  if keep:
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
