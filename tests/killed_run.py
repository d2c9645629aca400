"""A tiny run as a real process that dies at a chosen place, and its config.

python tests/killed_run.py PLACE --config=tests/killed_run.py:METHOD --workdir=DIR
PLACE: "step:5" (SIGKILL while step 5 is computed), "save:3" (SIGKILL when the files of checkpoint 3
are written and not yet renamed into place), "term:5" (SIGTERM while step 5 is computed), "hang:5"
(the batch of step 5 never comes), "lack:5" (OSError in place of that batch), "fill:3" (before
checkpoint 3 is saved, a file beside the workdir takes the room of its disk), "none".
With "@1" at its end the place is for process 1 alone.
"""

import contextlib
import os
import pathlib
import signal
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parent)]

import tiny  # noqa: E402


def get_config(method: str = "mae") -> dict:
  """Six steps; checkpoints after 2, 3, 4 and 6, evaluations after 3 and 6."""
  return tiny.config(
    method,
    data=dict(eval_train="train[:48]", eval_test="train[48:]"),
    eval=dict(
      every=3,
      knn=dict(name="ssljax.evals.knn", k=(5,)),
      rank=dict(name="ssljax.evals.rank"),
      best="knn_k5_T0.07/top1",
    ),
  )


def no_report(workdir: pathlib.Path) -> pathlib.Path:
  """In place of `reporting.write`: drawing curves takes longer than these six steps."""
  return workdir


def die_while_stepping(step: int, number: int) -> None:
  """Sends the signal right after the step was handed to the devices."""
  from ssljax import train

  compiled = train.compiled_step

  def deadly(job):
    function = compiled(job)

    def one(state, batch):
      before = int(state.step)
      after = function(state, batch)
      if before + 1 == step:
        os.kill(os.getpid(), number)
      return after

    return one

  train.compiled_step = deadly


def die_while_saving(step: int) -> None:
  """SIGKILL in the thread that would rename the written checkpoint into place."""
  from orbax.checkpoint._src.path import atomicity

  finalize = atomicity.AtomicRenameTemporaryPath.finalize

  def deadly(self, *args, **kwargs):
    if self.get_final().name == str(step):
      os.kill(os.getpid(), signal.SIGKILL)
    return finalize(self, *args, **kwargs)

  atomicity.AtomicRenameTemporaryPath.finalize = deadly


def fill_disk(step: int, arguments: list[str]) -> None:
  """Leaves 64 KiB, in which lines of numbers fit and no checkpoint; the one before is whole."""
  from ssljax import checkpoint

  workdir = next(a.split("=", 1)[1] for a in arguments if a.startswith("--workdir="))
  save = checkpoint.Checkpoints.save

  def full(self, number, *args, **kwargs):
    if number == step:
      self.wait()
      with open(pathlib.Path(workdir).parent / "filler", "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
          while True:
            file.write(bytes(16384))
        file.truncate(file.tell() - 65536)
    return save(self, number, *args, **kwargs)

  checkpoint.Checkpoints.save = full


def stop_feeding(step: int, hang: bool) -> None:
  """The batch of a step does not come, or fails to."""
  import threading

  from ssljax.data import pipeline

  plain = pipeline.order.places

  def places(number, *rest):
    if number + 1 == step and hang:
      threading.Event().wait()
    if number + 1 == step:
      raise OSError("the disk with the images is gone")
    return plain(number, *rest)

  pipeline.order.places = places


def run(place: str, arguments: list[str]) -> int:
  place, _, only = place.partition("@")
  if only and f"--process_id={only}" not in arguments:
    place = "none"
  kind, _, step = place.partition(":")
  if kind == "save":
    die_while_saving(int(step))
  elif kind in ("step", "term"):
    die_while_stepping(int(step), signal.SIGKILL if kind == "step" else signal.SIGTERM)
  elif kind == "fill":
    fill_disk(int(step), arguments)
  elif kind in ("hang", "lack"):
    stop_feeding(int(step), kind == "hang")
  from ssljax import main, reporting

  reporting.write = no_report
  return main.main(arguments)


if __name__ == "__main__":
  sys.exit(run(sys.argv[1], sys.argv[2:]))
