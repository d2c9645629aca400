"""ssljax: self-supervised pre-training in JAX, from a laptop to a TPU pod, with one command."""

__version__ = "0.1.0"
