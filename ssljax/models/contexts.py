"""Encoders and predictors on parts of examples: several contexts of each, and what a teacher says
of the rest."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssljax.models.cued import CuedPredictor
from ssljax.models.heads import Projector
from ssljax.models.predictors import GridPredictor, PlacePredictor


class Projected(NamedTuple):
  """An encoder and, of these widths, linear layers without bias after it, each with a layer norm
  and, between them, GELU (Latent MIM, Wei et al. 2024, 2407.15837); () is none.

  Parameters are {"encoder": …} and, where there are layers, "projector".
  """

  encoder: Any
  sizes: tuple[int, ...] = ()

  @property
  def width(self) -> int:
    """Of the tokens that come out."""
    return self.sizes[-1] if self.sizes else self.encoder.width

  @property
  def projector(self) -> Any:
    start, dtype = self.encoder.init_kernels, self.encoder.dtype
    return Projector(self.sizes, "layer", "layer", activation="gelu", start=start, dtype=dtype)

  def init(self, rng: jax.Array, x: jax.Array) -> dict[str, Any]:
    """Parameters, of an example [1 s1…sr c]."""
    params = {"encoder": self.encoder.init(rng, x)["params"]}
    if self.sizes:
      token = jnp.zeros((1, self.encoder.width))
      params["projector"] = self.projector.init(jax.random.fold_in(rng, 1), token)["params"]
    return params

  def project(self, params: Any, tokens: jax.Array) -> jax.Array:
    """[… e] -> [… width]"""
    return self.projector.apply({"params": params.get("projector", {})}, tokens)

  def contexts(self, params: Any, x: jax.Array, context: jax.Array, keys: jax.Array) -> jax.Array:
    """What is seen of each of c contexts of each example, by itself: [b s1…sr c], int32 [b c k],
    keys [b c] -> [b c p+k width]."""
    b, c, k = context.shape
    x = jnp.broadcast_to(x[:, None], (b, c, *x.shape[1:])).reshape(b * c, *x.shape[1:])
    given = dict(keep=context.reshape(b * c, k), keys=keys.reshape(b * c))
    out = self.encoder.apply({"params": params["encoder"]}, x, **given)
    return self.project(params, out["tokens"]).reshape(b, c, -1, self.width)

  def taught(
    self, params: Any, x: jax.Array, layers: int, keep: jax.Array | None
  ) -> tuple[list[jax.Array], jax.Array]:
    """What a teacher says of examples at places `keep` [b n], which it sees alone, or at all:
    [b n width] of the last layer, or the outputs [b n e] of the last `layers` MLPs; and the
    encoder's mean [b e]. Nothing flows back."""
    last = tuple(range(-layers, 0))
    out = self.encoder.apply({"params": params["encoder"]}, x, keep=keep, mlp_layers=last)
    depth, p = self.encoder.depth, self.encoder.prefix
    maps = [out[f"mlp_{depth + i}"][:, p:] for i in last] or [self.project(params, out["patches"])]
    return jax.lax.stop_gradient((maps, out["patches"].astype(jnp.float32).mean(1)))


def beside(
  encoder: Any, kind: str, width: int, depth: int, heads: int, kernel: int, groups: int, out: int
) -> PlacePredictor | GridPredictor | CuedPredictor:
  """The predictor "transformer", "convolution" or "cued" in the style of an encoder; heads: 0 is
  the encoder's; kernel, groups: of a convolution.

  Raises:
    ValueError: a width that the heads do not divide.
  """
  if kind == "convolution":
    return GridPredictor(width, depth, out, encoder.prefix, kernel, groups, encoder.dtype)
  heads = heads or encoder.heads
  if width % heads:
    raise ValueError(
      f"method.predictor_width {width} is not divisible by {heads} heads: set"
      " method.predictor_heads"
    )
  style = dict(eps=encoder.eps, start=encoder.init_kernels, remat=encoder.remat)
  style |= dict(prefix=encoder.prefix, dtype=encoder.dtype)
  sizes = width, depth, heads, out
  if kind == "cued":
    return CuedPredictor(*sizes, **style)
  return PlacePredictor(*sizes, scan=encoder.scan, **style)


def drawn(
  head: Any, keys: jax.Array, deviation: float, grid: tuple[int, ...], targets: jax.Array, d: int
) -> jax.Array | None:
  """Noise of a predictor's argument of that name, from keys [b]: [b m t d] at targets [b m t], of a
  GridPredictor [b n d]; None where others have none."""
  if isinstance(head, GridPredictor):
    shape: tuple[int, ...] = (math.prod(grid), d)
  elif deviation:
    shape = (*targets.shape[1:], d)
  else:
    return None
  return deviation * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def init(
  tower: Projected, head: Any, rng: jax.Array, batch: Mapping[str, Any], deviation: float
) -> dict[str, Any]:
  """Parameters of encoder, layers after it and predictor, of a batch, which may be shapes alone."""
  x = jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32)
  grid, rngs = tower.encoder.grid(x.shape[1:-1]), jax.random.split(rng, 2)
  tokens = jnp.zeros((1, tower.encoder.prefix + batch["context"].shape[2], tower.width))
  context = jnp.zeros((1, *batch["context"].shape[2:]), jnp.int32)
  places = jnp.zeros((1, *batch["targets"].shape[2:]), jnp.int32)
  noise = drawn(head, rngs[:1], deviation, grid, places, tower.width)
  made = head.init(rngs[1], tokens, grid, context, places, noise)
  return tower.init(rngs[0], x) | {"predictor": made["params"]}


def predict(
  tower: Projected,
  head: Any,
  params: Any,
  batch: Mapping[str, jax.Array],
  keys: jax.Array,
  deviation: float,
) -> tuple[jax.Array, jax.Array]:
  """From each of an example's c contexts by itself: what is predicted at its targets, and its
  tokens; keys [b] -> [b c m t width], [b c p+k width]."""
  x, context, targets = (batch[name] for name in ("image", "context", "targets"))
  keys = jax.vmap(lambda key: jax.random.split(key, (context.shape[1], 2)))(keys)
  seen, grid = tower.contexts(params, x, context, keys[:, :, 0]), tower.encoder.grid(x.shape[1:-1])
  fold = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
  noise = drawn(head, fold(keys[:, :, 1]), deviation, grid, fold(targets), seen.shape[-1])
  args = fold(seen), grid, fold(context), fold(targets), noise
  pred = head.apply({"params": params["predictor"]}, *args)
  return pred.reshape(*targets.shape, -1), seen
