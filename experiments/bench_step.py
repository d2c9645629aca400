"""MAE's training step on a CPU: beside PyTorch, and with all tokens visible against a quarter.

  python experiments/bench_step.py                                    both parts, ViT-B/16
  python experiments/bench_step.py --parts=torch --torch=default,fused --repeats=7
  python experiments/bench_step.py --parts=hidden --variant=L --batch=8 --repeats=3

torch: forward, backward and AdamW with its weight-decay mask, float32, in the project's compiled
step with donated state, against ViTMAEForPreTraining of transformers in eager PyTorch (`default`:
torch.optim.AdamW as it comes; `fused`: its fused kernel). Ours takes uint8 pictures and normalises
them in the step; PyTorch is given float pictures that are normalised already.
hidden: our step with all places but one visible (195 of 196) against 25 % visible (49); the decoder
works on all 196 places in both. The FLOP ratio is that of the two steps by `ssljax.flops`: matrix
multiplications, forward and backward.

Each contestant lives in a process of its own; they take turns. Ours runs its blocks as a scan and
keeps matrix products only (`encoder.scan=True`, `encoder.remat="dots"`: least memory traffic).
Run it where nothing else runs.
"""

import argparse
import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
import side_by_side

from ssljax import config as config_lib
from ssljax import environment, main, sharding, train
from ssljax import job as job_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
# `random` hides 196 - int(196 · (1 - ratio)) places: 147, and 1.
RATIOS = {"25 % visible": 0.75, "all visible": 0.004}
SIZES = {"B": ("vitb16", 768, 12, 12), "L": ("vitl16", 1024, 24, 16)}


def make_job(variant: str, batch: int, ratio: float, remat: str) -> job_lib.Job:
  """The job of configs/mae_vitb.py in float32 on noise in memory."""
  config = main.load_config(f"{ROOT / 'configs' / 'mae_vitb.py'}:{SIZES[variant][0]}")
  config = config_lib.plain(config)
  rng = np.random.default_rng(0)
  config["data"] |= {
    "source": {"image": rng.integers(0, 256, (batch, 224, 224, 3), np.uint8)},
    "eval_train": "", "eval_test": "", "views": None, "eval_views": None,
    "hidden": dict(name="ssljax.data.masking.random", ratio=ratio),
  }  # fmt: skip
  config["encoder"] |= dict(scan=True, remat=remat)
  config |= dict(batch_size=batch, dtype="float32", mesh=dict(devices=1), eval=dict(every=0))
  config["schedule"]["warmup_steps"] = 10
  return job_lib.assemble(config_lib.complete(config))


def our_step(variant: str, batch: int, ratio: float, remat: str) -> Callable[[], Any]:
  """One step of a run: next batch in, state donated, waited for."""
  job = make_job(variant, batch, ratio, remat)
  with jax.set_mesh(job.mesh):
    compiled, state = train.compiled_step(job), train.start(job)
    with job.batches(0) as batches:
      batch = sharding.to_global(next(batches), job.mesh, job.config["batch_size"])

  def step():
    nonlocal state
    state, metrics = compiled(state, batch)
    return jax.block_until_ready(metrics["loss"])

  return step


def torch_step(variant: str, batch: int, threads: int, optimizer: str) -> Callable[[], Any]:
  """The same step by transformers, eager, with the decay groups that MAE uses."""
  torch = side_by_side.import_torch(threads)
  from transformers import ViTMAEConfig, ViTMAEForPreTraining

  _, width, depth, heads = SIZES[variant]
  config = ViTMAEConfig(
    hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
    intermediate_size=4 * width, mask_ratio=0.75, norm_pix_loss=True,
  )  # fmt: skip
  model = ViTMAEForPreTraining(config).train()
  wanted = [p for p in model.parameters() if p.requires_grad]
  groups = [
    {"params": [p for p in wanted if p.ndim > 1], "weight_decay": 0.05},
    {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
  ]
  adamw = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=optimizer == "fused" or None)
  pictures = torch.randn(batch, 3, 224, 224)

  def step():
    adamw.zero_grad()
    loss = model(pictures).loss
    loss.backward()
    adamw.step()
    return loss.item()

  return step


def bench_torch(args: argparse.Namespace) -> list[list[str]]:
  """Rows: ours, then each PyTorch contestant with its ratio to ours."""
  own = side_by_side.own_process
  jobs = {"ssljax": own(our_step, args.variant, args.batch, 0.75, args.remat)}
  for optimizer in filter(None, args.torch.split(",")):
    name = f"PyTorch eager, AdamW {optimizer}"
    jobs[name] = own(torch_step, args.variant, args.batch, args.threads, optimizer)
  seconds = side_by_side.alternate(jobs, args.repeats, args.warm, args.lead)
  rows = []
  for name, took in seconds.items():
    ratio = side_by_side.ratio(took, seconds["ssljax"])
    speed = args.batch / np.median(took)
    note = "1" if name == "ssljax" else f"ours {ratio:.2f}× as fast"
    rows.append([name, side_by_side.quartiles(took), f"{speed:.1f}", note])
  return rows


def bench_hidden(args: argparse.Namespace) -> list[list[str]]:
  """Rows: all visible and a quarter visible; the ratio of times beside that of FLOPs."""
  steps, flops = {}, {}
  for name, ratio in RATIOS.items():
    sizes = args.variant, args.batch, ratio, args.remat
    steps[name] = side_by_side.own_process(our_step, *sizes)
    flops[name] = train.model_flops(make_job(*sizes))
  seconds = side_by_side.alternate(steps, args.repeats, args.warm, args.lead)
  quarter, whole = RATIOS
  ratio = side_by_side.ratio(seconds[whole], seconds[quarter])
  ideal = flops[whole] / flops[quarter]
  notes = {whole: "1", quarter: f"{ratio:.2f}×; FLOPs {ideal:.2f}×; {ratio / ideal:.0%} of that"}
  rows = []
  for name, took in seconds.items():
    rate = flops[name] / np.median(took) / 1e9
    numbers = f"{flops[name] / 1e12:.3f} TFLOP, {rate:.0f} GFLOP/s"
    rows.append([name, side_by_side.quartiles(took), numbers, notes[name]])
  return rows


def run() -> None:
  environment.tune_cpu()  # as the command does; the contestants' processes inherit it
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--parts", default="torch,hidden")
  parser.add_argument("--variant", default="B", choices=SIZES)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--warm", type=int, default=1)
  parser.add_argument("--lead", type=int, default=1, help="untimed steps before each timed one")
  parser.add_argument("--torch", default="default,fused")
  parser.add_argument("--threads", type=int, default=side_by_side.cores(), help="of PyTorch")
  parser.add_argument("--remat", default="dots", help="encoder.remat of ours: none, dots or full")
  parser.add_argument("--json", default="", help="write the table here, too")
  args = parser.parse_args()
  where = side_by_side.machine(PACKAGES)
  model = f"MAE ViT-{args.variant}/16, 224 px, batch {args.batch}, float32"
  if "torch" in args.parts:
    header = ["step", "seconds: median (quartiles)", "images/s", "ratio of medians"]
    path = args.json and args.json.replace(".json", "_torch.json")
    side_by_side.report(f"{model}, training step", header, bench_torch(args), where, path)
  if "hidden" in args.parts:
    header = ["encoder sees", "seconds: median (quartiles)", "model work", "speed-up"]
    path = args.json and args.json.replace(".json", "_hidden.json")
    side_by_side.report(f"{model}, tokens visible", header, bench_hidden(args), where, path)


if __name__ == "__main__":
  run()
