"""Golden values, limits and bad input: codes, codebooks, diffusion weights, ranks, colours."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssljax import losses, targets

few = settings(max_examples=10, deadline=None, derandomize=True)
# The published modules printed seven or eight digits, of float32.
golden = functools.partial(np.testing.assert_allclose, rtol=3e-7)


def signal(shape, w, phase=0.0):
  """The input of the golden values: sin(w·n + phase) over the flat index, rounded to float32."""
  n = np.arange(math.prod(shape), dtype=np.float64)
  return np.sin(w * n + phase).astype(np.float32).reshape(shape)


def draw(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Ranks


def hpm():
  errors = signal((2, 5), 1.7, 0.3)
  errors[0, 1] = errors[0, 0]
  return jnp.asarray(signal((2, 5), 0.9)), jnp.asarray(errors)


def test_golden_ranks():
  scores, errors = hpm()
  golden(losses.rank_loss(scores, errors, over="batch").mean(), 0.8338017)
  standard = targets.normalised_pixels(errors[:, None])
  golden(losses.masked_l2(scores[:, None], standard).mean(), 1.3410442)


def test_ranks_see_order_only():
  scores, errors = hpm()
  want = losses.rank_loss(scores, errors)
  np.testing.assert_allclose(losses.rank_loss(scores + 7, errors), want, rtol=1e-5)
  np.testing.assert_allclose(losses.rank_loss(scores, jnp.exp(3 * errors)), want, rtol=1e-6)
  right = losses.rank_loss(1e3 * errors, errors)
  np.testing.assert_allclose(right, 0, atol=2e-6)
  assert (losses.rank_loss(-1e3 * errors, errors) > 13).all()


@pytest.mark.parametrize("over", ["example", "batch"])
def test_ranks_of_places_that_count(over):
  scores, errors = hpm()
  kept = jnp.array([[1, 0, 1, 0, 1]] * 2)
  got = losses.rank_loss(scores, errors, kept, over=over)
  want = losses.rank_loss(scores[:, ::2], errors[:, ::2], over=over)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("over", ["example", "batch"])
@pytest.mark.parametrize("case", ["ties", "one place", "no place"])
def test_no_pair_is_zero_with_zero_gradient(case, over):
  scores, errors = hpm()
  weights = None
  if case == "ties":
    errors = jnp.ones((2, 5))
  elif case == "one place":
    scores, errors = scores[:, :1], errors[:, :1]
  else:
    weights = jnp.zeros((2, 5), bool)

  def loss(s):
    return losses.rank_loss(s, errors, weights, over=over).sum()

  value, gradient = jax.value_and_grad(loss)(scores)
  assert value == 0
  np.testing.assert_array_equal(gradient, 0.0)


# Codes


@given(k=st.sampled_from([2, 1024, 8192]), smoothing=st.sampled_from([0.0, 0.1, 0.5]))
@few
def test_equal_logits_are_worth_log_k(k, smoothing):
  ce = losses.codebook_ce(jnp.full((2, 3, k), 5.0), jnp.zeros((2, 3), int), smoothing=smoothing)
  np.testing.assert_allclose(ce, math.log(k), rtol=1e-6)


@pytest.mark.parametrize("over", ["example", "batch"])
def test_codes_of_visible_places_do_not_matter(over):
  logits, codes = draw((3, 4, 7)), jnp.array([[1, 2, 3, 4]] * 3)
  hidden = jnp.array([[True, True, False, False], [True, False, False, False], [False] * 4])

  def loss(x, c):
    return losses.codebook_ce(x, c, hidden, smoothing=0.1, over=over)

  want, other = loss(logits, codes), jnp.where(hidden, codes, -100)
  np.testing.assert_array_equal(loss(logits, other), want)
  np.testing.assert_array_equal(loss(jnp.where(hidden[..., None], logits, jnp.inf), codes), want)
  assert want[2] == 0
  gradient = jax.grad(lambda x: loss(x, other).sum())(logits)
  np.testing.assert_array_equal(gradient[~hidden], 0.0)
  assert (gradient[hidden] != 0).all()
  nothing = losses.codebook_ce(logits, codes, jnp.zeros((3, 4)), over=over)
  np.testing.assert_array_equal(nothing, 0.0)


def test_example_and_batch_weigh_places_differently():
  logits, codes = draw((2, 3, 5)), jnp.zeros((2, 3), int)
  hidden = jnp.array([[1, 0, 0], [1, 1, 1]])
  ce = -jax.nn.log_softmax(logits)[..., 0]
  got = losses.codebook_ce(logits, codes, hidden, over="batch").mean()
  np.testing.assert_allclose(got, ce[hidden == 1].mean(), rtol=1e-6)
  got = losses.codebook_ce(logits, codes, hidden).mean()
  np.testing.assert_allclose(got, (ce[0, 0] + ce[1].mean()) / 2, rtol=1e-6)


@given(size=st.sampled_from([0.0, 1e-6, 1e3, 1e30]))
@few
def test_codes_at_any_size_of_logits(size):
  def loss(x):
    return losses.codebook_ce(x, jnp.zeros((1, 3), int), smoothing=0.1).sum()

  value, gradient = jax.value_and_grad(loss)(size * draw((1, 3, 5)))
  assert np.isfinite(value) and np.isfinite(gradient).all()


# Codebooks


def test_golden_quantiser():
  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  codebook = jnp.asarray(unit(signal((4, 3), 0.7)))
  z = jnp.asarray(signal((1, 3, 2, 2), 1.3, 0.2).transpose(0, 2, 3, 1).reshape(1, 4, 3))
  quantised, codes, (sums, counts) = losses.quantise(z, codebook)
  assert codes.tolist() == [[2, 1, 3, 0]] and counts.tolist() == [1, 1, 1, 1]
  np.testing.assert_allclose(quantised[0, 0], [-0.598128, -0.674218, -0.433213], atol=1e-6)
  golden(losses.vq_commitment(z, quantised).mean(), 0.1338960, rtol=5e-7)
  moved = losses.update_codebook(codebook, sums, counts, momentum=0.9)
  np.testing.assert_allclose(moved[0], [-0.067499, 0.517496, 0.853019], atol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_straight_through(normalise):
  z, codebook, out = draw((2, 3, 4)), draw((5, 4), 1), draw((2, 3, 4), 2)

  def loss(z, book):
    return (losses.quantise(z, book, normalise=normalise)[0] * out).sum()

  def unit(z):
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True) if normalise else z

  want = jax.grad(lambda z: (unit(z) * out).sum())(z)
  got, book = jax.grad(loss, (0, 1))(z, codebook)
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_array_equal(book, 0.0)
  quantised, codes, _ = losses.quantise(z, codebook, normalise=normalise)
  np.testing.assert_allclose(quantised, codebook[codes], atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_codebook_stays_on_the_sphere(momentum):
  codebook = jnp.eye(5)[:, :4].at[4].set(0.5)
  z = draw((2, 1, 4))
  _, codes, statistics = losses.quantise(z, codebook)
  moved = losses.update_codebook(codebook, *statistics, momentum)
  np.testing.assert_allclose(jnp.linalg.norm(moved, axis=-1), 1, rtol=1e-6)
  unused = np.setdiff1d(np.arange(5), codes)
  np.testing.assert_allclose(moved[unused], codebook[unused], atol=1e-6)
  if momentum == 0 and codes[0] != codes[1]:  # one member: the code becomes it
    np.testing.assert_allclose(moved[codes[0, 0]], z[0, 0] / jnp.linalg.norm(z[0, 0]), rtol=1e-5)


def test_commitment_on_the_sphere_is_a_cosine():
  z, e = draw((2, 3, 4)), draw((2, 3, 4), 1)
  e = e / jnp.linalg.norm(e, axis=-1, keepdims=True)
  cosine = (z * e).sum(-1) / jnp.linalg.norm(z, axis=-1)
  np.testing.assert_allclose(losses.vq_commitment(z, e), ((2 - 2 * cosine) / 4).mean(-1), rtol=1e-5)
  weights = jnp.array([[1, 0, 0], [0, 0, 0]])
  got = losses.vq_commitment(z, e, weights)
  np.testing.assert_allclose(got, [(2 - 2 * cosine[0, 0]) / 4, 0], rtol=1e-5)


def test_zero_vectors_and_equal_codes():
  z, codebook = jnp.zeros((1, 2, 4)), jnp.ones((3, 4)) / 2

  def loss(z):
    return losses.vq_commitment(z, losses.quantise(z, codebook)[0]).sum()

  value, gradient = jax.value_and_grad(loss)(z)
  assert np.isfinite(value) and np.isfinite(gradient).all()
  _, codes, (_, counts) = losses.quantise(draw((2, 2, 4)), codebook)
  assert codes.max() == 0 and counts.tolist() == [4, 0, 0]  # the first of equals


# Masked diffusion

SCHEDULES = ["linear", "cosine", 2.0, 3]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_prediction_costs_log_v_for_every_schedule(schedule):
  """∫ weight·(1 - α)·log v dt + eps·log v = (1 - eps)·log v: text8's 4.7544 bits at v = 27."""
  eps, v, n = 1e-4, 27, 4000
  with jax.enable_x64(True):
    t = (jnp.arange(n) + 0.5) / n  # midpoints
    weights = losses.masked_diffusion_weights(t, schedule, eps=eps)
    hidden = 1 - losses.masked_diffusion_alpha(t, schedule, eps=eps)
    one = losses.masked_diffusion_ce(
      jnp.zeros((n, 1, v)), jnp.zeros((n, 1), int), jnp.ones((n, 1), bool), weights
    )
    bits = ((one * hidden).mean() + eps * jnp.log(v)) / jnp.log(2)
  np.testing.assert_allclose(bits, math.log2(v) * (1 - eps), rtol=1e-6)
  assert round(float(bits), 4) == 4.7544


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffusion_in_many_steps_tends_to_none(schedule):
  with jax.enable_x64(True):
    t = jnp.array([0.1, 0.5, 1.0])
    want = losses.masked_diffusion_weights(t, schedule)
    far, near = (losses.masked_diffusion_weights(t, schedule, steps=s) for s in (100, 100_000))
  np.testing.assert_allclose(near, want, rtol=1e-3, atol=1e-4)
  assert np.abs(near - want).max() <= np.abs(far - want).max() + 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffusion_at_the_ends(schedule):
  ends = jnp.array([0.0, 1.0])
  alpha = losses.masked_diffusion_alpha(ends, schedule)
  np.testing.assert_allclose(alpha, [1 - 1e-4, 1e-4], atol=1e-7)
  for steps in (None, 1000):
    assert np.isfinite(losses.masked_diffusion_weights(ends, schedule, steps=steps)).all()
  bound = losses.masked_diffusion_weights(ends, "linear")
  np.testing.assert_allclose(bound, [(1 - 2e-4) / 1e-4, (1 - 2e-4) / (1 - 1e-4)], rtol=1e-5)


def test_diffusion_divides_by_all_places():
  hidden = jnp.array([[True, False, False, False], [True] * 4, [False] * 4])
  logits, ids = draw((3, 4, 5)), jnp.full((3, 4), 2)
  ids = jnp.where(hidden, ids, 99)

  def loss(x):
    return losses.masked_diffusion_ce(x, ids, hidden, jnp.array([3.0, 3.0, 1e4]))

  ce = -jax.nn.log_softmax(logits)[..., 2]
  np.testing.assert_allclose(loss(logits), [0.75 * ce[0, 0], 3 * ce[1].mean(), 0], rtol=1e-5)
  gradient = jax.grad(lambda x: loss(x).sum())(logits)
  np.testing.assert_array_equal(gradient[~hidden], 0.0)


# Colours


def test_colours():
  bins = jax.nn.one_hot(jnp.array([[[0, 1], [2, 2]]]), 3)
  logits = draw((1, 2, 2, 3))
  ce = -(bins * jax.nn.log_softmax(logits)).sum(-1)
  got = losses.colorization_ce(logits, bins, jnp.array([1.0, 0.0, 4.0]))
  np.testing.assert_allclose(got, (ce[0, 0, 0] + 4 * ce[0, 1].sum()) / 4, rtol=1e-5)
  assert losses.colorization_ce(1e3 * bins, bins)[0] == 0
  nothing = jax.value_and_grad(lambda x: losses.colorization_ce(x, bins, jnp.zeros(3)).sum())
  value, gradient = nothing(logits)
  assert value == 0 and (gradient == 0).all()


X, IDS = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), int)
BAD = {
  "codes .* must be of kind int": (TypeError, lambda: losses.codebook_ce(X, X[..., 0])),
  "codes must have shape": (ValueError, lambda: losses.codebook_ce(X, IDS[:, :2])),
  "logits must be an array": (TypeError, lambda: losses.codebook_ce(3.0, IDS)),
  "smoothing must be": (ValueError, lambda: losses.codebook_ce(X, IDS, smoothing=1.0)),
  "over must be": (ValueError, lambda: losses.codebook_ce(X, IDS, over="all")),
  "codebook must have shape": (ValueError, lambda: losses.quantise(X, jnp.ones((5, 3)))),
  "z must have shape": (ValueError, lambda: losses.quantise(X[0], jnp.ones((5, 4)))),
  "counts must have shape": (
    ValueError,
    lambda: losses.update_codebook(X[0], X[0], jnp.ones(4)),
  ),
  "quantised must have shape": (ValueError, lambda: losses.vq_commitment(X, X[:1])),
  "errors must have shape": (ValueError, lambda: losses.rank_loss(X[0], X[0, :, :2])),
  "scores .* must be of kind float": (TypeError, lambda: losses.rank_loss(IDS, X[..., 0])),
  "weights must have shape": (ValueError, lambda: losses.rank_loss(X[0], X[0], jnp.ones(3))),
  "t must be an array": (TypeError, lambda: losses.masked_diffusion_weights(0.5)),
  "t must have shape": (ValueError, lambda: losses.masked_diffusion_alpha(X)),
  "schedule must be": (ValueError, lambda: losses.masked_diffusion_alpha(X[0, 0], "cosin")),
  "schedule must be .* not 0.5": (ValueError, lambda: losses.masked_diffusion_alpha(X[0, 0], 0.5)),
  "steps must be a positive": (
    ValueError,
    lambda: losses.masked_diffusion_weights(X[0, 0], steps=0),
  ),
  "hidden .* must be of kind bool": (
    TypeError,
    lambda: losses.masked_diffusion_ce(X, IDS, IDS, X[:, 0, 0]),
  ),
  "soft_bins must have shape": (
    ValueError,
    lambda: losses.colorization_ce(X[None], X[None, ..., :2]),
  ),
  "class_weights must have shape": (
    ValueError,
    lambda: losses.colorization_ce(X[None], X[None], jnp.ones(3)),
  ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
  error, call = BAD[message]
  with pytest.raises(error, match=message):
    call()
