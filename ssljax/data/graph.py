"""Decoding and views in tf.data's threads; damaged images are named and replaced."""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ssljax.data import direct, images, order
from ssljax.data.decode import boxes, decode, windows
from ssljax.data.order import Plan
from ssljax.data.sources import Source
from ssljax.data.tensorflow import load
from ssljax.data.views import Views

# Global steps are int64; a run that ends before 2**62 never sees the end of the range.
FOREVER = 2**62


class Loader:
  """Decoded, viewed images of planned batches: a function of the plan alone."""

  def __init__(
    self,
    source: Source,
    plan: Callable[[int], Plan],
    *,
    seed: int,
    views: Views,
    channels: int,
    workers: int,
    max_pixels: int,
    damaged: dict[str, str],
  ):
    self.source, self.plan, self.seed, self.views = source, plan, seed, views
    self.channels, self.max_pixels, self.damaged = channels, max_pixels, damaged
    self.workers = workers or cores()
    self.pending: dict[int, tuple[Plan, np.ndarray | None]] = {}
    self.error: BaseException | None = None
    self.single: Callable | None = None
    self.batchwise: Callable | None = None

  def read(self, plan: Plan) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Records of a batch ("" for what has no header), headers and keys, as the graph takes them."""
    index, source = plan.index, self.source
    records, labels = source.read(index) if source.read else (source.fetch(index), None)
    keys = order.keys(self.seed, plan.epoch, index, "views").view(np.int64)
    if source.form == "array":
      return {"record": records, "key": keys}, labels
    shape = np.ones((len(index), 5), np.int32)
    data = np.full(len(index), b"", object)
    for row, record in enumerate(records):
      try:
        data[row], shape[row] = self.inspect(record)
      except (ValueError, OSError):
        continue  # "" does not decode either: the row is missing, and `report` finds out why
    return {"record": data, "shape": shape, "key": keys}, labels

  def inspect(self, record: bytes) -> tuple[bytes, tuple[int, ...]]:
    """The record as the graph reads it; kind, height, width, orientation, channels. Or raises."""
    if self.source.form == "npy":
      height, width, depth, body = images.read_npy(
        record, self.max_pixels, self.channels, self.source.dtype
      )
      return body, (images.NPY, height, width, 1, depth)
    header = images.read_header(record, self.max_pixels, self.channels)
    if header.repack or (header.kind == images.WEBP and not hasattr(load().io, "decode_webp")):
      record = images.repack(record, self.channels)
      header = images.read_header(record, self.max_pixels, self.channels)
    return record, (header.kind, header.height, header.width, header.turn, self.channels)

  def step(self, step: int) -> dict[str, np.ndarray]:
    """`read` of the plan of a step; the plan waits in `pending` for its images."""
    try:
      plan = self.plan(int(step))
      loaded, labels = self.read(plan)
      self.pending[int(step)] = (plan, labels)
      return loaded
    except BaseException as error:
      self.error = error
      raise

  def element(self, loaded):
    """Graph of one example: record, shape, key -> the leaves of its views."""
    made = decode(loaded, self.source, self.channels, self.views, loaded["drawn"])
    return made | {leaf: loaded[leaf] for leaf in self.views.beside()}

  def drawn(self, batch):
    """Graph of a batch: its records with the parameters of each view, and the windows that follow
    from them. Example by example these dozens of tiny operations took a third of the time."""
    tf, views = load(), self.views
    batch = dict(batch)
    if any(view.draw for view in views.each()):
      batch["drawn"] = tf.vectorized_map(views.draw, batch["key"], warn=False)
    else:
      batch["drawn"] = views.draw(None)
    cropped = self.source.form == "picture" and all(view.window for view in views.each())
    if cropped or views.boxes:
      shape = self.headers(batch)
      make = lambda one: windows(one[0], one[1], views)  # noqa: E731
      batch["windows"] = tf.vectorized_map(make, (shape, batch["drawn"]), warn=False)
    if views.boxes:
      batch["boxes"] = boxes(batch["windows"], batch["drawn"], shape)
    return batch

  def headers(self, batch):
    """Kind, height, width, orientation, channels of the records of a batch: [b 5]."""
    if "shape" in batch:
      return batch["shape"]
    tf = load()
    shape = tf.constant([0, *batch["record"].shape[1:3], 1, self.channels])  # arrays of one size
    return tf.broadcast_to(shape, [tf.shape(batch["key"])[0], 5])

  def dataset(self, first: int, last: int | None):
    """tf.data of (step, row [k], {leaf: [k …]}): rows that are missing were damaged."""
    tf = load()
    loaded = self.read(Plan(*(value[:1] for value in self.plan(first))))[0]
    types = {k: tf.string if v.dtype == object else tf.as_dtype(v.dtype) for k, v in loaded.items()}

    def fetch(step):
      flat = tf.numpy_function(lambda s: list(self.step(s).values()), [step], list(types.values()))
      for tensor, value in zip(flat, loaded.values()):
        tensor.set_shape([None, *value.shape[1:]])
      return step, dict(zip(types, flat))

    def decoded(step, batch):
      rows = tf.data.Dataset.range(tf.shape(batch["key"], tf.int64)[0])
      parts = tf.data.Dataset.zip((rows, tf.data.Dataset.from_tensor_slices(self.drawn(batch))))
      parts = parts.map(lambda row, one: (row, self.element(one)), num_parallel_calls=self.workers)
      if self.source.encoded:
        parts = parts.ignore_errors()
      whole = parts.batch(tf.shape(batch["key"], tf.int64)[0])
      whole = whole.map(lambda row, made: (step, row, made))
      return whole.concatenate(self.nothing(whole.element_spec, step))

    steps = tf.data.Dataset.range(first, FOREVER if last is None else last)
    steps = steps.map(fetch, num_parallel_calls=2)
    # Two inner data sets in turn: the next batch decodes while this one fills.
    steps = steps.interleave(decoded, cycle_length=2, block_length=2, num_parallel_calls=2)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = self.workers
    options.threading.max_intra_op_parallelism = 1
    return steps.with_options(options).prefetch(1)

  def nothing(self, spec, step):
    """An element without rows that ends each step: steps that are all damaged are not skipped."""
    tf = load()
    empty = {
      leaf: tf.zeros([0, *(side or 1 for side in x.shape[1:])], x.dtype)
      for leaf, x in spec[2].items()
    }
    return tf.data.Dataset.from_tensors((step, tf.zeros([0], tf.int64), empty))

  def run(
    self, first: int, last: int | None
  ) -> Iterator[tuple[Plan, dict[str, np.ndarray], np.ndarray, np.ndarray | None]]:
    """Per step: plan (indices as delivered), leaves [b …], valid [b], labels of records."""
    steps: Iterable[int] = itertools.count(first) if last is None else range(first, last)
    fast = direct.possible(self.source, self.views)
    for plan, labels, row, made in direct.made(self, steps) if fast else self.made(steps, last):
      if len(row) == len(plan.index):
        yield plan, made, np.ones(len(row), bool), labels
      else:
        yield self.filled(plan, row, made, labels)

  def made(self, steps: Iterable[int], last: int | None):
    """Per step: plan, labels of records, rows [k] that are readable, {leaf: [k …]}, by tf.data."""
    stream = None
    for step in steps:
      if stream is None:
        with load().device("/CPU:0"):
          stream = iter(self.dataset(step, last))
      at, row, made = self.next(stream)
      while int(at) < step:  # the empty end of the step before
        at, row, made = self.next(stream)
      plan, labels = self.pending.pop(step)
      yield plan, labels, row.numpy(), {leaf: x.numpy() for leaf, x in made.items()}

  def drawn_now(self, batch: dict[str, np.ndarray]):
    """`drawn` of a batch, as arrays."""
    tf = load()
    if self.batchwise is None:
      self.batchwise = tf.function(self.drawn, reduce_retracing=True)
    with tf.device("/CPU:0"):
      found = self.batchwise({k: tf.constant(v) for k, v in batch.items()})
    return tf.nest.map_structure(lambda x: x.numpy(), found)

  def next(self, stream):
    """The next element. Errors of the reading function are raised as they were."""
    tf = load()
    try:
      return next(stream)
    except tf.errors.OpError as error:
      if self.error is not None:
        raise self.error from None
      if "batch" in str(error.message) or "shape" in str(error.message):
        raise ValueError(
          f"images of {self.source.name} differ in size: set a view that resizes them"
        ) from None
      raise

  def filled(self, plan: Plan, row, made, labels):
    """A batch whose missing rows are replaced (training) or marked (offset -1)."""
    index, labels = plan.index.copy(), None if labels is None else labels.copy()
    valid = np.zeros(len(index), bool)
    valid[row] = True
    found = {place: {k: x[i] for k, x in made.items()} for i, place in enumerate(row.tolist())}
    for place in np.flatnonzero(~valid).tolist():
      self.report(int(index[place]), plan, place)
      if plan.offset[place] >= 0:
        found[place], index[place], label = self.substitute(plan, place)
        valid[place] = True
        if labels is not None:
          labels[place] = label
    if not found:
      found[0] = self.blank()
    example = next(iter(found.values()))
    out = {leaf: np.zeros((len(index), *x.shape), x.dtype) for leaf, x in example.items()}
    for place, leaves in found.items():
      for leaf, one in leaves.items():
        if one.shape != example[leaf].shape:
          raise ValueError(
            f"images of {self.source.name} differ in size: set a view that resizes them"
          )
        out[leaf][place] = one
    return plan._replace(index=index), out, valid, labels

  def blank(self) -> dict[str, np.ndarray]:
    """Leaves of an example when a whole batch is damaged."""
    shapes = self.views.shapes((None, None, self.channels))
    if any(None in shape for shape in shapes.values()):
      raise ValueError(
        f"no image of a whole batch of {self.source.name} can be read, and no view says their size"
      )
    blank = {leaf: np.zeros(shape, self.source.dtype) for leaf, shape in shapes.items()}
    return blank | {leaf: np.zeros(*form) for leaf, form in self.views.beside().items()}

  def report(self, index: int, plan: Plan, place: int):
    """Name a damaged image and the reason once: in the log and in `damaged`."""
    name = self.source.example_name(index)
    if name in self.damaged:
      return
    try:
      self.one(index, plan.epoch[place])
      why = "could not be read at the first try"
    except ValueError as error:
      why = str(error)
    self.damaged[name] = why
    logging.warning("%s %s: %s", name, why, "replaced" if plan.offset[place] >= 0 else "left out")

  def substitute(self, plan: Plan, place: int):
    """Leaves, index and label of the first readable candidate for this place.

    Nothing is remembered from earlier places: a JPEG damaged at the bottom may well give an upper
    crop, and a resumed run, which does not remember, must choose the same.
    """
    epoch, offset = int(plan.epoch[place]), int(plan.offset[place])
    tried = order.substitutes(self.source.size, self.seed, epoch, offset)
    for index in tried.tolist():
      try:
        made, label = self.one(index, epoch)
        return made, index, label
      except ValueError:
        self.report(index, plan, place)
    name = self.source.example_name(index)
    raise ValueError(
      f"no readable image of {self.source.name} among {len(tried)} candidates; "
      f"the last, {name}, {self.damaged[name]}"
    )

  def one(self, index: int, epoch: int) -> tuple[dict[str, np.ndarray], np.int32 | None]:
    """The leaves of one example and the label of its record, through the same graph. Raises the
    reason."""
    tf = load()
    plan = Plan(np.array([epoch]), np.array([-1]), np.array([index]))
    loaded, labels = self.read(plan)
    if self.source.encoded and loaded["record"][0] == b"":
      try:
        self.inspect(self.source.fetch(plan.index)[0])
      except OSError as error:
        raise ValueError(f"cannot be decoded ({error})") from None
    if self.single is None:
      self.single = tf.function(
        lambda batch: self.element(tf.nest.map_structure(lambda x: x[0], self.drawn(batch))),
        reduce_retracing=True,
      )
    try:
      with tf.device("/CPU:0"):
        made = self.single({k: tf.constant(v) for k, v in loaded.items()})
    except tf.errors.InvalidArgumentError as error:
      raise ValueError(f"cannot be decoded ({reason(error)})") from None
    made = {leaf: x.numpy() for leaf, x in made.items()}
    return made, None if labels is None else labels[0]


def cores() -> int:
  """Cores that this process may use, which in a container are fewer than the machine has."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def reason(error) -> str:
  """The decoder's own words in TensorFlow's message, without the graph it stands in."""
  lines = [line.strip() for line in str(error.message).split("[[")[0].splitlines()]
  lines = [
    line for line in lines if line and not line.startswith(("Graph execution", "Detected at"))
  ]
  return lines[-1].split("}} ")[-1][:120] if lines else "damaged data"
