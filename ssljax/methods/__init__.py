"""Families of self-supervised methods, one file each. A published method is a config."""
