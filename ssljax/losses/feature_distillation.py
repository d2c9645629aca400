"""A teacher's features as targets: regression, relations between them, groups of tokens."""

import jax
import jax.numpy as jnp
import optax

from ssljax.losses import arguments, numerics
from ssljax.losses.assignment import read_weights, scaled

__all__ = (
  "feature_cosine",
  "feature_l1",
  "feature_l2",
  "feature_smooth_l1",
  "gram_loss",
  "morph_groups",
  "morph_tokens",
  "relation_kl",
  "similarity_kl",
  "token_morph_loss",
)


def _read(student, teacher, weights):
  """Both as [b … d], the teacher without gradient, and weights [b …]."""
  student, teacher = arguments.read(student=(student, "* d"), teacher=(teacher, "* d"))
  if student.shape != teacher.shape or student.ndim < 2:
    raise ValueError(
      f"teacher must have the shape [b … d] of student: {teacher.shape}, {student.shape}"
    )
  letters = " ".join("bmnopq"[: student.ndim - 1])
  return student, jax.lax.stop_gradient(teacher), read_weights(weights, student, letters)


def _over_places(errors, weights):
  """(Weighted) mean over all axes but the first: [b …] -> [b]."""
  return numerics.mean(errors, weights, tuple(range(1, errors.ndim)))


def feature_l2(
  student: jax.Array, teacher: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """Squared error to a teacher's features: [b … d], [b … d], weights [b …] -> [b].

  Formula: mean over d, then the (weighted) mean over places, of (student - teacher)².
  Source: the feature targets of MaskFeat, Wei et al. 2021, 2112.09133.
  Tested: NumPy; torch mse_loss.

  data2vec for audio sums over d and divides by √d: that is √d times this.

  >>> losses.feature_l2(jnp.ones((4, 9, 2)), jnp.zeros((4, 9, 2))).tolist()
  [1.0, 1.0, 1.0, 1.0]
  """
  student, teacher, weights = _read(student, teacher, weights)
  return _over_places(jnp.square(student - teacher).mean(-1), weights)


def feature_l1(
  student: jax.Array, teacher: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """Absolute error to a teacher's features: [b … d], [b … d], weights [b …] -> [b].

  Formula: mean over d, then the (weighted) mean over places, of |student - teacher|.
  Source: V-JEPA, Bardes et al. 2024, 2404.08471.
  Tested: NumPy; torch l1_loss.

  >>> losses.feature_l1(jnp.ones((4, 2)), jnp.zeros((4, 2))).tolist()
  [1.0, 1.0, 1.0, 1.0]
  """
  student, teacher, weights = _read(student, teacher, weights)
  return _over_places(jnp.abs(student - teacher).mean(-1), weights)


def feature_smooth_l1(
  student: jax.Array,
  teacher: jax.Array,
  beta: float = 1.0,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Smooth L1 to a teacher's features: [b … d], [b … d], weights [b …] -> [b].

  Formula: mean over d, then over places, of e²/(2·beta) where |e| < beta, else |e| - beta/2.
  Source: I-JEPA, Assran et al. 2023, 2301.08243 (beta 1); data2vec, 2202.03555 (2; text 4).
  Tested: NumPy; torch smooth_l1_loss.

  optax.losses.huber_loss is beta times this.

  >>> losses.feature_smooth_l1(jnp.ones((4, 2)), jnp.zeros((4, 2)), beta=2.0).tolist()
  [0.25, 0.25, 0.25, 0.25]
  """
  student, teacher, weights = _read(student, teacher, weights)
  arguments.positive(beta=beta)
  errors = optax.losses.huber_loss(student, teacher, delta=beta) / beta
  return _over_places(errors.mean(-1), weights)


def feature_cosine(
  student: jax.Array, teacher: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """One minus the cosine to a teacher's features: [b … d], [b … d], weights [b …] -> [b].

  Formula: (weighted) mean over places of 1 - cos(student, teacher).
  Source: the summary loss of AM-RADIO, Ranzinger et al. 2023, 2312.06709.
  Tested: NumPy; torch cosine_similarity.

  A zero vector has cosine 0.

  >>> losses.feature_cosine(jnp.eye(2), 3 * jnp.eye(2)).tolist()
  [0.0, 0.0]
  """
  student, teacher, weights = _read(student, teacher, weights)
  return _over_places(1 - numerics.cosine(student, teacher), weights)


def gram_loss(
  student: jax.Array, teacher: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """Likeness of an image's patches held to an earlier teacher's: [b n d], [b n e] -> [b].

  Formula: mean over i, j of (cos(s_i, s_j) - cos(t_i, t_j))², within each image.
  Source: Gram anchoring of DINOv3, Siméoni et al. 2025, 2508.10104.
  Tested: NumPy; invariance to rotation.

  Negative cosines are kept, as in the published runs. The pairs i = j are always 0 and count in
  the mean. `weights` [b n]: a pair has the product of its two.

  >>> losses.gram_loss(jnp.ones((4, 9, 2)), -jnp.ones((4, 9, 3))).round(3).tolist()
  [0.0, 0.0, 0.0, 0.0]
  """
  student, teacher = arguments.read(student=(student, "b n d"), teacher=(teacher, "b n e"))
  weights = read_weights(weights, student, "b n")
  student, teacher = (numerics.normalise(x) for x in (student, jax.lax.stop_gradient(teacher)))
  gram = lambda x: jnp.einsum("bid,bjd->bij", x, x)  # noqa: E731
  pairs = None if weights is None else weights[:, :, None] * weights[:, None]
  return numerics.mean(jnp.square(gram(student) - gram(teacher)), pairs, (1, 2))


def _kl(targets, logits, where=None):
  """KL(softmax(targets) ‖ softmax(logits)) over the places in `where`; 0 where there are none."""
  if where is not None:
    low = jnp.asarray(-1e30, logits.dtype)
    targets, logits = jnp.where(where, targets, low), jnp.where(where, logits, low)
  log_q, log_p = jax.nn.log_softmax(targets), jax.nn.log_softmax(logits)
  each = jnp.exp(log_q) * (log_q - log_p)
  return (each if where is None else jnp.where(where, each, 0.0)).sum(-1)


def relation_kl(
  student: jax.Array,
  teacher: jax.Array,
  temperature: float | jax.Array = 1.0,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Relations between an image's tokens, as distributions: [b n d], [b n e] -> [b].

  Formula: mean_i KL(softmax_j(t_i·t_j/(√e·T)) ‖ softmax_j(s_i·s_j/(√d·T))).
  Source: MiniLM, Wang et al. 2020, 2002.10957; for images Hybrid Distillation, Shi et al. 2023,
    2306.15876.
  Tested: NumPy; torch kl_div; invariance to rotation.

  Widths may differ. For relations of queries or keys by heads give [b·heads n d]. `weights` [b n],
  numbers or bool: weights count the tokens i, and tokens without weight are no j either.

  >>> losses.relation_kl(jnp.ones((4, 9, 2)), jnp.ones((4, 9, 3))).tolist()
  [0.0, 0.0, 0.0, 0.0]
  """
  student, teacher = arguments.read(student=(student, "b n d"), teacher=(teacher, "b n e"))
  arguments.positive(temperature=temperature)
  weights = read_weights(weights, student, "b n")
  where = None if weights is None else (weights != 0)[:, None]

  def relations(x):
    scores = jnp.einsum("bid,bjd->bij", x, x) / x.shape[-1] ** 0.5
    return scaled(scores, temperature)

  targets = relations(jax.lax.stop_gradient(teacher))
  return numerics.mean(_kl(targets, relations(student), where), weights, 1)


def similarity_kl(
  student: jax.Array,
  teacher: jax.Array,
  student_bank: jax.Array | None = None,
  teacher_bank: jax.Array | None = None,
  student_temperature: float | jax.Array = 0.04,
  teacher_temperature: float | jax.Array = 0.04,
) -> jax.Array:
  """Likeness of an example to others, as a distribution: [b d], [b e], [m d], [m e] -> [b].

  Formula: KL(softmax_j(cos(t, t_j)/T_t) ‖ softmax_j(cos(s, s_j)/T_s)), j over the banks or, without
  them, over the other examples of the batch.
  Source: CompRess, Abbasi Koohpayegani et al. 2020, 2010.14713; SEED, Fang et al. 2021,
    2101.04731.
  Tested: NumPy; invariance to rotation.

  Rows of the two banks are the same examples, seen by student and teacher (CompRess-2q); with one
  bank for both, give the teacher's twice (SEED, CompRess-1q: equal widths). Banks and teacher get
  no gradient; in the batch form both ends of the student's cosines do. Alone in a batch: 0.

  >>> losses.similarity_kl(jnp.eye(4), jnp.eye(4)).tolist()
  [0.0, 0.0, 0.0, 0.0]
  """
  student, teacher, student_bank, teacher_bank = arguments.read(
    student=(student, "b d"), teacher=(teacher, "b e"),
    student_bank=(student_bank, "?m d"), teacher_bank=(teacher_bank, "?m e"),
  )  # fmt: skip
  arguments.positive(
    student_temperature=student_temperature, teacher_temperature=teacher_temperature
  )
  if (student_bank is None) != (teacher_bank is None):
    raise ValueError("student_bank and teacher_bank come together: rows are the same examples")
  others = None if student_bank is not None else ~jnp.eye(student.shape[0], dtype=bool)

  def scores(x, bank, temperature):
    x = numerics.normalise(x)
    bank = x if bank is None else jax.lax.stop_gradient(numerics.normalise(bank))
    similarity = x @ bank.T
    if others is not None:  # the cosine with itself would set the scale
      similarity = jnp.where(others, similarity, -1.0)
    return scaled(similarity, temperature)

  targets = scores(jax.lax.stop_gradient(teacher), teacher_bank, teacher_temperature)
  return _kl(targets, scores(student, student_bank, student_temperature), others)


def morph_groups(
  features: jax.Array,
  merges: int | jax.Array,
  rounds: int | jax.Array = 1,
  keep_first: bool = True,
) -> jax.Array:
  """Groups of like tokens of an image: [b n d] -> int [b n], the group's number of each token.

  Formula: `rounds` times: tokens alternate between two sets; each of the first finds its nearest by
  cosine in the second; the `merges` nearest pairs become one, the mean of their tokens.
  Source: DTM, Kim et al. 2023, 2401.00254; matching of ToMe, Bolya et al. 2022, 2210.09461.
  Tested: NumPy, token by token; partition, order of merging.

  `merges` and `rounds` may be traced: DTM draws a total of 0 … n and 1 … 14 rounds each step, and
  merges total/rounds a round, at most all of the first set. keep_first: token 0 does not look for
  another (one may still come to it later); the original leaves ToMe's option for a class token on
  although there is none. A merged pair takes the place of its second token.

  >>> tokens = jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.9]]])
  >>> losses.morph_groups(tokens, merges=1).tolist()
  [[0, 1, 2, 2]]
  """
  (features,) = arguments.read(features=(features, "b n d"))
  n = features.shape[1]
  features = jax.lax.stop_gradient(features)

  def one_round(x, state):
    slots, count = state
    member = (slots[None] == jnp.arange(n)[:, None]).astype(x.dtype)
    means = (member @ x) / jnp.maximum(member.sum(1, keepdims=True), 1.0)
    means = numerics.normalise(means)
    first, second = jnp.arange(0, n, 2), jnp.arange(1, n, 2)
    fit = means[first] @ means[second].T
    fit = jnp.where((first[:, None] < count) & (second < count), fit, -jnp.inf)
    if keep_first:
      fit = fit.at[0].set(-jnp.inf)
    rank = jnp.argsort(jnp.argsort(-fit.max(1)))
    number = jnp.minimum(merges, (count - int(keep_first)) // 2)
    merged = rank < number
    # New order: what is left of the first set, then the second set.
    left = jnp.cumsum(~merged & (first < count)) - 1
    behind = (count + 1) // 2 - number
    goes = jnp.zeros(n, slots.dtype).at[second].set(behind + jnp.arange(second.size))
    goes = goes.at[first].set(jnp.where(merged, behind + fit.argmax(1), left))
    return jnp.where(number > 0, goes[slots], slots), count - number

  def groups(x):
    start = jnp.arange(n), jnp.asarray(n)
    return jax.lax.fori_loop(0, rounds, lambda _, state: one_round(x, state), start)[0]

  return jax.vmap(groups)(features) if n > 1 else jnp.zeros(features.shape[:2], jnp.int32)


def morph_tokens(tokens: jax.Array, groups: jax.Array) -> jax.Array:
  """Every token replaced by the mean of its group: [b n d], int [b n] -> [b n d].

  Formula: y_i = mean of x_j over all j of the group of i.
  Source: DTM, Kim et al. 2023, 2401.00254.
  Tested: NumPy; keeps the sum over tokens, idempotent.

  The original adds 1e-6 to a group's size.

  >>> losses.morph_tokens(jnp.array([[[1.0], [3.0], [5.0]]]), jnp.array([[0, 0, 1]])).tolist()
  [[[2.0], [2.0], [5.0]]]
  """
  tokens, groups = arguments.read(tokens=(tokens, "b n d"), groups=(groups, "b n:int"))
  same = (groups[:, :, None] == groups[:, None]).astype(tokens.dtype)
  return jnp.einsum("bij,bjd->bid", same / same.sum(-1, keepdims=True), tokens)


def token_morph_loss(
  student: jax.Array, teacher: jax.Array, groups: jax.Array, beta: float = 2.0
) -> jax.Array:
  """Smooth L1 between tokens averaged by groups: [b n d], [b n d], int [b n] -> [b].

  Formula: feature_smooth_l1(morph_tokens(student), morph_tokens(teacher), beta) over all tokens.
  Source: DTM, Kim et al. 2023, 2401.00254.
  Tested: NumPy; groups of one token are plain feature distillation.

  Over all tokens, masked and visible, so a group counts by its size. Groups come from the teacher's
  tokens (`morph_groups`); the original averages over two draws of groups.

  >>> x = jnp.ones((4, 9, 2))
  >>> losses.token_morph_loss(x, x, losses.morph_groups(x, merges=3)).tolist()
  [0.0, 0.0, 0.0, 0.0]
  """
  student, teacher, groups = arguments.read(
    student=(student, "b n d"), teacher=(teacher, "b n d"), groups=(groups, "b n:int")
  )
  return feature_smooth_l1(morph_tokens(student, groups), morph_tokens(teacher, groups), beta)
