"""Contrastive losses: InfoNCE in general, its forms of two views, queues, given scores."""

import jax
import jax.numpy as jnp
import numpy as np

from loss_cases.case import Case
from ssljax import losses


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows(*names, d=6):
  """Arrays [b d] of those names."""
  return lambda rng, b: {name: rng.normal(size=(b, d)) for name in names}


def also(make, **more):
  """`make` and further arrays, each from (rng, b)."""
  return lambda rng, b: make(rng, b) | {name: f(rng, b) for name, f in more.items()}


def normal(*shape):
  return lambda rng, b: rng.normal(size=tuple(b if n == "b" else n for n in shape))


def numbers(*shape):
  return lambda rng, b: rng.uniform(0.2, 2.0, tuple(b if n == "b" else n for n in shape))


def kernel(a, b, temperature, gamma=None):
  """exp(cosine/T) or exp(-distance^gamma/T) of all pairs."""
  a, b = unit(a), unit(b)
  if gamma is None:
    return np.exp(a @ b.T / temperature)
  return np.exp(-(np.linalg.norm(a[:, None] - b[None], axis=-1) ** gamma) / temperature)


# InfoNCE in general: the probability of each key, then the targets' cross-entropy.


def info_nce(
  anchors,
  keys,
  temperature,
  targets,
  queue=None,
  negatives=None,
  weights=1.0,
  queue_weights=1.0,
  gamma=None,
):
  k = kernel(anchors, keys, temperature, gamma)
  total = (weights * k).sum(1)
  if queue is not None:
    total = total + (queue_weights * kernel(anchors, queue, temperature, gamma)).sum(1)
  if negatives is not None:
    own = [kernel(a[None], n, temperature, gamma)[0].sum() for a, n in zip(anchors, negatives)]
    total = total + np.array(own)
  return -(targets * np.log(k / total[:, None])).sum(1)


def one_hot(places, m):
  return (np.asarray(places)[:, None] == np.arange(m)).astype(float)


M = 5  # keys of the general form
GENERAL = also(rows("anchors"), keys=normal(M, 6))


def places(rng, b):
  return rng.integers(-1, M, b)


def own_masked(rng, b):
  return rng.random((b, M)) < 0.7


def simplex(rng, b):
  return rng.dirichlet(np.ones(M), b)


def shared(mask):
  return mask / np.maximum(mask.sum(1, keepdims=True), 1)


INFO_NCE = [
  Case(
    "info_nce",
    rows("anchors", "keys"),
    lambda anchors, keys: losses.info_nce(anchors, keys, 0.2),
    lambda anchors, keys: info_nce(anchors, keys, 0.2, np.eye(len(keys))),
  ),
  Case(
    "info_nce/indices, queue, own negatives",
    also(
      GENERAL,
      positives=places,
      queue=normal(7, 6),
      negatives=normal("b", 3, 6),
      queue_weights=numbers(7),
    ),
    lambda **x: losses.info_nce(**x, temperature=0.3),
    lambda positives, **x: info_nce(**x, temperature=0.3, targets=one_hot(positives, M)),
    whole=("keys", "queue", "queue_weights"),
  ),
  Case(
    "info_nce/indices, weights, Laplacian",
    also(GENERAL, positives=places, weights=numbers("b", M)),
    lambda **x: losses.info_nce(**x, temperature=0.5, gamma=1.0),
    lambda positives, **x: info_nce(**x, temperature=0.5, gamma=1.0, targets=one_hot(positives, M)),
    whole=("keys",),
  ),
  Case(
    "info_nce/bool matrix, queue",
    also(GENERAL, positives=own_masked, queue=normal(7, 6), queue_weights=numbers("b", 7)),
    lambda **x: losses.info_nce(**x, temperature=0.3),
    lambda positives, **x: info_nce(**x, temperature=0.3, targets=shared(positives)),
    whole=("keys", "queue"),
  ),
  Case(
    "info_nce/soft targets, bool weights, Gaussian, learnt temperature",
    also(
      GENERAL,
      positives=simplex,
      weights=own_masked,
      queue=normal(7, 6),
      temperature=lambda rng, b: np.array(0.4),
    ),
    lambda **x: losses.info_nce(**x, gamma=2.0),
    lambda positives, **x: info_nce(**x, gamma=2.0, targets=positives),
    whole=("keys", "queue", "temperature"),
  ),
]


# Two views: all 2b rows at once, each anchor in turn.


def anchors_of(z1, z2, weights=None):
  """Both views as [2b d], partners, and the weights of each anchor's negatives: [2b 2b]."""
  b = len(z1)
  z = np.concatenate([z1, z2])
  w = np.ones(b) if weights is None else np.asarray(weights, float)
  partner = np.concatenate([np.arange(b, 2 * b), np.arange(b)])
  w = np.concatenate([w, w])[None].repeat(2 * b, 0)
  own = np.arange(2 * b)
  w[own, own] = w[own, partner] = 0.0
  return z, partner, w


def by_example(values, weights=None):
  loss = values.reshape(2, -1).mean(0)
  return loss if weights is None else np.where(np.asarray(weights) > 0, loss, 0.0)


def nt_xent(z1, z2, temperature, weights=None, gamma=None):
  z, partner, w = anchors_of(z1, z2, weights)
  k = kernel(z, z, temperature, gamma)
  positive = k[np.arange(len(z)), partner]
  return by_example(-np.log(positive / (positive + (w * k).sum(1))), weights)


def decoupled(z1, z2, temperature, sigma=None, weights=None, at=None):
  z, partner, w = anchors_of(z1, z2, weights)
  k = kernel(z, z, temperature)
  cosine = (unit(z1) * unit(z2)).sum(1)
  v = np.ones(len(z1))
  if sigma is not None:
    there = np.ones(len(z1)) if weights is None else np.asarray(weights, float)
    frozen = (unit(at["z1"]) * unit(at["z2"])).sum(1) if at else cosine
    share = np.exp(frozen / sigma) / (there * np.exp(frozen / sigma)).sum()
    v = 2 - there.sum() * share
  return by_example(-np.tile(v * cosine / temperature, 2) + np.log((w * k).sum(1)), weights)


def debiased(z1, z2, temperature, tau_plus, beta=0.0, positives=None, weights=None):
  z, partner, w = anchors_of(z1, z2, weights)
  k = kernel(z, z, temperature)
  p = prior = k[np.arange(len(z)), partner]
  if positives is not None:
    more = [kernel(z[i : i + 1], positives[i % len(z1)], temperature)[0] for i in range(len(z))]
    prior = np.concatenate([p[:, None], np.array(more)], 1).mean(1)
  n = w.sum(1)
  hard = (w * k ** (1 + beta)).sum(1) / ((w * k**beta).sum(1) / n)
  g = np.maximum((hard - tau_plus * n * prior) / (1 - tau_plus), n * np.exp(-1 / temperature))
  return by_example(-np.log(p / (p + g)), weights)


def inbatch(q, k, temperature, symmetric=False, weights=None):
  s = kernel(q, k, temperature)
  w = np.ones(len(q)) if weights is None else np.asarray(weights, float)
  w = np.where(np.eye(len(q), dtype=bool), 1.0, w[None])
  loss = -np.log(np.diag(s) / (w * s).sum(1))
  if symmetric:
    loss = (loss - np.log(np.diag(s) / (w * s.T).sum(1))) / 2
  return loss if weights is None else np.where(np.asarray(weights) > 0, loss, 0.0)


def hardness(a, b, scale, alpha, weights=None, at=None):
  cosine = unit(a) @ unit(b).T
  frozen = unit(at["a"]) @ unit(at["b"]).T if at else cosine
  w = np.ones(len(a)) if weights is None else np.asarray(weights, float)
  e = np.exp(scale * cosine + np.where(np.eye(len(a), dtype=bool), 0.0, alpha * frozen))
  keep = np.where(np.eye(len(a), dtype=bool), 1.0, w[None])
  loss = -0.5 * np.log(np.diag(e) / (keep * e).sum(1))
  loss = loss - 0.5 * np.log(np.diag(e) / (keep * e.T).sum(1))
  return loss if weights is None else np.where(np.asarray(weights) > 0, loss, 0.0)


VIEWS = rows("z1", "z2")


def some(rng, b):
  return np.arange(b) % 4 != 1


def learnt(rng, b):
  return np.array(0.3)


def close_views(rng, b):
  z1 = rng.normal(size=(b, 6))
  return {"z1": z1, "z2": z1 + 0.3 * rng.normal(size=z1.shape)}


TWO_VIEWS = [
  Case(
    "nt_xent",
    VIEWS,
    lambda **x: losses.nt_xent(**x, temperature=0.2),
    lambda **x: nt_xent(**x, temperature=0.2),
  ),
  Case(
    "nt_xent/weights, learnt temperature",
    also(VIEWS, weights=numbers("b"), temperature=learnt),
    losses.nt_xent,
    nt_xent,
    whole=("temperature",),
  ),
  Case(
    "nt_xent/padding",
    also(VIEWS, weights=some),
    lambda **x: losses.nt_xent(**x, temperature=0.5),
    lambda **x: nt_xent(**x, temperature=0.5),
  ),
  Case(
    "info_nce_inbatch",
    rows("q", "k"),
    lambda **x: losses.info_nce_inbatch(**x, temperature=0.2),
    lambda **x: inbatch(**x, temperature=0.2),
    fixed=("k",),
  ),
  Case(
    "info_nce_inbatch/symmetric, weights",
    also(rows("q", "k"), weights=numbers("b")),
    lambda **x: losses.info_nce_inbatch(**x, temperature=0.2, symmetric=True),
    lambda **x: inbatch(**x, temperature=0.2, symmetric=True),
    fixed=("k",),
  ),
  Case(
    "decoupled_nce",
    VIEWS,
    lambda **x: losses.decoupled_nce(**x, temperature=0.2),
    lambda **x: decoupled(**x, temperature=0.2),
  ),
  Case(
    "decoupled_nce/weighted positives",
    also(VIEWS, weights=some),
    lambda **x: losses.decoupled_nce(**x, temperature=0.2, sigma=0.5),
    lambda **x: decoupled(**x, temperature=0.2, sigma=0.5),
    stopped=lambda at, **x: decoupled(**x, temperature=0.2, sigma=0.5, at=at),
  ),
  Case(
    "debiased_nce",
    close_views,
    lambda **x: losses.debiased_nce(**x, temperature=0.5, tau_plus=0.1),
    lambda **x: debiased(**x, temperature=0.5, tau_plus=0.1),
  ),
  Case(
    "debiased_nce/hard, views, weights",
    also(close_views, positives=normal("b", 2, 6), weights=numbers("b")),
    lambda **x: losses.debiased_nce(**x, temperature=0.5, tau_plus=0.1, beta=1.5),
    lambda **x: debiased(**x, temperature=0.5, tau_plus=0.1, beta=1.5),
  ),
  Case(
    "debiased_nce/at its lower bound",
    close_views,
    lambda **x: losses.debiased_nce(**x, temperature=0.3, tau_plus=0.7),
    lambda **x: debiased(**x, temperature=0.3, tau_plus=0.7),
  ),
  Case(
    "kernel_info_nce",
    VIEWS,
    lambda **x: losses.kernel_info_nce(**x, gamma=1.0, temperature=0.5),
    lambda **x: nt_xent(**x, gamma=1.0, temperature=0.5),
  ),
  Case(
    "kernel_info_nce/learnt gamma, weights",
    also(VIEWS, weights=numbers("b"), gamma=lambda rng, b: np.array(1.5)),
    lambda **x: losses.kernel_info_nce(**x, temperature=0.5),
    lambda **x: nt_xent(**x, temperature=0.5),
    whole=("gamma",),
  ),
  Case(
    "hardness_weighted_nce",
    also(rows("a", "b"), scale=lambda rng, b: np.array(5.0)),
    lambda **x: losses.hardness_weighted_nce(**x, alpha=1.0),
    lambda **x: hardness(**x, alpha=1.0),
    whole=("scale",),
    stopped=lambda at, **x: hardness(**x, alpha=1.0, at=at),
  ),
  Case(
    "hardness_weighted_nce/padding, no hardness",
    also(rows("a", "b"), weights=some),
    lambda **x: losses.hardness_weighted_nce(**x, scale=5.0, alpha=0.0),
    lambda **x: hardness(**x, scale=5.0, alpha=0.0),
  ),
]


# Queues.


def queue_nce(q, k, queue, temperature, negatives=None, queue_weights=1.0):
  positive = np.exp((unit(q) * unit(k)).sum(1) / temperature)
  rest = (queue_weights * kernel(q, queue, temperature)).sum(1)
  if negatives is not None:
    rest = rest + np.array([kernel(a[None], n, temperature).sum() for a, n in zip(q, negatives)])
  return -np.log(positive / (positive + rest))


def mix(q, queue, n_hard, s, s2, key=0):
  """MoCHi with the library's draws: which of five keys draws what is its only knowledge."""
  q, queue = unit(np.asarray(q, float)), unit(np.asarray(queue, float))
  keys = jax.random.split(jax.random.key(key), 5)
  float_type = jnp.result_type(float)
  i, j, l = (
    np.asarray(jax.random.randint(key, (len(q), n), 0, n_hard)) for key, n in zip(keys, (s, s, s2))
  )
  u = np.asarray(jax.random.uniform(keys[3], (len(q), s, 1), float_type), float)
  v = np.asarray(jax.random.uniform(keys[4], (len(q), s2, 1), float_type, maxval=0.5), float)
  found = []
  for a in range(len(q)):
    hardest = queue[np.argsort(-(queue @ q[a]))[:n_hard]]
    mixed = u[a] * hardest[i[a]] + (1 - u[a]) * hardest[j[a]]
    harder = v[a] * q[a] + (1 - v[a]) * hardest[l[a]]
    found.append(unit(np.concatenate([mixed, harder])))
  return np.stack(found)


def mochi(q, k, queue, index):
  hard = [mix(one[None], queue, 4, 5, 3, key)[0] for one, key in zip(q, index)]
  return queue_nce(q, k, queue, 0.2, negatives=hard)


def mochi_ours(q, k, queue, index, step=7):
  rngs = jax.vmap(jax.random.key)(index)
  return losses.mochi(q, k, queue, 0.2, rngs, step, n_hard=4, s=5, s2=3, start=7)


def lookup(z, queue):
  place = (unit(z) @ unit(queue).T).argmax(1)
  return unit(queue)[place], place


def nnclr(z1, z2, p1, p2, queue, temperature):
  one = inbatch(lookup(z1, queue)[0], p2, temperature)
  return 0.5 * (one + inbatch(lookup(z2, queue)[0], p1, temperature))


def enqueue(queue, keys, position):
  new = queue.copy()
  for i, key in enumerate(keys):
    new[(position + i) % len(queue)] = key
  return new, (position + len(keys)) % len(queue)


QUEUES = [
  Case(
    "info_nce_queue",
    also(rows("q", "k"), queue=normal(10, 6)),
    lambda **x: losses.info_nce_queue(**x, temperature=0.2),
    lambda **x: queue_nce(**x, temperature=0.2),
    whole=("queue",),
    fixed=("k", "queue"),
  ),
  Case(
    "info_nce_queue/own negatives, weights",
    also(
      rows("q", "k"),
      queue=normal(10, 6),
      negatives=normal("b", 3, 6),
      queue_weights=numbers("b", 10),
    ),
    lambda **x: losses.info_nce_queue(**x, temperature=0.2),
    lambda **x: queue_nce(**x, temperature=0.2),
    whole=("queue",),
    fixed=("k", "queue", "negatives"),
  ),
  Case(
    "mix_hard_negatives",
    also(rows("q"), queue=normal(12, 6)),
    lambda q, queue: losses.mix_hard_negatives(jax.random.key(0), q, queue, 4, 5, 3),
    lambda q, queue: mix(q, queue, 4, 5, 3),
    whole=("queue",),
    rows=False,  # draws belong to the places in the batch
    gradient=False,
  ),
  Case(
    "mochi",
    also(rows("q", "k"), queue=normal(12, 6), index=lambda rng, b: rng.permutation(b)),
    mochi_ours,
    mochi,
    whole=("queue",),
    fixed=("k", "queue"),
    # The mixtures hold q, without gradient.
    stopped=lambda at, q, k, queue, index: queue_nce(
      q, k, queue, 0.2, [mix(o[None], at["queue"], 4, 5, 3, i)[0] for o, i in zip(at["q"], index)]
    ),
  ),
  Case(
    "mochi/before its start",
    also(rows("q", "k"), queue=normal(12, 6), index=lambda rng, b: rng.permutation(b)),
    lambda **x: mochi_ours(**x, step=6),
    lambda q, k, queue, index: queue_nce(q, k, queue, 0.2),
    whole=("queue",),
    fixed=("k", "queue"),
  ),
  Case(
    "nearest_neighbour_lookup",
    also(rows("z"), queue=normal(12, 6)),
    losses.nearest_neighbour_lookup,
    lookup,
    whole=("queue",),
    gradient=False,
  ),
  Case(
    "nnclr",
    also(rows("z1", "z2", "p1", "p2"), queue=normal(12, 6)),
    lambda **x: losses.nnclr(**x, temperature=0.2),
    lambda **x: nnclr(**x, temperature=0.2),
    whole=("queue",),
    fixed=("z1", "z2", "queue"),
  ),
  Case(
    "enqueue",
    also(rows("keys"), queue=normal(20, 6), position=lambda rng, b: np.array(17)),
    losses.enqueue,
    enqueue,
    whole=("queue", "position"),
    rows=False,  # the order of the keys is the order in the queue
    low=None,  # a queue keeps its type
    gradient=False,
  ),
]


# Given scores.


def circle(positives, negatives, gamma, positive_mask=True, negative_mask=True):
  near = (np.exp(-gamma * positives) * positive_mask).sum(1)
  far = (np.exp(gamma * negatives) * negative_mask).sum(1)
  return np.log(1 + near * far)


def multi_scale(source, target, image_id=None, clip=20.0, reg=0.05):
  b, places, d = target.shape
  image_id = np.arange(b) if image_id is None else image_id
  raw = np.einsum("id,jld->ijl", source, target) / np.sqrt(d)
  e = np.exp(clip * np.tanh(raw / clip))
  nce = np.zeros(b)
  for i in range(b):
    negatives = e[i, image_id != image_id[i]].sum()
    nce[i] = -np.log(e[i, i] / (e[i, i] + negatives)).mean()
  return nce, reg * (raw**2).mean((1, 2))


SCORES = [
  Case(
    "circle_contrast",
    also(rows("positives", d=3), negatives=normal("b", 7)),
    lambda **x: losses.circle_contrast(**x, gamma=2.0),
    lambda **x: circle(**x, gamma=2.0),
  ),
  Case(
    "circle_contrast/masks, learnt gamma",
    also(
      rows("positives", d=3),
      negatives=normal("b", 7),
      gamma=lambda rng, b: np.array(1.5),
      positive_mask=lambda rng, b: rng.random((b, 3)) < 0.5,
      negative_mask=lambda rng, b: rng.random((b, 7)) < 0.5,
    ),
    losses.circle_contrast,
    circle,
    whole=("gamma",),
  ),
  Case(
    "soft_clip",
    lambda rng, b: {"s": 30 * rng.normal(size=(b, 2, 3))},
    lambda s: losses.soft_clip(s, 20.0),
    lambda s: 20.0 * np.tanh(s / 20.0),
  ),
  Case(
    "multi_scale_nce",
    also(rows("source"), target=normal("b", 4, 6)),
    losses.multi_scale_nce,
    multi_scale,
  ),
  Case(
    "multi_scale_nce/ids",
    also(
      rows("source"),
      target=normal("b", 4, 6),
      image_id=lambda rng, b: rng.integers(0, b // 2, b),
    ),
    lambda **x: losses.multi_scale_nce(**x, clip=1.0, reg=0.04),
    lambda **x: multi_scale(**x, clip=1.0, reg=0.04),
  ),
]

CASES = INFO_NCE + TWO_VIEWS + QUEUES + SCORES
