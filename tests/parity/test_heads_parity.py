"""Heads against lightly's with the same weights: training mode with its statistics, evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("lightly")

import torch
from copied import close
from lightly.models.modules import heads as lightly
from torch import nn

from ssljax.models.heads import DINOHead, Projector, Prototypes

pytestmark = pytest.mark.parity
X = np.random.default_rng(0).normal(1, 2, (16, 6)).astype(np.float32)
# Their last layers of BYOL, Barlow Twins and VICReg have a bias, those of the originals none.
HEADS = {
  "SimCLR": (lightly.SimCLRProjectionHead, (6, 8, 4), Projector((8, 4), last="batch")),
  "SimCLR v2": (lightly.SimCLRProjectionHead, (6, 8, 4, 3), Projector((8, 8, 4), last="batch")),
  "Barlow Twins": (lightly.BarlowTwinsProjectionHead, (6, 8, 4), Projector((8, 8, 4))),
  "MoCo v2": (lightly.MoCoProjectionHead, (6, 8, 4), Projector((8, 4), "none")),
  "MoCo v3": (
    lightly.MoCoProjectionHead,
    (6, 8, 4, 3, True),
    Projector((8, 8, 4), last="batch"),
  ),
  "BYOL": (lightly.BYOLProjectionHead, (6, 8, 4), Projector((8, 4))),
  "BYOL's predictor": (lightly.BYOLPredictionHead, (6, 8, 4), Projector((8, 4))),
  "SimSiam": (lightly.SimSiamProjectionHead, (6, 8, 4), Projector((8, 8, 4), last="plain")),
  "SimSiam's predictor": (lightly.SimSiamPredictionHead, (6, 8, 4), Projector((8, 4))),
  "NNCLR": (lightly.NNCLRProjectionHead, (6, 8, 4), Projector((8, 8, 4), last="batch")),
  "SwAV": (lightly.SwaVProjectionHead, (6, 8, 4), Projector((8, 4))),
  "VICReg": (lightly.VICRegProjectionHead, (6, 8, 4, 3), Projector((8, 8, 4))),
  "VICRegL's, of cells": (
    lightly.VicRegLLocalProjectionHead,
    (6, 8, 4),
    Projector((8, 8, 4), "layer"),
  ),
}


def randomised(model, seed=0):
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
      if tensor.dtype == torch.float32:
        positive = 1.0 if name.endswith(("var", "weight_g")) or tensor.ndim == 1 else 0.0
        tensor.copy_(torch.tensor(positive + 0.3 * rng.uniform(-1, 1, tuple(tensor.shape))))
  return model


def copied(layers):
  """The variables of a Projector from a Sequential of linear layers, norms and activations."""
  params, stats, i = {}, {}, -1
  array = lambda tensor: tensor.detach().numpy().copy()  # noqa: E731
  for module in layers:
    if isinstance(module, nn.Linear):
      i += 1
      params[f"layer_{i}"] = {"kernel": array(module.weight.T)}
      if module.bias is not None:
        params[f"layer_{i}"]["bias"] = array(module.bias)
    elif isinstance(module, nn.BatchNorm1d):
      stats[f"norm_{i}"] = {"mean": array(module.running_mean), "var": array(module.running_var)}
      if module.affine:
        params[f"norm_{i}"] = {"scale": array(module.weight), "bias": array(module.bias)}
    elif isinstance(module, nn.LayerNorm):
      params[f"norm_{i}"] = {"scale": array(module.weight), "bias": array(module.bias)}
  return {"params": params} | ({"batch_stats": stats} if stats else {})


def compare(theirs, ours, variables, read):
  """Evaluation, then training: outputs, statistics and the gradient in the input."""
  template = jax.eval_shape(ours.init, jax.random.key(0), X)
  assert jax.tree.structure(variables) == jax.tree.structure(template)
  with torch.no_grad():
    close(ours.apply(variables, X), theirs.eval()(torch.tensor(X)))
  weight = np.random.default_rng(1).normal(size=ours.apply(variables, X).shape).astype(np.float32)

  def loss(x):
    y, new = ours.apply(variables, x, train=True, mutable=["batch_stats"])
    return jnp.sum(y * weight), (y, new)

  grad, (y, new) = jax.grad(loss, has_aux=True)(jnp.asarray(X))
  x = torch.tensor(X, requires_grad=True)
  want = theirs.train()(x)
  (want * torch.tensor(weight)).sum().backward()
  close(y, want)
  close(grad, x.grad, 2e-5)
  jax.tree.map(functools.partial(close, relative=1e-6), new, {
    k: v for k, v in read().items() if k == "batch_stats"
  })  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_projectors(name):
  make, sizes, ours = HEADS[name]
  theirs = randomised(make(*sizes))
  read = lambda: copied(theirs.layers)  # noqa: E731
  compare(theirs, ours, read(), read)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("fixed", [True, False])
def test_dino(normed, fixed):
  theirs = lightly.DINOProjectionHead(
    6, 8, 4, 12, batch_norm=normed, norm_last_layer=fixed
  )  # fmt: skip
  randomised(theirs)
  with torch.no_grad():
    theirs.last_layer.weight_g.fill_(1.0)
    if not fixed:
      theirs.last_layer.weight_g.uniform_(0.5, 2)
  ours = DINOHead(
    out=12, hidden=8, bottleneck=4, norm="batch" if normed else "none", bias="auto",
    gain="fixed" if fixed else "trained",
  )  # fmt: skip

  def read():
    variables = {k: {"mlp": v} for k, v in copied(theirs.layers).items()}
    last = theirs.last_layer
    variables["params"]["last_layer"] = {"kernel": last.weight_v.detach().numpy().T.copy()}
    if not fixed:
      variables["params"]["last_layer_gain"] = last.weight_g.detach().numpy()[:, 0].copy()
    return variables

  compare(theirs, ours, read(), read)


def test_prototypes():
  """lightly's layer has a bias, which SwAV has not: it is set to zero."""
  theirs = randomised(lightly.SwaVPrototypes(6, 12))
  with torch.no_grad():
    theirs.heads[0].bias.zero_()
  kernel = theirs.heads[0].weight.detach().numpy().T.copy()
  used = Prototypes(12, "use").apply({"params": {"kernel": kernel}}, X)
  theirs.normalize()
  with torch.no_grad():
    want = theirs(torch.tensor(X))
  close(used, want)
  kernel = theirs.heads[0].weight.detach().numpy().T.copy()
  close(Prototypes(12, "no").apply({"params": {"kernel": kernel}}, X), want)


def test_starts_are_those_of_pytorch():
  theirs = nn.Linear(300, 200)
  params = Projector((200,)).init(jax.random.key(0), jnp.ones((1, 300)))["params"]["layer_0"]
  for ours, other in ((params["kernel"], theirs.weight), (params["bias"], theirs.bias)):
    other = other.detach().numpy()
    np.testing.assert_allclose(ours.std(), other.std(), rtol=0.1)
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(other).max(), rtol=0.05)
