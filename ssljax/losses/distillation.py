"""A teacher's distributions over prototypes as targets: DINO, iBOT, MSN."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ssljax.losses import arguments, assignment, numerics
from ssljax.losses.assignment import read_views, read_weights, scaled

__all__ = ("dino_loss", "ibot_loss", "msn_loss", "pmsn_loss", "update_center")


def _targets(teacher, center, temperature, n_iters, weights=None):
  """Distributions of [… k]: centred and sharpened, or balanced over all leading axes."""
  teacher = jax.lax.stop_gradient(teacher)
  if center is None:
    return assignment.sinkhorn_knopp(teacher, temperature, n_iters, weights=weights)
  return jax.nn.softmax(scaled(teacher - jax.lax.stop_gradient(center), temperature))


def dino_loss(
  student: Sequence[jax.Array],
  teacher: Sequence[jax.Array],
  center: jax.Array | None,
  student_temperature: float | jax.Array = 0.1,
  teacher_temperature: float | jax.Array = 0.04,
  n_iters: int = 3,
) -> jax.Array:
  """Views' logits matched to a teacher's of the other views: v × [b k], u × [b k], [k] -> [b].

  Formula: 1/(u(v-1)) Σ_i Σ_{j≠i} -q_i · log softmax(s_j/T_s), with q = softmax((t - center)/T_t),
  or, without a centre, q of Sinkhorn with eps = T_t over all u views together.
  Source: DINO, Caron et al. 2021, 2104.14294; Sinkhorn: DINOv2, Oquab et al. 2023, 2304.07193.
  Tested: NumPy; lightly DINOLoss with its centre over several steps.

  Views are paired by their place in the lists: the teacher's u views come first in the student's
  list. center=None balances by Sinkhorn instead; zeros are no balancing at all. The centre moves
  after the loss of the same step (`update_center`). DINOv2's losses of global and local views share
  this denominator. At the start the loss is log k.

  >>> views = [jnp.eye(4), jnp.ones((4, 4)), jnp.zeros((4, 4))]
  >>> losses.dino_loss(views, views[:2], center=jnp.zeros(4)).shape
  (4,)
  """
  student, teacher = read_views("student", student), read_views("teacher", teacher)
  first = {"student[0]": (student[0], "b k"), "teacher[0]": (teacher[0], "b k")}
  center = arguments.read(**first, center=(center, "?k"))[-1]
  arguments.positive(
    student_temperature=student_temperature, teacher_temperature=teacher_temperature
  )
  if len(teacher) > len(student) or len(student) < 2:
    raise ValueError(f"student must hold two views or more, the teacher's first: {len(student)}")
  targets = _targets(jnp.stack(teacher, 1), center, teacher_temperature, n_iters)
  codes = [targets[:, i] for i in range(len(teacher))]
  return assignment.swapped_ce(student, codes, student_temperature)


def ibot_loss(
  student: jax.Array,
  teacher: jax.Array,
  center: jax.Array | None,
  student_temperature: float | jax.Array = 0.1,
  teacher_temperature: float | jax.Array = 0.04,
  weights: jax.Array | None = None,
  n_iters: int = 3,
) -> jax.Array:
  """Masked places matched to the teacher's of the same view: [b m k], [b m k], [k] -> [b].

  Formula: Σ_m w_m · (-q_m · log softmax(s_m/T_s)) / Σ_m w_m, with q as in DINO.
  Source: iBOT, Zhou et al. 2021, 2111.07832; DINOv2, Oquab et al. 2023, 2304.07193.
  Tested: NumPy; lightly IBOTPatchLoss with its centre over several steps.

  `weights` [b m], numbers or bool, is 0 where a place is padding or not masked: such places neither
  count in the loss nor in Sinkhorn (center=None). An example without masked places gives 0 and
  still counts in the mean over the batch, as in the original. The centre: iBOT's is the mean over
  all places, DINOv2's over the masked ones (`update_center`, with and without weights).

  >>> z, hidden = jnp.ones((4, 9, 2)), jnp.arange(9) < 3
  >>> losses.ibot_loss(z, z, jnp.zeros(2), weights=jnp.tile(hidden, (4, 1))).shape
  (4,)
  """
  student, teacher, center = arguments.read(
    student=(student, "b m k"), teacher=(teacher, "b m k"), center=(center, "?k")
  )
  arguments.positive(
    student_temperature=student_temperature, teacher_temperature=teacher_temperature
  )
  weights = read_weights(weights, student, "b m")
  targets = _targets(teacher, center, teacher_temperature, n_iters, weights)
  return assignment.soft_ce(student, targets, student_temperature, weights)


def update_center(
  center: jax.Array,
  teacher: jax.Array,
  momentum: float | jax.Array = 0.9,
  weights: jax.Array | None = None,
) -> jax.Array:
  """The centre after this batch: [k], [b k] or [b … k] -> [k], no gradient.

  Formula: momentum·center + (1 - momentum)·mean of the teacher's logits over all leading axes.
  Source: DINO, Caron et al. 2021, 2104.14294.
  Tested: NumPy; lightly DINOLoss and IBOTPatchLoss over several steps.

  Starts at zeros. `weights` has the leading shape; where nothing counts the centre stays.

  >>> losses.update_center(jnp.zeros(2), jnp.ones((4, 2)), momentum=0.75).tolist()
  [0.25, 0.25]
  """
  center, teacher = arguments.read(center=(center, "k"), teacher=(teacher, "* k"))
  weights = read_weights(weights, teacher, " ".join("bmnopq"[: teacher.ndim - 1]))
  axes = tuple(range(teacher.ndim - 1))
  if weights is None:
    mean, some = teacher.mean(axes), jnp.array(True)
  else:
    each = jnp.broadcast_to(weights[..., None], teacher.shape)
    mean, some = numerics.mean(teacher, each, axes), (weights != 0).any()
  moved = momentum * center + (1 - momentum) * mean
  return jax.lax.stop_gradient(jnp.where(some, moved, center))


def _power_law(k, exponent, dtype):
  prior = jnp.arange(1, k + 1, dtype=dtype) ** -exponent
  return prior / prior.sum()


def msn_loss(
  anchors: Sequence[jax.Array],
  targets: jax.Array,
  prototypes: jax.Array,
  temperature: float | jax.Array = 0.1,
  sharpening: float | jax.Array = 0.25,
  n_iters: int = 3,
  prior_weight: float | jax.Array = 1.0,
  prior: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Masked views matched to prototypes of the whole view: v × [b d], [b d], [k d] -> scalar.

  Formula: mean_{v,b} -q·log p + prior_weight·KL(p̄ ‖ prior), p = softmax(cos(z, prototypes)/T),
  q = Sinkhorn of the target's p^(1/sharpening), p̄ = mean_{v,b} p; uniform prior: log k - H(p̄).
  Source: MSN, Assran et al. 2022, 2204.07141.
  Tested: NumPy; lightly MSNLoss.

  All three are normalised inside. n_iters=0 leaves the balancing of the targets out. Nothing flows
  into `targets`, and into the prototypes only through the anchors and p̄. `weights` [b] counts
  examples; where none counts the loss is 0.

  >>> losses.msn_loss([jnp.eye(4)], jnp.eye(4), jnp.eye(4)).shape
  ()
  """
  anchors = read_views("anchors", anchors, "b d")
  first, targets, prototypes, prior = arguments.read(
    **{"anchors[0]": (anchors[0], "b d")}, targets=(targets, "b d"),
    prototypes=(prototypes, "k d"), prior=(prior, "?k"),
  )  # fmt: skip
  arguments.positive(temperature=temperature, sharpening=sharpening)
  weights = jnp.ones(first.shape[0], bool) if weights is None else weights
  weights = read_weights(weights, first, "b")
  prototypes = numerics.normalise(prototypes)
  sharp = scaled(numerics.normalise(targets) @ prototypes.T, temperature * sharpening)
  # Of probabilities: where rows start matters with few rounds.
  sharp = jax.lax.stop_gradient(jax.nn.log_softmax(sharp))
  q = assignment.sinkhorn_knopp(sharp, 1.0, n_iters, weights=weights)
  logits = [scaled(numerics.normalise(z) @ prototypes.T, temperature) for z in anchors]
  errors = jnp.stack([numerics.cross_entropy(x, q) for x in logits], 1).mean(1)
  gap = _prior_kl(logits, prior, weights)
  return numerics.mean(errors, weights) + prior_weight * gap


def _prior_kl(logits, prior, weights):
  """KL of the mean prediction from the prior (None: uniform), from logits v × [b k] in logs."""
  k, some = logits[0].shape[-1], (weights > 0)[:, None]
  count = weights.sum() * len(logits)
  log_weights = jnp.log(jnp.where(weights > 0, weights, 1.0))[:, None]
  log_p = jnp.stack([jax.nn.log_softmax(x) + log_weights for x in logits])
  log_mean = numerics.logsumexp(log_p, jnp.broadcast_to(some, log_p.shape), axis=1)
  log_mean = jax.nn.logsumexp(log_mean, axis=0) - jnp.log(jnp.where(count > 0, count, 1.0))
  if prior is None:
    log_prior = jnp.full(k, 1 / k, log_p.dtype)
  else:
    log_prior = jax.lax.stop_gradient(prior / prior.sum())
  log_prior = jnp.log(jnp.maximum(log_prior, jnp.finfo(log_p.dtype).tiny))
  return (jnp.exp(log_mean) * (log_mean - log_prior)).sum()


def pmsn_loss(
  anchors: Sequence[jax.Array],
  targets: jax.Array,
  prototypes: jax.Array,
  temperature: float | jax.Array = 0.1,
  sharpening: float | jax.Array = 0.25,
  exponent: float = 0.25,
  n_iters: int = 0,
  prior_weight: float | jax.Array = 1.0,
  weights: jax.Array | None = None,
) -> jax.Array:
  """MSN with a power law as prior over prototypes: v × [b d], [b d], [k d] -> scalar.

  Formula: mean_{v,b} -q·log p + prior_weight·KL(p̄ ‖ π), π_i ∝ (i+1)^-exponent, p, q as in MSN.
  Source: PMSN, Assran et al. 2022, 2210.07277.
  Tested: NumPy; lightly PMSNLoss in its cross-entropy (its prior term is KL(π ‖ p̄)).

  Prototype 0 is meant to be the most frequent. Sinkhorn would force equal shares against the prior:
  it is off (n_iters=0). exponent=0 is MSN without Sinkhorn. Other priors: msn_loss(prior=...).

  >>> losses.pmsn_loss([jnp.eye(4)], jnp.eye(4), jnp.eye(4)).shape
  ()
  """
  (prototypes,) = arguments.read(prototypes=(prototypes, "k d"))
  prior = _power_law(prototypes.shape[0], exponent, prototypes.dtype)
  return msn_loss(
    anchors, targets, prototypes, temperature, sharpening, n_iters, prior_weight, prior, weights
  )
