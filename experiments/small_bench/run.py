"""Pre-trains every method of `methods.py` for some minutes and writes one table.

  python experiments/small_bench/run.py --data=cifar10.npz [--fashion=fashion_mnist.npz]
  python experiments/small_bench/run.py --data=cifar10.npz --methods=mae,simclr --seeds=0
  python experiments/small_bench/run.py --table

cifar10.npz: `experiments/cifar10_npz.py` writes it; fashion_mnist.npz: train_images, train_labels.
Every run is a process and a workdir of its own. The same command goes on where a kill ended it, and
leaves out what is finished. Config and metrics of each finished run are kept in `results/`, the
table in `results.md`. k-NN (k 20, T .1) and linear probe of raw pixels and of the untrained encoder
are measured once for each encoder, set of pictures and seed.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import methods  # noqa: E402

SCORES = {"k-NN": "knn_k20_T0.1/top1", "linear": "linear/top1"}
COLUMNS = (
  "method", "encoder", "steps", "k-NN", "untrained k-NN", "linear", "untrained linear", "rank",
  "images/s", "seeds",
)  # fmt: skip


def train(method: str, data: str, file: str, seed: int, steps: int, workdir: pathlib.Path) -> None:
  """One run, in this process."""
  from ssljax import environment
  from ssljax import train as train_lib

  environment.prepare()
  train_lib.run(methods.config(method, data, file, seed, steps), workdir)


def records(folder: pathlib.Path) -> list[dict]:
  from ssljax.records import read_metrics

  path = folder / "metrics.jsonl"
  return read_metrics(path) if path.exists() else []


def finished(folder: pathlib.Path) -> bool:
  """Whether a run is trained to its end and judged."""
  kept = folder / "config.json"
  if not kept.exists():
    return False
  total = json.loads(kept.read_text())["total_steps"]
  key = f"eval/{SCORES['linear']}"
  return any(r["step"] == total and key in r for r in records(folder))


def run_all(flags: argparse.Namespace) -> bool:
  """Every run that is not finished, one after the other; -> whether all are."""
  files = {"cifar10": flags.data, "fashion": flags.fashion}
  good = True
  for data, file in files.items():
    names = [n for n in flags.methods if data == "cifar10" or n in methods.FASHION]
    for name, seed in ((n, s) for s in flags.seeds for n in names if file):
      label = f"{name}_{seed}" if data == "cifar10" else f"{data}_{name}_{seed}"
      kept, workdir = flags.results / label, flags.workdirs / label
      if finished(kept):
        continue
      print(f"--- {label}", flush=True)
      good &= run_one(flags, name, data, file, seed, workdir)
      if finished(workdir):
        keep(workdir, kept)
  return good


def run_one(flags, name: str, data: str, file: str, seed: int, workdir: pathlib.Path) -> bool:
  """A process for one run, which shares the baselines of its encoder; -> whether it ended well."""
  workdir.mkdir(parents=True, exist_ok=True)
  encoder = json.dumps(methods.config(name, data, file, seed)["encoder"], sort_keys=True)
  digest = hashlib.sha256(encoder.encode()).hexdigest()[:8]
  shared = flags.workdirs / f"baselines_{data}_{digest}_{seed}.json"
  if shared.exists() and not (workdir / "baselines.json").exists():
    shutil.copy(shared, workdir / "baselines.json")
  command = [sys.executable, __file__, "--one", name, data, file, str(seed), str(workdir)]
  ended = subprocess.run([*command, f"--steps={flags.steps}"]).returncode == 0
  if (workdir / "baselines.json").exists():
    shutil.copy(workdir / "baselines.json", shared)
  return ended


def keep(workdir: pathlib.Path, folder: pathlib.Path) -> None:
  """What is kept of a finished run."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in ("config.json", "metrics.jsonl"):
    shutil.copy(workdir / name, folder / name)
  machine = json.loads((workdir / "environment.json").read_text())
  del machine["command"]  # this script's, with the folders of one machine
  (folder / "environment.json").write_text(json.dumps(machine, indent=2) + "\n")


def row(folders: list[pathlib.Path]) -> dict[str, str]:
  """The mean over seeds of what the runs of one method ended with, in the table's columns."""
  last = [{k: v for r in records(folder) for k, v in r.items()} for folder in folders]
  config = json.loads((folders[0] / "config.json").read_text())

  def text(key, scale=1.0, form="{:.1f}"):
    values = [one[key] * scale for one in last if one.get(key) is not None]
    if not values:
      return "–"
    spread = f" ± {statistics.pstdev(values):.1f}" if len(values) > 1 and scale == 100 else ""
    return form.format(statistics.mean(values)) + spread

  scores = {name: text(f"eval/{key}", 100) for name, key in SCORES.items()}
  return scores | {
    "encoder": config["encoder"]["name"].rpartition(".")[2], "seeds": str(len(folders)),
    "steps": str(config["total_steps"]),
    "rank": text("eval/rank/effective"),
    "images/s": text("throughput/images_per_sec", form="{:.0f}"),
  } | {f"{name} {score}": text(f"eval/{kind}/{key}", 100) for score, key in SCORES.items()
       for kind, name in (("baseline_random", "untrained"), ("baseline_pixels", "pixels"))
  }  # fmt: skip


def table(results: pathlib.Path) -> str:
  """Markdown: a line for each method, after that of raw pixels."""
  rows = {}
  for name in [*methods.METHODS, *(f"fashion_{name}" for name in methods.FASHION)]:
    folders = sorted(f for f in results.glob(f"{name}_[0-9]*") if finished(f))
    if folders:
      rows[name] = row(folders)
  lines = []
  for data in methods.DATA:
    here = {n: r for n, r in rows.items() if n.startswith("fashion_") == (data == "fashion")}
    if not here:
      continue
    first = next(iter(here.values()))
    raw = {"raw pixels": {score: first[f"pixels {score}"] for score in SCORES}}
    lines += [f"\n## {data}\n", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, found in (raw | here).items():
      cells = {"method": name.removeprefix("fashion_")} | found
      lines.append("| " + " | ".join(cells.get(column, "–") for column in COLUMNS) + " |")
  return "\n".join(lines).strip() + "\n"


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--data", default="", help="npz of CIFAR-10")
  parser.add_argument("--fashion", default="", help="npz of Fashion-MNIST")
  parser.add_argument("--methods", default=",".join(methods.METHODS))
  parser.add_argument("--seeds", default="0,1")
  parser.add_argument("--steps", type=int, default=0, help="0: the method's own number")
  parser.add_argument("--workdirs", type=pathlib.Path, default=pathlib.Path("runs/small_bench"))
  parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
  parser.add_argument("--table", action="store_true", help="only write the table again")
  parser.add_argument("--one", nargs=5, default=(), help=argparse.SUPPRESS)
  flags = parser.parse_args()
  flags.methods = flags.methods.split(",")
  flags.seeds = [int(seed) for seed in flags.seeds.split(",")]
  if unknown := [name for name in flags.methods if name not in methods.METHODS]:
    parser.error(f"no method {', '.join(unknown)}; there are {', '.join(methods.METHODS)}")
  if not (flags.data or flags.fashion or flags.table or flags.one):
    parser.error("--data=FILE.npz or --fashion=FILE.npz is needed")
  return flags


def main() -> int:
  flags = parse()
  if flags.one:
    name, data, file, seed, workdir = flags.one
    train(name, data, file, int(seed), flags.steps, pathlib.Path(workdir))
    return 0
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  good = flags.table or run_all(flags)
  text = table(flags.results)
  (flags.results.parent / "results.md").write_text(text)
  print(text)
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main())
