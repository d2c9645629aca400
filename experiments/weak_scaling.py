"""Weak scaling by plan: the same batch a device on more and more devices; nothing is trained.

  python experiments/weak_scaling.py --configs=configs/mae_vitb.py:vitl16 --batch=16
  python experiments/weak_scaling.py --configs=a.py,b.py --topologies=v5e:2x4,v5e:8x8

For each config and topology the training step is compiled ahead of time (`ssljax.plan`, libtpu).
Predicted time: matmuls at the stated MFU, beside them memory and links at full speed. `overlap` is
the longest of the three, `in turn` their sum: what a run takes lies between. Efficiency is the time
on the first topology divided by that on this one. One process for each compile.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADER = (
  "config", "topology", "devices", "compute ms", "memory ms", "links ms", "sent MiB", "bound by",
  "efficiency: overlap", "in turn",
)  # fmt: skip


def planned(config: str, topology: str, batch: int, mfu: float, settings: list[str]) -> dict:
  """The plan of one config on one topology, made by a process of its own."""
  devices = math.prod(map(int, topology.split(":")[1].split("x")))
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "plan.json"
    command = [
      sys.executable, "-m", "ssljax.plan", f"--config={config}", f"--topology={topology}",
      f"--mfu={mfu}", f"--json={file}", f"--config.batch_size={batch * devices}",
      "--config.eval.batch_size=0", *settings,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if not file.exists():
      raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(file.read_text())


def times(found: dict, mfu: float) -> dict[str, float]:
  """Seconds of a step by resource; matmuls at the assumed MFU."""
  return found["seconds"] | {"compute": found["seconds"]["compute"] / mfu}


def rows(config: str, plans: dict[str, dict], mfu: float) -> list[list[str]]:
  """One row a topology; efficiencies against the first."""
  made, first = [], None
  for topology, found in plans.items():
    if not found["fits"]:
      made.append([config, topology, *["does not fit"] * (len(HEADER) - 2)])
      continue
    seconds = times(found, mfu)
    both = max(seconds.values()), sum(seconds.values())
    first = first or both
    bound = max(seconds, key=lambda key: seconds[key])
    sent = sum(found["sent_bytes"].values()) / 2**20
    made.append([
      config, topology, str(math.prod(found["mesh"].values())),
      *(f"{1000 * seconds[key]:.1f}" for key in ("compute", "memory", "links")), f"{sent:,.0f}",
      bound, *(f"{a / b:.1%}" for a, b in zip(first, both)),
    ])  # fmt: skip
  return made


def run() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--configs", default="configs/mae_vitb.py:vitl16")
  parser.add_argument("--topologies", default="v5e:2x4,v5e:8x8,v5e:16x16")
  parser.add_argument("--batch", type=int, default=16, help="of a device")
  parser.add_argument("--mfu", type=float, default=0.5)
  flags, settings = parser.parse_known_args()
  print("| " + " | ".join(HEADER) + " |\n" + "| --- " * len(HEADER) + "|", flush=True)
  for config in flags.configs.split(","):
    given = flags.batch, flags.mfu, settings
    plans = {name: planned(config, name, *given) for name in flags.topologies.split(",")}
    for row in rows(config, plans, flags.mfu):
      print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
  run()
