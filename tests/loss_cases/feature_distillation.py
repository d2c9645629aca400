"""Feature distillation in float64, token by token where the loss works on matrices."""

import numpy as np

from loss_cases.assignment import normalised, softmax
from loss_cases.case import Case
from ssljax import losses


def pair(rng, b, n=5, d=4, e=None):
  return {"student": rng.normal(0, 1, (b, n, d)), "teacher": rng.normal(0, 1, (b, n, e or d))}


def weighted(rng, b, n=5):
  return pair(rng, b, n) | {"weights": rng.uniform(0.1, 1, (b, n))}


def masked(rng, b, n=5):
  hidden = rng.uniform(0, 1, (b, n)) > 0.3
  hidden[0] = False
  return pair(rng, b, n) | {"weights": hidden}


def over_places(errors, weights=None):
  if weights is None:
    return errors.mean(1)
  total = weights.sum(1)
  return (errors * weights).sum(1) / np.where(total == 0, 1, total)


def smooth(error, beta):
  error = np.abs(error)
  return np.where(error < beta, error**2 / (2 * beta), error - beta / 2).mean(-1)


def kl(q, p):
  return sum(a * np.log(a / b) for a, b in zip(q, p))


def gram(student, teacher, weights=None):
  s, t = normalised(student), normalised(teacher)
  b, n, _ = s.shape
  weights = np.ones((b, n)) if weights is None else weights
  result = np.zeros(b)
  for x in range(b):
    pairs = [(i, j) for i in range(n) for j in range(n)]
    mass = sum(weights[x, i] * weights[x, j] for i, j in pairs)
    for i, j in pairs:
      error = (s[x, i] @ s[x, j] - t[x, i] @ t[x, j]) ** 2
      result[x] += weights[x, i] * weights[x, j] * error / max(mass, 1e-300)
  return result


def relations(student, teacher, temperature, weights=None):
  b, n, d = student.shape
  weights = np.ones((b, n)) if weights is None else weights
  result = np.zeros(b)
  for x in range(b):
    some = np.flatnonzero(weights[x])
    for i in some:
      q = softmax(teacher[x, some] @ teacher[x, i] / teacher.shape[-1] ** 0.5 / temperature)
      p = softmax(student[x, some] @ student[x, i] / d**0.5 / temperature)
      result[x] += weights[x, i] / weights[x].sum() * kl(q, p)
  return result


def similarities(student, teacher, student_bank=None, teacher_bank=None, ts=0.04, tt=0.04):
  s, t = normalised(student), normalised(teacher)
  result = np.zeros(len(s))
  for i in range(len(s)):
    if student_bank is None:
      other = np.arange(len(s)) != i
      banks = s[other], t[other]
    else:
      banks = normalised(student_bank), normalised(teacher_bank)
    result[i] = kl(softmax(banks[1] @ t[i] / tt), softmax(banks[0] @ s[i] / ts))
  return result


def groups_of(features, merges, rounds, keep_first=True):
  """Lists of tokens, merged as in ToMe: even places to their nearest odd place."""
  result = []
  for x in features:
    lists = [[i] for i in range(len(x))]
    for _ in range(rounds):
      number = min(merges, (len(lists) - keep_first) // 2)
      if number <= 0:
        continue
      means = normalised(np.stack([x[tokens].mean(0) for tokens in lists]))
      even, odd = lists[0::2], [list(tokens) for tokens in lists[1::2]]
      fit = means[0::2] @ means[1::2].T
      best = fit.max(1)
      if keep_first:
        best[0] = -np.inf
      merged = np.argsort(-best)[:number]
      for i in merged:
        odd[fit[i].argmax()] += even[i]
      lists = [tokens for i, tokens in enumerate(even) if i not in merged] + odd
    number_of = {token: i for i, tokens in enumerate(lists) for token in tokens}
    result.append([number_of[i] for i in range(len(x))])
  return np.array(result)


def morphed(tokens, groups):
  result = np.zeros_like(tokens)
  for x, numbers in enumerate(groups):
    for i in set(numbers):
      result[x, numbers == i] = tokens[x, numbers == i].mean(0)
  return result


def grouped(rng, b, n=5):
  return pair(rng, b, n) | {"groups": rng.integers(0, 3, (b, n))}


def banks(rng, b, d=4, e=3, m=6):
  names = {"student": (b, d), "teacher": (b, e), "student_bank": (m, d), "teacher_bank": (m, e)}
  return {name: rng.normal(0, 1, shape) for name, shape in names.items()}


REGRESSIONS = {
  "feature_l2": (losses.feature_l2, lambda s, t: ((s - t) ** 2).mean(-1)),
  "feature_l1": (losses.feature_l1, lambda s, t: np.abs(s - t).mean(-1)),
  "feature_smooth_l1": (losses.feature_smooth_l1, lambda s, t: smooth(s - t, 1.0)),
  "feature_cosine": (
    losses.feature_cosine,
    lambda s, t: 1 - (normalised(s) * normalised(t)).sum(-1),
  ),
}


def regression(name, loss, errors):
  return [
    Case(
      name,
      pair,
      lambda student, teacher: loss(student, teacher),
      lambda student, teacher: errors(student, teacher).mean(1),
      fixed=("teacher",),
    ),
    Case(
      f"{name}/weights",
      weighted,
      lambda student, teacher, weights: loss(student, teacher, weights=weights),
      lambda student, teacher, weights: over_places(errors(student, teacher), weights),
      fixed=("teacher",),
    ),
    Case(
      f"{name}/mask",
      masked,
      lambda student, teacher, weights: loss(student, teacher, weights=weights),
      lambda student, teacher, weights: over_places(errors(student, teacher), weights * 1.0),
      fixed=("teacher",),
    ),
  ]


CASES = [
  *(case for name, made in REGRESSIONS.items() for case in regression(name, *made)),
  Case(
    "feature_smooth_l1/beta, pooled",
    lambda rng, b: {k: 2 * x[:, 0] for k, x in pair(rng, b).items()},
    lambda student, teacher: losses.feature_smooth_l1(student, teacher, 2.0),
    lambda student, teacher: smooth(student - teacher, 2.0),
    fixed=("teacher",),
  ),
  Case(
    "gram_loss",
    lambda rng, b: pair(rng, b, e=3),
    losses.gram_loss,
    gram,
    fixed=("teacher",),
  ),
  Case("gram_loss/weights", weighted, losses.gram_loss, gram, fixed=("teacher",)),
  Case("gram_loss/mask", masked, losses.gram_loss, gram, fixed=("teacher",)),
  Case(
    "relation_kl",
    lambda rng, b: pair(rng, b, e=3),
    lambda student, teacher: losses.relation_kl(student, teacher, 0.7),
    lambda student, teacher: relations(student, teacher, 0.7),
    fixed=("teacher",),
  ),
  Case(
    "relation_kl/weights",
    weighted,
    lambda student, teacher, weights: losses.relation_kl(student, teacher, weights=weights),
    lambda student, teacher, weights: relations(student, teacher, 1.0, weights),
    fixed=("teacher",),
  ),
  Case(
    "relation_kl/mask",
    masked,
    lambda student, teacher, weights: losses.relation_kl(student, teacher, weights=weights),
    lambda student, teacher, weights: relations(student, teacher, 1.0, weights),
    fixed=("teacher",),
  ),
  Case(
    "similarity_kl",
    lambda rng, b: {k: x[:, 0] for k, x in pair(rng, b, e=3).items()},
    lambda student, teacher: losses.similarity_kl(student, teacher, None, None, 0.2, 0.1),
    lambda student, teacher: similarities(student, teacher, ts=0.2, tt=0.1),
    fixed=("teacher",),
  ),
  Case(
    "similarity_kl/banks",
    banks,
    lambda **named: losses.similarity_kl(**named, student_temperature=0.2, teacher_temperature=0.1),
    lambda **named: similarities(**named, ts=0.2, tt=0.1),
    whole=("student_bank", "teacher_bank"),
    fixed=("teacher", "student_bank", "teacher_bank"),
  ),
  Case(
    "morph_groups",
    lambda rng, b: {"features": rng.normal(0, 1, (b, 9, 4))},
    lambda features: losses.morph_groups(features, merges=2, rounds=3),
    lambda features: groups_of(features, 2, 3),
    gradient=False,
  ),
  Case(
    "morph_groups/traced, to the end",
    lambda rng, b: {
      "features": rng.normal(0, 1, (b, 8, 4)), "merges": np.array(3), "rounds": np.array(5),
    },
    lambda **named: losses.morph_groups(**named, keep_first=False),
    lambda features, merges, rounds: groups_of(features, int(merges), int(rounds), False),
    whole=("merges", "rounds"),
    gradient=False,
  ),
  Case(
    "morph_tokens",
    lambda rng, b: {k: x for k, x in grouped(rng, b).items() if k != "teacher"},
    lambda student, groups: losses.morph_tokens(student, groups),
    lambda student, groups: morphed(student, groups),
  ),
  Case(
    "token_morph_loss",
    grouped,
    lambda student, teacher, groups: losses.token_morph_loss(student, teacher, groups, 0.5),
    lambda student, teacher, groups: smooth(
      morphed(student, groups) - morphed(teacher, groups), 0.5
    ).mean(1),
    fixed=("teacher",),
  ),
]  # fmt: skip
