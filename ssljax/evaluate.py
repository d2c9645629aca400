"""The evaluation inside a run: features, baselines, held-out loss, pictures, report."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax import sharding
from ssljax.evals import features as features_lib
from ssljax.step import init_state

NEED_LABELS = ("ssljax.evals.knn", "ssljax.evals.linear")
PICTURES = 8


class Evaluation:
  """What one run measures of itself; built once, called at each evaluation."""

  def __init__(self, job: job_lib.Job, workdir: pathlib.Path, log: Any = print):
    self.job, self.workdir, self.log = job, workdir, log
    config, data = job.config, job.config["data"]
    self.train = job_lib.open_source(config, data["eval_train"]) if data["eval_train"] else None
    self.test = job_lib.open_source(config, data["eval_test"]) if data["eval_test"] else None
    self.parts = self._parts()
    if self.test is not None and data["eval_views"] is None:
      job_lib.example_shape(self.test, None)
    method = job.method
    self._encode = jax.jit(lambda p, e, batch: {"pooled": method.encode(p, e, batch)["pooled"]})
    self._loss = jax.jit(lambda p, e, batch, step: method.loss(p, e, batch, jax.random.key(0), step)[0])
    if method.reconstruct:
      self._reconstruct = jax.jit(method.reconstruct)

  def _parts(self) -> dict[str, dict]:
    """The evaluations that the data allow; the others are switched off with one line."""
    wanted = {k: v for k, v in self.job.config["eval"].items() if isinstance(v, dict)}
    if self.train is None or self.test is None:
      if wanted:
        self.log(f"eval: {', '.join(wanted)} off: data.eval_train or data.eval_test is not set")
      return {}
    if self.train.labelled and self.test.labelled:
      return wanted
    off = [k for k, v in wanted.items() if v["name"] in NEED_LABELS]
    if off:
      self.log(f"eval: {', '.join(off)} off: {self.train.name} has no labels")
    return {k: v for k, v in wanted.items() if k not in off}

  def __call__(self, state: Any, step: int) -> dict[str, float]:
    """All metrics of this step, baselines included, as eval/… keys; writes the figures."""
    metrics, train, test = {}, None, None
    if self.parts:
      train, test = self._features(state.params, state.extra)
      metrics |= self._measure(train, test)
      for name, found in self._baselines().items():
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    if self.job.config["eval"]["heldout"] and self.test is not None:
      metrics["heldout/loss"] = self._heldout(state)
    if self.job.config["eval"]["figures"]:
      self._figures(state, train, test)
    return {f"eval/{key}": value for key, value in metrics.items()}

  def _place(self, batch: Mapping) -> dict[str, jax.Array]:
    keys = ("image", "index", "hidden")
    kept = {k: np.asarray(v) for k, v in batch.items() if k in keys}
    size = job_lib.eval_batch_size(self.job.config, self.job.mesh)
    rows = sharding.local_rows(size, self.job.mesh)
    return sharding.to_global({k: v[rows] for k, v in kept.items()}, self.job.mesh, size)

  def _features(self, params: Any, extra: Any) -> tuple[Any, Any]:
    def encode(batch):
      return self._encode(params, extra, self._place(batch))

    found = []
    for source in (self.train, self.test):
      with self.job.examples(source) as batches:
        found.append(features_lib.extract(encode, batches))
    return tuple(found)

  def _measure(self, train: Any, test: Any) -> dict[str, float]:
    found = {}
    for spec in self.parts.values():
      found |= config_lib.build(spec, train=train, test=test)
    return found

  @functools.cached_property
  def _random(self) -> Any:
    """The encoder as it was before its first step."""
    job = self.job
    batch, seed = job.batch, job.config["seed"]
    where = jax.tree.map(lambda x: x.sharding, (job.state.params, job.state.extra))

    def start():
      state = init_state(job.method, job.tx, batch, seed)
      return state.params, state.extra

    return jax.jit(start, out_shardings=where)()

  def _baselines(self) -> dict[str, dict[str, float]]:
    """The same measures of raw pixels and of the untrained encoder, measured once in a run."""
    config = config_lib.as_json(self.job.config)
    data = {k: v for k, v in config["data"].items() if k not in ("workers", "hidden", "views")}
    parts = {"parts": self.parts, "data": data, "encoder": config["encoder"]}
    key = json.dumps(config_lib.as_json(parts) | {"seed": config["seed"]}, sort_keys=True)
    kept = self.workdir / "baselines.json"
    if kept.exists():
      found = json.loads(kept.read_text())
      if found["key"] == key:
        return found["metrics"]
    found = {"baseline_random": self._measure(*self._features(*self._random))}
    del self.__dict__["_random"]
    raw = []
    for source in (self.train, self.test):
      with self.job.examples(source) as batches:
        raw.append(features_lib.pixels(batches))
    found["baseline_pixels"] = self._measure(*raw)
    kept.write_text(json.dumps({"key": key, "metrics": found}))
    return found

  def _heldout(self, state: Any) -> float:
    """Mean pre-training loss over the test split, hidden places and view fixed."""
    total, count = 0.0, 0
    with self.job.examples(self.test, hidden=True) as batches:
      for batch in batches:
        valid = int(np.sum(batch["valid"]))
        if valid < len(batch["valid"]) and count:
          continue  # a mean over a padded batch would count some examples twice
        loss = self._loss(state.params, state.extra, self._place(batch), state.step)
        total, count = total + float(loss) * valid, count + valid
    return total / count

  def _figures(self, state: Any, train: Any, test: Any) -> None:
    from ssljax.viz import neighbours, reconstructions

    folder = self.workdir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    source = self.test or self.job.source
    size = job_lib.eval_batch_size(self.job.config, self.job.mesh)
    indices = np.linspace(0, source.size - 1, min(size, source.size)).astype(int)
    with self.job.examples(source, hidden=True, indices=indices) as batches:
      batch = next(iter(batches))
    if self.job.hidden is not None:
      seen = None
      if self.job.method.reconstruct:
        args = (state.params, state.extra, self._place(batch), jax.random.key(0), state.step)
        seen = np.asarray(self._reconstruct(*args), np.float32)[:PICTURES]
      image = unit_scale(batch["image"][:PICTURES])
      reconstructions.reconstruction_figure(
        folder / "reconstructions.png", image, batch["hidden"][:PICTURES], self.job.grid, seen
      )
    if train is not None:
      self._neighbour_figure(neighbours, folder, train, test)

  def _neighbour_figure(self, neighbours: Any, folder: Any, train: Any, test: Any) -> None:
    from ssljax.evals.knn import neighbours as nearest

    chosen = np.linspace(0, len(test.pooled) - 1, min(PICTURES, len(test.pooled))).astype(int)
    near, places = nearest(train.pooled, test.pooled[chosen], min(6, len(train.pooled)))
    queries = self._images(self.test, test.index[chosen])
    found = self._images(self.train, train.index[places.reshape(-1)])
    found = found.reshape(*places.shape, *found.shape[1:])
    labels = {}
    if train.label is not None and test.label is not None:
      labels = dict(query_label=test.label[chosen], neighbour_label=train.label[places])
    path = folder / "neighbours.png"
    neighbours.neighbours_figure(path, queries, found, similarity=near, **labels)

  def _images(self, source: Any, indices: np.ndarray) -> np.ndarray:
    with self.job.examples(source, indices=indices) as batches:
      images = [batch["image"][batch["valid"]] for batch in batches]
    return unit_scale(np.concatenate(images))


def unit_scale(image: np.ndarray) -> np.ndarray:
  """Pictures on the 0…1 scale: integers by their type's maximum, floats as they are."""
  top = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1
  return np.asarray(image, np.float32) / top
