"""The evaluation inside a run: features, baselines, held-out loss, pictures, report."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ssljax import config as config_lib
from ssljax import job as job_lib
from ssljax import processes, reporting, sharding
from ssljax.evals import features as features_lib
from ssljax.methods.combine import IMAGES, viewed
from ssljax.step import init_state

ZERO_SHOT = "ssljax.evals.zero_shot"
NEED_LABELS = ("ssljax.evals.knn", "ssljax.evals.linear", ZERO_SHOT)
PICTURES = 8


class Evaluation:
  """What one run measures of itself; built once, called at each evaluation."""

  def __init__(self, job: job_lib.Job, workdir: pathlib.Path, log: Any = processes.say):
    self.job, self.workdir, self.log = job, workdir, log
    self._size = job_lib.eval_batch_size(job.config, job.mesh)
    self._rows = sharding.local_rows(self._size, job.mesh)
    self.damaged: dict[str, str] = {}  # as in the pipeline: example name -> reason
    self.train, self.test = self._open("eval_train"), self._open("eval_test")
    parts = self._parts()
    self.told = {k: v for k, v in parts.items() if v["name"] == ZERO_SHOT}
    self.parts = {k: v for k, v in parts.items() if k not in self.told}
    self._check_texts()
    self._check_best()
    method = job.method
    # What is read back must be whole in every process.
    read = functools.partial(jax.jit, out_shardings=NamedSharding(job.mesh, PartitionSpec()))
    self._copy = read(lambda x: x)
    self._encode = read(lambda p, e, batch: {"pooled": method.encode(p, e, batch)["pooled"]})
    self._joint = read(lambda p, e, batch: {"pooled": method.encode(p, e, batch)["joint"]})
    if method.encode_text:
      self._tell = read(method.encode_text)
    self._several = not {*IMAGES[1:]}.isdisjoint(method.needs)
    on_image = viewed(method, job.feed.make_views if self._several else None)
    self._loss = jax.jit(
      lambda p, e, batch, step: on_image.loss(p, e, batch, jax.random.key(0), step)[0]
    )
    if method.reconstruct:
      self._reconstruct = read(
        lambda p, e, batch, step: method.reconstruct(p, e, batch, jax.random.key(0), step)
      )

  def _open(self, key: str) -> Any:
    """The source of data.eval_train or data.eval_test; None where it is not set or not needed."""
    config, split = self.job.config, self.job.config["data"][key]
    if not config["eval"]["every"] or not split:
      return None
    try:
      source = job_lib.open_source(config, split)
      shape = job_lib.example_shape(source, self.job.eval_views)
    except ValueError as error:
      raise ValueError(f"data.{key}: {error}") from None
    seen = tuple(self.job.image.shape)
    if shape != seen:
      raise ValueError(
        f"data.{key}: evaluation images are {shape}, those of training {seen}; set"
        f" data.eval_views=dict(name='ssljax.data.views.resize_crop', size={seen[:-1]})"
      )
    return source

  def _parts(self) -> dict[str, dict]:
    """The evaluations that the data allow; the others are switched off with one line."""
    config = self.job.config["eval"]
    wanted = {k: v for k, v in config.items() if isinstance(v, dict) and config["every"]}
    if self.train is None or self.test is None:
      if wanted:
        self.log(f"eval: {', '.join(wanted)} off: data.eval_train or data.eval_test is not set")
      return {}
    if self.train.labelled and self.test.labelled:
      return wanted
    off = [k for k, v in wanted.items() if v["name"] in NEED_LABELS]
    if off:
      lacks = self.test if self.train.labelled else self.train
      self.log(f"eval: {', '.join(off)} off: {lacks.name} has no labels")
    return {k: v for k, v in wanted.items() if k not in off}

  def _check_texts(self) -> None:
    """Raises ValueError where there are no texts for what reads them."""
    text = self.job.text
    if self.told and (text is None or not text.names or self.job.method.encode_text is None):
      raise ValueError(
        f"eval.{next(iter(self.told))} needs a method that reads texts, and the names of the"
        " classes, data.text.names=('cat', 'dog', …)"
      )
    if text is not None and self.test is not None and self.job.config["eval"]["heldout"]:
      try:
        text.check(self.test)
      except ValueError as error:
        hint = "eval.heldout=False leaves out the loss of the test split, which needs its texts"
        raise ValueError(f"data.eval_test: {error}; {hint}") from None

  def _check_best(self) -> None:
    """Raises ValueError where eval.best is no metric of this run; it would never be found.

    The evaluations are rehearsed on made-up features, which also checks their arguments now.
    """
    best = self.job.config["eval"]["best"]
    made = [_made_up(min(s.size, 256)) for s in (self.train, self.test) if s is not None]
    names = sorted(self._measure(*made)) if self.parts else []
    if self.told:
      names += config_lib.build({"name": ZERO_SHOT}, test=made[-1], prompts=np.ones((6, 1, 4)))
    wanted = [v for v in self.job.config["eval"].values() if isinstance(v, dict)]
    whole = len(self.parts) + len(self.told) == len(wanted)
    if best and whole and names and best not in names:
      raise ValueError(f"unknown metric eval.best {best!r}{config_lib.nearest(best, names)}")

  def __call__(self, state: Any, step: int) -> dict[str, float]:
    """All metrics of this step, baselines included, as eval/… keys; writes the figures."""
    metrics: dict[str, float] = {}
    train = test = None
    if self.parts:
      train, test = self._features(state.params, state.extra)
      metrics |= processes.from_first(lambda: self._measure(train, test))
      for name, found in self._baselines().items():
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    if self.told:
      metrics |= self._zero_shot(state)
    if self.job.config["eval"]["heldout"] and self.test is not None:
      metrics["heldout/loss"] = self._heldout(state)
    if self.job.config["eval"]["figures"]:
      self._figures(state, train, test)
    return {f"eval/{key}": value for key, value in metrics.items()}

  def _place(self, batch: Mapping) -> dict[str, jax.Array]:
    """This process's rows of a batch, as global arrays."""
    keys = {*IMAGES, "index", "hidden", *self.job.method.needs}
    kept = {k: np.asarray(v) for k, v in batch.items() if k in keys}
    return sharding.to_global(kept, self.job.mesh, self._size)

  def _whole(self, batch: Mapping) -> dict[str, Any]:
    """This process's rows of a batch -> the rows of all processes, in each of them."""
    if processes.count() == 1:
      return dict(batch)
    return processes.settled(self._copy(sharding.to_global(batch, self.job.mesh, self._size)))

  @contextlib.contextmanager
  def _examples(self, source: Any, whole: bool = False, **given: Any) -> Iterator[Any]:
    """One pass over a source, of which this process reads its rows (or all); what cannot be read
    is remembered."""
    rows = None if whole else self._rows
    with self.job.examples(source, known=self.damaged, rows=rows, **given) as batches:
      yield batches
      self.damaged |= batches.damaged

  def _features(self, params: Any, extra: Any) -> tuple[Any, Any]:
    made = [self._of(s, self._encode, params, extra) for s in (self.train, self.test)]
    return made[0], made[1]

  def _of(self, source: Any, compiled: Any, params: Any, extra: Any) -> features_lib.Features:
    def encode(batch):
      known = {k: batch[k] for k in ("valid", "label", "index") if k in batch}
      found = processes.settled(compiled(params, extra, self._place(batch)))
      return found | self._whole(known)

    with self._examples(source) as batches:
      return features_lib.extract(encode, batches)

  def _zero_shot(self, state: Any) -> dict[str, float]:
    """Images and class texts in the common space, the texts a batch at a time."""
    ids = self.job.text.prompts()
    flat = ids.reshape(-1, ids.shape[-1])
    padded = np.resize(flat, (-(-len(flat) // self._size) * self._size, flat.shape[-1]))
    parts = [
      np.asarray(processes.settled(self._tell(state.params, state.extra, part)))
      for part in np.split(padded, len(padded) // self._size)
    ]
    prompts = np.concatenate(parts)[: len(flat)].reshape(*ids.shape[:2], -1)
    test = self._of(self.test, self._joint, state.params, state.extra)
    given = dict(test=test, prompts=prompts)
    build = functools.partial(config_lib.build, {"name": ZERO_SHOT}, **given)
    return processes.from_first(build)

  def _measure(self, train: Any, test: Any) -> dict[str, float]:
    found: dict[str, float] = {}
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
      state = init_state(job.trained, job.tx, batch, seed)
      return state.params, state.extra

    return jax.jit(start, out_shardings=where)()

  def _baselines(self) -> dict[str, dict[str, float]]:
    """The same measures of raw pixels and of the untrained encoder, measured once in a run."""
    config = config_lib.as_json(self.job.config)
    training = ("workers", "hidden", "views", "views_on", "hidden_on", "canvas", "cache")
    data = {k: v for k, v in config["data"].items() if k not in training}
    prints = [self.train.fingerprint, self.test.fingerprint]
    parts = {"parts": self.parts, "data": data, "encoder": config["encoder"], "sources": prints}
    key = json.dumps(config_lib.as_json(parts) | {"seed": config["seed"]}, sort_keys=True)
    kept = self.workdir / "baselines.json"
    found = processes.from_first(lambda: json.loads(kept.read_text()) if kept.exists() else {})
    if found.get("key") == key:
      return found["metrics"]
    given = {"baseline_random": self._features(*self._random)}
    del self.__dict__["_random"]
    raw = []
    for source in (self.train, self.test):
      with self._examples(source) as batches:
        raw.append(features_lib.pixels(map(self._whole, batches)))
    given["baseline_pixels"] = (raw[0], raw[1])
    found = processes.from_first(lambda: {k: self._measure(*v) for k, v in given.items()})
    if processes.first():
      reporting.write_json(kept, {"key": key, "metrics": found})
    return found

  def _heldout(self, state: Any) -> float:
    """Mean pre-training loss over the test split, hidden places and view fixed.

    A method that needs several views of an image gets those of training, as drawn in epoch 0, or
    by one key where they are made on the device.
    """
    several = self._several
    coupled = several or self.job.method.couple is not None
    views = self.job.feed.views if several else None
    found: list[tuple[bool, float, int]] = []
    with self._examples(self.test, hidden=True, views=views) as batches:
      for batch in batches:
        valid = np.asarray(self._whole({"valid": batch["valid"]})["valid"])
        good = np.flatnonzero(valid)
        if not len(good):
          continue
        placed = self._place(batch if valid.all() else self._repeated(batch, good))
        loss = self._loss(state.params, state.extra, placed, state.step)
        found.append((len(good) == self._size, float(loss), len(good)))
    if not found:
      raise ValueError(f"no image of {self.test.name} can be read")
    # Where examples meet, a repeated one would be a negative of itself: whole batches alone count,
    # where there are any.
    if coupled and any(whole for whole, _, _ in found):
      found = [part for part in found if part[0]]
    return sum(loss * n for _, loss, n in found) / sum(n for _, _, n in found)

  def _repeated(self, batch: Mapping, good: np.ndarray) -> dict[str, np.ndarray]:
    """The loss is a mean over all rows: those that do not count repeat the `good` ones in turn, so
    that each counts about once."""
    rows = np.resize(good, self._size)
    rows[good] = good
    return {k: np.asarray(v)[rows[self._rows]] for k, v in self._whole(batch).items()}

  def _figures(self, state: Any, train: Any, test: Any) -> None:
    from ssljax.viz import neighbours, reconstructions

    folder = self.workdir / "figures"
    source = self.test or self.job.source
    indices = np.linspace(0, source.size - 1, min(self._size, source.size)).astype(int)
    with self._examples(source, whole=True, hidden=True, indices=indices) as batches:
      batch = next(iter(batches))
    seen = None
    if self.job.hidden is not None and self.job.method.reconstruct:
      placed = self._place({k: np.asarray(v)[self._rows] for k, v in batch.items()})
      seen = self._reconstruct(state.params, state.extra, placed, state.step)
      seen = np.asarray(seen, np.float32)[:PICTURES]
    if not processes.first():
      return
    folder.mkdir(parents=True, exist_ok=True)
    if self.job.hidden is not None and not self.job.hidden.views:
      image = unit_scale(batch["image"][:PICTURES])
      hidden = self.job.hidden.shown(batch)[:PICTURES]
      reconstructions.reconstruction_figure(
        folder / "reconstructions.png", image, hidden, self.job.grid, seen
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
    with self._examples(source, whole=True, indices=indices) as batches:
      images = [batch["image"][batch["valid"]] for batch in batches]
    return unit_scale(np.concatenate(images))


def _made_up(size: int) -> features_lib.Features:
  """Random features of two classes: [size 4]."""
  index = np.arange(size)
  pooled = np.random.default_rng(0).normal(size=(size, 4)).astype(np.float32)
  return features_lib.Features(pooled, index % 2, index)


def unit_scale(image: np.ndarray) -> np.ndarray:
  """Pictures on the 0…1 scale: integers by their type's maximum, floats as they are."""
  top = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1
  return np.asarray(image, np.float32) / top
