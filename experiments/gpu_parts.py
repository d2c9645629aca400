"""The parts of bench_gpu.py: configs of the runs, and what each part measures."""

import json
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
import side_by_side

# size -> variant, patch, width, depth, heads
MAE = {"B": ("B", 16, 768, 12, 12), "L": ("L", 16, 1024, 24, 16), "H": ("H", 14, 1280, 32, 16)}
BATCH = {"mae_B": 1024, "mae_L": 512, "mae_H": 256, "barlow": 256, "simclr": 512, "start": 256}
PARTS = (
  "matmul", "mae_B", "torch_B", "mae_L", "torch_L", "mae_H", "torch_H", "barlow_S", "barlow_host",
  "barlow_L", "simclr_float32", "simclr_bfloat16", "start_cold", "start_warm",
)  # fmt: skip
WINDOWS, STEPS = 6, 10  # windows that count, steps of each
TINY_VIT = dict(width=32, depth=2, heads=2)


def noise(count: int, pixels: int) -> dict[str, np.ndarray]:
  """Pictures [count pixels pixels 3] in memory."""
  image = np.random.default_rng(0).integers(0, 256, (count, pixels, pixels, 3), np.uint8)
  return {"image": image}


def run_config(steps: int, windows: int, **parts: Any) -> dict:
  """A run of one uncounted window and `windows` others, without evaluation."""
  return dict(
    total_steps=steps * (windows + 1), log=dict(every=steps, tensorboard=False),
    eval=dict(every=0, figures=False), mesh=dict(devices=1), **parts,
  )  # fmt: skip


def mae(variant: str, batch: int, tiny: bool) -> dict:
  """configs/mae_vitb.py; tiny: the same of a toy size."""
  name, patch, *_ = MAE[variant]
  pixels, decoder = 224, dict(decoder_width=512, decoder_depth=8, decoder_heads=16)
  encoder = dict(name="ssljax.models.vit", variant=name, patch=(patch, patch), scan=True)
  if tiny:
    pixels, decoder = 32, dict(decoder_width=32, decoder_depth=1, decoder_heads=2)
    encoder |= TINY_VIT | dict(patch=(8, 8))
  return dict(
    batch_size=batch, dtype="bfloat16", encoder=encoder,
    method=dict(
      name="ssljax.methods.masked", layout="drop", head="decoder", target="normalised_pixels",
      loss="l2", **decoder,
    ),
    data=dict(
      source=noise(2 * batch, pixels), eval_train="", eval_test="", cache="device",
      hidden=dict(name="ssljax.data.masking.random", ratio=0.75), hidden_on="device",
    ),
    optimizer=dict(name="ssljax.optim.adamw", b1=0.9, b2=0.95, weight_decay=0.05),
    schedule=dict(name="ssljax.schedules.warmup_cosine", base=1.5e-4, per=256, warmup_steps=1),
  )  # fmt: skip


def barlow(variant: str, batch: int, cache: str, tiny: bool) -> dict:
  """configs/barlow_twins_r50.py with a ViT/16 and AdamW, all views made in the step."""
  pixels, stored, projector = 224, 256, (8192, 8192, 8192)
  encoder = dict(name="ssljax.models.vit", variant=variant, patch=(16, 16), scan=True)
  if variant == "L":
    encoder |= dict(remat="dots")  # without it 512 views keep some 85 GB
  if tiny:
    pixels, stored, projector = 32, 36, (32, 32, 32)
    encoder |= TINY_VIT | dict(patch=(8, 8))
  return dict(
    batch_size=batch, dtype="bfloat16", encoder=encoder,
    method=dict(
      name="ssljax.methods.two_view", projector=projector, projector_bias="none",
      loss=dict(name="ssljax.losses.barlow_twins", redundancy_weight=0.0051),
    ),
    data=dict(
      source=noise(4 * batch, stored), eval_train="", eval_test="", cache=cache, views_on="device",
      views=dict(
        name="ssljax.data.views.two_views", size=(pixels, pixels), scale=(0.08, 1.0),
        jitter=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2),
      ),
    ),
    optimizer=dict(name="ssljax.optim.adamw", weight_decay=0.05),
    schedule=dict(name="ssljax.schedules.warmup_cosine", base=1e-4, per=256, warmup_steps=1),
  )  # fmt: skip


def simclr(batch: int, dtype: str, tiny: bool) -> dict:
  """configs/simclr_cifar10.py, everything on the device."""
  encoder = dict(name="ssljax.models.resnet", variant="18", stem="cifar", zero_init=False)
  if tiny:
    encoder |= dict(width=8, blocks=(1, 1))
  return dict(
    batch_size=batch, dtype=dtype, encoder=encoder,
    method=dict(
      name="ssljax.methods.two_view", loss=dict(name="ssljax.losses.nt_xent", temperature=0.5),
      projector=(512, 128), projector_last="batch",
    ),
    data=dict(
      source=noise(4 * batch if tiny else 50_000, 32), eval_train="", eval_test="", cache="device",
      views_on="device",
      views=dict(
        name="ssljax.data.views.two_views", size=(32, 32), scale=(0.08, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1), blur=(0.0, 0.0), solarize=(0.0, 0.0),
      ),
    ),
    optimizer=dict(name="ssljax.optim.sgd", weight_decay=5e-4),
    schedule=dict(name="ssljax.schedules.warmup_cosine", base=0.06, per=128),
  )  # fmt: skip


def config_of(part: str, batch: int, tiny: bool) -> dict:
  """The config of a part's run."""
  part, *flags = part.split(":")
  kind, _, which = part.partition("_")
  steps, windows = (2, 2) if tiny else (STEPS, WINDOWS)
  if kind == "simclr":
    found = simclr(batch, which, tiny)
    steps = len(found["data"]["source"]["image"]) // batch  # a window is an epoch
    return run_config(steps, 2 if tiny else 3, **found)
  if kind == "start":
    return run_config(2, 0, **mae("B", batch, tiny))
  if kind == "mae":
    found = mae(which, batch, tiny)
  else:
    cache = "none" if which == "host" else "device"
    found = barlow("L" if which == "L" else "S", batch, cache, tiny)
  for flag in flags:
    found["encoder"] |= dict(scan=False) if flag == "noscan" else dict(remat=flag)
  return run_config(steps, windows, **found)


def measure(part: str, batch: int, began: float, tiny: bool) -> dict:
  """The row of a part. `began`: when its process was started, seconds since 1970."""
  batch = batch or batch_of(part, tiny)
  if part == "matmul":
    found = bench_matmul(tiny)
  elif part.startswith("torch_"):
    found = bench_torch(part, batch, began, tiny)
  else:
    found = bench_run(part, batch, began, tiny)
  return found | {"batch": batch, "tiny": tiny}


def batch_of(part: str, tiny: bool) -> int:
  """Pictures in a batch, where none is asked for."""
  name = part.partition(":")[0].replace("torch", "mae")
  return 8 if tiny else BATCH.get(name) or BATCH.get(name.split("_")[0], 0)


def bench_run(part: str, batch: int, began: float, tiny: bool) -> dict:
  """One run of the project's own, and what it does not write down itself."""
  import jax

  from ssljax import train

  jobs, row, compiled_step = [], {}, train.compiled_step

  def watched(job):
    step = compiled_step(job)
    jobs.append(job)

    def first(state, given):
      out = step(state, given)
      if "first_step_s" not in row:
        jax.block_until_ready(out)
        row["first_step_s"] = time.time() - began
      return out

    return first

  train.compiled_step, train.save = watched, lambda *_: None
  with tempfile.TemporaryDirectory() as workdir:
    train.run(config_of(part, batch, tiny), workdir)
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  with jax.set_mesh(jobs[0].mesh):
    row["flops"] = train.model_flops(jobs[0])
  found = [json.loads(line) for line in lines[1:]]
  memory = jax.local_devices()[0].memory_stats() or {}
  return row | {
    "device": jax.devices()[0].device_kind,
    "step_ms": [one["throughput/step_ms"] for one in found],
    "data_wait": [one["throughput/data_wait"] for one in found],
    "steps": jobs[0].config["log"]["every"],
    "peak_bytes": memory.get("peak_bytes_in_use"),
  }


def bench_torch(part: str, batch: int, began: float, tiny: bool) -> dict:
  """MAE by transformers, compiled, in windows of as many steps as ours."""
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cpu":
    side_by_side.import_torch(side_by_side.cores())
  from transformers import ViTMAEConfig, ViTMAEForPreTraining

  name, _, mode = part.partition(":")
  torch.set_float32_matmul_precision("high")
  sizes = torch_sizes(name.split("_")[1], tiny)
  config = ViTMAEConfig(**sizes, norm_pix_loss=True, mask_ratio=0.75, attn_implementation="sdpa")
  model = ViTMAEForPreTraining(config).train().to(device)
  wanted = [p for p in model.parameters() if p.requires_grad]
  groups = [
    {"params": [p for p in wanted if p.ndim > 1], "weight_decay": 0.05},
    {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
  ]
  adamw = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
  pictures = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
  compiled = torch.compile(model, mode=mode or None)

  def step():
    with torch.autocast(device, torch.bfloat16):
      loss = compiled(pictures).loss
    loss.backward()
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return loss

  step().item()
  first = time.time() - began
  steps, windows = (2, 2) if tiny else (STEPS, WINDOWS)
  return {
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "first_step_s": first,
    "step_ms": torch_windows(step, steps, windows),
    "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
  }


def torch_sizes(variant: str, tiny: bool) -> dict[str, int]:
  """Arguments of ViTMAEConfig; its decoder's defaults are MAE's."""
  _, patch, width, depth, heads = MAE[variant]
  sizes = dict(
    hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
    intermediate_size=4 * width, patch_size=patch,
  )  # fmt: skip
  if not tiny:
    return sizes
  return dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    patch_size=8, image_size=32, decoder_hidden_size=32, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=128,
  )  # fmt: skip


def torch_windows(step: Any, steps: int, windows: int) -> list[float]:
  """Milliseconds a step of each window after the first one."""
  took = []
  for _ in range(windows + 1):
    begin = time.perf_counter()
    for _ in range(steps):
      loss = step()
    if not np.isfinite(loss.item()):  # also waits for the device
      raise FloatingPointError("the loss of PyTorch is not finite")
    took.append(1000 * (time.perf_counter() - begin) / steps)
  return took[1:]


def bench_matmul(tiny: bool) -> dict:
  """TFLOP/s of [n n] @ [n n] in bf16, sums in float32, by n; the product is the next one's left."""
  import jax
  import jax.numpy as jnp

  found = {}
  for n in (128, 256) if tiny else (4096, 8192, 16384):
    rounds = 4 if tiny else 2 * (16384 // n) ** 2
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (n, n), jnp.bfloat16)
    w = jax.random.normal(keys[1], (n, n), jnp.bfloat16) * jnp.bfloat16(n**-0.5)
    chain = jax.jit(lambda x, w, rounds=rounds: jax.lax.fori_loop(0, rounds, lambda _, x: x @ w, x))
    took = []
    for _ in range(8):
      begin = time.perf_counter()
      jax.block_until_ready(chain(x, w))
      took.append(time.perf_counter() - begin)
    found[str(n)] = 2 * n**3 * rounds / float(np.median(took[2:])) / 1e12
  return {"device": jax.devices()[0].device_kind, "tflops": found}
