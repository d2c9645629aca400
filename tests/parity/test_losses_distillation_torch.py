"""Distillation against lightly (DINO, iBOT, MSN, PMSN) and torch (regressions, normalisers)."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightly")

import torch.nn.functional as F  # noqa: E402
from lightly.loss import DINOLoss, IBOTPatchLoss, MSNLoss, PMSNLoss  # noqa: E402

from ssljax import losses, targets  # noqa: E402

pytestmark = pytest.mark.parity


def both(*shape, seed=0, scale=1.0):
  x = np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
  return jnp.asarray(x), torch.tensor(x)


def close(ours, theirs, rtol=1e-5):
  np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=rtol, atol=1e-6)


def test_dino_and_its_centre_over_five_steps():
  theirs, center = DINOLoss(6, teacher_temp=0.06, warmup_teacher_temp=0.06), jnp.zeros(6)
  for step in range(5):
    student, their_student = zip(*(both(8, 6, seed=10 * step + i) for i in range(5)))
    teacher, their_teacher = zip(*(both(8, 6, seed=99 + 10 * step + i) for i in range(2)))
    ours = losses.dino_loss(student, teacher, center, 0.1, 0.06)
    close(ours.mean(), theirs(list(their_teacher), list(their_student)))
    center = losses.update_center(center, jnp.stack(teacher, 1))
    close(center, theirs.center.ravel())


def test_ibot_and_its_centre_over_three_steps():
  # Their centre is of the masked tokens, DINOv2's way.
  theirs, center = IBOTPatchLoss(6), jnp.zeros(6)
  hidden = np.random.default_rng(0).uniform(size=(4, 3, 3)) > 0.5
  hidden[2] = False
  weights = jnp.asarray(hidden.reshape(4, 9))
  for step in range(3):
    student, their_student = both(4, 9, 6, seed=step)
    teacher, their_teacher = both(4, 9, 6, seed=9 + step)
    ours = losses.ibot_loss(student, teacher, center, weights=weights)
    masked = torch.tensor(hidden.reshape(4, 9))
    close(ours.mean(), theirs(their_teacher[masked], their_student[masked], torch.tensor(hidden)))
    center = losses.update_center(center, teacher, weights=weights)
    close(center, theirs.center.value.ravel())


def embeddings():
  anchors, theirs = zip(*(both(6, 5, seed=i) for i in range(3)))
  ours = list(anchors), *(both(n, 5, seed=i)[0] for n, i in ((6, 7), (8, 8)))
  return ours, (torch.cat(theirs), *(both(n, 5, seed=i)[1] for n, i in ((6, 7), (8, 8))))


@pytest.mark.parametrize("n_iters", [0, 3])
def test_msn(n_iters):
  ours, theirs = embeddings()
  close(losses.msn_loss(*ours, n_iters=n_iters), MSNLoss(sinkhorn_iterations=n_iters)(*theirs))


def test_pmsn_differs_in_the_direction_of_its_prior_term():
  # Theirs is KL(prior ‖ mean), the paper's and ours KL(mean ‖ prior): the rest is equal.
  ours, theirs = embeddings()
  options = dict(sinkhorn_iterations=0)
  error = losses.pmsn_loss(*ours, prior_weight=0.0)
  close(error, PMSNLoss(regularization_weight=0, **options)(*theirs))
  z, prototypes = (F.normalize(x) for x in (theirs[0], theirs[2]))
  mean = torch.softmax(z @ prototypes.T / 0.1, 1).mean(0)
  prior = torch.arange(1, 9) ** -0.25
  prior = prior / prior.sum()
  gap = PMSNLoss(**options)(*theirs) - PMSNLoss(regularization_weight=0, **options)(*theirs)
  close((prior * (prior / mean).log()).sum().numpy(), gap, 1e-4)
  ours_gap = losses.pmsn_loss(*ours) - error
  close(ours_gap, (mean * (mean / prior).log()).sum(), 1e-4)
  assert abs(float(ours_gap) - float(gap)) > 1e-3


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 4.0])
def test_smooth_l1(beta):
  student, their_student = both(4, 3, 6, scale=2)
  teacher, their_teacher = both(4, 3, 6, scale=2, seed=1)
  want = F.smooth_l1_loss(their_student, their_teacher, beta=beta)
  close(losses.feature_smooth_l1(student, teacher, beta).mean(), want)


def test_other_regressions():
  student, their_student = both(4, 3, 6)
  teacher, their_teacher = both(4, 3, 6, seed=1)
  close(losses.feature_l2(student, teacher).mean(), F.mse_loss(their_student, their_teacher))
  close(losses.feature_l1(student, teacher).mean(), F.l1_loss(their_student, their_teacher))
  cosine = F.cosine_similarity(their_student, their_teacher, dim=-1)
  close(losses.feature_cosine(student, teacher), 1 - cosine.mean(1))


def test_relations():
  student, their_student = both(4, 3, 6)
  teacher, their_teacher = both(4, 3, 5, seed=1)
  log_p = F.log_softmax(their_student @ their_student.mT / 6**0.5, -1)
  q = F.softmax(their_teacher @ their_teacher.mT / 5**0.5, -1)
  want = F.kl_div(log_p, q, reduction="none").sum(-1).mean(1)
  close(losses.relation_kl(student, teacher), want)


def test_normalisers():
  x, theirs = both(4, 3, 6, scale=3)
  close(targets.layer_normalise(x), F.layer_norm(theirs, (6,)))
  close(targets.instance_normalise(x), F.instance_norm(theirs.mT).mT)
  close(targets.l2_normalise(x), F.normalize(theirs, dim=-1))
  layers = [both(4, 3, 6, seed=i) for i in range(3)]
  mean = torch.stack([F.layer_norm(y, (6,)) for _, y in layers]).mean(0)
  close(targets.average_layers([y for y, _ in layers]), F.layer_norm(mean, (6,)))
  mean = torch.stack([F.instance_norm(y.mT).mT for _, y in layers]).mean(0)
  want = F.layer_norm(mean, (6,))
  close(targets.average_layers([y for y, _ in layers], norm="instance"), want)


def test_standardise_in_training_and_afterwards():
  # Theirs normalises by the batch and keeps the unbiased variance; ours is biased in both.
  x, theirs = both(8, 6, scale=3)
  mean, variance = torch.zeros(6), torch.ones(6)
  want = F.batch_norm(theirs, mean, variance, training=True, momentum=0.1, eps=1e-6)
  close(targets.standardise(x, jnp.zeros(6), jnp.ones(6), 0.0)[0], want)
  _, (our_mean, our_variance) = targets.standardise(x, jnp.zeros(6), jnp.ones(6), 0.9)
  close(our_mean, mean)
  close((our_variance - 0.9) * 8 / 7 + 0.9, variance)
  y, _ = targets.standardise(x, jnp.asarray(mean.numpy()), jnp.asarray(variance.numpy()), 1.0)
  close(y, F.batch_norm(theirs, mean, variance, training=False, eps=1e-6))
