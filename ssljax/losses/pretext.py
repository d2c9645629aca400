"""Pretext classifications, and terms that shape a labelled embedding.

`b` examples, `k` classes, `d` values of a feature.
"""

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics

__all__ = (
  "cip",
  "jigsaw_ce",
  "joint_label_ce",
  "local_rotation_ce",
  "nc_regulariser",
  "proto_triplet",
  "relative_patch_ce",
  "rotation_ce",
  "spectral_norm_term",
)


def _label_ce(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross-entropy, [b k], [b] -> [b]; a label below 0 is padding: loss 0."""
  there = labels >= 0
  logits, labels = jnp.where(there[:, None], logits, 0.0), jnp.where(there, labels, 0)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.where(there, losses, 0.0)


def rotation_ce(logits: jax.Array, k: jax.Array) -> jax.Array:
  """Which of four rotations: logits [b 4], k [b] -> [b].

  Formula: -log softmax(logits)[k], the image turned by k·90°.
  Source: RotNet, Gidaris et al. 2018, 1803.07728.
  Tested: NumPy; torch cross_entropy; ln 4 at uniform logits.
  The four copies of an image stay in one batch. Turn by transposes and flips, before anything that
  makes borders: interpolation gives the angle away. k below 0 is padding, loss 0.

  >>> losses.rotation_ce(jnp.zeros((2, 4)), jnp.array([0, 3])).shape
  (2,)
  """
  logits, k = arguments.read(logits=(logits, "b 4"), k=(k, "b:int"))
  return _label_ce(logits, k)


def local_rotation_ce(logits: jax.Array, quadrant: jax.Array, angle: jax.Array) -> jax.Array:
  """Which quadrant was turned, and how far: logits [b 16], quadrant [b], angle [b] -> [b].

  Formula: -log softmax(logits)[4·quadrant + angle].
  Source: LoRot-E, Moon et al. 2022, 2207.10023.
  Tested: NumPy; torch cross_entropy.
  Quadrants row by row: upper left, upper right, lower left, lower right; angle k is k·90°. Added
  to the supervised loss at ratio 0.1 (long tails) or 0.5 (OOD). LoRot-I, which turns a random box,
  is `rotation_ce`. A quadrant below 0 is padding, loss 0.

  >>> losses.local_rotation_ce(jnp.zeros((2, 16)), jnp.array([0, 3]), jnp.array([1, 2])).shape
  (2,)
  """
  logits, quadrant, angle = arguments.read(
    logits=(logits, "b 16"), quadrant=(quadrant, "b:int"), angle=(angle, "b:int")
  )
  return _label_ce(logits, 4 * quadrant + angle)


def joint_label_ce(logits: jax.Array, y: jax.Array, t: jax.Array, m: int) -> jax.Array:
  """Class and transformation as one label: logits [b k·m], y [b], t [b] below m -> [b].

  Formula: -log softmax(logits)[y·m + t].
  Source: SLA, Lee et al. 2020, 1910.05872.
  Tested: NumPy; torch cross_entropy; plain cross-entropy for m = 1.
  b counts every transformed copy: all m (4 rotations, 6 orders of the channels) of each image. To
  predict, average over t the logits y·m + t of the copy t. The original's `with_large_loss`
  multiplies by m.

  >>> losses.joint_label_ce(jnp.zeros((2, 12)), jnp.array([2, 2]), jnp.array([0, 3]), 4).shape
  (2,)
  """
  logits, y, t = arguments.read(logits=(logits, "b c"), y=(y, "b:int"), t=(t, "b:int"))
  arguments.positive(m=m)
  if logits.shape[1] % m:
    raise ValueError(f"logits must have shape [b k·m] with m = {m}, not {logits.shape}")
  return _label_ce(logits, y * m + t)


def jigsaw_ce(logits: jax.Array, perm_id: jax.Array) -> jax.Array:
  """Which permutation of the tiles: logits [b p], perm_id [b] -> [b].

  Formula: -log softmax(logits)[perm_id].
  Source: Noroozi & Favaro 2016, 1603.09246.
  Tested: NumPy; torch cross_entropy; ln p at uniform logits.
  p permutations (100, 2000, 10000) of 9 tiles, chosen far apart in Hamming distance. Leave gaps
  between tiles, and drop colour now and then: edges and chromatic aberration give the place away.
  perm_id below 0 is padding, loss 0.

  >>> losses.jigsaw_ce(jnp.zeros((2, 100)), jnp.array([0, 99])).shape
  (2,)
  """
  logits, perm_id = arguments.read(logits=(logits, "b p"), perm_id=(perm_id, "b:int"))
  return _label_ce(logits, perm_id)


def relative_patch_ce(logits: jax.Array, place: jax.Array) -> jax.Array:
  """Which of the eight neighbours of the centre: logits [b 8], place [b] -> [b].

  Formula: -log softmax(logits)[place].
  Source: Doersch et al. 2015, 1505.05192.
  Tested: NumPy; torch cross_entropy; ln 8 at uniform logits.
  Places row by row without the centre: exchanging the two patches makes place into 7 - place.
  place below 0 is padding, loss 0.

  >>> losses.relative_patch_ce(jnp.zeros((2, 8)), jnp.array([0, 7])).shape
  (2,)
  """
  logits, place = arguments.read(logits=(logits, "b 8"), place=(place, "b:int"))
  return _label_ce(logits, place)


def nc_regulariser(
  h: jax.Array,
  y: jax.Array,
  n_classes: int,
  w_within: float = 1.0,
  w_angle: float = 1.0,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Towards neural collapse: features [b d], labels [b] -> loss, (within, angle).

  Formula: w_within · mean ‖h_i - μ_y‖² + w_angle · (-mean_c arccos max_{c'≠c} cos(c, c')), cosines
    of the class means less their mean.
  Source: Papyan et al. 2020, 2008.08186; the angle: MMA, Wang et al. 2020, 2006.06527.
  Tested: NumPy; the simplex: within 0, angle -arccos(-1/(k - 1)).
  Means are of the batch, with gradients. Classes without an example take no part; with fewer than
  two classes the angle is 0. Cosines are kept 1e-6 from ±1, where the slope of arccos is infinite.
  A label below 0 is padding.

  >>> loss, (within, angle) = losses.nc_regulariser(jnp.eye(3), jnp.array([0, 1, 2]), n_classes=3)
  >>> float(within), round(float(np.cos(-angle)), 4)
  (0.0, -0.5)
  """
  h, y = arguments.read(h=(h, "b d"), y=(y, "b:int"))
  arguments.positive(n_classes=n_classes)
  own = jax.nn.one_hot(y, n_classes, dtype=h.dtype)
  h = jnp.where((own.sum(-1) > 0)[:, None], h, 0.0)
  counts = own.sum(0)
  means = own.T @ h / jnp.maximum(counts, 1.0)[:, None]
  within = numerics.mean(jnp.square(h - own @ means).sum(-1), own.sum(-1))
  there = counts > 0
  centre = numerics.mean(means, jnp.broadcast_to(there[:, None], means.shape), axis=0)
  unit = numerics.normalise(jnp.where(there[:, None], means - centre, 0.0))
  others = there[:, None] & there & ~jnp.eye(n_classes, dtype=bool)
  nearest = jnp.where(others, unit @ unit.T, -1.0).max(-1)
  angles = jnp.arccos(jnp.clip(nearest, -1 + 1e-6, 1 - 1e-6))
  angle = -numerics.mean(angles, others.any(-1))
  return w_within * within + w_angle * angle, (within, angle)


def cip(h: jax.Array, y: jax.Array, unit: bool = True) -> jax.Array:
  """Same class in line, other classes orthogonal: features [b d], labels [b] -> [b].

  Formula: Σ_{j≠i, y_j = y_i} max(0, 1 - h_i·h_j) + Σ_{y_j ≠ y_i} |h_i·h_j|, h unit rows.
  Source: collaborative inner product, Li et al. 2019, 1906.00546.
  Tested: NumPy; 0 for orthogonal classes of equal rows.
  A sum over the others, so it grows with the batch. The paper takes the inner products of features
  as they are (unit=False), where the hinge lets norms grow. A label below 0 is padding.

  >>> losses.cip(jnp.eye(3), jnp.array([0, 1, 1])).tolist()
  [0.0, 1.0, 1.0]
  """
  h, y = arguments.read(h=(h, "b d"), y=(y, "b:int"))
  there = y >= 0
  h = jnp.where(there[:, None], h, 0.0)
  if unit:
    h = numerics.normalise(h)
  inner = h @ h.T
  # Padded rows are zero: only their hinge must be taken out, |0| is 0.
  same = (y[:, None] == y) & ~jnp.eye(len(y), dtype=bool) & there
  hinge = jnp.where(same, jax.nn.relu(1 - inner), 0.0)
  return (hinge + jnp.where(y[:, None] == y, 0.0, jnp.abs(inner))).sum(-1)


def proto_triplet(
  q: jax.Array, prototypes: jax.Array, y: jax.Array, margin: float = 0.2
) -> jax.Array:
  """Nearer to the own prototype than to any other: [b d], [k d], labels [b] -> [b].

  Formula: max(0, ‖q - c_y‖ - min_{c≠y} ‖q - c‖ + margin).
  Source: triplet-center loss, He et al. 2018, 1803.06189.
  Tested: NumPy; 0 beyond the margin.
  Prototypes are class means (of the batch, or a moving average) or learnt; gradients flow into
  them. The gradient of a distance is 0 at distance 0. With one prototype the loss is 0. A label
  below 0 is padding.

  >>> losses.proto_triplet(jnp.eye(2), jnp.eye(2), jnp.array([0, 1]), margin=0.2).tolist()
  [0.0, 0.0]
  """
  q, prototypes, y = arguments.read(q=(q, "b d"), prototypes=(prototypes, "k d"), y=(y, "b:int"))
  q = jnp.where((y >= 0)[:, None], q, 0.0)
  distances = numerics.square_root(jnp.square(q[:, None] - prototypes[None]).sum(-1))
  own = jax.nn.one_hot(y, len(prototypes), dtype=bool)
  near = jnp.where(own, distances, 0.0).sum(-1)
  far = jnp.where(own, jnp.inf, distances).min(-1)
  return jnp.where(own.any(-1), jax.nn.relu(near - far + margin), 0.0)


def spectral_norm_term(s: jax.Array, max_iterations: int = 1000) -> jax.Array:
  """The largest singular value of a similarity matrix: [b m] -> scalar.

  Formula: σ_max(s) = u·s·v, gradient u vᵀ.
  Source: MedFLIP, Li et al. 2024, 2403.04626.
  Tested: NumPy and torch norm(s, 2); 1 at the identity, b at a matrix of ones.
  By power iteration, the vectors under stop_gradient: where singular values are equal the gradient
  of a decomposition is infinite, this one is not. It ends when the vector stands still, at most
  after max_iterations; the value is then below σ_max by no more than nearly equal singular values
  differ. The paper gives neither sign, weight nor normalisation of its term, and no code.

  >>> round(float(losses.spectral_norm_term(jnp.ones((4, 4)))), 4)
  4.0
  """
  (s,) = arguments.read(s=(s, "b m"))
  arguments.positive(max_iterations=max_iterations)
  fixed = jax.lax.stop_gradient(s)
  # Only directions count: this keeps squares of huge and tiny numbers in range.
  largest = jnp.abs(fixed).max()
  fixed = fixed / jnp.where(largest == 0, 1.0, largest)
  resolution = 4 * jnp.finfo(s.dtype).eps

  def turn(state):
    i, v, _ = state
    new = numerics.normalise(fixed.T @ (fixed @ v))
    return i + 1, new, jnp.abs(new - v).max()

  # A random start is orthogonal to no vector in particular; ones would be, for centred rows.
  start = numerics.normalise(jax.random.normal(jax.random.key(0), s.shape[1:], s.dtype))
  _, v, _ = jax.lax.while_loop(
    lambda state: (state[0] < max_iterations) & (state[2] > resolution),
    turn,
    (0, start, jnp.full((), jnp.inf, s.dtype)),
  )
  u = jax.lax.stop_gradient(numerics.normalise(fixed @ v))
  return u @ s @ jax.lax.stop_gradient(v)
