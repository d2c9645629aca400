"""SimCLR's and Barlow Twins' training step on a CPU, beside PyTorch.

  python experiments/bench_two_view.py                                all four parts
  python experiments/bench_two_view.py --parts=simclr_resnet18 --batch=64 --repeats=9
  python experiments/bench_two_view.py --parts=simclr_vits,barlow_vits --torch=default

ResNet-18 with a CIFAR stem at 32 px and SGD, ViT-S/16 at 96 px and AdamW with its decay groups,
both with a projector. One step is forward, backward, optimizer and batch-norm statistics on a ready
batch of two views, float32: in the project's compiled step with donated state, and in eager PyTorch
with torchvision's resnet18 and timm's ViT-S, the losses written out in PyTorch's own operations.
Ours takes uint8 views and normalises them in the step; PyTorch is given normalised floats.

--torch: `default`, and `channels_last`, the order in memory that suits convolutions (ResNet only);
`fused` after a plus takes the optimizer's fused kernel (`channels_last+fused`).

As in the recipes, batch norm sees each view apart in ResNet-18 (PyTorch calls the network twice),
and both together after ViT-S, which is called once. Each contestant lives in a process of its own;
they take turns. Our ViT runs its blocks as in bench_step.py. Run it where nothing else runs.
"""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
import side_by_side

from ssljax import config as config_lib
from ssljax import environment, sharding, train
from ssljax import job as job_lib

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "timm", "numpy")
TEMPERATURE, REDUNDANCY = 0.5, 0.005
# model -> what it is called, pixels, encoder, optimizer, rate, whether batch norm sees both views.
MODELS: dict[str, tuple[str, int, dict, dict, float, bool]] = {
  "resnet18": (
    "ResNet-18, CIFAR stem", 32,
    dict(name="ssljax.models.resnet", variant="18", stem="cifar", zero_init=False),
    dict(name="ssljax.optim.sgd", weight_decay=5e-4), 1e-3, False,
  ),
  "vits": (
    "ViT-S/16", 96,
    dict(name="ssljax.models.vit", variant="S", patch=(16, 16), positions="learned", scan=True),
    dict(name="ssljax.optim.adamw", b1=0.9, b2=0.999, weight_decay=0.1), 1e-4, True,
  ),
}  # fmt: skip
# method -> what it is called, loss, widths of the projector, whether batch norm follows it.
METHODS: dict[str, tuple[str, dict, tuple[int, ...], bool]] = {
  "simclr": (
    "SimCLR", dict(name="ssljax.losses.nt_xent", temperature=TEMPERATURE), (512, 128), True,
  ),
  "barlow": (
    "Barlow Twins", dict(name="ssljax.losses.barlow_twins", redundancy_weight=REDUNDANCY),
    (2048, 2048), False,
  ),
}  # fmt: skip
PARTS = tuple(f"{method}_{model}" for model in MODELS for method in METHODS)


def make_job(part: str, batch: int, remat: str) -> job_lib.Job:
  """The job of a part; its images only say what shape they have."""
  method, model = part.split("_")
  _, pixels, encoder, optimizer, rate, together = MODELS[model]
  _, loss, projector, last = METHODS[method]
  if model == "vits":
    encoder = encoder | dict(remat=remat)
  config = config_lib.complete(dict(
    total_steps=1000, batch_size=batch, encoder=encoder, optimizer=optimizer,
    method=dict(
      name="ssljax.methods.two_view", loss=loss, projector=projector, projector_bias="none",
      projector_last="batch" if last else "none", norm_views="together" if together else "apart",
    ),
    data=dict(
      source={"image": np.zeros((batch, pixels, pixels, 3), np.uint8)},
      eval_train="", eval_test="",
      views=dict(name="ssljax.data.views.two_views", size=(pixels, pixels)),
    ),
    schedule=dict(name="ssljax.schedules.constant", base=rate, per=0), mesh=dict(devices=1),
  ))  # fmt: skip
  # A source that is handed over is described, not read: the views below are the batch.
  return job_lib.assemble(config, source=job_lib.open_source(config, "train"))


def our_step(part: str, batch: int, remat: str) -> Callable[[], Any]:
  """One step of a run on a ready batch: state donated, waited for."""
  job = make_job(part, batch, remat)
  views = np.random.default_rng(0).integers(0, 256, job.given["views"].shape, np.uint8)
  with jax.set_mesh(job.mesh):
    compiled, state = train.compiled_step(job), train.start(job)
    rows = {"views": views, "index": np.arange(batch, dtype=np.int32)}
    given = sharding.to_global(rows, job.mesh, batch)

  def step():
    nonlocal state
    state, metrics = compiled(state, given)
    return finite(float(metrics["loss"]))

  return step


def torch_step(part: str, batch: int, threads: int, manner: str) -> Callable[[], Any]:
  """The same step in eager PyTorch."""
  torch = side_by_side.import_torch(threads)
  method, model = part.split("_")
  _, pixels, _, _, rate, together = MODELS[model]
  _, _, sizes, last = METHODS[method]
  encoder = torch_encoder(model)
  network = torch.nn.Sequential(encoder, *projector(torch, encoder.num_features, sizes, last))
  network.train()
  order = torch.channels_last if "channels_last" in manner else torch.contiguous_format
  network = network.to(memory_format=order)
  views = torch.randn(2, batch, 3, pixels, pixels)
  one, two = (view.to(memory_format=order) for view in views)
  both = torch.cat([one, two])
  optimizer = torch_optimizer(torch, model, network, rate, "fused" in manner or None)
  loss_of = {"simclr": nt_xent, "barlow": barlow_twins}[method]

  def step():
    optimizer.zero_grad()
    z1, z2 = network(both).chunk(2) if together else (network(one), network(two))
    loss = loss_of(torch, z1, z2)
    loss.backward()
    optimizer.step()
    return finite(loss.item())

  return step


def torch_encoder(model: str) -> Any:
  """resnet18 of torchvision with a CIFAR stem, or ViT-S/16 of timm; pooled features."""
  if model == "vits":
    import timm

    return timm.create_model("vit_small_patch16_224", img_size=MODELS[model][1], num_classes=0)
  import torch
  import torchvision

  encoder = torchvision.models.resnet18()
  encoder.num_features = encoder.fc.in_features
  encoder.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
  encoder.maxpool = encoder.fc = torch.nn.Identity()
  return encoder


def projector(torch: Any, width: int, sizes: tuple[int, ...], last: bool) -> list[Any]:
  """Linear layers without bias; batch norm and ReLU between them, batch norm after the last."""
  layers = []
  for i, size in enumerate(sizes):
    layers.append(torch.nn.Linear(width, size, bias=False))
    if i < len(sizes) - 1:
      layers += [torch.nn.BatchNorm1d(size), torch.nn.ReLU(inplace=True)]
    elif last:
      layers.append(torch.nn.BatchNorm1d(size))
    width = size
  return layers


def torch_optimizer(torch: Any, model: str, network: Any, rate: float, fused: bool | None) -> Any:
  """SGD with momentum, or AdamW that does not decay one-dimensional parameters."""
  wanted = list(network.parameters())
  if model == "resnet18":
    return torch.optim.SGD(wanted, lr=rate, momentum=0.9, weight_decay=5e-4, fused=fused)
  groups = [
    {"params": [p for p in wanted if p.ndim > 1], "weight_decay": 0.1},
    {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
  ]
  return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), fused=fused)


def nt_xent(torch: Any, z1: Any, z2: Any) -> Any:
  """[b d], [b d] -> the mean over both anchors of each example."""
  z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
  scores = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
  other = torch.arange(len(z)).roll(len(z1))
  return torch.nn.functional.cross_entropy(scores, other)


def barlow_twins(torch: Any, z1: Any, z2: Any) -> Any:
  """[b d], [b d] -> the distance of the correlation [d d] from the identity."""

  def standard(z):
    return torch.nn.functional.batch_norm(z, None, None, training=True)

  c = standard(z1).T @ standard(z2) / len(z1)
  diagonal = c.diagonal()
  spread = c.square().sum() - diagonal.square().sum()
  return (1 - diagonal).square().sum() + REDUNDANCY * spread


def finite(loss: float) -> float:
  """The loss; a contestant whose numbers have blown up must not go on."""
  if not math.isfinite(loss):
    raise FloatingPointError(f"the loss is {loss}")
  return loss


def bench(part: str, args: argparse.Namespace) -> list[list[str]]:
  """Rows: ours, then each PyTorch contestant with its ratio to ours."""
  own = side_by_side.own_process
  jobs = {"ssljax": own(our_step, part, args.batch, args.remat)}
  for manner in filter(None, args.torch.split(",")):
    if "channels_last" not in manner or part.endswith("resnet18"):
      jobs[f"PyTorch eager, {manner}"] = own(torch_step, part, args.batch, args.threads, manner)
  seconds = side_by_side.alternate(jobs, args.repeats, args.warm, args.lead)
  rows = []
  for name, took in seconds.items():
    ratio = side_by_side.ratio(took, seconds["ssljax"])
    speed = args.batch / np.median(took)
    note = "1" if name == "ssljax" else f"ours {ratio:.2f}× as fast"
    rows.append([name, side_by_side.quartiles(took), f"{speed:.1f}", note])
  return rows


def run() -> None:
  environment.tune_cpu()  # as the command does; the contestants' processes inherit it
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--parts", default=",".join(PARTS))
  parser.add_argument("--batch", type=int, default=32, help="images, each seen twice")
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--warm", type=int, default=1)
  parser.add_argument("--lead", type=int, default=1, help="untimed steps before each timed one")
  parser.add_argument("--torch", default="default,channels_last")
  parser.add_argument("--threads", type=int, default=side_by_side.cores(), help="of PyTorch")
  parser.add_argument("--remat", default="dots", help="of our ViT: none, dots or full")
  parser.add_argument("--json", default="", help="write the table here, too: NAME.json, by part")
  args = parser.parse_args()
  parts = args.parts.split(",")
  if unknown := sorted({*parts} - {*PARTS}):
    parser.error(f"--parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
  where = side_by_side.machine(PACKAGES)
  for part in parts:
    method, model = part.split("_")
    name, pixels = MODELS[model][:2]
    title = f"{METHODS[method][0]}, {name}, {pixels} px, two views, batch {args.batch}, float32"
    header = ["step", "seconds: median (quartiles)", "images/s", "ratio of medians"]
    path = args.json and args.json.replace(".json", f"_{part}.json")
    side_by_side.report(f"{title}, training step", header, bench(part, args), where, path)


if __name__ == "__main__":
  run()
