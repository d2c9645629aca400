"""Tiled NT-Xent against lightly: value, and gradients of both views."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lightly")

import torch
from lightly.loss import NTXentLoss

from ssljax import losses

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("b", "tile", "temperature"), [(7, 3, 0.5), (8, 100, 0.1)])
def test_nt_xent_tiled(b, tile, temperature):
  first, second = np.random.default_rng(b).normal(size=(2, b, 5)).astype(np.float32)
  theirs = [torch.tensor(x, requires_grad=True) for x in (first, second)]
  want = NTXentLoss(temperature=temperature)(*theirs)
  want.backward()
  got, gradients = jax.value_and_grad(
    lambda a, b: losses.nt_xent_tiled(a, b, temperature, tile).mean(), (0, 1)
  )(first, second)
  np.testing.assert_allclose(got, want.item(), rtol=1e-5)
  for gradient, x in zip(gradients, theirs):
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-4, atol=1e-6)
