"""Pictures hold what they should, and the report is one whole file that needs nothing else."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from ssljax.records import read_metrics
from ssljax.viz.batch import batch_figure
from ssljax.viz.curves import curves_figure, panels
from ssljax.viz.neighbours import neighbours_figure
from ssljax.viz.reconstructions import reconstruction_figure
from ssljax.viz.report import write_report
from ssljax.viz.style import HIDDEN, as_rgb, cover
from ssljax.viz.table import summary, table_text


def pixel_colours(path) -> np.ndarray:
  return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def has(path, colour, least: int = 500) -> bool:
  near = np.abs(pixel_colours(path).astype(int) - np.asarray(colour)).max(1) <= 3
  return near.sum() >= least


def plain(count: int, colour, side: int = 16) -> np.ndarray:
  return np.broadcast_to(np.asarray(colour, np.uint8), (count, side, side, 3)).copy()


GREY = [round(255 * HIDDEN)] * 3


def test_cover_hides_exactly_the_hidden_places():
  image = np.zeros((2, 8, 12, 3), np.float32)
  hidden = np.zeros((2, 6), bool)
  hidden[0, [0, 5]] = True
  covered = cover(image, hidden, (2, 3))
  want = np.zeros((2, 8, 12), bool)
  want[0, :4, :4] = want[0, 4:, 8:] = True
  np.testing.assert_array_equal((covered == np.float32(HIDDEN)).all(-1), want)
  with pytest.raises(ValueError, match="does not fit 2 images"):
    cover(image, hidden, (3, 3))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_any_array_becomes_colours(channels):
  rng = np.random.default_rng(0)
  shape = (2, 5, 6, channels)
  for image in (
    rng.integers(0, 256, shape, np.uint8),
    rng.integers(0, 60000, shape).astype(np.uint16),
    rng.normal(size=shape).astype(np.float32) * 9,
    np.where(rng.random(shape) < 0.1, np.nan, 0.5),
  ):
    found = as_rgb(image)
    assert found.shape == (2, 5, 6, 3)
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
  # Colours of bytes and of 0..1 are not stretched.
  assert as_rgb(np.full((1, 2, 2, 3), 51, np.uint8)).max() == pytest.approx(0.2)
  assert as_rgb(np.full((1, 2, 2, 3), 0.2)).max() == pytest.approx(0.2)


def test_sixteen_bits_use_the_range_of_the_type_only_if_it_is_bytes():
  ramp = np.linspace(1000, 1400, 36).astype(np.uint16).reshape(1, 6, 6, 1)
  assert as_rgb(ramp).min() == 0 and as_rgb(ramp).max() == 1


def test_batch_figure_shows_views_and_hidden_places(tmp_path):
  batch = {"image": plain(3, (200, 30, 40)), "hidden": np.zeros((3, 16), bool)}
  path = batch_figure(tmp_path / "figures" / "batch.png", batch, (4, 4))
  assert has(path, (200, 30, 40)) and not has(path, GREY)
  batch["hidden"][:] = True
  path = batch_figure(tmp_path / "all.png", batch, (4, 4))
  assert has(path, (200, 30, 40)) and has(path, GREY)
  assert has(batch_figure(tmp_path / "no.png", {"image": batch["image"]}), (200, 30, 40))
  assert not list(tmp_path.glob("**/*.part"))
  with pytest.raises(ValueError, match="without image cannot be drawn; it has hidden"):
    batch_figure(tmp_path / "x.png", {"hidden": batch["hidden"]})
  with pytest.raises(ValueError, match="grid"):
    batch_figure(tmp_path / "x.png", batch)


def test_reconstruction_figure_has_three_rows_or_two(tmp_path):
  image = plain(2, (20, 160, 60)) / 255
  hidden = np.ones((2, 4), bool)
  path = reconstruction_figure(tmp_path / "a.png", image, hidden, (2, 2))
  assert has(path, (20, 160, 60)) and has(path, GREY) and not has(path, (0, 0, 255))
  # Blue beyond the scale: clipped to pure blue, not stretched.
  back = np.broadcast_to(np.array([-0.5, 0.0, 1.5]), image.shape)
  path = reconstruction_figure(tmp_path / "b.png", image, hidden, (2, 2), back)
  assert has(path, (20, 160, 60)) and has(path, GREY) and has(path, (0, 0, 255))
  with pytest.raises(ValueError, match="differ in shape"):
    reconstruction_figure(tmp_path / "c.png", image, hidden, (2, 2), back[:1])


def test_neighbours_figure_frames_by_class(tmp_path):
  query, near = plain(2, (90, 90, 90)), plain(6, (250, 250, 0)).reshape(2, 3, 16, 16, 3)
  blue, orange = (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
  labels = {"query_label": np.array([1, 2]), "neighbour_label": np.array([[1] * 3, [2] * 3])}
  path = neighbours_figure(tmp_path / "same.png", query, near, **labels)
  assert has(path, blue) and not has(path, orange, 20)
  labels["neighbour_label"] = labels["neighbour_label"] + 5
  path = neighbours_figure(
    tmp_path / "other.png", query, near, similarity=np.full((2, 3), 0.5), **labels
  )
  assert has(path, orange) and not has(path, blue, 20)
  path = neighbours_figure(tmp_path / "none.png", query, near)
  assert has(path, (250, 250, 0)) and not has(path, orange, 20) and not has(path, blue, 20)
  with pytest.raises(ValueError, match="1 queries"):
    neighbours_figure(tmp_path / "x.png", query[:1], near)


def records(labelled: bool = True) -> list[dict]:
  made = []
  for step in range(10, 101, 10):
    line = {"step": step, "train/loss": 2 - step / 100, "train/lr": 1e-3}
    if step % 50 == 0:
      line |= {"eval/heldout/loss": 1.5 - step / 200, "eval/rank/effective": step / 10}
    if step % 50 == 0 and labelled:
      for key, value in (("knn_k10_T0.07", 0.3), ("knn_k20_T0.07", 0.4), ("linear", 0.8)):
        line[f"eval/{key}/top1"] = value - step / 1000
        line[f"eval/baseline_random/{key}/top1"] = value - 0.3
        line[f"eval/baseline_pixels/{key}/top1"] = value + 0.1
      line["eval/linear/l2"] = 1e-3
    made.append(line)
  return made


def write(path, lines) -> None:
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_read_metrics_forgives_only_a_cut_last_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, records())
  whole = read_metrics(path)
  path.write_text(path.read_text() + '{"step": 110, "train/lo')
  assert read_metrics(path) == whole
  path.write_text('{"train/loss": 1}\n{"step": 2}\n')
  with pytest.raises(ValueError, match="line 1 is no JSON object with a step"):
    read_metrics(path)


def test_panels_hold_the_run_and_its_baselines():
  found = {panel.title: panel for panel in panels(records())}
  assert list(found)[:3] == ["Loss", "Linear probe, top-1", "k-NN, top-1 (T = 0.07)"]
  probe = {line.role: line.value[-1] for line in found["Linear probe, top-1"].lines}
  assert probe == pytest.approx({"run": 0.7, "random encoder": 0.5, "raw pixels": 0.9})
  names = [line.name for line in found["k-NN, top-1 (T = 0.07)"].lines]
  assert names == ["k = 10", "k = 20", "random encoder, k = 20", "raw pixels, k = 20"]
  assert {p.title for p in panels(records(labelled=False))} == {
    "Loss",
    "Effective rank of the features",
    "Learning rate",
  }
  assert panels([{"step": 1, "train/loss": float("nan")}]) == []
  chosen = panels(records(), {"mine": ["eval/linear/top1", "train/lr"]})
  assert [line.name for line in chosen[0].lines][:2] == ["linear/top1", "train/lr"]


def test_curves_figure(tmp_path):
  write(tmp_path / "metrics.jsonl", records())
  path = curves_figure(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
  assert has(path, (0, 0x72, 0xB2), 200)
  write(tmp_path / "metrics.jsonl", [{"step": 1}])
  with pytest.raises(ValueError, match="none of the metrics"):
    curves_figure(path, tmp_path / "metrics.jsonl")


def test_summary_keeps_last_and_best():
  rows = {row.key: row for row in summary(records())}
  assert list(rows)[:3] == [
    "eval/linear/top1",
    "eval/knn_k10_T0.07/top1",
    "eval/knn_k20_T0.07/top1",
  ]
  top1 = rows["eval/linear/top1"]
  assert (top1.last, top1.best, top1.best_step) == pytest.approx((0.7, 0.75, 50))
  assert (top1.random, top1.pixels) == pytest.approx((0.5, 0.9))
  loss = rows["eval/heldout/loss"]
  assert (loss.last, loss.best, loss.best_step) == pytest.approx((1.0, 1.0, 100))
  assert rows["eval/linear/l2"].best is None
  text = table_text(list(rows.values())).splitlines()
  assert re.search(r"linear probe top-1 +70.0 % +75.0 % +50 +50.0 % +90.0 %", text[2])
  assert len({len(line) for line in text}) == 1
  assert summary([{"step": 1, "train/loss": 1.0}]) == []


class Page(html.parser.HTMLParser):
  """Checks that tags close, and collects the text, the ids and what is loaded."""

  VOID = {"meta", "img", "br", "link", "input"}

  def __init__(self, text: str):
    super().__init__()
    self.open, self.words, self.ids, self.loaded, self.tags = [], [], [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.ids += [value for name, value in attrs if name == "id"]
    self.loaded += [v for name, v in attrs if name in ("src", "href", "xlink:href", "srcset")]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in self.VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


@pytest.fixture
def run(tmp_path):
  write(tmp_path / "metrics.jsonl", records())
  config = {
    "total_steps": 100,
    "batch_size": 8,
    "seed": 3,
    "method": {"name": "ssljax.methods.masked"},
    "encoder": {"name": "ssljax.models.vit", "width": 64},
    "data": {"source": "folder:/a<b>&c"},
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "environment.json").write_text(json.dumps({"devices": ["cpu:0"]}))
  image, hidden = plain(2, (20, 160, 60)) / 255, np.ones((2, 4), bool)
  for step in (50, 100):
    path = tmp_path / "figures" / f"reconstructions_{step}.png"
    reconstruction_figure(path, image, hidden, (2, 2))
  return tmp_path


def test_report_is_whole_and_needs_nothing_else(run):
  path = write_report(run, damaged={"<bad>.jpg": "cannot be decoded"})
  text = path.read_text()
  page = Page(text)
  words = " ".join(page.words)
  for part in (
    "masked · vit",
    "step 100 of 100",
    "folder:/a<b>&c",
    "70.0 %",
    "75.0 %",
    "20.0 points above the untrained encoder and 20.0 points below raw pixels",
    "Curves",
    "k = 20",
    "Reconstructions",
    "at step 100",
    "<bad>.jpg",
    "encoder.width",
    "cpu:0",
  ):
    assert part in words, part
  assert "at step 50" not in words
  assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.loaded)
  assert "script" not in page.tags and "link" not in page.tags
  assert "@import" not in text and not re.search(r"url\((?!#)", text)
  assert len(set(page.ids)) == len(page.ids)
  assert {link[1:] for link in page.loaded if link[0] == "#"} <= set(page.ids)
  assert "prefers-color-scheme: dark" in text and "var(--c0)" in text
  assert "#0072b2" not in text[text.index("<body>") :].lower()


def test_report_tolerates_what_is_missing(tmp_path, run):
  write(run / "metrics.jsonl", records(labelled=False))
  for name in ("config.json", "environment.json"):
    (run / name).unlink()
  words = " ".join(Page(write_report(run).read_text()).words)
  assert "effective rank" in words and "linear probe" not in words and "Damaged" not in words
  empty = tmp_path / "empty"
  empty.mkdir()
  assert "Nothing has been measured yet" in write_report(empty).read_text()
  (empty / "config.json").write_text("{cut")
  (empty / "damaged.json").write_text('{"a.png": "empty file"}')
  words = " ".join(Page(write_report(empty).read_text()).words)
  assert "could not be read" in words and "a.png" in words
  with pytest.raises(FileNotFoundError, match="no run at"):
    write_report(tmp_path / "nowhere")


def test_figures_do_not_touch_pyplot(tmp_path):
  import subprocess
  import sys

  code = (
    "import sys, numpy as np; from ssljax.viz.report import write_report;"
    "from ssljax.viz.batch import batch_figure;"
    f"batch_figure({str(tmp_path / 'b.png')!r}, {{'image': np.zeros((1, 8, 8, 3))}});"
    "assert not {'matplotlib.pyplot', 'tensorflow', 'jax'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
