"""Pictures straight to finished views in a pool of threads, without a graph for each image.

The same kernels as the graph's, to the same bits: TensorFlow decodes, `View.direct` does the rest.
All of it works outside the interpreter's lock but for a few dozen microseconds per image.
"""

import collections
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ssljax.data import images
from ssljax.data.decode import DCT, decode_whole, upright
from ssljax.data.order import Plan
from ssljax.data.tensorflow import load
from ssljax.data.views import View, Views

# Steps that are begun before the one that is waited for: threads do not idle at the end of a batch.
AHEAD = 1
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
  try:
    for step in steps:
      waiting.append(begin(loader, pool, step))
      if len(waiting) > AHEAD:
        yield ended(*waiting.popleft())
    while waiting:
      yield ended(*waiting.popleft())
  finally:
    pool.shutdown(cancel_futures=True)


def begin(loader, pool: ThreadPoolExecutor, step: int):
  """Reads the records of a step, draws its views and hands rows to the pool."""
  plan = loader.plan(step)
  loaded, labels = loader.read(plan)
  count = len(plan.index)
  loaded |= loader.drawn_now({"key": loaded["key"], "shape": loaded["shape"]})
  shapes = loader.views.shapes((None, None, loader.channels))
  out = {leaf: np.empty((count, *shape), np.uint8) for leaf, shape in shapes.items()}
  places = [np.arange(count)[at : at + ROWS] for at in range(0, count, ROWS)]
  tasks = [pool.submit(fill, part, loaded, out, loader.views, loader.channels) for part in places]
  return plan, labels, out, tasks


def ended(plan: Plan, labels, out: dict[str, np.ndarray], tasks: list[Future]):
  """Waits for the rows of a step."""
  row = np.concatenate([task.result() for task in tasks])
  if len(row) < len(plan.index):
    out = {leaf: x[row] for leaf, x in out.items()}
  return plan, labels, row, out


def fill(places: np.ndarray, loaded: dict, out: dict, views: Views, channels: int) -> np.ndarray:
  """Writes the leaves of some rows; -> those that could be decoded."""
  tf, good = load(), []
  # One array [b size c] for each view, in the order of `each`.
  slots = [
    slot
    for leaf, group in views.leaves.items()
    for slot in ([out[leaf]] if isinstance(group, View) else np.moveaxis(out[leaf], 1, 0))
  ]
  for place in places.tolist():
    windows = loaded["windows"][place]
    low, high = windows[:, :2].min(0), (windows[:, :2] + windows[:, 2:]).max(0)
    box = np.concatenate([low, high - low])
    try:
      part = decoded(loaded["record"][place], loaded["shape"][place], box, channels)
    except tf.errors.InvalidArgumentError:
      continue  # the row is missing, and `report` finds out why
    for view, slot, window, drawn in zip(views.each(), slots, windows, loaded["drawn"]):
      (y, x), (height, width) = window[:2] - low, window[2:]
      mine = {name: value[place] for name, value in drawn.items()}
      slot[place] = view.direct(part[y : y + height, x : x + width], mine)
    good.append(place)
  return np.array(good, np.int64)


def decoded(record: bytes, shape: np.ndarray, box: np.ndarray, channels: int) -> np.ndarray:
  """The box (y, x, height, width) of a picture, upright: uint8 [h w c], without a copy."""
  kind, _, _, turn, _ = shape.tolist()
  if kind == images.JPEG and turn == 1:
    part = load().io.decode_and_crop_jpeg(record, box, channels=channels, dct_method=DCT)
    return np.asarray(memoryview(part))
  kind, turn = load().constant(kind), load().constant(turn)  # the graph's functions, run at once
  whole = np.asarray(memoryview(upright(decode_whole(record, kind, channels), turn)))
  y, x, height, width = box.tolist()
  return whole[y : y + height, x : x + width]
