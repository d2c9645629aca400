"""Questions about an example whose answer is known: encoder, head, cross-entropy.

RotNet (Gidaris, Singh and Komodakis 2018, 1803.07728): `rotation`, which of four turns.
Jigsaw (Noroozi and Favaro 2016, 1603.09246): `jigsaw`, which of many orders of nine tiles. Its head
is that of Goyal et al. 2019 (1905.01235): a layer for each tile, then one for all of them.
DIET (Balestriero 2023, 2302.10260): `diet`, which example of the data set. No projector, one view.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssljax import collapse, losses
from ssljax.models.heads import Projector
from ssljax.models.norms import running, with_statistics
from ssljax.models.views import evaluated, merged, see, why_whole
from ssljax.step import Method, coupled, example_keys

BATCH_NORM = ("global", "microbatch")


class Question(NamedTuple):
  """What an encoder is shown of an example and asked about it.

  `show(image [b h w c], keys [b]) -> [b v h' w' c]`, `answer(batch, keys) -> int32 [b m]`. v/m
  pictures together tell one of the m `answers`, one of `choices`; `loss` is ([n k], [n]) -> [n].
  `square`: images must be.
  """

  show: Callable
  answer: Callable
  answers: int
  choices: int
  loss: Callable
  square: bool = True


class Parts(NamedTuple):
  """What the functions of a method share: `projector` is for each picture, `head` for those that
  tell one answer together."""

  encoder: Any
  question: Question
  projector: Projector
  head: Any


def rotation(encoder, *, batch_norm: str = "global") -> Method:
  """A method of `batch["image"]` [b s s c]: all four turns of each image, as examples of their own.

  Args:
    encoder: from `models/`. It sees 4·b images.
    batch_norm: of the encoder under `accum`: "global" needs the whole batch, "microbatch" takes
      each microbatch's own.

  Raises:
    ValueError: an unknown name, or images that are not square.
  """
  question = Question(_turned, _turns, 4, 4, losses.rotation_ce)
  head = Projector((4,), dtype=encoder.dtype)
  return _method(Parts(encoder, question, Projector(()), head), batch_norm)


def jigsaw(
  encoder,
  batch_size: int,
  *,
  grid: int = 3,
  tile: int = 64,
  permutations: int = 1000,
  standardise: bool = True,
  projector: tuple[int, ...] = (1000,),
  projector_norm: str = "batch",
  batch_norm: str = "global",
) -> Method:
  """A method of `batch["image"]` [b s s c], cut into grid·grid tiles in one of many orders.

  The image is divided into cells of s // grid pixels, and a tile is cut from a random place of each
  cell: the gap between them hides edges that go on. Colours show where in a lens a tile was: drop
  them (`gray` of the view).

  Args:
    encoder: from `models/`. It sees grid²·b tiles, each by itself.
    grid: tiles a side, 2 or 3.
    tile: pixels of a side of a tile.
    permutations: orders, chosen far apart by `far_apart`: 100, 2000 and 10000 are usual.
    standardise: each tile and channel to mean 0 and deviation 1 (the paper; Goyal et al. do not).
    projector, projector_norm: widths of layers for each tile and "batch" or "none" after each of
      them, before the activation; () is none.
    batch_norm: as in `rotation`.

  Raises:
    ValueError: an unknown name, images that are not square, tiles that do not fit, more orders than
      there are, or an encoder that knows one size of images only.
  """
  if batch_size < 2 and projector and projector_norm == "batch":
    raise ValueError("batch_size 1: batch norm in the projector needs two examples or more")
  if getattr(encoder, "positions", "") == "relative":
    raise ValueError(
      'encoder.positions "relative" belongs to one size of images, and jigsaw shows tiles of them;'
      ' there are "sincos" and "rotary"'
    )
  show = functools.partial(_tiles, far_apart(grid, permutations), grid, tile, standardise)
  answer = functools.partial(_orders, permutations)
  question = Question(show, answer, 1, permutations, losses.jigsaw_ce)
  first = Projector(projector, projector_norm, projector_norm, dtype=encoder.dtype)
  head = Projector((permutations,), dtype=encoder.dtype)
  return _method(Parts(encoder, question, first, head), batch_norm)


def diet(encoder, *, examples: int, smoothing: float = 0.8, batch_norm: str = "global") -> Method:
  """A method of `batch["image"]` [b h w c] and `batch["index"]` [b]: every example its own class.

  The last layer [d n] has no bias. It and the optimizer's moments grow with the data set, as do the
  logits [b n]: up to 100,000 examples or so; beyond, mesh.state "full" shares out the layer.

  Args:
    encoder: from `models/`.
    examples: how many the source has. Its order must not change between runs.
    smoothing: of the labels. At the best the loss is their entropy, not 0.
    batch_norm: as in `rotation`.

  Raises:
    ValueError: an unknown name, fewer than two examples, or a smoothing outside of 0…1.
  """
  if examples < 2:
    raise ValueError(f"method.examples {examples}: two or more can be told apart")
  if not 0 <= smoothing <= 1:
    raise ValueError(f"method.smoothing {smoothing} is not between 0 and 1")
  loss = functools.partial(losses.instance_ce, smoothing=smoothing)
  show, answer = lambda image, keys: image[:, None], lambda batch, keys: batch["index"][:, None]
  question = Question(show, answer, 1, examples, loss, square=False)
  head = Projector((examples,), bias="none", dtype=encoder.dtype)
  return _method(Parts(encoder, question, Projector(()), head), batch_norm)


def _method(parts: Parts, batch_norm: str) -> Method:
  if batch_norm not in BATCH_NORM:
    raise ValueError(f"method.batch_norm {batch_norm!r} is none of {', '.join(BATCH_NORM)}")
  init, embed, couple, update, encode = (
    functools.partial(f, parts) for f in (_init, _embed, _couple, _update, _encode)
  )
  whole, chance = why_whole(parts.encoder, batch_norm), math.log(parts.question.choices)
  made = Method(init, coupled(embed, couple), update, encode, None, ("image", "index"))
  made = made._replace(whole=whole, chance=chance)
  # Without batch norm in the projector every example has a loss of its own: microbatches are
  # enough, and no feature of the whole batch is kept.
  projector = parts.projector
  meets = projector.sizes and "batch" in (projector.norm, projector.last)
  return made._replace(embed=embed, couple=couple) if meets else made


def _init(parts: Parts, rng, batch):
  encoder, question, projector, head = parts
  asked = question.answers
  x, rngs = _blank(batch["image"], question.square), jax.random.split(rng, 3)
  shown = jax.eval_shape(question.show, x, rngs[:1]).shape
  # Of a whole image, not of what is shown: a table of positions is as large as images are.
  made = {"encoder": encoder.init(rngs[0], x)}
  pooled = jax.eval_shape(encoder.apply, made["encoder"], jnp.zeros(shown[1:]))["pooled"]
  made["projector"] = projector.init(rngs[1], jnp.zeros(pooled.shape))
  z = jax.eval_shape(projector.apply, made["projector"], pooled)
  made["head"] = head.init(rngs[2], jnp.zeros((asked, z.size // asked)))
  params = {name: variables.get("params", {}) for name, variables in made.items()}
  stats = {name: made[name].get("batch_stats", {}) for name in ("encoder", "projector")}
  return params, jax.tree.map(jnp.copy, {"stats": stats} if any(stats.values()) else {})


def _embed(parts: Parts, params, extra, batch, rng, step):
  """Pooled features of all pictures, [b v d]."""
  own, further = _keys(rng, batch)
  shown = parts.question.show(batch["image"], own)
  keys = jax.vmap(lambda key: jax.random.split(key, shown.shape[1]))(further)
  given = params["encoder"], running(extra, "encoder"), shown
  out, stats = see(parts.encoder, *given, keys=keys)
  z = out["pooled"]
  # Of the pictures that tell the first answer: for a probe.
  pooled = z[:, : z.shape[1] // parts.question.answers].mean(1)
  return z, jax.lax.stop_gradient({"mean": {"encoder": stats}, "rows": {"pooled": pooled}})


def _couple(parts: Parts, params, extra, z, batch, rng, step):
  _, question, projector, head = parts
  given = params["projector"], running(extra, "projector"), z
  projected, stats = with_statistics(projector, *given, train=True)
  projected = jax.nn.relu(projected) if projector.sizes else projected
  together = projected.reshape(len(z) * question.answers, -1)
  logits = head.apply({"params": params["head"]}, together)
  answers = merged(question.answer(batch, _keys(rng, batch)[0]))
  right = (logits.argmax(-1) == answers).astype(jnp.float32)
  metrics = {"top1": right.mean()} | collapse.features(z)
  mean = {"mean": {"projector": stats}}
  return question.loss(logits, answers).mean(), (jax.lax.stop_gradient(mean), metrics)


def _update(parts: Parts, params, extra, stats, step):
  return {"stats": {k: stats["mean"][k] for k in extra["stats"]}} if extra else extra


def _encode(parts: Parts, params, extra, batch, layers=()):
  stats = running(extra, "encoder")
  return evaluated(parts.encoder, params["encoder"], stats, batch["image"], layers)


def far_apart(grid: int, count: int) -> np.ndarray:
  """`count` orders of grid² tiles, int32 [count grid²]: the first is the identity, and each of the
  next disagrees with those before it in as many places as possible, on average (the paper's rule),
  and among equals with the nearest of them.

  Raises:
    ValueError: a grid that is neither 2 nor 3 (sixteen tiles have 2·10¹³ orders), or more than
      there are.
  """
  if grid not in (2, 3):
    raise ValueError(f"method.grid {grid} is neither 2 nor 3")
  every = np.array(list(itertools.permutations(range(grid**2))), np.int8).T
  if not 2 <= count <= every.shape[1]:
    raise ValueError(
      f"method.permutations {count} is not between 2 and {every.shape[1]}, the orders of"
      f" {grid**2} tiles"
    )
  chosen = [0]
  total, nearest = np.zeros(every.shape[1], np.int32), np.zeros(every.shape[1], np.int8)
  for _ in range(count - 1):
    agree = sum((row == row[chosen[-1]]).view(np.int8) for row in every)
    total += agree
    np.maximum(nearest, agree, out=nearest)
    total[chosen[-1]] = np.iinfo(np.int32).max // 2  # not again
    best = np.flatnonzero(total == total.min())
    chosen.append(int(best[nearest[best].argmin()]))
  return every[:, chosen].T.astype(np.int32)


def _turned(image: jax.Array, keys: jax.Array) -> jax.Array:
  """All four turns, counter-clockwise, by transposes and flips: [b s s c] -> [b 4 s s c]."""
  del keys
  return jnp.stack([jnp.rot90(image, k, axes=(1, 2)) for k in range(4)], axis=1)


def _turns(batch, keys: jax.Array) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(4), (len(keys), 4))


def _orders(count: int, batch, keys: jax.Array) -> jax.Array:
  """Which order each example's tiles are in: [b 1]."""
  return jax.vmap(lambda key: jax.random.randint(jax.random.split(key)[0], (1,), 0, count))(keys)


def _tiles(table, grid: int, tile: int, standardise: bool, image, keys) -> jax.Array:
  """Tiles in the order that was drawn, from random places of their cells: [b s s c], [b] ->
  [b grid² tile tile c]."""
  side, c = image.shape[2:]
  cell = side // grid
  if not 0 < tile <= cell:
    raise ValueError(
      f"method.tile {tile} does not fit into the cells of {cell} pixels that method.grid {grid}"
      f" makes of images of {side}"
    )
  corners = cell * np.stack([table // grid, table % grid], axis=-1)
  at = jnp.asarray(corners)[_orders(len(table), None, keys)[:, 0]]
  inside = jax.vmap(
    lambda key: jax.random.randint(jax.random.split(key)[1], at.shape[1:], 0, cell - tile + 1)
  )
  cut = lambda one, yx: jax.lax.dynamic_slice(one, (*yx, 0), (tile, tile, c))  # noqa: E731
  tiles = jax.vmap(jax.vmap(cut, (None, 0)))(image, at + inside(keys))
  return jax.nn.standardize(tiles, axis=(2, 3), epsilon=1e-5) if standardise else tiles


def _blank(image, square: bool) -> jax.Array:
  """A blank image [1 h w c] as large as the batch's, which may have to be square."""
  shape = image.shape[1:]
  if square and (len(shape) != 3 or shape[0] != shape[1]):
    raise ValueError(
      f"images of {' x '.join(map(str, shape[:-1]))} pixels are not square: set data.views, e.g."
      " dict(name='ssljax.data.views.crop_flip', size=(224, 224))"
    )
  return jnp.zeros((1, *shape))


def _keys(rng: jax.Array, batch) -> tuple[jax.Array, jax.Array]:
  """Keys of the question and of the encoder, one an example: [b], [b]."""
  keys = jax.vmap(jax.random.split)(example_keys(rng, batch["index"]))
  return keys[:, 0], keys[:, 1]
