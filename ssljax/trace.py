"""`--profile=STEP`: what the devices do during a few steps, for TensorBoard or xprof."""

import pathlib
from typing import Any

import jax

STEPS = 3


class Trace:
  """Records the steps `first` … `first + 2` of process 0 into `folder`; `first` 0 records nothing.

  >>> trace = Trace(pathlib.Path("profile"), 0)
  >>> trace.after(7, None)  # after step 7 was given to the devices; `found` is what it returns
  """

  def __init__(self, folder: pathlib.Path, first: int):
    self.folder, self.first = folder, first
    self.running = False

  def after(self, step: int, found: Any) -> None:
    """To be called before the first step (with its number less one) and after every step."""
    if not self.first or jax.process_index():
      return
    if step == self.first - 1:
      jax.block_until_ready(found)  # the steps before are no part of it
      jax.profiler.start_trace(self.folder)
      self.running = True
    elif self.running and step == self.first + STEPS - 1:
      jax.block_until_ready(found)
      self.stop()

  def stop(self) -> None:
    """Writes what was recorded: the run may end before the last step that was asked for."""
    if self.running:
      jax.profiler.stop_trace()
      print(f"wrote the profile of steps {self.first} and following to {self.folder}")
      self.running, self.first = False, 0
    elif self.first and not jax.process_index():
      print(f"no profile was written: step {self.first} was not begun in this run")
