"""Deep clustering by distances: centroids, their sharpened targets, and points to be matched.

`b` examples, `d` values, `k` centroids.
"""

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics
from ssljax.losses.pairs import kind

__all__ = (
  "clam_loss",
  "dec_kl",
  "dec_target",
  "depict_target",
  "noise_target_assignment",
  "noise_target_loss",
  "student_t_assign",
  "tell",
)


def _squares(z: jax.Array, centroids: jax.Array) -> jax.Array:
  """‖z_i - c_j‖²: [b d], [k d] -> [b k]; as differences, exact for near points."""
  return jnp.square(z[:, None] - centroids[None]).sum(-1)


def _log_student_t(z: jax.Array, centroids: jax.Array, alpha: float) -> jax.Array:
  kernel = -(alpha + 1) / 2 * jnp.log1p(_squares(z, centroids) / alpha)
  return jax.nn.log_softmax(kernel)


def student_t_assign(z: jax.Array, centroids: jax.Array, alpha: float = 1.0) -> jax.Array:
  """Soft assignment by a Student-t kernel: [b d], [k d] -> [b k].

  Formula: q_ij ∝ (1 + ‖z_i - c_j‖²/alpha)^(-(alpha + 1)/2), rows sum to 1.
  Source: DEC, Xie et al. 2016, 1511.06335.
  Tested: NumPy.
  Scale z: far from all centroids the assignment is flat.

  >>> losses.student_t_assign(jnp.zeros((1, 2)), jnp.eye(2)).tolist()
  [[0.5, 0.5]]
  """
  z, centroids = arguments.read(z=(z, "b d"), centroids=(centroids, "k d"))
  arguments.positive(alpha=alpha)
  return jnp.exp(_log_student_t(z, centroids, alpha))


def dec_target(q: jax.Array) -> jax.Array:
  """Sharpened assignments: [n k] -> [n k], rows sum to 1.

  Formula: p_ij ∝ q_ij² / Σ_i q_ij.
  Source: DEC, Xie et al. 2016, 1511.06335.
  Tested: NumPy; a hard assignment is its own target.
  q are the assignments of the whole data set, and p stays for some steps (140 for MNIST):
  frequencies of one batch are another loss. No gradient.

  >>> losses.dec_target(jnp.eye(3)).tolist()
  [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
  """
  (q,) = arguments.read(q=(q, "n k"))
  # q·(q/frequency), not q²/frequency: the square of a small q is 0 in float32.
  return _rows(q * _over(q, q.sum(0)))


def _over(a: jax.Array, b: jax.Array) -> jax.Array:
  """a / b, and 0 where b is 0."""
  return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def _rows(p: jax.Array) -> jax.Array:
  return jax.lax.stop_gradient(_over(p, p.sum(-1, keepdims=True)))


def dec_kl(
  z: jax.Array, centroids: jax.Array, alpha: float = 1.0, target: jax.Array | None = None
) -> jax.Array:
  """KL of assignments to their sharpened target: [b d], [k d], target [b k] -> [b].

  Formula: KL(p_i ‖ q_i) = Σ_j p_ij ln(p_ij / q_ij), q = student_t_assign(z, centroids, alpha).
  Source: DEC, Xie et al. 2016, 1511.06335.
  Tested: NumPy; torch kl_div; golden value; 0 at the target.
  target: rows of `dec_target` of the whole data set; of this batch's own q by default. No gradient
  flows into it, in either case.

  >>> losses.dec_kl(jnp.eye(4), jnp.eye(4)[:2]).shape
  (4,)
  """
  z, centroids, target = arguments.read(
    z=(z, "b d"), centroids=(centroids, "k d"), target=(target, "?b k")
  )
  arguments.positive(alpha=alpha)
  log_q = _log_student_t(z, centroids, alpha)
  p = dec_target(jnp.exp(log_q)) if target is None else jax.lax.stop_gradient(target)
  return (jax.scipy.special.xlogy(p, p) - p * log_q).sum(-1)


def depict_target(p: jax.Array, kind: str = "paper") -> jax.Array:
  """Balanced targets of DEPICT: assignments [n k] -> [n k], rows sum to 1.

  Formula: "paper": t_ij ∝ p_ij / √(Σ_i p_ij); "code": t_ij ∝ p_ij² / Σ_i p_ij, as in DEC.
  Source: DEPICT, Ghasedi Dizaji et al. 2017, 1704.06327.
  Tested: NumPy; golden values of both forms; "paper" is p where the clusters are of equal size.
  The paper and its released code differ. p is of the clean pass over the whole data set, the loss
  is the cross-entropy of the noisy pass (dropout 0.1) with it. No gradient.

  >>> losses.depict_target(jnp.eye(2), kind="paper").tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  (p,) = arguments.read(p=(p, "n k"))
  if kind not in ("paper", "code"):
    raise ValueError(f'kind must be "paper" or "code", not {kind!r}')
  return dec_target(p) if kind == "code" else _rows(_over(p, jnp.sqrt(p.sum(0))))


def tell(z: jax.Array, w: jax.Array, alpha: float = 0.001) -> jax.Array:
  """k-means as a layer: [b d], rows of weights [k d] -> [b].

  Formula: mean over the k entries of 2·alpha - δ_ij w_j·z_i, z unit rows, δ one-hot at the largest.
  Source: TELL, Peng et al. 2022, 1808.07292.
  Tested: NumPy; (alpha·‖z - c‖² + 2·alpha·(k - 1)) / k for unit centroids c.
  The rows of w are 2·alpha times unit centroids; the original normalises them after every step and
  multiplies the loss by 0.01/alpha. It lets the gradient into z on odd epochs and into w on even
  ones (there with rows normalised, times 0.2·alpha): stop_gradient by the caller.

  >>> losses.tell(jnp.eye(2), 2 * jnp.eye(2), alpha=1.0).tolist()
  [1.0, 1.0]
  """
  z, w = arguments.read(z=(z, "b d"), w=(w, "k d"))
  arguments.positive(alpha=alpha)
  # Of the largest product only: its place gets no gradient.
  return 2 * alpha - (numerics.normalise(z) @ w.T).max(-1) / len(w)


def clam_loss(
  x: jax.Array, prototypes: jax.Array, mask: jax.Array, beta: float, alpha: float, steps: int
) -> tuple[jax.Array, jax.Array]:
  """Hidden values recalled by a memory: [b d], [k d], mask [b d] -> [b], recalled [b d].

  Formula: v ← v + alpha · mask · Σ_k softmax_k(-beta/2 ‖c_k - v‖²)(c_k - v), `steps` times from
    v = x·(1 - mask); loss = mean over d of mask · (v - x)².
  Source: ClAM, Saha et al. 2023, 2306.03209.
  Tested: NumPy; one prototype: v approaches it by alpha each step.
  mask (numbers or bool) is 1 at hidden values. They start at 0, the mean of standardised data, and
  only they move. As in the released code the mean is over all d values, so that an example with few
  hidden ones counts less; a mask that hides nothing gives 0. beta 1.1–2.4, alpha 0.1, one value in
  five hidden, steps about 1/alpha. Gradients flow through all steps.

  >>> loss, recalled = losses.clam_loss(
  ...   jnp.ones((2, 3)), jnp.ones((1, 3)), jnp.eye(2, 3) > 0, beta=2.0, alpha=0.5, steps=1)
  >>> recalled[0].tolist()
  [0.5, 1.0, 1.0]
  """
  x, prototypes, mask = arguments.read(
    x=(x, "b d"), prototypes=(prototypes, "k d"), mask=(mask, f"b d:{kind(mask)}")
  )
  arguments.positive(beta=beta, alpha=alpha)
  mask = mask.astype(x.dtype)

  def recall(v, _):
    near = jax.nn.softmax(-beta / 2 * _squares(v, prototypes))
    # The weights sum to 1: Σ_k near (c_k - v) = near·c - v.
    return v + alpha * mask * (near @ prototypes - v), None

  v, _ = jax.lax.scan(recall, x * (1 - mask), None, length=steps)
  return (mask * jnp.square(v - x)).mean(-1), v


def noise_target_assignment(f: jax.Array, targets: jax.Array) -> jax.Array:
  """Which fixed point each example shall have: [b d], [b d] -> [b], a permutation.

  Formula: argmin over permutations π of Σ_i ‖f_i - y_π(i)‖², unit rows.
  Source: NAT, Bojanowski & Joulin 2017, 1704.05310.
  Tested: SciPy linear_sum_assignment; the cost is not above that of the identity.
  The exact optimum, by optax's Hungarian algorithm: O(b³), one step after another, so for single
  batches (256 there, every third epoch); on a host scipy.optimize.linear_sum_assignment of
  -f·yᵀ is faster. Write targets[π] back to the rows of the batch. No gradient.

  >>> losses.noise_target_assignment(jnp.eye(3), jnp.eye(3)[jnp.array([2, 0, 1])]).tolist()
  [1, 2, 0]
  """
  f, targets = arguments.read(f=(f, "b d"), targets=(targets, "b d"))
  cost = jax.lax.stop_gradient(-numerics.normalise(f) @ numerics.normalise(targets).T)
  # optax computes in the default type: in float64 where that is enabled, whatever the cost is.
  with jax.enable_x64(cost.dtype == jnp.float64):
    rows, columns = optax.assignment.hungarian_algorithm(cost)
  return jnp.zeros_like(columns).at[rows].set(columns)


def noise_target_loss(f: jax.Array, targets: jax.Array) -> jax.Array:
  """Features to their assigned points on the sphere: [b d], [b d] -> [b].

  Formula: ½ ‖f_i - y_i‖², unit rows.
  Source: NAT, Bojanowski & Joulin 2017, 1704.05310.
  Tested: NumPy; 0 at the targets.
  targets are in the order of the examples (after `noise_target_assignment`); no gradient into them.

  >>> losses.noise_target_loss(jnp.eye(2), jnp.eye(2)).tolist()
  [0.0, 0.0]
  """
  f, targets = arguments.read(f=(f, "b d"), targets=(targets, "b d"))
  targets = jax.lax.stop_gradient(numerics.normalise(targets))
  return 0.5 * jnp.square(numerics.normalise(f) - targets).sum(-1)
