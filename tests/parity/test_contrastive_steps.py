"""Whole steps of SimCLR and MoCo: torchvision's ResNet, lightly's heads, torch's SGD and an average
and a queue written out here, against ours from the same weights on the same views: losses, weights,
running statistics, teacher and queue after each step. In float64, where rounding hides nothing."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("lightly")

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import heads
from test_heads_parity import copied, randomised
from test_resnet_parity import ONES, read, theirs_of
from torch import nn
from torch.nn import functional as F

from ssljax import losses, optim
from ssljax.leaves import named
from ssljax.methods.two_view import two_view
from ssljax.models.resnet import resnet
from ssljax.step import State, train_step

pytestmark = pytest.mark.parity
B, SIDE, STEPS, RATE, MOMENTUM, PLACES = 8, 16, 2, 0.05, 0.9, 12
ENCODER = resnet(variant="18", stem="cifar", blocks=ONES, dtype="float64")


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


def views(step):
  """[b 2 h w c] for us, two [b c h w] for torch."""
  x = np.random.default_rng(step).normal(size=(B, 2, SIDE, SIDE, 3))
  return x, [torch.tensor(x[:, i].transpose(0, 3, 1, 2)) for i in range(2)]


def network(head):
  encoder = theirs_of("torchvision", "18", "cifar", ONES)
  return nn.Sequential(encoder, randomised(head)).double().train()


def numbers(net):
  """Their parameters and running statistics in our form."""
  made = {"encoder": read(net[0], ENCODER, (SIDE, SIDE, 3)), "projector": copied(net[1].layers)}
  stats = {name: v.get("batch_stats", {}) for name, v in made.items()}
  return {name: v["params"] for name, v in made.items()}, stats


def alike(ours, theirs):
  """Every leaf to 1e-6 of its largest value; ours keeps running statistics in float32."""
  found, wanted = named(ours), named(theirs)
  assert found.keys() == wanted.keys()
  for path, leaf in wanted.items():
    error = np.abs(np.asarray(found[path]) - leaf).max() / np.abs(leaf).max()
    assert error < 1e-6, f"{path}: {error:.1e}"


def compare(method, net, loss_of, extra, check):
  """Step by step. loss_of: (step, views) -> their loss and what is to be done after the step."""
  params, stats = numbers(net)
  tx = optim.sgd(lambda step: RATE, momentum=0.9, weight_decay=1e-2)
  optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=1e-2)
  extra = {"stats": {"predictor": {}} | stats} | extra
  template = jax.eval_shape(method.init, jax.random.key(0), {"views": views(0)[0]})
  assert named(template[0]).keys() == named(params).keys()
  assert named(template[1]).keys() == named(extra).keys()
  params = params | {k: v for k, v in template[0].items() if k not in params}  # no predictor: {}
  state = State(jnp.zeros((), jnp.int32), params, extra, tx.init(params), jax.random.key(0))
  step = jax.jit(functools.partial(train_step, method, tx, 1))
  for number in range(STEPS):
    x, theirs = views(number)
    state, metrics = step(state, {"views": x, "index": np.arange(B)})
    value, after = loss_of(number, theirs)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    with torch.no_grad():
      after()
    np.testing.assert_allclose(float(metrics["loss"]), float(value.detach()), atol=1e-8)
    alike((state.params, state.extra["stats"]), numbers(net))
    check(state.extra)
  before = named(params)
  change = [np.abs(before[k] - v).max() / np.abs(v).max() for k, v in named(state.params).items()]
  assert min(change) > 1e-4  # else the comparison would be idle


def test_simclr():
  net = network(heads.SimCLRProjectionHead(512, 24, 16))
  method = two_view(
    ENCODER, B, loss=functools.partial(losses.nt_xent, temperature=0.5), projector=(24, 16),
    projector_last="batch",
  )  # fmt: skip
  criterion = NTXentLoss(temperature=0.5)
  compare(
    method, net, lambda step, x: (criterion(net(x[0]), net(x[1])), lambda: None), {}, lambda e: None
  )


def test_moco():
  """Keys by the teacher as it was before the step, with batch statistics of its own; then it moves,
  and the keys enter the queue, which the second batch goes round."""
  net = network(heads.MoCoProjectionHead(512, 24, 16))
  teacher = copy.deepcopy(net)
  with torch.no_grad():
    for p in teacher.parameters():
      p.mul_(0.9)
  start = np.random.default_rng(7).normal(size=(PLACES, 16))
  queue = F.normalize(torch.tensor(start), dim=1)

  def loss_of(step, x):
    with torch.no_grad():
      keys = F.normalize(teacher(x[1]), dim=1)
    z = F.normalize(net(x[0]), dim=1)
    logits = torch.cat([(z * keys).sum(1, keepdim=True), z @ queue.clone().T], dim=1) / 0.2

    def after():
      for old, new in zip(teacher.parameters(), net.parameters()):
        old.mul_(MOMENTUM).add_(new, alpha=1 - MOMENTUM)
      queue[(B * step + np.arange(B)) % PLACES] = keys

    return F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)), after

  def check(extra):
    alike((extra["teacher"], extra["teacher_stats"]), numbers(teacher))
    alike({"queue": extra["queue"]}, {"queue": queue.numpy()})

  method = two_view(
    ENCODER, B, loss=functools.partial(losses.info_nce_queue, temperature=0.2),
    projector=(24, 16), projector_norm="none", target="teacher", symmetric=False,
    momentum=MOMENTUM, queue=PLACES,
  )  # fmt: skip
  slow, slow_stats = numbers(teacher)
  extra = {"teacher": slow, "teacher_stats": slow_stats, "queue": queue.numpy().copy()}
  compare(method, net, loss_of, extra | {"position": np.int32(0)}, check)
