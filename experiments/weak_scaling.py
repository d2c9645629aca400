"""Weak scaling by plan: the same batch a device on more and more devices; nothing is trained.

  python experiments/weak_scaling.py --configs=configs/mae_vitb.py:vitl16 --batch=16
  python experiments/weak_scaling.py --configs=a.py,b.py --topologies=v5e:2x4,v5e:8x8

For each config and topology the training step is compiled ahead of time (`ssljax.plan`, libtpu).
Predicted time: matmuls at the stated MFU, beside them memory and links at full speed. `overlapped`
is the longest of the three, `in turn` their sum: what a run takes lies between. Efficiency is what
the same step would take if devices exchanged nothing (its own matmuls and memory alone, combined in
the same way) divided by the predicted time: at most 100 %. It is not relative to the smallest
topology, whose chips have fewer links and hold more of a sharded state. One process for each
compile; --keep names a folder of plans, of which none is made twice.
"""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADER = (
  "config", "topology", "devices", "compute ms", "memory ms", "links ms", "sent MiB", "bound by",
  "overlapped ms", "efficiency", "in turn ms", "efficiency",
)  # fmt: skip


def planned(
  config: str, topology: str, batch: int, mfu: float, settings: list[str], keep: str = ""
) -> dict:
  """The plan of one config on one topology: made by a process of its own, or found in `keep`."""
  devices = math.prod(map(int, topology.split(":")[1].split("x")))
  with tempfile.TemporaryDirectory() as folder:
    words = [config, topology, f"batch{batch}", *settings]
    name = re.sub(r"[^\w.=]+", "_", " ".join(words)) + ".json"
    file = pathlib.Path(keep or folder).resolve() / name
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [
      sys.executable, "-m", "ssljax.plan", f"--config={config}", f"--topology={topology}",
      f"--mfu={mfu}", f"--json={file}", f"--config.batch_size={batch * devices}",
      "--config.eval.batch_size=0", *settings,
    ]  # fmt: skip
    if not file.exists():
      done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
      if not file.exists():
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(file.read_text())


def times(found: dict, mfu: float) -> dict[str, float]:
  """Seconds of a step by resource; matmuls at the assumed MFU."""
  return found["seconds"] | {"compute": found["seconds"]["compute"] / mfu}


def rows(config: str, plans: dict[str, dict], mfu: float) -> list[list[str]]:
  """One row a topology; efficiencies against the same step without its communication."""
  made = []
  for topology, found in plans.items():
    if not found["fits"]:
      made.append([config, topology, *["does not fit"] * (len(HEADER) - 2)])
      continue
    seconds = times(found, mfu)
    alone = seconds["compute"], seconds["memory"]
    bound = max(seconds, key=lambda key: seconds[key])
    sent = sum(found["sent_bytes"].values()) / 2**20
    row = [
      config, topology, str(math.prod(found["mesh"].values())),
      *(f"{1000 * seconds[key]:.1f}" for key in ("compute", "memory", "links")), f"{sent:,.0f}",
      bound,
    ]  # fmt: skip
    for combined in (max, sum):
      whole = combined(seconds.values())
      row += [f"{1000 * whole:.1f}", f"{combined(alone) / whole:.1%}"]
    made.append(row)
  return made


def run() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--configs", default="configs/mae_vitb.py:vitl16")
  parser.add_argument("--topologies", default="v5e:2x4,v5e:8x8,v5e:16x16")
  parser.add_argument("--batch", type=int, default=16, help="of a device")
  parser.add_argument("--mfu", type=float, default=0.5)
  parser.add_argument("--keep", default="", help="folder of plans")
  flags, settings = parser.parse_known_args()
  print("| " + " | ".join(HEADER) + " |\n" + "| --- " * len(HEADER) + "|", flush=True)
  for config in flags.configs.split(","):
    given = flags.batch, flags.mfu, settings, flags.keep
    plans = {name: planned(config, name, *given) for name in flags.topologies.split(",")}
    for row in rows(config, plans, flags.mfu):
      print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
  run()
