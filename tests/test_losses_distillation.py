"""Distillation of distributions, features and relations: minima, masks, extremes and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, special

from ssljax import losses, targets

quick = settings(max_examples=10, deadline=None, derandomize=True)


def random(*shape, seed=0, scale=1.0):
  return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def rotation(d, seed=0):
  return jnp.asarray(linalg.qr(np.random.default_rng(seed).normal(0, 1, (d, d)))[0], jnp.float32)


def finite(*arrays):
  return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(arrays))


def test_dino_has_no_pair_of_one_view_and_may_swap_the_teachers_views():
  views, zero = [random(4, 6, seed=i) for i in range(4)], jnp.zeros(6)
  loss = losses.dino_loss(views, views[:2], zero)
  swapped = losses.dino_loss([views[1], views[0], *views[2:]], [views[1], views[0]], zero)
  np.testing.assert_allclose(loss, swapped, rtol=1e-6)
  alone = losses.dino_loss(views, views[:1], zero)
  moved = losses.dino_loss([5 * views[0], *views[1:]], views[:1], zero)
  np.testing.assert_array_equal(alone, moved)


def test_dino_at_the_start_and_at_its_minimum():
  flat = [jnp.zeros((4, 6))] * 3
  np.testing.assert_allclose(losses.dino_loss(flat, flat[:2], jnp.zeros(6)), np.log(6), rtol=1e-6)
  np.testing.assert_allclose(losses.dino_loss(flat, flat[:2], None), np.log(6), rtol=1e-6)
  same = [random(4, 6)] * 2
  loss = lambda s: losses.dino_loss([s, s], same, jnp.zeros(6), 0.5, 0.5).sum()  # noqa: E731
  np.testing.assert_allclose(jax.grad(loss)(same[0]), np.zeros((4, 6)), atol=1e-6)
  entropy = special.entr(jax.nn.softmax(same[0] / 0.5)).sum(1)
  np.testing.assert_allclose(
    losses.dino_loss(same, same, jnp.zeros(6), 0.5, 0.5), entropy, rtol=1e-5
  )


def test_ibot_counts_masked_places_alone():
  student, teacher, hidden = random(2, 5, 6), random(2, 5, 6, seed=1), jnp.arange(5) < 2
  weights = jnp.stack([hidden, hidden & False])
  call = jax.jit(losses.ibot_loss)
  for center in (jnp.zeros(6), None):
    loss = call(student, teacher, center, weights=weights)
    changed = student.at[:, 2:].set(9.0), teacher.at[:, 2:].set(-9.0)
    other = call(*changed, center, weights=weights)
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    assert loss[1] == 0 and loss[0] > 0
  short = call(student[:1, :2], teacher[:1, :2], jnp.zeros(6))
  padded = call(student, teacher, jnp.zeros(6), weights=weights)
  np.testing.assert_allclose(padded[:1], short, rtol=1e-6)


def test_a_centre_without_weight_stays_and_else_moves():
  center, teacher = random(4), random(6, 3, 4)
  stays = losses.update_center(center, teacher, 0.9, jnp.zeros((6, 3), bool))
  np.testing.assert_array_equal(stays, center)
  np.testing.assert_allclose(
    losses.update_center(center, teacher, 0.0), teacher.mean((0, 1)), rtol=1e-5, atol=1e-7
  )


def test_msn_with_equal_shares_has_no_prior_term_and_collapse_has_log_k():
  eye, flat = jnp.eye(4), jnp.zeros((4, 4))
  uniform = losses.msn_loss([flat], flat, eye)
  np.testing.assert_allclose(uniform, np.log(4), rtol=1e-6)
  one = jnp.tile(eye[:1], (4, 1))
  options = dict(temperature=0.01, n_iters=0)
  gap = losses.msn_loss([one], one, eye, **options, prior_weight=1.0)
  without = losses.msn_loss([one], one, eye, **options, prior_weight=0.0)
  np.testing.assert_allclose(gap - without, np.log(4), rtol=1e-5)


def test_pmsn_with_a_flat_prior_is_msn():
  z, t, p = [random(5, 3), random(5, 3, seed=1)], random(5, 3, seed=2), random(4, 3, seed=3)
  want = losses.msn_loss(z, t, p, n_iters=0)
  np.testing.assert_allclose(losses.pmsn_loss(z, t, p, exponent=0.0), want, rtol=1e-6)


@quick
@given(seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_relations_do_not_see_rotation_nor_cosines_scale(seed, scale):
  student, teacher = random(3, 5, 4, seed=seed), random(3, 5, 4, seed=seed + 1)
  turned = student @ rotation(4, seed)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)  # noqa: E731
  close(losses.gram_loss(scale * turned, teacher), losses.gram_loss(student, teacher))
  close(losses.gram_loss(scale * turned, student), np.zeros(3))
  close(losses.relation_kl(turned, teacher), losses.relation_kl(student, teacher))
  close(losses.relation_kl(turned, student), np.zeros(3))
  one, two, half = scale * turned[:, 0], student[:, 0], dict(student_temperature=0.5)
  close(
    losses.similarity_kl(one, teacher[:, 0], **half),
    losses.similarity_kl(two, teacher[:, 0], **half),
  )
  close(losses.similarity_kl(one, two), np.zeros(3))
  close(losses.feature_cosine(scale * two, two), np.zeros(3))


def test_regressions_meet():
  student, teacher = random(4, 3, 5), random(4, 3, 5, seed=1)
  close = np.testing.assert_allclose
  close(
    losses.feature_smooth_l1(student, teacher, 1e-6), losses.feature_l1(student, teacher), rtol=1e-5
  )
  wide = losses.feature_smooth_l1(student, teacher, 100.0)
  close(200 * wide, losses.feature_l2(student, teacher), rtol=1e-5)


def test_groups_are_a_partition_and_the_first_token_stays_first():
  x = random(2, 12, 4)
  groups = np.asarray(jax.jit(losses.morph_groups)(x, merges=2, rounds=3))
  assert all(set(row) == set(range(12 - 6)) for row in groups)
  assert (groups[:, 0] == 0).all()
  np.testing.assert_array_equal(losses.morph_groups(x, merges=0), np.tile(np.arange(12), (2, 1)))
  one = losses.morph_groups(x, merges=12, rounds=9, keep_first=False)
  np.testing.assert_array_equal(one, np.zeros((2, 12)))
  np.testing.assert_array_equal(losses.morph_groups(x[:, :1], merges=3), np.zeros((2, 1)))


def test_equal_tokens_merge_first():
  x = random(1, 8, 4).at[0, 4].set(random(1, 8, 4)[0, 7])
  groups = np.asarray(losses.morph_groups(x, merges=1))[0]
  assert groups[4] == groups[7] and len(set(groups)) == 7


def test_morphing_keeps_sums_and_is_idempotent():
  x = random(2, 9, 4)
  groups = losses.morph_groups(x, merges=3, rounds=2)
  once = losses.morph_tokens(x, groups)
  np.testing.assert_allclose(once.sum(1), x.sum(1), atol=1e-5)
  np.testing.assert_allclose(losses.morph_tokens(once, groups), once, atol=1e-6)
  other, single = random(2, 9, 4, seed=1), jnp.tile(jnp.arange(9), (2, 1))
  plain = losses.feature_smooth_l1(other, x, 2.0)
  np.testing.assert_allclose(losses.token_morph_loss(other, x, single), plain, rtol=1e-5)


THREE = jnp.arange(6.0)[:, None] % 3
ONE_EXAMPLE = {
  "dino_loss": lambda z, t: losses.dino_loss([z, z], [z], jnp.zeros(z.shape[-1]), t, t),
  "dino_loss/sinkhorn": lambda z, t: losses.dino_loss([z, z], [z], None, t, t),
  "ibot_loss": lambda z, t: losses.ibot_loss(z[:, None], z[:, None], None, t, t),
  "msn_loss": lambda z, t: losses.msn_loss([z, z], z, jnp.eye(4, z.shape[-1]), t),
  "pmsn_loss": lambda z, t: losses.pmsn_loss([z, z], z, jnp.eye(4, z.shape[-1]), t),
  "similarity_kl": lambda z, t: losses.similarity_kl(z, z[:, ::-1], None, None, t, t),
  "similarity_kl/banks": lambda z, t: losses.similarity_kl(z, z, z[::-1], z[::-1], t, t),
  "relation_kl": lambda z, t: losses.relation_kl(z[:, None] * jnp.eye(6), z[:, None] * THREE, t),
  "gram_loss": lambda z, t: losses.gram_loss(z[:, None] * jnp.eye(6), t * z[:, None] * THREE),
  "feature_cosine": lambda z, t: losses.feature_cosine(z, t * z[:, ::-1]),
  "token_morph_loss": lambda z, t: losses.token_morph_loss(
    z[:, None], t * z[:, None], losses.morph_groups(z[:, None], merges=2)
  ),
}  # fmt: skip
INPUTS = {
  "one example": random(1, 6), "zeros": jnp.zeros((4, 6)), "large": 1e10 * random(4, 6),
  "duplicates": jnp.tile(random(1, 6), (4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_EXAMPLE)
def test_extremes_stay_finite(name):
  call = jax.jit(jax.value_and_grad(lambda z, t: ONE_EXAMPLE[name](z, t).sum()))
  for z in INPUTS.values():
    for temperature in (1.0, 1e-8, 1e8):
      assert finite(call(z, temperature)), (z, temperature)


NOTHING = {
  "ibot_loss": lambda z, w: losses.ibot_loss(z, z + 1, jnp.zeros(4), weights=w),
  "ibot_loss/sinkhorn": lambda z, w: losses.ibot_loss(z, z + 1, None, weights=w),
  "gram_loss": lambda z, w: losses.gram_loss(z, z[..., ::-1] ** 2, w),
  "relation_kl": lambda z, w: losses.relation_kl(z, z[..., ::-1] ** 2, weights=w),
  "feature_l1": lambda z, w: losses.feature_l1(z, z + 1, w),
  "feature_l2": lambda z, w: losses.feature_l2(z, z + 1, w),
  "feature_smooth_l1": lambda z, w: losses.feature_smooth_l1(z, z + 1, weights=w),
  "feature_cosine": lambda z, w: losses.feature_cosine(z, z[..., ::-1], w),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_mask_that_selects_nothing_gives_zero(name):
  z, call = random(2, 3, 4), jax.jit(NOTHING[name])
  for weights in (jnp.array([[0, 0, 0], [1, 1, 0]], bool), jnp.zeros((2, 3))):
    value = call(z, weights)
    gradient = jax.jit(jax.grad(lambda z, w: call(z, w).sum()))(z, weights)
    assert value[0] == 0 and (gradient[0] == 0).all() and finite(value, gradient)
    assert (value[1] > 0) == weights.any()


def test_msn_without_weight_is_zero():
  call = lambda z: losses.msn_loss([z], z, jnp.eye(4), weights=jnp.zeros(3))  # noqa: E731
  value, gradient = jax.jit(jax.value_and_grad(call))(random(3, 4))
  assert value == 0 and (gradient == 0).all()


Z, P3 = jnp.ones((4, 6)), jnp.ones((4, 5, 6))
BAD = {
  "student": (TypeError, lambda: losses.dino_loss(Z, [Z], None)),
  "student views": (ValueError, lambda: losses.dino_loss([Z], [Z], None)),
  "teacher": (ValueError, lambda: losses.dino_loss([Z, Z], [Z[:, :2]], None)),
  "teacher views": (ValueError, lambda: losses.dino_loss([Z, Z], [Z, Z[:2]], None)),
  "center": (ValueError, lambda: losses.dino_loss([Z, Z], [Z], jnp.zeros(3))),
  "teacher_temperature": (ValueError, lambda: losses.dino_loss([Z, Z], [Z], None, 0.1, 0)),
  "weights": (ValueError, lambda: losses.ibot_loss(P3, P3, None, weights=jnp.ones(4))),
  "teacher places": (ValueError, lambda: losses.ibot_loss(P3, P3[:, :2], None)),
  "center mean": (ValueError, lambda: losses.update_center(jnp.zeros(3), Z)),
  "sharpening": (ValueError, lambda: losses.msn_loss([Z], Z, Z, sharpening=-1.0)),
  "prototypes": (ValueError, lambda: losses.msn_loss([Z], Z, Z[:, :2])),
  "prior": (ValueError, lambda: losses.msn_loss([Z], Z, Z, prior=jnp.ones(2))),
  "targets": (TypeError, lambda: losses.pmsn_loss([Z], Z.astype(int), Z)),
  "teacher [b n e]": (ValueError, lambda: losses.gram_loss(P3, Z)),
  "temperature": (ValueError, lambda: losses.relation_kl(P3, P3, 0.0)),
  "student_bank": (ValueError, lambda: losses.similarity_kl(Z, Z, Z)),
  "teacher_bank": (ValueError, lambda: losses.similarity_kl(Z, Z, Z, Z[:2])),
  "teacher [b … d]": (ValueError, lambda: losses.feature_l2(P3, P3[:, :1])),
  "beta": (ValueError, lambda: losses.feature_smooth_l1(Z, Z, 0.0)),
  "groups": (TypeError, lambda: losses.morph_tokens(P3, jnp.ones((4, 5)))),
  "features": (ValueError, lambda: losses.morph_groups(Z, 2)),
  "mean": (ValueError, lambda: targets.standardise(Z, jnp.zeros(2), jnp.ones(6))),
  "covariance": (ValueError, lambda: targets.phi_s_matrix(Z)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
  error, call = BAD[name]
  with pytest.raises(error, match=name.split()[0]):
    call()


@pytest.mark.parametrize("d", [1, 2, 4, 12, 28, 36, 64, 96])
def test_phi_s_gives_every_channel_variance_1_and_comes_back(d):
  x = random(200, d) * jnp.arange(1.0, d + 1) @ rotation(d) + 3
  mean, covariance = x.mean(0), jnp.atleast_2d(jnp.cov(x.T, bias=True))
  matrix = jax.jit(targets.phi_s_matrix)(covariance)
  y = jax.jit(targets.phi_s)(x, mean, matrix)
  np.testing.assert_allclose(y.var(0), np.ones(d), rtol=1e-3)
  back = y @ matrix / (jnp.square(matrix).sum() / d) + mean
  np.testing.assert_allclose(back, x, rtol=1e-3, atol=1e-3 * float(jnp.abs(x).max()))


@pytest.mark.parametrize("d", [192, 384, 512, 640, 768, 1024, 1152, 1280, 1408, 1536, 1664])
def test_usual_widths_have_a_hadamard_matrix(d):
  from ssljax.targets.features import _hadamard

  matrix = _hadamard(d).astype(np.float32)
  assert (np.abs(matrix) == 1).all()
  np.testing.assert_array_equal(matrix @ matrix.T, d * np.eye(d))


def test_other_widths_are_refused():
  with pytest.raises(ValueError, match="width 6"):
    targets.phi_s_matrix(jnp.eye(6))


def test_a_layer_alone_is_its_layer_norm_and_zeros_stay_finite():
  x = random(2, 3, 8, scale=4)
  np.testing.assert_allclose(targets.average_layers([x]), targets.layer_normalise(x), atol=1e-4)
  for target in (targets.layer_normalise, targets.instance_normalise, targets.l2_normalise):
    value, back = jax.vjp(target, jnp.zeros((2, 3, 4)))
    assert (value == 0).all() and finite(back(jnp.ones((2, 3, 4))))


def test_standardise_with_momentum_1_keeps_what_it_is_given():
  x, mean, variance = random(7, 3), random(3), jnp.ones(3)
  y, new = targets.standardise(x, mean, variance, momentum=1.0, eps=0.0)
  np.testing.assert_allclose(y, x - mean, rtol=1e-6)
  for got, want in zip(new, (mean, variance)):
    np.testing.assert_array_equal(got, want)
