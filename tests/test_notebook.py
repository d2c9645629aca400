"""The quickstart notebook: its cells, in order, in a process of their own, in a short form."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ssljax import config as config_lib
from ssljax import main

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]

# What runs after the cell with the tag: six steps of a tiny encoder, checkpoints after 4 and 6.
SHORT = {
  "parameters": "STEPS, WORKDIR, IMAGES = 6, 'run', 'images'",
  "config": """
config["encoder"] |= dict(width=32, depth=1, heads=2)
config["method"] |= dict(decoder_width=32, decoder_heads=2)
config["data"] |= dict(split="train[:256]", eval_train="train[:128]", eval_test="test[:64]")
config["schedule"] |= dict(warmup_steps=2)
config |= dict(batch_size=16, checkpoint=dict(every=2), log=dict(every=1, tensorboard=False))
config["eval"] |= dict(every=6, batch_size=64, rank=None)
config["eval"]["linear"]["l2"] = (1e-1,)
config["eval"]["knn"]["k"] = (20,)
config["mesh"] = dict(devices=1)
""",
  "folder": """
mine |= {key: config[key] for key in ("total_steps", "batch_size", "encoder", "method")}
mine |= {key: config[key] for key in ("schedule", "checkpoint", "log", "mesh")}
mine["data"] |= {key: mine["data"][key] | dict(size=(32, 32)) for key in ("views", "eval_views")}
config["eval"]["every"] = 0  # the continued copy need not be measured again
""",
  # Runs on folders are tested elsewhere.
  "dry_run": "IMAGES = ''",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
  """What each code cell printed and showed, by its id."""
  place = tmp_path_factory.mktemp("notebook")
  (place / "images").mkdir()
  rng = np.random.default_rng(0)
  for i in range(40):
    Image.fromarray(rng.integers(0, 255, (36, 36 + i % 5, 3), np.uint8)).save(
      place / "images" / f"{i:02d}.png"
    )
  command = [sys.executable, ROOT / "tests" / "run_notebook.py", NOTEBOOK]
  done = subprocess.run(
    [*command, *(f"{tag}={code}" for tag, code in SHORT.items())],
    env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=place, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
  parts = re.split(r"^\[([\w-]+)\]\n", done.stdout, flags=re.M)[1:]
  return dict(zip(parts[::2], parts[1::2]))


def starting(said, words: str) -> str:
  """What the one cell said whose source has these words."""
  (cell,) = [c for c in CELLS if c["cell_type"] == "code" and words in "".join(c["source"])]
  return said[cell["id"]]


def test_every_cell_ran(said):
  assert list(said) == [cell["id"] for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", ["curves", "reconstructions", "neighbours", "batch"])
def test_pictures_are_shown(said, name):
  text = starting(said, f'Image(f"{{WORKDIR}}{"_mine" * (name == "batch")}/figures/{name}.png')
  size = re.search(r"picture of (\d+) bytes, b'\\x89PNG", text)
  assert int(size[1]) > 1000


def test_the_table_has_the_untrained_encoder_beside_the_run(said):
  table = starting(said, "table_text(")
  assert "random encoder" in table
  for row in ("linear probe top-1  ", "k-NN top-1 (k = 20"):
    (line,) = [line for line in table.splitlines() if line.startswith(row)]
    assert len(re.findall(r"\d+\.\d %", line)) == 4, line  # last, best, random encoder, raw pixels


def test_features_of_an_array(said):
  text = starting(said, "load(WORKDIR)")
  assert "step 6; wants uint8 of shape [b, 24, 24, 3]" in text
  assert "pooled (16, 32) patches (16, 36, 32)" in text
  assert len(re.findall(r"1\. ", text)) >= 4 and "nan" not in text


def test_a_folder_of_images_is_accepted(said):
  text = starting(said, "dry_run(mine")
  assert "image  16 x 32 x 32 x 3  uint8" in text and "wrote run_mine/figures/batch.png" in text


def test_the_run_resumes_and_ends_with_the_same_loss(said):
  assert "resumed" not in starting(said, "scores = train.run(config, WORKDIR)")
  text = starting(said, "_disconnected")
  assert text.count("resumed at step 4\n") == 1
  ends = re.findall(r": step 6, loss (\d\.\d{9})\n", text)
  assert len(ends) == 2 and ends[0] == ends[1]


def test_the_config_is_that_of_the_demo():
  space: dict = {}
  for cell in CELLS:
    if {"parameters", "config"} & set(cell["metadata"].get("tags", ())):
      exec("".join(cell["source"]), space)
  shown = config_lib.complete(space["config"])
  demo = config_lib.plain(main.load_config(str(ROOT / "configs" / "mae_digits.py")))
  before, after = config_lib.flatten(demo), config_lib.flatten(shown)
  changed = {key: after.get(key) for key in before | after if before.get(key) != after.get(key)}
  assert changed == {"data.cache": "device", "data.hidden_on": "device"}


@pytest.mark.parametrize(
  "place, gpu, wanted",
  [
    ("", False, str(ROOT)),
    ("", True, f"{ROOT}[cuda]"),
    ("git+https://example.org/it.git", True, "ssljax[cuda] @ git+https://example.org/it.git"),
  ],
)
def test_what_the_install_cell_installs(monkeypatch, place, gpu, wanted):
  ran = install(monkeypatch, NOTEBOOK.parent, place, gpu)
  assert [command[-1] for command in ran] == [wanted]


def test_the_install_cell_says_what_to_set(monkeypatch, tmp_path):
  with pytest.raises(FileNotFoundError, match="set INSTALL_FROM"):
    install(monkeypatch, tmp_path, "", False)


def install(monkeypatch, folder: pathlib.Path, place: str, gpu: bool) -> list[list]:
  """The commands of the install cell on a machine without ssljax, started in `folder`."""
  ran: list[list] = []
  monkeypatch.chdir(folder)
  for name in [name for name in os.environ if name.startswith(("TPU_", "COLAB_TPU"))]:
    monkeypatch.delenv(name)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.setattr("glob.glob", lambda pattern: [])
  monkeypatch.setattr("shutil.which", lambda name: name if gpu else None)
  monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command))
  (cell,) = ["".join(c["source"]) for c in CELLS if '"pip"' in "".join(c["source"])]
  exec(cell, dict(INSTALL_FROM=place, DRIVE=False, WORKDIR="run"))
  return ran


def test_what_is_kept_in_the_notebook_is_small_and_names_no_machine():
  text = NOTEBOOK.read_text()
  assert len(text) < 300_000
  assert not re.search(r"/(home|root|Users|tmp|work)/", text)
