"""The evaluation inside a run: its metrics and baselines, what is switched off, the best step."""

import json
import pathlib

import numpy as np
import pytest
import tiny

from ssljax import checkpoint, records, train
from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax.evaluate import Evaluation

PARTS = dict(
  knn=dict(name="ssljax.evals.knn", k=(5,)),
  linear=dict(name="ssljax.evals.linear", l2=(1e-2,), iterations=10),
  rank=dict(name="ssljax.evals.rank"),
)
OWN = ("knn_k5_T0.07/top1", "linear/top1", "linear/l2", "rank/effective", "rank/std_unit")


def config(labelled: bool = True, **changes):
  source = tiny.images(72)
  # 8×8 pictures of one channel keep the probe on raw pixels small.
  source["image"] = source["image"][:, ::4, ::4, :1].copy()
  if not labelled:
    del source["label"]
  encoder = tiny.ENCODER | dict(patch=(2, 2), depth=1)
  data = dict(source=source, channels=1, eval_train="train[:48]", eval_test="train[48:]")
  base = dict(encoder=encoder, data=data, mesh=dict(devices=1), total_steps=4)
  return tiny.config(**base | dict(eval=dict(every=2, **PARTS)) | changes)


def evaluation(tmp_path, said=None, **changes) -> Evaluation:
  job = job_lib.assemble(config_lib.complete(config(**changes)), tmp_path)
  return Evaluation(job, tmp_path, log=(said if said is not None else []).append)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run: (workdir, what `train.run` returned)."""
  workdir = tmp_path_factory.mktemp("run")
  best = dict(best="rank/effective", figures=True)
  return workdir, train.run(config(eval=dict(every=2, **PARTS, **best)), workdir)


def rows(workdir: pathlib.Path) -> dict[int, dict]:
  found: dict[int, dict] = {}
  for row in records.read_metrics(workdir / "metrics.jsonl"):
    found.setdefault(row["step"], {}).update(row)
  return found


def test_every_measure_stands_beside_two_baselines(run):
  workdir, last = run
  for step in (2, 4):
    row = rows(workdir)[step]
    for key in OWN:
      for prefix in ("eval/", "eval/baseline_random/", "eval/baseline_pixels/"):
        assert np.isfinite(row[prefix + key]), (step, prefix + key)
    assert row["eval/heldout/loss"] > 0
  assert "eval/linear/top1" not in rows(workdir)[1]
  assert last["eval/heldout/loss"] == rows(workdir)[4]["eval/heldout/loss"]
  first, second = rows(workdir)[2], rows(workdir)[4]
  same = [k for k in first if "baseline" in k and first[k] != second[k]]
  assert not same  # measured once
  assert first["eval/rank/effective"] != second["eval/rank/effective"]


def test_an_untrained_run_equals_its_random_baseline(tmp_path):
  measure = evaluation(tmp_path)
  state = train.start(measure.job)
  found = measure(state, 0)
  for key in OWN:
    assert found[f"eval/{key}"] == pytest.approx(found[f"eval/baseline_random/{key}"], rel=1e-5)
  again = evaluation(tmp_path)(state, 0)
  assert again == found  # nothing is drawn anew


def test_baselines_are_measured_again_when_the_test_split_changed(tmp_path):
  measure = evaluation(tmp_path)
  first = measure._baselines()
  changed = config()
  changed["data"]["source"]["image"][50:] //= 3
  job = job_lib.assemble(config_lib.complete(changed), tmp_path)
  assert Evaluation(job, tmp_path)._baselines() != first
  assert json.loads((tmp_path / "baselines.json").read_text())["metrics"] != first


def test_pictures_and_report(run):
  workdir, _ = run
  for name in ("reconstructions", "neighbours", "curves"):
    assert (workdir / "figures" / f"{name}.png").stat().st_size > 1000
  report = (workdir / "report.html").read_text()
  assert "baseline" in report or "untrained" in report.lower()
  assert report.count("data:image/png;base64") >= 2  # the curves may be drawn otherwise


def test_the_best_step_is_kept_beside_the_last(run, tmp_path):
  workdir, _ = run
  scores = {step: rows(workdir)[step]["eval/rank/effective"] for step in (2, 4)}
  assert checkpoint.best_step(workdir) == max(scores, key=scores.get)
  # A score that only falls: the first evaluated step must survive all later ones.
  falling = config(
    total_steps=8, eval=dict(every=2, heldout=False, best="rank/effective", rank=PARTS["rank"])
  )
  with pytest.MonkeyPatch.context() as patch:
    call = Evaluation.__call__

    def scored(self, state, step):
      call(self, state, step)
      return {"eval/rank/effective": 100.0 - step}

    patch.setattr(Evaluation, "__call__", scored)
    train.run(falling, tmp_path)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == [2, 6, 8] and checkpoint.best_step(tmp_path) == 2


def test_without_labels_one_line_and_the_rest(tmp_path):
  said = []
  measure = evaluation(tmp_path, said, labelled=False)
  assert len(said) == 1 and said[0].startswith("eval: knn, linear off: ")
  assert said[0].endswith("has no labels")
  found = measure(train.start(measure.job), 0)
  assert {"eval/rank/effective", "eval/baseline_pixels/rank/std", "eval/heldout/loss"} <= set(found)
  assert not any("top1" in key for key in found)


def test_what_evaluation_cannot_read_is_remembered(tmp_path, monkeypatch):
  measure = evaluation(tmp_path)
  examples = job_lib.Job.examples

  def damaged(self, source, **given):
    batches = examples(self, source, **given)
    batches.damaged["cut.jpg"] = "is cut"
    return batches

  monkeypatch.setattr(job_lib.Job, "examples", damaged)
  measure._heldout(train.start(measure.job))
  assert measure.damaged == {"cut.jpg": "is cut"}


def test_without_splits_one_line_and_nothing_is_opened(tmp_path):
  said = []
  settings = config()
  settings["data"] |= dict(eval_train="", eval_test="")
  job = job_lib.assemble(config_lib.complete(settings), tmp_path)
  measure = Evaluation(job, tmp_path, log=said.append)
  assert said == ["eval: knn, linear, rank off: data.eval_train or data.eval_test is not set"]
  assert measure(train.start(job), 0) == {}


def test_off_means_that_no_split_is_opened(tmp_path):
  said = []
  settings = config(eval=dict(every=0, **PARTS))
  settings["data"]["eval_test"] = "no_such_split"
  job = job_lib.assemble(config_lib.complete(settings), tmp_path)
  assert Evaluation(job, tmp_path, log=said.append).test is None and said == []


def test_a_misspelt_metric_is_named_only_where_it_could_exist(tmp_path):
  bad = dict(every=2, **PARTS, best="knn_k20/top1")
  with pytest.raises(ValueError, match="unknown metric eval.best .*did you mean knn_k5_T0.07/top1"):
    evaluation(tmp_path, eval=bad)
  said = []
  evaluation(tmp_path, said, labelled=False, eval=bad | dict(best="knn_k5_T0.07/top1"))
  assert len(said) == 1  # switched off for want of labels: said, and no error


def test_heldout_loss_counts_every_example_about_once(tmp_path):
  """24 test examples in batches of 16: the second is half padding."""
  measure = evaluation(tmp_path, eval=dict(every=2, batch_size=16))
  state = train.start(measure.job)
  mixed = measure._heldout(state)
  exact = evaluation(tmp_path, eval=dict(every=2, batch_size=8))._heldout(state)
  assert mixed == pytest.approx(exact, rel=1e-5)
  # Fewer examples than one batch: none may weigh more than the others.
  big = evaluation(tmp_path, eval=dict(every=2, batch_size=48))._heldout(state)
  assert big == pytest.approx(exact, rel=1e-5)
