"""Assignments against lightly: SwAV with multi-crop and queue, MSN's balancing, CAPI."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightly")

from lightly.loss import SwaVLoss  # noqa: E402
from lightly.loss.capi_loss import CAPILoss  # noqa: E402
from lightly.loss.capi_loss import sinkhorn_knopp as capi_sinkhorn  # noqa: E402
from lightly.loss.msn_loss import sinkhorn as msn_sinkhorn  # noqa: E402
from lightly.loss.swav_loss import sinkhorn  # noqa: E402

from ssljax import losses  # noqa: E402

pytestmark = pytest.mark.parity


def both(*shape, seed=0):
  x = np.tanh(np.random.default_rng(seed).normal(0, 1, shape)).astype(np.float32)
  return jnp.asarray(x), torch.tensor(x)


def close(ours, theirs, rtol=1e-5):
  theirs = theirs.detach().numpy()
  np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("n_iters", [1, 3, 7])
def test_sinkhorn(n_iters):
  ours, theirs = both(9, 5)
  close(losses.sinkhorn_knopp(ours, 0.05, n_iters), sinkhorn(theirs, n_iters), 1e-4)


def test_sinkhorn_of_probabilities():
  ours, theirs = both(9, 5)
  theirs = torch.softmax(4 * theirs, 1)
  got = losses.sinkhorn_knopp(jnp.log(jnp.asarray(theirs.numpy())), 1.0)
  close(got, msn_sinkhorn(theirs))


@pytest.mark.parametrize("views", [2, 5])
def test_swav(views):
  ours, theirs = zip(*(both(8, 6, seed=i) for i in range(views)))
  codes = [losses.sinkhorn_knopp(s) for s in ours[:2]]
  close(losses.swapped_ce(ours, codes).mean(), SwaVLoss()(theirs[:2], theirs[2:])[0])


def test_swav_with_a_queue():
  ours, theirs = zip(*(both(8, 6, seed=i) for i in range(3)))
  queues, their_queues = zip(*(both(16, 6, seed=9 + i) for i in range(2)))
  joined = [jnp.concatenate([s, q]) for s, q in zip(ours, queues)]
  codes = [losses.sinkhorn_knopp(s)[:8] for s in joined]
  close(
    losses.swapped_ce(ours, codes).mean(), SwaVLoss()(theirs[:2], theirs[2:], list(their_queues))[0]
  )


def test_capi():
  # They add 1e-8 to each sum after a shift to maximum 0 (the original: 50, where it is nothing), so
  # scores are kept small.
  teacher, their_teacher = (0.2 * x for x in both(8, 7, 6))
  student, their_student = both(8, 3, 6, seed=1)
  targets = losses.positionwise_sinkhorn(teacher, 0.06)
  close(targets, capi_sinkhorn(their_teacher / 0.06), 1e-4)
  index = np.stack([np.random.default_rng(i).permutation(7)[:3] for i in range(8)])
  at_places = jnp.take_along_axis(targets, index[:, :, None], 1)
  want = CAPILoss()(their_teacher, their_student, torch.tensor(index))
  close(losses.soft_ce(student, at_places, 0.12).mean(), want)
