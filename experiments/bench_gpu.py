"""Training on a GPU, through `train.run`, and MAE beside PyTorch: images/s, MFU, memory, start.

  python experiments/bench_gpu.py                                     everything, one table
  python experiments/bench_gpu.py --parts=matmul,mae_L,torch_L        these; earlier ones stay
  python experiments/bench_gpu.py --parts=                            the table once more
  JAX_PLATFORMS=cpu python experiments/bench_gpu.py --tiny            the script itself, on a CPU

Needs jax, flax, optax and orbax; for the rows of PyTorch torch and transformers; no TensorFlow.
Each part is a process of its own with a time limit; what it measured, or why it failed, is in the
JSON before the next one begins.

matmul: bf16 products of random square matrices, the best of three sizes: what MFU is measured by.
mae_B, mae_L, mae_H: configs/mae_vitb.py in bf16 on pictures of 224 px that lie on the device,
hidden places drawn in the step. `mae_L:noscan` runs the blocks without a scan, `mae_H:dots` with
that rematerialisation.
torch_B, torch_L, torch_H: ViTMAEForPreTraining of transformers with torch.compile, bf16 autocast,
fused attention (sdpa) and fused AdamW, on a normalised batch that lies on the device.
`torch_L:max-autotune` is a mode of torch.compile. TFLOP/s and MFU are by our count of the model.
barlow_S, barlow_L: Barlow Twins as in configs/barlow_twins_r50.py, but a ViT/16 and AdamW, bf16:
two augmented views of 224 px made in the step from pictures of 256 px on the device; L with
encoder.remat="dots". barlow_host: ViT-S, the pictures come from the host. Images/s counts pictures,
each seen twice.
simclr_float32, simclr_bfloat16: configs/simclr_cifar10.py on 50,000 pictures of 32 px, all on the
device, epoch by epoch. The projection is of training alone, without evaluation.
start_cold, start_warm: mae_B from the start of the process to the end of the first step, without
and with the compiled programs of the start before.

A run times its own steps, in windows of several; the first window does not count. The state is not
saved at the end. `peak` is the framework's own count of bytes in use.
"""

import argparse
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import gpu_parts
import numpy as np
import side_by_side

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "numpy")
HEADER = [
  "part", "batch", "images/s", "ms a step: median (quartiles)", "TFLOP/s", "of measured peak",
  "peak GiB", "first step s", "note",
]  # fmt: skip


def run_part(part: str, batch: int, limit: float, tiny: bool, cache: str) -> dict:
  """The row of a part, measured by a process of its own; "failed" says why there is none."""
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "row.json"
    order = dict(part=part, batch=batch, tiny=tiny, began=time.time())
    command = [sys.executable, __file__, f"--child={json.dumps(order)}", f"--json={file}"]
    process = subprocess.Popen(
      command, env=child_environment(part, cache), text=True, errors="replace", process_group=0,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    why = ""
    try:
      log = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)  # compilers that it started go, too
      log, why = process.communicate()[0], f"over {limit:g} s"
    row = {"date": datetime.date.today().isoformat(), "tiny": tiny}
    if file.exists():
      return row | json.loads(file.read_text())
  lines = [line for line in log.splitlines() if line.strip()]
  print("\n".join(lines[-15:]), file=sys.stderr)
  last = lines[-1][:200] if lines else f"exit status {process.returncode}"
  return row | {"failed": why or last, "log": lines[-60:]}


def child_environment(part: str, cache: str) -> dict[str, str]:
  """That of this process; the package is found without being installed."""
  paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  changed = {"PYTHONPATH": os.pathsep.join(paths)}
  if part.startswith("start_"):
    changed["JAX_COMPILATION_CACHE_DIR"] = cache
  return os.environ | changed


def table(rows: dict[str, dict]) -> list[list[str]]:
  """The cells of all parts that there are, in the order of PARTS."""
  known = [part for part in gpu_parts.PARTS if part in rows]
  order = known + [part for part in rows if part not in known]
  return [cells(part, rows) for part in order]


def cells(part: str, rows: dict[str, dict]) -> list[str]:
  """One line; "–" where nothing was measured."""
  row = rows[part]
  if "failed" in row:
    return [part, *["–"] * (len(HEADER) - 2), f"failed: {row['failed']}"]
  if part == "matmul":
    sizes = ", ".join(f"{n}: {rate:.4g}" for n, rate in row["tflops"].items())
    return [part, *["–"] * 3, f"{peak(rows):.4g}", "1", *["–"] * 2, f"{sizes}; {row['device']}"]
  size = row["peak_bytes"]
  memory = f"{size / 2**30:.1f}" if size else "–"
  ends = [memory, f"{row['first_step_s']:.1f}", note(part, rows)]
  if not row["step_ms"]:
    return [part, str(row["batch"]), *["–"] * 4, *ends]
  ms, work = float(np.median(row["step_ms"])), flops(part, rows)
  rate = work / ms / 1e9 if work else 0.0
  share = f"{rate / peak(rows):.1%}" if rate and peak(rows) else "–"
  times = side_by_side.quartiles(np.array(row["step_ms"]))
  speed = f"{1000 * row['batch'] / ms:,.0f}"
  return [part, str(row["batch"]), speed, times, f"{rate:.4g}" if rate else "–", share, *ends]


def peak(rows: dict[str, dict]) -> float:
  """Measured TFLOP/s of a matmul, 0 if it was not."""
  return max(rows.get("matmul", {}).get("tflops", {}).values(), default=0.0)


def flops(part: str, rows: dict[str, dict]) -> float:
  """Model FLOPs of a step; PyTorch's are those of our row of the same model, 0 without one."""
  row, ours = rows[part], twin(part, rows)
  return row.get("flops") or row["batch"] * ours.get("flops", 0.0) / ours.get("batch", 1)


def twin(part: str, rows: dict[str, dict]) -> dict:
  """Our row of the model that a row of PyTorch has, the one without flags first; {} if none."""
  name = part.partition(":")[0].replace("torch_", "mae_")
  same = [key for key in (name, *rows) if key.partition(":")[0] == name]
  return next((rows[key] for key in same if "flops" in rows.get(key, {})), {})


def note(part: str, rows: dict[str, dict]) -> str:
  """What a part is compared with or projected to."""
  row, ours = rows[part], twin(part, rows)
  if not row["step_ms"]:
    return "start alone"
  image = float(np.median(row["step_ms"])) / row["batch"]
  if part.startswith("torch_") and ours:
    return f"ours {image * ours['batch'] / np.median(ours['step_ms']):.2f}× as fast"
  if part.startswith("simclr_"):
    epoch = image * row["batch"] * row["steps"] / 1000
    return f"{epoch:.2f} s an epoch of {row['steps']} steps, {epoch * 200 / 60:.1f} min for 200"
  wait = float(np.median(row.get("data_wait", [0.0])))
  return f"waits for data {wait:.1%}" if part.startswith("barlow") else ""


def kept_rows(file: pathlib.Path, tiny: bool) -> dict[str, dict]:
  """Rows of earlier calls with sizes like these."""
  if not file.exists():
    return {}
  rows = json.loads(file.read_text())["parts"]
  return {part: row for part, row in rows.items() if row["tiny"] == tiny}


def write(file: pathlib.Path, where: dict, rows: dict[str, dict]) -> None:
  """Writes the JSON, whole or not at all."""
  file.parent.mkdir(parents=True, exist_ok=True)
  part = file.with_name(f"{file.name}.part")
  part.write_text(json.dumps({"where": where, "parts": rows}, indent=1, ensure_ascii=False) + "\n")
  part.replace(file)


def run() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--parts", default=",".join(gpu_parts.PARTS))
  parser.add_argument("--batch", type=int, default=0, help="0: that of the part")
  parser.add_argument("--limit", type=float, default=240.0, help="seconds for each part")
  parser.add_argument("--tiny", action="store_true", help="toy sizes")
  parser.add_argument("--json", default="runs/bench_gpu.json")
  parser.add_argument("--child", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  file = pathlib.Path(args.json)
  if args.child:
    file.write_text(json.dumps(gpu_parts.measure(**json.loads(args.child))))
    return
  parts = [part for part in args.parts.split(",") if part]
  if unknown := [part for part in parts if part.partition(":")[0] not in gpu_parts.PARTS]:
    parser.error(f"--parts: {', '.join(unknown)}; there are {', '.join(gpu_parts.PARTS)}")
  where, rows = side_by_side.machine(PACKAGES), kept_rows(file, args.tiny)
  with tempfile.TemporaryDirectory() as cache:
    for part in parts:
      rows[part] = run_part(part, args.batch, args.limit, args.tiny, cache)
      write(file, where, rows)
      print(" | ".join(cells(part, rows)), flush=True)
  side_by_side.report("Training on a GPU", HEADER, table(rows), where, "")


if __name__ == "__main__":
  run()
