"""AdamW with weight-decay groups, a schedule and clipping against torch; position tables resized
against torch's interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")

import torch
from copied import close

from ssljax import optim, schedules
from ssljax.models import positions

pytestmark = pytest.mark.parity
SHAPES = {"kernel": (5, 4), "bias": (4,), "cls_token": (4,), "table": (3, 4)}


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e3], ids=["no clip", "clips", "clip out of reach"])
def test_adamw(clip):
  rng = np.random.default_rng(0)
  start = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
  schedule = schedules.warmup_cosine(12, 256, base=1e-2, warmup_steps=4)
  tx = optim.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.3, no_decay=("table",), clip=clip)

  theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
  groups = [
    {"params": [theirs["kernel"], theirs["cls_token"]], "weight_decay": 0.3},
    {"params": [theirs["bias"], theirs["table"]], "weight_decay": 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
  ours, opt, update = start, tx.init(start), jax.jit(tx.update)
  for step in range(10):
    # Gradients from 1e-7 to 10: epsilon and clipping both show.
    grads = {k: rng.normal(0, 10.0 ** rng.uniform(-7, 1), s) for k, s in SHAPES.items()}
    grads = {k: g.astype(np.float32) for k, g in grads.items()}
    updates, opt = update(grads, opt, ours)
    ours = optax.apply_updates(ours, updates)
    for name, parameter in theirs.items():
      parameter.grad = torch.tensor(grads[name])
    for group in optimizer.param_groups:
      group["lr"] = float(schedule(step))
    if clip:
      torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
    optimizer.step()
    for name in SHAPES:
      close(ours[name], theirs[name], 2e-6)


def test_clipping_divides_by_the_norm_plus_1e_6():
  grads = {"a": jnp.float32([3e-6, 4e-6])}
  clipped, _ = optim.clip_global_norm(1e-6).update(grads, optax.EmptyState())
  theirs = torch.nn.Parameter(torch.zeros(2))
  theirs.grad = torch.tensor([3e-6, 4e-6])
  torch.nn.utils.clip_grad_norm_([theirs], 1e-6)
  close(clipped["a"], theirs.grad, 1e-6)  # plain division would be off by a fifth


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("new", [(14, 14), (7, 9), (4, 3), (24, 31)])
def test_resize_of_position_tables(new, antialias):
  old = (7, 9) if new != (7, 9) else (14, 5)
  table = np.random.default_rng(0).normal(size=(old[0] * old[1], 6)).astype(np.float32)
  x = torch.tensor(table.reshape(1, *old, 6)).permute(0, 3, 1, 2)
  theirs = torch.nn.functional.interpolate(
    x, size=new, mode="bicubic", align_corners=False, antialias=antialias
  )
  theirs = theirs.permute(0, 2, 3, 1).reshape(-1, 6)
  close(positions.resize_table(table, old, new, antialias), theirs, 3e-6)


@pytest.mark.parametrize("how", ["size", "offset", "antialias"])
@pytest.mark.parametrize("new", [(6, 6), (9, 9), (20, 18)])
def test_positions_read_at_another_size(how, new):
  """PyTorch with the sizes, and with the factors (new + .1)/old that DINO and DINOv2 train with."""
  old = (14, 14)
  table = np.random.default_rng(0).normal(size=(*old, 5)).astype(np.float32)
  x = torch.tensor(table)[None].permute(0, 3, 1, 2)
  given = dict(size=new)
  if how == "offset":
    given = dict(scale_factor=tuple((n + 0.1) / o for n, o in zip(new, old)))
  theirs = torch.nn.functional.interpolate(
    x, mode="bicubic", antialias=how == "antialias", align_corners=False, **given
  )
  rows, columns = positions.interpolation(old, new, how)
  ours = np.einsum("ai,bj,ijd->abd", rows, columns, table)
  close(ours, theirs[0].permute(1, 2, 0), 3e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
  rng = np.random.default_rng(0)
  start = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
  schedule = schedules.warmup_cosine(12, 256, base=1e-1, warmup_steps=4)
  tx = optim.sgd(schedule, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
  theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
  optimizer = torch.optim.SGD(
    theirs.values(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=nesterov
  )
  against(theirs, optimizer, tx, schedule, start, rng)


def test_lars():
  """The rate outside the velocity, one-dimensional parameters neither decayed nor adapted."""
  lars = pytest.importorskip("lightly.utils.lars")
  rng = np.random.default_rng(0)
  start = {k: rng.normal(size=SHAPES[k]).astype(np.float32) for k in ("kernel", "table")}
  schedule = schedules.warmup_cosine(12, 256, base=1e-1, warmup_steps=4)
  tx = optim.lars(schedule, momentum=0.9, weight_decay=1e-9)
  theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
  optimizer = lars.LARS(
    theirs.values(), lr=0.1, momentum=0.9, weight_decay=1e-9, trust_coefficient=1e-3
  )
  # lightly divides by ‖g‖ + decay·‖p‖ and we by ‖g + decay·p‖, as the originals do: the same only
  # without decay, which lightly takes for "do not adapt"; hence a tiny one.
  against(theirs, optimizer, tx, schedule, start, rng)


def against(theirs, optimizer, tx, schedule, start, rng):
  """Ten steps of both on the same gradients."""
  ours, opt, update = start, tx.init(start), jax.jit(tx.update)
  for step in range(10):
    grads = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
    updates, opt = update(grads, opt, ours)
    ours = optax.apply_updates(ours, updates)
    for name, parameter in theirs.items():
      parameter.grad = torch.tensor(grads[name])
    for group in optimizer.param_groups:
      group["lr"] = float(schedule(step))
    optimizer.step()
    for name in start:
      close(ours[name], theirs[name], 2e-6)
