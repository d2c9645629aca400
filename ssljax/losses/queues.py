"""Contrastive losses against a memory of earlier keys, and the memory itself.

A queue is an array [m d] that the caller keeps: start it with unit Gaussian rows, compute the loss
with the old queue, then `enqueue` the new keys. Its rows get no gradient.
"""

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics, pairs
from ssljax.losses.contrastive import info_nce

__all__ = (
  "enqueue",
  "info_nce_queue",
  "mix_hard_negatives",
  "mochi",
  "nearest_neighbour_lookup",
  "nnclr",
)


def info_nce_queue(
  q: jax.Array,
  k: jax.Array,
  queue: jax.Array,
  temperature: float | jax.Array,
  negatives: jax.Array | None = None,
  queue_weights: jax.Array | None = None,
) -> jax.Array:
  """InfoNCE against a queue: queries [b d], keys [b d], queue [m d] -> [b].

  Formula: -log(exp(q·k/T) / (exp(q·k/T) + Σ_queue exp(q·n/T))) of unit vectors.
  Source: MoCo, He et al. 2020, 1911.05722; v2, Chen et al. 2020, 2003.04297.
  Tested: NumPy; lightly NTXentLoss with its memory bank; torch cross_entropy.
  No gradient into keys, queue and negatives. Keys of the batch are nobody else's negatives. Enqueue
  the keys after the loss, or each finds its positive among the negatives.
  negatives: [b s d], each query's own, from `mix_hard_negatives` (MoCHi). queue_weights: [m] or
  [b m], 0 for rows that are not filled yet.

  >>> losses.info_nce_queue(jnp.eye(4), jnp.eye(4), jnp.zeros((16, 4)), temperature=0.2).shape
  (4,)
  """
  pairs.check_temperature(temperature=temperature)
  q, k, queue, negatives = arguments.read(
    q=(q, "b d"), k=(k, "b d"), queue=(queue, "m d"), negatives=(negatives, "?b s d")
  )
  q, *rest = numerics.normalise(q), numerics.normalise(k), queue, negatives
  k, queue, negatives = jax.lax.stop_gradient(rest)
  total = pairs.memory(q, queue, negatives, queue_weights, temperature)
  return jax.nn.softplus(total - pairs.matches(q, k, temperature))


def mix_hard_negatives(
  rng: jax.Array, q: jax.Array, queue: jax.Array, n_hard: int, s: int, s2: int
) -> jax.Array:
  """Synthetic negatives of each query: [b d], queue [m d] -> [b s+s2 d], unit, without gradient.

  Formula: the n_hard rows n of the queue with the largest q·n; s times n(u·n_i + (1-u)·n_j) with
    u ~ U(0, 1); s2 times n(v·q + (1-v)·n_j) with v ~ U(0, 0.5); i, j drawn from the n_hard.
  Source: MoCHi, Kalantidis et al. 2020, 2010.01028.
  Tested: NumPy (same draws); span and unit length.
  v below 0.5 keeps a mixture nearer to its negative than to the query. i and j are drawn
  independently and may be equal. Give the result to `info_nce_queue` as `negatives`, after some
  10 epochs on the plain queue; it is never enqueued.

  >>> hard = losses.mix_hard_negatives(
  ...   jax.random.key(0), jnp.eye(4), jnp.eye(4), n_hard=2, s=3, s2=1)
  >>> hard.shape
  (4, 4, 4)
  """
  q, queue = arguments.read(q=(q, "b d"), queue=(queue, "m d"))
  if not 1 <= n_hard <= len(queue):
    raise ValueError(f"n_hard must be between 1 and {len(queue)} (rows of queue), not {n_hard}")
  if s < 0 or s2 < 0:
    raise ValueError(f"s and s2 must not be negative: {s}, {s2}")
  q, queue = jax.lax.stop_gradient((numerics.normalise(q), numerics.normalise(queue)))
  _, hardest = jax.lax.top_k(pairs.products(q, queue), n_hard)
  first, second, third, u, v = jax.random.split(rng, 5)

  def drawn(key: jax.Array, size: int) -> jax.Array:
    place = jax.random.randint(key, (len(q), size), 0, n_hard)
    return queue[jnp.take_along_axis(hardest, place, axis=1)]

  u = jax.random.uniform(u, (len(q), s, 1), q.dtype)
  v = jax.random.uniform(v, (len(q), s2, 1), q.dtype, maxval=0.5)
  mixed = u * drawn(first, s) + (1.0 - u) * drawn(second, s)
  harder = v * q[:, None] + (1.0 - v) * drawn(third, s2)
  return numerics.normalise(jnp.concatenate([mixed, harder], axis=1))


def mochi(
  q: jax.Array,
  k: jax.Array,
  queue: jax.Array,
  temperature: float | jax.Array,
  rngs: jax.Array,
  step: int | jax.Array,
  n_hard: int = 1024,
  s: int = 1024,
  s2: int = 128,
  start: int = 0,
) -> jax.Array:
  """InfoNCE against a queue and mixtures of its hardest rows: [b d], [b d], [m d] -> [b].

  Formula: info_nce_queue with the negatives of mix_hard_negatives, drawn for each example by its
    own key in `rngs` [b]; without them before step `start`.
  Source: MoCHi, Kalantidis et al. 2020, 2010.01028.
  Tested: NumPy (same draws); before the start it is info_nce_queue.
  With s and s2 the paper writes MoCHi(n_hard, s, s2); it starts after 10 to 15 epochs.

  >>> rngs = jax.random.split(jax.random.key(0), 4)
  >>> losses.mochi(jnp.eye(4), jnp.eye(4), -jnp.eye(4), 0.2, rngs, 0, n_hard=2, s=3, s2=1).shape
  (4,)
  """

  def own(rng: jax.Array, one: jax.Array) -> jax.Array:
    return mix_hard_negatives(rng, one[None], queue, n_hard, s, s2)[0]

  def mixed() -> jax.Array:
    return info_nce_queue(q, k, queue, temperature, jax.vmap(own)(rngs, q))

  def plain() -> jax.Array:
    return info_nce_queue(q, k, queue, temperature)

  return jax.lax.cond(jnp.asarray(step) >= start, mixed, plain) if start else mixed()


def nearest_neighbour_lookup(z: jax.Array, queue: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The nearest row of the queue: [b d], [m d] -> unit rows [b d] without gradient, places [b].

  Formula: argmax_j cosine(z_i, queue_j), in full float32 (bfloat16 has ties).
  Source: NNCLR, Dwibedi et al. 2021, 2104.14548.
  Tested: NumPy; lightly NNMemoryBankModule.
  Look up before the batch is enqueued, or each finds itself. A queue started with zeros gives zero
  vectors as neighbours.

  >>> neighbours, places = losses.nearest_neighbour_lookup(jnp.eye(4), jnp.eye(4)[::-1])
  >>> places.tolist()
  [3, 2, 1, 0]
  """
  z, queue = arguments.read(z=(z, "b d"), queue=(queue, "m d"))
  z, queue = jax.lax.stop_gradient((numerics.normalise(z), numerics.normalise(queue)))
  places = pairs.products(z, queue).argmax(-1)
  return queue[places], places


def nnclr(
  z1: jax.Array,
  z2: jax.Array,
  p1: jax.Array,
  p2: jax.Array,
  queue: jax.Array,
  temperature: float | jax.Array,
) -> jax.Array:
  """InfoNCE from nearest neighbours of projections z to predictions p: four [b d], [m d] -> [b].

  Formula: mean over both directions of -log(exp(n_i·p_i/T) / Σ_j exp(n_i·p_j/T)), n_i the row of
    the queue nearest to z1_i and p of view 2, and the reverse.
  Source: NNCLR, Dwibedi et al. 2021, 2104.14548.
  Tested: NumPy; with the batch as queue it is InfoNCE.
  Gradients flow into predictions alone, through all of the batch. Afterwards enqueue z1 (normalised
  projections, not predictions). lightly's recipe differs: NT-Xent between neighbours and
  predictions, with the negatives of both views.

  >>> losses.nnclr(*4 * [jnp.eye(4)], jnp.eye(4), temperature=0.1).shape
  (4,)
  """
  arguments.read(z1=(z1, "b d"), z2=(z2, "b d"), p1=(p1, "b d"), p2=(p2, "b d"))
  near1, _ = nearest_neighbour_lookup(z1, queue)
  near2, _ = nearest_neighbour_lookup(z2, queue)
  return 0.5 * (info_nce(near1, p2, temperature) + info_nce(near2, p1, temperature))


def enqueue(
  queue: jax.Array, keys: jax.Array, position: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """First in, first out: queue [m d], keys [b d], position [] -> new queue, new position.

  Formula: queue[(position + i) mod m] = keys[i]; position = (position + b) mod m.
  Source: MoCo, He et al. 2020, 1911.05722.
  Tested: NumPy; b that does not divide m.
  Keys are written as they are, in the queue's type, without gradient; the losses here normalise
  what they read. b is at most m, and need not divide it.

  >>> queue, position = losses.enqueue(jnp.zeros((4, 2)), jnp.ones((3, 2)), 2)
  >>> queue[:, 0].tolist(), int(position)
  ([1.0, 0.0, 1.0, 1.0], 1)
  """
  at = jnp.asarray(position) if isinstance(position, int) else position
  _, _, at = arguments.read(queue=(queue, "m d"), keys=(keys, "b d"), position=(at, ":int"))
  m, b = len(queue), len(keys)
  if b > m:
    raise ValueError(f"keys [b d] has more rows ({b}) than queue [m d] ({m})")
  places = (at + jnp.arange(b)) % m
  keys = jax.lax.stop_gradient(jnp.asarray(keys)).astype(queue.dtype)
  new = jax.lax.stop_gradient(jnp.asarray(queue)).at[places].set(keys, unique_indices=True)
  return new, (at + b) % m
