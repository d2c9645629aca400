"""Contrast without the b × b matrix: in tiles of columns, and around a ring of devices.

All of them are made of sums over negatives (`columns.negatives`) that walk over tiles of columns
and compute the tiles again in the backward pass. The positive is added here: with n the log-sum-exp
over j ≠ i, -log softmax_i = softplus(n_i - s_ii), which is exact for tiny losses, too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ssljax.losses import pairs
from ssljax.losses.columns import Walk, negatives
from ssljax.losses.image_text import number

__all__ = (
  "clip_ring",
  "clip_tiled",
  "info_nce_ring",
  "info_nce_tiled",
  "nt_xent_ring",
  "nt_xent_tiled",
  "siglip_ring",
  "siglip_tiled",
)

Loss = Callable[..., jax.Array]


def info_nce_tiled(
  q: jax.Array,
  k: jax.Array,
  temperature: float | jax.Array,
  tile: int = 1024,
  weights: jax.Array | None = None,
) -> jax.Array:
  """InfoNCE over the batch in memory b · tile: [b d], [b d], [] -> [b].

  Formula: -log(exp(s_ii/T) / Σ_j exp(s_ij/T)), s_ij = cos(q_i, k_j).
  Source: Inf-CL, Cheng et al. 2024, 2410.17243.
  Tested: NumPy; golden value; the plain form in value and gradient.

  Equal to the plain form, not an estimate; gradient to q, k and a learnt temperature. Any b, also
  one that `tile` does not divide. Stop the gradient of k outside where k is a teacher's. Time is
  that of the plain form and one more product in the backward pass. No second derivatives.
  `weights`: [b], how much an example counts as a negative; 0 is padding, nobody's negative, with
  loss 0. They get no gradient.

  >>> losses.info_nce_tiled(jnp.eye(4), jnp.eye(4), temperature=0.5, tile=3).shape
  (4,)
  """
  scale, arrays = _with_temperature(temperature, weights, q=q, k=k)
  return _tiled(_info_nce, Walk("exp", tile), arrays, scale)


def nt_xent_tiled(
  z1: jax.Array,
  z2: jax.Array,
  temperature: float | jax.Array,
  tile: int = 1024,
  weights: jax.Array | None = None,
) -> jax.Array:
  """NT-Xent of two views in memory b · tile: [b d], [b d], [] -> [b].

  Formula: mean over the two anchors of -log(exp(s_ij/T) / Σ_{k≠i} exp(s_ik/T)), s cosine.
  Source: SimCLR, Chen et al. 2020, 2002.05709; tiles: Inf-CL, Cheng et al. 2024, 2410.17243.
  Tested: NumPy; lightly NTXentLoss; golden value.

  Equal to `nt_xent` in value and gradient; `weights` as in `info_nce_tiled`.

  >>> losses.nt_xent_tiled(jnp.eye(4), jnp.eye(4), temperature=0.5, tile=3).shape
  (4,)
  """
  scale, arrays = _with_temperature(temperature, weights, z1=z1, z2=z2)
  return _tiled(_nt_xent, Walk("exp", tile), arrays, scale)


def clip_tiled(
  image: jax.Array,
  text: jax.Array,
  scale: float | jax.Array,
  tile: int = 1024,
  weights: jax.Array | None = None,
) -> jax.Array:
  """CLIP's loss in memory b · tile: [b d], [b d], [] -> [b].

  Formula: ½·(-log softmax_j(s·cos(image_i, text_j))_i - log softmax_j(s·cos(text_i, image_j))_i).
  Source: CLIP, Radford et al. 2021, 2103.00020; tiles: Inf-CL, Cheng et al. 2024, 2410.17243.
  Tested: NumPy; transformers CLIPModel; golden value; the plain form in value and gradient.

  Equal to `clip_loss` in value and gradient; `weights` as in `info_nce_tiled`.

  >>> losses.clip_tiled(jnp.eye(4), jnp.eye(4), scale=14.0, tile=3).shape
  (4,)
  """
  scale, arrays = _with_scale(scale, weights, image=image, text=text)
  return _tiled(_clip, Walk("exp", tile), arrays, scale)


def siglip_tiled(
  image: jax.Array,
  text: jax.Array,
  t: float | jax.Array,
  b: float | jax.Array,
  tile: int = 1024,
  weights: jax.Array | None = None,
) -> jax.Array:
  """SigLIP's loss in memory b · tile: [b d], [b d], [], [] -> [b].

  Formula: Σ_j softplus(-y_ij·(t·cos(image_i, text_j) + b)), y_ii = 1, else -1.
  Source: SigLIP, Zhai et al. 2023, 2303.15343.
  Tested: NumPy; transformers SiglipModel; golden value; the plain form in value and gradient.

  Equal to `siglip_loss` in value and gradient, to t and b, too; `weights` as in `info_nce_tiled`.

  >>> losses.siglip_tiled(jnp.eye(4), jnp.eye(4), t=10.0, b=-10.0, tile=3).shape
  (4,)
  """
  t, b = number("t", t), number("b", b, positive=False)
  arrays = pairs.read(1.0, weights, image=image, text=text)
  return _tiled(_siglip, Walk("sigmoid", tile), arrays, t, b)


def info_nce_ring(
  q: jax.Array,
  k: jax.Array,
  temperature: float | jax.Array,
  axis: str,
  mesh: Any = None,
  tile: int | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """InfoNCE over the batch, keys passed around the devices: [b d], [b d], [] -> [b].

  Formula: -log(exp(s_ii/T) / Σ_j exp(s_ij/T)), s_ij = cos(q_i, k_j).
  Source: Inf-CL, Cheng et al. 2024, 2410.17243.
  Tested: NumPy; golden value; the plain form in value and gradient on 1, 2 and 8 devices.

  The arrays are global, their batch lies along `axis` of `mesh` (None: the one of `jax.set_mesh`)
  and is divisible by its devices. No device ever holds all keys: memory is (b / devices)², or
  (b / devices) · tile with `tile`. In the backward pass the keys' gradient travels with them.
  `weights` as in `info_nce_tiled`.

  >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  >>> losses.info_nce_ring(jnp.eye(4), jnp.eye(4), 0.5, "data", mesh).shape
  (4,)
  """
  scale, arrays = _with_temperature(temperature, weights, q=q, k=k)
  return _ring(_info_nce, Walk("exp", tile, axis), mesh, arrays, scale)


def nt_xent_ring(
  z1: jax.Array,
  z2: jax.Array,
  temperature: float | jax.Array,
  axis: str,
  mesh: Any = None,
  tile: int | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """NT-Xent of two views, passed around the devices: [b d], [b d], [] -> [b].

  Formula: mean over the two anchors of -log(exp(s_ij/T) / Σ_{k≠i} exp(s_ik/T)), s cosine.
  Source: SimCLR, Chen et al. 2020, 2002.05709; ring: Inf-CL, Cheng et al. 2024, 2410.17243.
  Tested: NumPy; golden value; the plain form in value and gradient on 1, 2 and 8 devices.

  Mesh, memory, `tile` and `weights` as in `info_nce_ring`.

  >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  >>> losses.nt_xent_ring(jnp.eye(4), jnp.eye(4), 0.5, "data", mesh).shape
  (4,)
  """
  scale, arrays = _with_temperature(temperature, weights, z1=z1, z2=z2)
  return _ring(_nt_xent, Walk("exp", tile, axis), mesh, arrays, scale)


def clip_ring(
  image: jax.Array,
  text: jax.Array,
  scale: float | jax.Array,
  axis: str,
  mesh: Any = None,
  tile: int | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """CLIP's loss, embeddings passed around the devices: [b d], [b d], [] -> [b].

  Formula: ½·(-log softmax_j(s·cos(image_i, text_j))_i - log softmax_j(s·cos(text_i, image_j))_i).
  Source: CLIP, Radford et al. 2021, 2103.00020; ring: Inf-CL, Cheng et al. 2024, 2410.17243.
  Tested: NumPy; golden value; the plain form in value and gradient on 1, 2 and 8 devices.

  Mesh, memory, `tile` and `weights` as in `info_nce_ring`.

  >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  >>> losses.clip_ring(jnp.eye(4), jnp.eye(4), 14.0, "data", mesh).shape
  (4,)
  """
  scale, arrays = _with_scale(scale, weights, image=image, text=text)
  return _ring(_clip, Walk("exp", tile, axis), mesh, arrays, scale)


def siglip_ring(
  image: jax.Array,
  text: jax.Array,
  t: float | jax.Array,
  b: float | jax.Array,
  axis: str,
  mesh: Any = None,
  tile: int | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """SigLIP's loss, texts passed around the devices: [b d], [b d], [], [] -> [b].

  Formula: Σ_j softplus(-y_ij·(t·cos(image_i, text_j) + b)), y_ii = 1, else -1.
  Source: SigLIP, Zhai et al. 2023, 2303.15343.
  Tested: NumPy; golden value; the plain form in value and gradient on 1, 2 and 8 devices.

  Mesh, memory, `tile` and `weights` as in `info_nce_ring`.

  >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  >>> losses.siglip_ring(jnp.eye(4), jnp.eye(4), 10.0, -10.0, "data", mesh).shape
  (4,)
  """
  t, b = number("t", t), number("b", b, positive=False)
  arrays = pairs.read(1.0, weights, image=image, text=text)
  return _ring(_siglip, Walk("sigmoid", tile, axis), mesh, arrays, t, b)


def _info_nce(
  walk: Walk, q: jax.Array, k: jax.Array, weights: jax.Array, scale: jax.Array
) -> jax.Array:
  return jax.nn.softplus(negatives(walk, q, k, weights, scale) - scale * (q * k).sum(-1))


def _nt_xent(
  walk: Walk, z1: jax.Array, z2: jax.Array, weights: jax.Array, scale: jax.Array
) -> jax.Array:
  positives = scale * (z1 * z2).sum(-1)
  mass = partial(negatives, walk, weights=weights, scale=scale)
  first = jnp.logaddexp(mass(z1, z2), mass(z1, z1))
  second = jnp.logaddexp(mass(z2, z1), mass(z2, z2))
  return (jax.nn.softplus(first - positives) + jax.nn.softplus(second - positives)) / 2


def _clip(
  walk: Walk, image: jax.Array, text: jax.Array, weights: jax.Array, scale: jax.Array
) -> jax.Array:
  by_image = _info_nce(walk, image, text, weights, scale)
  return (by_image + _info_nce(walk, text, image, weights, scale)) / 2


def _siglip(
  walk: Walk,
  image: jax.Array,
  text: jax.Array,
  weights: jax.Array,
  t: jax.Array,
  b: jax.Array,
) -> jax.Array:
  positives = t * (image * text).sum(-1) + b
  return negatives(walk, image, text, weights, t, b) + jax.nn.softplus(-positives)


def _with_scale(scale: Any, weights: Any, **views: Any) -> tuple[jax.Array, tuple[Any, ...]]:
  scale = number("scale", scale)
  arrays = pairs.read(1.0, weights, **views)
  return pairs.capped(scale, arrays[0].dtype), arrays


def _with_temperature(temperature: Any, weights: Any, **views: Any) -> tuple[Any, tuple[Any, ...]]:
  arrays = pairs.read(temperature, weights, **views)
  return pairs.scaled(jnp.ones((), arrays[0].dtype), temperature), arrays


def _tiled(loss: Loss, walk: Walk, arrays: tuple[Any, ...], *numbers: Any) -> jax.Array:
  first, second, weights = arrays
  if not isinstance(walk.tile, int | None) or (walk.tile is not None and walk.tile < 1):
    raise ValueError(f"tile must be a whole number of columns above zero, not {walk.tile!r}")
  each = jnp.ones_like(first[:, 0]) if weights is None else weights
  numbers = tuple(jnp.asarray(x, first.dtype) for x in numbers)
  return pairs.keep(loss(walk, first, second, each, *numbers), weights)


def _ring(loss: Loss, walk: Walk, mesh: Any, arrays: tuple[Any, ...], *numbers: Any) -> jax.Array:
  """`loss` on every device's rows of the global arrays; the numbers go to all devices."""
  sizes = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
  b, rows = len(arrays[0]), P(walk.axis)
  if not sizes:
    raise ValueError("mesh must be given, or be set by jax.set_mesh")
  if walk.axis not in sizes:
    raise ValueError(f"axis must be one of the mesh's {tuple(sizes)}, not {walk.axis!r}")
  if b % sizes[walk.axis]:
    raise ValueError(
      f"batch {b} is not divisible by the {sizes[walk.axis]} devices of {walk.axis!r}"
    )
  specs = (rows, rows, rows) + (P(),) * len(numbers)

  def spread(walk, *inputs):
    local = jax.shard_map(partial(loss, walk), mesh=mesh, in_specs=specs, out_specs=rows)
    return local(*inputs)

  return _tiled(spread, walk, arrays, *numbers)
