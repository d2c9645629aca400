"""Reading the record of a run back; needs neither jax nor matplotlib."""

import json
import os
import pathlib
from typing import Any


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl, in order; a last line cut by a kill is left out.

  Raises:
    ValueError: another line is no JSON object with a step.
  """
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      int(record["step"])
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines):
        break
      raise ValueError(f"{path}: line {number} is no JSON object with a step") from error
    records.append(record)
  return records
