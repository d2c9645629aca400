"""TensorFlow, imported on first use only and kept off the accelerators."""

import functools
import os


@functools.cache
def load():
  """Import TensorFlow for tf.data: no GPU or TPU memory is taken from jax."""
  # Nothing here computes with oneDNN; left on, TensorFlow says so at every start.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    if tf.config.list_physical_devices(kind):
      tf.config.set_visible_devices([], kind)
  return tf
