"""The smallest method on several views: the encoder's mean of two views of an image agrees."""

from typing import Any

import jax.numpy as jnp

from ssljax.step import Method


def pairs(encoder: Any, *, weight: float = 1.0) -> Method:
  """Mean squared distance of the pooled features of the two views, times `weight`."""

  def init(rng, batch):
    image = jnp.zeros((1, *batch["views"].shape[2:]), jnp.float32)
    return {"encoder": encoder.init(rng, image)["params"]}, {}

  def features(params, image, layers=()):
    return encoder.apply({"params": params["encoder"]}, image, layers=layers)

  def loss(params, extra, batch, rng, step):
    first, second = (features(params, batch["views"][:, v])["pooled"] for v in range(2))
    return weight * jnp.mean((first - second) ** 2), ({}, {})

  def encode(params, extra, batch, layers=()):
    return features(params, batch["image"], layers)

  return Method(
    init, loss, lambda params, extra, stats, step: extra, encode, needs=("views", "index")
  )
