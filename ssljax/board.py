"""TensorBoard events of a run. TensorFlow and clu are imported only by a run that writes them."""

import logging
import os
import pathlib
from typing import Any

_log = logging.getLogger(__name__)


def open_board(folder: pathlib.Path, resume_step: int) -> Any:
  """clu's writer of events in `folder`; those of steps after `resume_step` are gone first."""
  tf = _tensorflow()
  from clu import metric_writers

  cut_back(folder, resume_step)
  tf.config.set_visible_devices([], "GPU")  # else the first summary takes the accelerator's memory
  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))


def cut_back(folder: pathlib.Path, step: int) -> None:
  """Keeps the events of steps up to `step` (none for 0); each file is replaced atomically.

  Files are rewritten because a mark to purge from, which TensorBoard knows, holds for the scalars
  of its first version only: readers go on showing the tensors that TensorFlow 2 writes.
  """
  for path in sorted(folder.glob("events.out.tfevents.*")):
    if path.name.endswith(".part"):
      path.unlink()  # of a kill while this was done before
    elif step <= 0:
      path.unlink()
    else:
      _cut_back_file(path, step)


def _cut_back_file(path: pathlib.Path, step: int) -> None:
  tf = _tensorflow()
  part = path.with_name(path.name + ".part")
  kept = dropped = 0
  with tf.io.TFRecordWriter(str(part)) as writer:
    try:
      for raw in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        event = tf.compat.v1.Event.FromString(raw)
        if event.step > step:
          dropped += 1
          continue
        writer.write(raw)
        kept += event.WhichOneof("what") == "summary"
    except tf.errors.DataLossError:  # the last event of a killed run may be half an event
      dropped += 1
      _log.warning("%s: its end is unreadable and was dropped", path)
  if dropped and kept:
    part.replace(path)
    return
  part.unlink()
  if not kept:
    path.unlink()


def _tensorflow() -> Any:
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else TensorFlow says so at every start
  import tensorflow as tf

  return tf
