"""Assignments of examples to prototypes, and losses on them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, numerics

__all__ = (
  "multi_sinkhorn",
  "partial_ot_plan",
  "positionwise_sinkhorn",
  "sinkhorn_knopp",
  "soft_ce",
  "swapped_ce",
)

LOW = -1e30  # the lowest log used here: sums and products of a few of them stay finite in float32


def scaled(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
  """(logits - their maximum) / temperature, not below LOW: [… k] -> [… k]; softmax is unchanged."""
  top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  return jnp.maximum((logits - top) / temperature, LOW)


def read_views(name: str, views: Any, letters: str = "b k") -> tuple[jax.Array, ...]:
  """A list of arrays of one shape, checked and widened."""
  if not isinstance(views, (list, tuple)) or not views:
    raise TypeError(f"{name} must be a list of views, each an array [{letters}]")
  return arguments.read(**{f"{name}[{i}]": (x, letters) for i, x in enumerate(views)})


def read_weights(weights: Any, like: jax.Array, letters: str) -> jax.Array | None:
  """Weights (numbers or bool) of the leading axes of `like`, in its type."""
  if weights is None:
    return None
  if not hasattr(weights, "dtype") or not hasattr(weights, "shape"):
    raise TypeError(f"weights must be an array [{letters}], not {type(weights).__name__}")
  if weights.shape != like.shape[: weights.ndim] or weights.ndim != len(letters.split()):
    raise ValueError(f"weights must have shape [{letters}], not {weights.shape}: {like.shape}")
  return jnp.asarray(weights).astype(like.dtype)


def _balance(scores, eps, n_iters, marginal, weights):
  """Sinkhorn of [n k] in potentials: the scores are read twice a round and never written."""
  top = scores.max(-1)
  # Rows are shifted by their own maximum for precision; `rows` gives the shift back, because with
  # few rounds the result depends on where the rows start.
  rows = jnp.maximum((top - top.max()) / eps, LOW)
  scores, some = scaled(scores, eps), None
  log_weights, any_row = jnp.zeros_like(rows), True
  if weights is not None:
    some = jnp.broadcast_to((weights > 0)[:, None], scores.shape)
    log_weights, any_row = jnp.log(jnp.where(weights > 0, weights, 1.0)), (weights > 0).any()

  def one_round(_, state):
    rows, _ = state
    sums = numerics.logsumexp(scores + (rows + log_weights)[:, None], some, axis=0)
    columns = jnp.where(any_row, marginal - sums, 0.0)
    return -jax.nn.logsumexp(scores + columns, axis=1), columns

  start = rows, jnp.zeros_like(marginal)
  _, columns = jax.lax.fori_loop(0, n_iters, one_round, start, unroll=n_iters <= 4)
  return jax.nn.softmax(scores + columns)


def _log_marginal(marginal, k, dtype):
  if marginal is None:
    return jnp.zeros(k, dtype)
  return jnp.log(jnp.maximum(marginal / marginal.sum(), jnp.finfo(dtype).tiny)).astype(dtype)


def sinkhorn_knopp(
  scores: jax.Array,
  eps: float | jax.Array = 0.05,
  n_iters: int = 3,
  marginal: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Balanced soft assignment: [b k] or [b … k] -> the same shape, rows sum to 1, no gradient.

  Formula: Q = exp(scores/eps); n_iters times: each prototype's sum over all rows becomes its share
  (1/k, or `marginal`), then each row's sum becomes 1.
  Source: SwAV, Caron et al. 2020, 2006.09882; after Cuturi 2013, 1306.0895.
  Tested: NumPy; golden column masses; lightly (SwAV, MSN).

  All leading axes count as rows, so [b v k] balances the views of a batch together (DINOv2) and
  [b m k] all masked places; `weights`, of the leading shape, counts rows (0: padding, which gets a
  row of its own but no say). `marginal` [k] is the share wanted of each prototype, normalised here.
  Logarithms throughout: exp(1/0.05) leaves float16, exp(1/0.002) float32. Rows are exact,
  prototypes only nearly after 3 rounds. With n_iters=0 it is the softmax.

  >>> losses.sinkhorn_knopp(jnp.zeros((4, 2))).tolist()[0]
  [0.5, 0.5]
  """
  scores, marginal = arguments.read(scores=(scores, "* k"), marginal=(marginal, "?k"))
  if scores.ndim < 2:
    raise ValueError(f"scores must have shape [b k], not {scores.shape}")
  arguments.positive(eps=eps)
  weights = read_weights(weights, scores, " ".join("bmnopq"[: scores.ndim - 1]))
  k = scores.shape[-1]
  flat = jax.lax.stop_gradient(scores).reshape(-1, k)
  flat_weights = None if weights is None else weights.reshape(-1)
  q = _balance(flat, eps, n_iters, _log_marginal(marginal, k, flat.dtype), flat_weights)
  return jax.lax.stop_gradient(q.reshape(scores.shape))


def positionwise_sinkhorn(
  scores: jax.Array,
  eps: float | jax.Array = 0.06,
  n_iters: int = 3,
  marginal: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Sinkhorn over the batch at each place by itself: [b n k] -> [b n k], no gradient.

  Formula: sinkhorn_knopp(scores[:, i], eps, n_iters) for every place i.
  Source: CAPI, Darcet et al. 2025, 2502.08769.
  Tested: NumPy; lightly CAPILoss.

  Balancing all tokens together lets prototypes code the position; by place they cannot. `weights`
  [b n]. The original adds 1e-8 to each sum; here nothing is added.

  >>> losses.positionwise_sinkhorn(jnp.zeros((4, 9, 2))).shape
  (4, 9, 2)
  """
  scores, marginal = arguments.read(scores=(scores, "b n k"), marginal=(marginal, "?k"))
  arguments.positive(eps=eps)
  weights = read_weights(weights, scores, "b n")
  share = _log_marginal(marginal, scores.shape[-1], scores.dtype)
  place = lambda s, w: _balance(s, eps, n_iters, share, w)  # noqa: E731
  by_place = jax.vmap(place, (1, None if weights is None else 1), 1)
  return jax.lax.stop_gradient(by_place(jax.lax.stop_gradient(scores), weights))


def multi_sinkhorn(
  scores: jax.Array,
  eps: float | jax.Array = 0.002,
  n_iters: int = 3,
  properties: int = 32,
  floor: float = 1e-5,
) -> jax.Array:
  """Targets with several prototypes a row: [b k] -> [b k] between 0 and 1, no gradient.

  Formula: A[m] = exp(c_m·scores/eps) / Σ for k slices m, c_m = 1 for the last `properties` and 0.25
  before; n_iters times: sums over b become b/k, sums over m become 1, sums over k become 1; each
  sum plus `floor`; the sum of the last slices, rows scaled from their minimum and maximum to 0, 1.
  Source: Multi-SK, Sirnam et al. 2023, 2308.13077.
  Tested: NumPy.

  Slices of one c_m are equal at every round: two are computed, with their counts, so [b 2 k] of
  memory. The original computes exp(1/0.002) and replaces infinities by hand; here in logarithms.
  A row without differences gives 0.

  >>> losses.multi_sinkhorn(jnp.eye(4), properties=2).tolist()[0]
  [1.0, 0.0, 0.0, 0.0]
  """
  (scores,) = arguments.read(scores=(scores, "b k"))
  arguments.positive(eps=eps)
  b, k = scores.shape
  if not 0 < properties < k:
    raise ValueError(f"properties must be 1 … k - 1 = {k - 1}, not {properties}")
  scores = jax.lax.stop_gradient(scores)
  counts = jnp.log(jnp.array([properties, k - properties], scores.dtype))[:, None, None]
  a = jnp.array([1.0, 0.25], scores.dtype)[:, None, None] * scores
  a = jnp.maximum((a - a.max()) / eps, LOW)
  a -= jax.nn.logsumexp(a + counts)
  floors = math.log(floor) if floor > 0 else -math.inf
  plus = lambda x: jnp.logaddexp(x, floors)  # noqa: E731
  for _ in range(n_iters):
    a += math.log(b / k) - plus(jax.nn.logsumexp(a, axis=1, keepdims=True))
    a -= plus(jax.nn.logsumexp(a + counts, axis=0, keepdims=True))
    a -= plus(jax.nn.logsumexp(a, axis=2, keepdims=True))
  last = jax.nn.softmax(a[0])
  low = last.min(1, keepdims=True)
  spread = last.max(1, keepdims=True) - low
  return jnp.where(spread > 0, (last - low) / jnp.where(spread > 0, spread, 1.0), 0.0)


def partial_ot_plan(
  logits: jax.Array,
  mass: float | jax.Array,
  gamma: float | jax.Array = 1.0,
  eps: float | jax.Array = 0.1,
  tolerance: float = 1e-6,
  max_iters: int = 1000,
) -> jax.Array:
  """Partial transport of examples to clusters: [b k] -> [b k], rows sum to at most 1, no gradient.

  Formula: b · argmin_Q <Q, -log softmax(logits)> + gamma·KL(Qᵀ1, mass/k) - eps·H(Q), Q1 <= 1/b,
  ΣQ = mass: unbalanced Sinkhorn with one more, free column of mass 1 - mass, which is dropped.
  Source: P²OT, Zhang et al. 2024, 2401.09266.
  Tested: NumPy; golden masses.

  `mass` (0 … 1, may be traced) rises in training; rows of doubtful examples are nearly 0, so use
  the plan as targets of `soft_ce`, which counts a row by its mass. Ends when no log scaling of a
  column moves by more than `tolerance`, or after max_iters (the original looks at the norm of the
  scalings, needs float64 and keeps them as the next batch's start).

  >>> plan = losses.partial_ot_plan(10 * jnp.eye(4), 0.5)
  >>> round(float(plan.sum() / 4), 3)
  0.5
  """
  (logits,) = arguments.read(logits=(logits, "b k"))
  arguments.positive(mass=mass, gamma=gamma, eps=eps)
  if isinstance(mass, (int, float)) and mass > 1:
    raise ValueError(f"mass must be at most 1, not {mass}")
  b, k = logits.shape
  log_p = jax.nn.log_softmax(scaled(jax.lax.stop_gradient(logits), 1.0)) / eps
  kernel = jnp.pad(jnp.maximum(log_p, LOW), ((0, 0), (0, 1)))
  tiny = jnp.finfo(kernel.dtype).tiny
  share = jnp.full(k + 1, jnp.asarray(mass, kernel.dtype) / k).at[k].set(1 - mass)
  share = jnp.log(jnp.maximum(share, tiny))
  exponent = jnp.full(k + 1, gamma / (gamma + eps), kernel.dtype).at[k].set(1.0)

  def go_on(state):
    i, _, _, moved = state
    return (i < max_iters) & (moved > tolerance)

  def step(state):
    i, _, columns, _ = state
    rows = -math.log(b) - jax.nn.logsumexp(kernel + columns, axis=1)
    new = exponent * (share - jax.nn.logsumexp(kernel + rows[:, None], axis=0))
    return i + 1, rows, new, jnp.abs(new - columns).max()

  start = jnp.full(k + 1, -math.log(k + 1), kernel.dtype)
  infinity = jnp.asarray(jnp.inf, kernel.dtype)
  state = 0, jnp.zeros(b, kernel.dtype), start, infinity
  _, rows, columns, _ = jax.lax.while_loop(go_on, step, state)
  plan = b * jnp.exp(rows[:, None] + kernel + columns)
  return jax.lax.stop_gradient(plan[:, :k])


def soft_ce(
  logits: jax.Array,
  targets: jax.Array,
  temperature: float | jax.Array = 1.0,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Cross-entropy to given distributions: [b … k], [b … k] -> [b]; a mean over the places.

  Formula: -Σ_k targets · log softmax(logits/temperature), then the (weighted) mean over `…`.
  Source: the student's side of CAPI, Darcet et al. 2025, 2502.08769; of DINO, 2104.14294.
  Tested: NumPy; lightly CAPILoss (with positionwise_sinkhorn).

  `weights` has the shape [b …] (numbers or bool); an example without weight gives 0. The targets
  get no gradient; their rows need not sum to 1 (a partial plan counts a row by its mass).

  >>> losses.soft_ce(jnp.zeros((4, 9, 2)), jnp.full((4, 9, 2), 0.5)).shape
  (4,)
  """
  logits, targets = arguments.read(logits=(logits, "* k"), targets=(targets, "* k"))
  if logits.shape != targets.shape or logits.ndim < 2:
    raise ValueError(
      f"targets must have the shape [b … k] of logits: {targets.shape}, {logits.shape}"
    )
  arguments.positive(temperature=temperature)
  weights = read_weights(weights, logits, " ".join("bmnopq"[: logits.ndim - 1]))
  losses = numerics.cross_entropy(scaled(logits, temperature), jax.lax.stop_gradient(targets))
  return numerics.mean(losses, weights, tuple(range(1, losses.ndim)))


def swapped_ce(
  logits: Sequence[jax.Array],
  codes: Sequence[jax.Array],
  temperature: float | jax.Array = 0.1,
  crops_for_assign: Sequence[int] | None = None,
) -> jax.Array:
  """Codes of some views predicted from all other views: v × [b k], u × [b k] -> [b].

  Formula: mean over codes i of 1/(v-1) Σ_{j ≠ view of i} -codes_i · log softmax(logits_j/T).
  Source: SwAV, Caron et al. 2020, 2006.09882.
  Tested: NumPy; golden value; lightly SwaVLoss (two and more views, queue).

  crops_for_assign: which views the codes belong to; by default the first u. Codes (from
  `sinkhorn_knopp`, or k-means as in DeepCluster-v2) get no gradient. A queue goes into the codes:
  balance its scores together with the view's, keep the view's rows.

  >>> scores = [jnp.eye(4), jnp.zeros((4, 4))]
  >>> losses.swapped_ce(scores, [losses.sinkhorn_knopp(s) for s in scores]).shape
  (4,)
  """
  logits = read_views("logits", logits)
  codes = read_views("codes", codes)
  arguments.read(**{"logits[0]": (logits[0], "b k"), "codes[0]": (codes[0], "b k")})
  arguments.positive(temperature=temperature)
  where = tuple(range(len(codes)) if crops_for_assign is None else crops_for_assign)
  if len(logits) < 2:
    raise ValueError("logits must hold at least two views: a view does not predict its own code")
  if len(where) != len(codes) or not all(0 <= i < len(logits) for i in where):
    raise ValueError(
      f"crops_for_assign {where} does not name a view for each of {len(codes)} codes"
    )
  total = jnp.zeros(logits[0].shape[0], logits[0].dtype)
  for j, view in enumerate(logits):
    # Linear in the codes: one cross-entropy a view, to the sum of the other views' codes.
    others = [code for i, code in zip(where, codes) if i != j]
    if others:
      target = jax.lax.stop_gradient(sum(others[1:], others[0]))
      total += numerics.cross_entropy(scaled(view, temperature), target)
  return total / (len(codes) * (len(logits) - 1))
