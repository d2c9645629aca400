"""What the commands say when something is wrong."""

import os
import pathlib
import sys
import traceback


def explain(error: BaseException) -> int:
  """Prints an error of our own in one line; one from a library below keeps its traceback.

  Returns the exit code. SSLJAX_TRACEBACK=1 shows every traceback.
  """
  raised = traceback.extract_tb(error.__traceback__)[-1].filename
  ours = {str(pathlib.Path(__file__).parent), "configs"}
  if os.environ.get("SSLJAX_TRACEBACK") or not any(place in raised for place in ours):
    traceback.print_exception(error)
  else:
    print(f"error: {error}", file=sys.stderr)
  return 1
