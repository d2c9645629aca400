"""Codes, codebooks, diffusion weights, ranks, colours."""

import jax
import numpy as np

from loss_cases.case import Case
from loss_cases.masked import mean
from ssljax import losses


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def pick(x, at):
  return np.take_along_axis(x, at[..., None], -1)[..., 0]


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def codes(rng, b):
  return dict(logits=rng.normal(0, 2, (b, 5, 11)), codes=rng.integers(0, 11, (b, 5)))


def hidden_codes(rng, b):
  mask = rng.random((b, 5)) < 0.5
  mask[:, 0] = True
  return codes(rng, b) | dict(weights=mask)


def codebook_ce(logits, codes, weights=None, smoothing=0.0, over="example"):
  log_p = log_softmax(logits)
  ce = -(1 - smoothing) * pick(log_p, codes) - smoothing * log_p.mean(-1)
  return mean(ce, weights, over)


def vectors(rng, b):
  # Five codes: a number that no batch of the tests has.
  return dict(z=rng.normal(size=(b, 6, 4)), codebook=unit(rng.normal(size=(5, 4))))


def quantise(z, codebook, normalise=True):
  z = unit(z) if normalise else z
  distance = ((z[:, :, None] - codebook) ** 2).sum(-1)
  code = distance.argmin(-1)
  member = code[..., None] == np.arange(5)
  sums = np.einsum("bnk,bnd->kd", member, z)
  return codebook[code], code.astype(np.int32), (sums, member.sum((0, 1)).astype(float))


def straight_through(**options):
  """The gradient straight through is no derivative of the value; tests/test_losses_masked_tokens.py
  holds it to the identity."""
  return lambda z, codebook: losses.quantise(jax.lax.stop_gradient(z), codebook, **options)


def books(rng, b):
  counts = np.array([3.0, 0.0, 1.0, 7.0, 0.0])
  sums = rng.normal(size=(5, 4)) * counts[:, None]
  return dict(codebook=unit(rng.normal(size=(5, 4))), sums=sums, counts=counts)


def update_codebook(codebook, sums, counts, momentum=0.99):
  new = codebook.copy()
  for k in np.flatnonzero(counts):
    new[k] = unit(sums[k] / counts[k])
  return unit(momentum * codebook + (1 - momentum) * new)


def commitment(rng, b):
  return dict(
    z=rng.normal(size=(b, 6, 4)),
    quantised=rng.normal(size=(b, 6, 4)),
    weights=rng.random((b, 6)) + 0.1,
  )


def vq_commitment(z, quantised, weights=None, normalise=True):
  z = unit(z) if normalise else z
  return mean(((z - quantised) ** 2).mean(-1), weights)


def ranked(rng, b):
  errors = rng.normal(size=(b, 6))
  errors[0, 1] = errors[0, 0]  # a tie
  return dict(scores=rng.normal(0, 2, (b, 6)), errors=errors)


def hidden_ranks(rng, b):
  mask = rng.random((b, 6)) < 0.6
  mask[:, 2:4] = True
  return ranked(rng, b) | dict(weights=mask)


def rank_loss(scores, errors, weights=None, over="example"):
  total, count = np.zeros(len(scores)), np.zeros(len(scores))
  for b, i, j in np.ndindex(len(scores), 6, 6):
    if errors[b, i] != errors[b, j] and (weights is None or weights[b, i] and weights[b, j]):
      p = 1 / (1 + np.exp(scores[b, j] - scores[b, i]))
      total[b] -= np.log((p if errors[b, i] > errors[b, j] else 1 - p) + 1e-6)
      count[b] += 1
  return total / count if over == "example" else total * len(scores) / count.sum()


def times(rng, b):
  return dict(t=rng.uniform(0.05, 1, b))


def alpha(t, schedule="linear", eps=1e-4):
  visible = {
    "linear": lambda: 1 - t,
    "cosine": lambda: 1 - np.cos(np.pi / 2 * (1 - t)),
    2.0: lambda: 1 - t**2,
  }[schedule]()
  return (1 - 2 * eps) * visible + eps


def diffusion_weights(t, schedule="linear", steps=None):
  if steps is not None:

    def odds(a):
      return np.log(a / (1 - a))

    now, before = alpha(t, schedule), alpha(t - 1 / steps, schedule)
    return -steps * np.expm1(odds(now) - odds(before)) * before
  slope = (alpha(t + 1e-5, schedule) - alpha(t - 1e-5, schedule)) / 2e-5
  return -slope / (1 - alpha(t, schedule))


def masked_text(rng, b):
  hidden = rng.random((b, 6)) < 0.5
  hidden[0] = False
  return dict(
    logits=rng.normal(0, 2, (b, 6, 9)),
    ids=rng.integers(0, 9, (b, 6)),
    hidden=hidden,
    weights=rng.uniform(0.5, 20, b),
  )


def diffusion_ce(logits, ids, hidden, weights):
  return -weights * (pick(log_softmax(logits), ids) * hidden).sum(1) / 6


def colours(rng, b):
  bins = rng.random((b, 3, 4, 7)) ** 3
  return dict(
    logits=rng.normal(size=(b, 3, 4, 7)),
    soft_bins=bins / bins.sum(-1, keepdims=True),
    class_weights=rng.uniform(0.5, 2, 7),
  )


def colorization_ce(logits, soft_bins, class_weights=None):
  ce = -(soft_bins * log_softmax(logits)).sum(-1)
  if class_weights is not None:
    ce = ce * class_weights[soft_bins.argmax(-1)]
  return ce.mean((1, 2))


def without(name, make):
  return lambda rng, b: {k: v for k, v in make(rng, b).items() if k != name}


def diffusion(name, numpy, *variants):
  # With steps, shares at two neighbouring times are subtracted: float32 loses a factor of `steps`.
  loss = getattr(losses, name)
  return [
    Case(
      f"{name}/{'_'.join(map(str, options.values()))}".rstrip("/"),
      times,
      lambda t, o=options: loss(t, **o),
      lambda t, o=options: numpy(t, **o),
      rtol=2e-5 if "steps" in options else 1e-5,
      gradient=False,
    )
    for options in variants
  ]


CASES = [
  Case("codebook_ce", codes, losses.codebook_ce, codebook_ce),
  Case(
    "codebook_ce/smoothing",
    hidden_codes,
    lambda **a: losses.codebook_ce(**a, smoothing=0.1, over="batch"),
    lambda **a: codebook_ce(**a, smoothing=0.1, over="batch"),
  ),
  Case("quantise", vectors, straight_through(), quantise, whole=("codebook",), gradient=False),
  Case(
    "quantise/plain",
    vectors,
    straight_through(normalise=False),
    lambda **a: quantise(**a, normalise=False),
    whole=("codebook",),
    gradient=False,
  ),
  Case(
    "update_codebook",
    books,
    losses.update_codebook,
    update_codebook,
    whole=("codebook", "sums", "counts"),
    gradient=False,
  ),
  Case("vq_commitment", commitment, losses.vq_commitment, vq_commitment, fixed=("quantised",)),
  Case(
    "vq_commitment/plain",
    without("weights", commitment),
    lambda **a: losses.vq_commitment(**a, normalise=False),
    lambda **a: vq_commitment(**a, normalise=False),
    fixed=("quantised",),
  ),
  Case("rank_loss", ranked, losses.rank_loss, rank_loss, fixed=("errors",)),
  Case(
    "rank_loss/batch",
    hidden_ranks,
    lambda **a: losses.rank_loss(**a, over="batch"),
    lambda **a: rank_loss(**a, over="batch"),
    fixed=("errors",),
  ),
  *diffusion("masked_diffusion_alpha", alpha, {}, {"schedule": "cosine"}, {"schedule": 2.0}),
  *diffusion(
    "masked_diffusion_weights",
    diffusion_weights,
    {},
    {"schedule": "cosine"},
    {"schedule": 2.0},
    {"schedule": "cosine", "steps": 20},
  ),
  Case("masked_diffusion_ce", masked_text, losses.masked_diffusion_ce, diffusion_ce),
  Case(
    "colorization_ce",
    colours,
    losses.colorization_ce,
    colorization_ce,
    whole=("class_weights",),
  ),
  Case(
    "colorization_ce/unweighted",
    without("class_weights", colours),
    losses.colorization_ce,
    colorization_ce,
  ),
]
