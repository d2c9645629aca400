"""Pictures straight to finished views in a pool of threads, without a graph for each image.

The same kernels as the graph's, to the same bits: TensorFlow decodes, `View.direct` does the rest.
All of it works outside the interpreter's lock but for a few dozen microseconds per image.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ssljax.data import images
from ssljax.data.decode import DCT, decode_whole, upright
from ssljax.data.order import Plan
from ssljax.data.tensorflow import load
from ssljax.data.views import View, Views

# Steps that are begun before the one that is waited for: threads do not idle at the end of a batch.
AHEAD = 2
# Examples whose views are drawn at once, over several small steps: the graph that draws costs 2 ms
# a call and next to nothing more an example, 15 % of a step of 64 pictures of 224 x 224.
DRAWN = 256
# Rows of a task: to hand over each row alone costs a tenth of a small picture.
ROWS = 8


def possible(source, views: Views) -> bool:
  """Whether all views have a direct form and the source holds pictures."""
  return source.form == "picture" and all(v.direct and v.window for v in views.each())


def made(
  loader, steps: Iterable[int]
) -> Iterator[tuple[Plan, np.ndarray | None, np.ndarray, dict[str, np.ndarray]]]:
  """Per step: plan, labels of records, rows [k] that are readable, {leaf: [k …]}."""
  waiting: collections.deque = collections.deque()
  pool = ThreadPoolExecutor(loader.workers, "decode")
  steps = iter(steps)
  try:
    while group := together(loader, steps):
      waiting.extend(begin(loader, pool, group))
      while len(waiting) > AHEAD:
        yield ended(*waiting.popleft())
    while waiting:
      yield ended(*waiting.popleft())
  finally:
    pool.shutdown(cancel_futures=True)


def together(loader, steps: Iterator[int]) -> list[Plan]:
  """Plans of the next steps, as many as are drawn at once; none at the end."""
  group = [loader.plan(step) for step in itertools.islice(steps, 1)]
  more = DRAWN // len(group[0].index) - 1 if group else 0
  return group + [loader.plan(step) for step in itertools.islice(steps, max(0, more))]


def begin(loader, pool: ThreadPoolExecutor, group: list[Plan]) -> Iterator[tuple]:
  """Reads the records of some steps, draws their views and hands rows to the pool."""
  loaded, labels = loader.read(Plan(*map(np.concatenate, zip(*group))))
  loaded |= loader.drawn_now({"key": loaded["key"], "shape": loaded["shape"]})
  box = loaded["box"] = around(loaded["windows"])
  loaded["windows"][..., :2] -= box[:, None, :2]
  shapes = loader.views.shapes((None, None, loader.channels))
  end = 0
  for plan in group:
    start, end = end, end + len(plan.index)
    out = {leaf: np.empty((end - start, *shape), np.uint8) for leaf, shape in shapes.items()}
    tasks = [
      pool.submit(fill, np.arange(at, min(at + ROWS, end)), start, loaded, out, loader)
      for at in range(start, end, ROWS)
    ]
    out |= {leaf: loaded[leaf][start:end] for leaf in loader.views.beside()}
    yield plan, None if labels is None else labels[start:end], out, tasks


def ended(plan: Plan, labels, out: dict[str, np.ndarray], tasks: list[Future]):
  """Waits for the rows of a step."""
  row = np.concatenate([task.result() for task in tasks])
  if len(row) < len(plan.index):
    out = {leaf: x[row] for leaf, x in out.items()}
  return plan, labels, row, out


def around(windows: np.ndarray) -> np.ndarray:
  """The smallest boxes (y, x, height, width) [b 4] that hold all windows [b v 4] of a picture."""
  low, high = windows[..., :2].min(1), (windows[..., :2] + windows[..., 2:]).max(1)
  return np.concatenate([low, high - low], 1)


def fill(places: np.ndarray, start: int, loaded: dict, out: dict, loader) -> np.ndarray:
  """Writes the leaves of some places of what was loaded; -> the rows of a step that begins at
  `start` that could be decoded."""
  tf, views, good = load(), loader.views, []
  # One array [b size c] for each view, in the order of `each`.
  slots = [
    slot
    for leaf, group in views.leaves.items()
    for slot in ([out[leaf]] if isinstance(group, View) else np.moveaxis(out[leaf], 1, 0))
  ]
  with tf.device("/CPU:0"):  # said once: to look for the device took 6 µs a picture
    for place in places.tolist():
      box = loaded["box"][place]
      try:
        part = decoded(loaded["record"][place], loaded["shape"][place], box, loader.channels)
      except tf.errors.InvalidArgumentError:
        continue  # the row is missing, and `report` finds out why
      windows = loaded["windows"][place].tolist()
      for view, slot, window, drawn in zip(views.each(), slots, windows, loaded["drawn"]):
        y, x, height, width = window
        mine = {name: value[place] for name, value in drawn.items()}
        view.direct(part[y : y + height, x : x + width], mine, slot[place - start])
      good.append(place - start)
  return np.array(good, np.int64)


def decoded(record: bytes, shape: np.ndarray, box: np.ndarray, channels: int) -> np.ndarray:
  """The box (y, x, height, width) of a picture, upright: uint8 [h w c], without a copy."""
  kind, _, _, turn, _ = shape.tolist()
  if kind == images.JPEG and turn == 1:
    # Tensors and 1.0, not bytes, an array and the default 1: else TensorFlow takes its slow path,
    # 42 instead of 21 µs a picture, most of them with the interpreter's lock.
    tf = load()
    data, box = tf.constant(record), tf.constant(box)
    part = tf.io.decode_and_crop_jpeg(
      data, box, channels=channels, dct_method=DCT, acceptable_fraction=1.0
    )
    return np.asarray(memoryview(part))
  kind, turn = load().constant(kind), load().constant(turn)  # the graph's functions, run at once
  whole = np.asarray(memoryview(upright(decode_whole(record, kind, channels), turn)))
  y, x, height, width = box.tolist()
  return whole[y : y + height, x : x + width]
