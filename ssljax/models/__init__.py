"""Encoders, decoders and heads: the only room that imports flax."""
