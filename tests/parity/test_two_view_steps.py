"""Whole steps of SimSiam and BYOL: torchvision's ResNet, lightly's heads and loss, torch's SGD, a
LARS and an average written out here, against ours from the same weights: losses, weights, teacher
and all running statistics after two steps. In float64: rounding alone makes two steps in float32
differ by 2e-4, through batch norms over 16 values."""

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("lightly")

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import heads
from test_heads_parity import copied, randomised
from test_resnet_parity import ONES, read, theirs_of

from ssljax import losses, optim, schedules
from ssljax.methods.two_view import two_view
from ssljax.models.resnet import resnet
from ssljax.step import State, train_step

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def in_float64():
  with jax.enable_x64(True):
    yield


B, SIDE, STEPS, TOTAL = 16, 8, 2, 5
ENCODER = resnet(variant="18", stem="cifar", blocks=ONES, dtype="float64")
RATE = schedules.warmup_cosine(TOTAL, B, base=0.05, per=0)


def views(step):
  x = np.random.default_rng(step).normal(size=(B, 2, SIDE, SIDE, 3))
  return x, [torch.tensor(x[:, i].transpose(0, 3, 1, 2)) for i in range(2)]


def networks(projector, predictor=None, seed=0):
  """Their encoder and heads, in training mode."""
  parts = {"encoder": theirs_of("torchvision", "18", "cifar", ONES)}
  parts["projector"] = randomised(projector, seed)
  if predictor is not None:
    parts["predictor"] = randomised(predictor, seed + 1)
  return torch.nn.ModuleDict(parts).double().train()


def ours_of(nets):
  """Their numbers as our parameters and running statistics."""
  made = {name: copied(net.layers) for name, net in nets.items() if name != "encoder"}
  made["encoder"] = read(nets["encoder"], ENCODER, (SIDE, SIDE, 3))
  params = {name: v["params"] for name, v in made.items()}
  return params, {name: v.get("batch_stats", {}) for name, v in made.items()}


def run(method, tx, params, extra):
  """Our losses of the steps and the state after them."""
  state = State(jnp.zeros((), jnp.int32), params, extra, tx.init(params), jax.random.key(0))
  step, found = jax.jit(functools.partial(train_step, method, tx, 1)), []
  for number in range(STEPS):
    state, metrics = step(state, {"views": views(number)[0], "index": np.arange(B)})
    found.append(float(metrics["loss"]))
  return found, state


def alike(ours, theirs):
  """Every leaf to 1e-6 of its largest value; ours keeps running statistics in float32."""
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)

  def one(path, a, b):
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error < 1e-6, f"{jax.tree_util.keystr(path)}: {error:.1e}"

  jax.tree_util.tree_map_with_path(one, ours, theirs)


def moved(before, after):
  """The largest change of a leaf over its size: the comparison would be idle without any."""
  change = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), before, after)
  return min(jax.tree.leaves(change))


def test_simsiam():
  """Decay on everything, the predictor's rate constant, gradients through predictions alone."""
  nets = networks(heads.SimSiamProjectionHead(512, 24, 16), heads.SimSiamPredictionHead(16, 8, 16))
  params, stats = ours_of(nets)
  method = two_view(
    ENCODER, B, loss=losses.negative_cosine, projector=(24, 24, 16), projector_last="plain",
    predictor=(8, 16), target="stopped",
  )  # fmt: skip
  tx = optim.sgd(RATE, weight_decay=1e-2, groups={"predictor": {"hold": 0}})
  found, state = run(method, tx, params, {"stats": stats})

  rest = [*nets["encoder"].parameters(), *nets["projector"].parameters()]
  groups = [{"params": rest}, {"params": nets["predictor"].parameters()}]
  optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-2)
  cosine, wanted = NegativeCosineSimilarity(), []
  for step in range(STEPS):
    optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / TOTAL))
    y = [nets["encoder"](x) for x in views(step)[1]]
    z = [nets["projector"](x) for x in y]
    p = [nets["predictor"](x) for x in z]
    loss = 0.5 * (cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    wanted.append(float(loss.detach()))
  np.testing.assert_allclose(found, wanted, atol=1e-8)
  alike((state.params, state.extra["stats"]), ours_of(nets))
  assert moved(params, state.params) > 1e-3


def lars(parameters, velocities, rate, decay):
  """One step, rate outside the velocity; vectors neither decay nor adapt."""
  with torch.no_grad():
    for p, v in zip(parameters, velocities):
      g = p.grad
      if p.ndim > 1:
        g = g + decay * p
        g = g * (0.1 * p.norm() / g.norm())
      v.mul_(0.9).add_(g)
      p.sub_(rate * v)


def test_byol():
  """The sum of both directions; the teacher, with statistics of its own, moves after the step."""
  student = networks(heads.BYOLProjectionHead(512, 24, 16), heads.BYOLPredictionHead(16, 24, 16))
  teacher = networks(heads.BYOLProjectionHead(512, 24, 16), seed=5)
  with torch.no_grad():
    for p in teacher["encoder"].parameters():
      p.mul_(0.9)
  params, stats = ours_of(student)
  slow, slow_stats = ours_of(teacher)
  momentum = schedules.moving(dict(schedule="cosine", start=0.8, end=1.0), TOTAL)
  method = two_view(
    ENCODER, B, loss=losses.normalized_l2, loss_scale=2.0, projector=(24, 16), predictor=(24, 16),
    target="teacher", momentum=momentum,
  )  # fmt: skip
  tx = optim.lars(RATE, weight_decay=1e-2, trust=0.1)
  extra = {"stats": stats, "teacher": slow, "teacher_stats": slow_stats}
  found, state = run(method, tx, params, copy.deepcopy(extra))

  parameters = list(student.parameters())
  velocities = [torch.zeros_like(p) for p in parameters]
  cosine, wanted = NegativeCosineSimilarity(), []
  for step in range(STEPS):
    x = views(step)[1]
    y = [student["encoder"](a) for a in x]
    z = [student["projector"](a) for a in y]
    p = [student["predictor"](a) for a in z]
    with torch.no_grad():
      t = [teacher["encoder"](a) for a in x]
      t = [teacher["projector"](a) for a in t]
    loss = (2 + 2 * cosine(p[0], t[1])) + (2 + 2 * cosine(p[1], t[0]))
    student.zero_grad()
    loss.backward()
    lars(parameters, velocities, 0.05 * 0.5 * (1 + math.cos(math.pi * step / TOTAL)), 1e-2)
    m = 1 - (1 - 0.8) * (math.cos(math.pi * step / TOTAL) + 1) / 2
    with torch.no_grad():
      for name in teacher:
        for a, b in zip(teacher[name].parameters(), student[name].parameters()):
          a.mul_(m).add_((1 - m) * b)
    wanted.append(float(loss.detach()))
  np.testing.assert_allclose(found, wanted, rtol=1e-8)
  alike((state.params, state.extra["stats"]), ours_of(student))
  alike((state.extra["teacher"], state.extra["teacher_stats"]), ours_of(teacher))
  assert moved(slow, state.extra["teacher"]) > 1e-3
