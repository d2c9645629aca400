"""ssljax: self-supervised pre-training in JAX, from a laptop to a TPU pod, with one command."""

import os

__version__ = "0.1.0"
# Read once by what JAX and TensorFlow share, when the first of them is imported. At this level
# TensorFlow is silent on pictures that do not decode, which the log names in its own words.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
