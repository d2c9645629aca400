"""Evaluations of frozen features: pure functions (train, test) -> {key: number}."""
