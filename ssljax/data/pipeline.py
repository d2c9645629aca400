"""Batches on the host: positions -> order -> this host's rows -> fetch -> decode -> views ->
hidden -> batch.

Batch k is a function of (seed, k) alone: the same for any number of hosts and from any start step.
"""

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from ssljax.data import order
from ssljax.data.images import MAX_PIXELS
from ssljax.data.masking import Hidden
from ssljax.data.moments import moments
from ssljax.data.order import Plan
from ssljax.data.sources import Source
from ssljax.data.text import Captions
from ssljax.data.views import View, Views, recipe_of

__all__ = ["MAX_PIXELS", "Batches", "batches", "examples", "moments"]


class Batches:
  """Iterator of batches, made ahead in a thread. `damaged`: example name -> reason, of all met so
  far."""

  def __init__(self, produce: Iterator[dict], damaged: dict[str, str], ahead: int = 2):
    self.damaged = damaged
    self._ready: queue.Queue = queue.Queue(maxsize=ahead)
    self._stop = threading.Event()
    self._end: BaseException | None = None
    # The thread knows the queue but not this object, so that an iterator nobody holds ends its
    # thread.
    thread = threading.Thread(target=_run, args=(produce, self._ready, self._stop), daemon=True)
    self._finish = weakref.finalize(self, _join, self._stop, thread)
    thread.start()

  def __iter__(self):
    return self

  def __next__(self) -> dict:
    if self._end is None:
      if self._stop.is_set():
        raise StopIteration
      batch, self._end = self._ready.get()
      if batch is not None:
        return batch
    raise self._end

  def close(self):
    """Stop the thread and free what it holds. Safe to call twice."""
    self._finish()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()


def _run(produce, ready: queue.Queue, stop: threading.Event):
  end: BaseException = StopIteration()
  try:
    for batch in produce:
      if not _put(ready, stop, (batch, None)):
        return
  except BaseException as error:  # raised again in the thread that reads
    end = error
  finally:
    produce.close()
  _put(ready, stop, (None, end))


def _put(ready: queue.Queue, stop: threading.Event, item) -> bool:
  while not stop.is_set():
    try:
      ready.put(item, timeout=0.1)
      return True
    except queue.Full:
      continue
  return False


def _join(stop: threading.Event, thread: threading.Thread):
  stop.set()
  if thread is not threading.current_thread():
    thread.join(timeout=10)


def batches(
  source: Source,
  *,
  batch_size: int,
  seed: int = 0,
  start_step: int = 0,
  rows: Sequence[int] | None = None,
  views: View | Views | None = None,
  hidden: Hidden | None = None,
  grid: Sequence[int] | None = None,
  channels: int = 3,
  workers: int = 0,
  max_pixels: int = MAX_PIXELS,
  shuffle: bool = True,
  steps: int | None = None,
  images: bool = True,
  text: Captions | None = None,
) -> Batches:
  """Training batches from global step `start_step` on: endless, or `steps` of them.

  batch_size is global; `rows` are the rows of it that this host supplies (None: all). Leaves:
  image [b h w c] in the source's dtype, or those of the recipe (such as views [b v h w c]), index
  int32 [b], label int32 [b] if the source has labels, hidden bool [b n], text int32 [b l] with
  `text`. Unreadable images are
  replaced in place by a candidate that depends on the place alone, and listed. workers: threads
  that decode (0: one per core). images: False leaves them out, for those who have them elsewhere.
  """
  _check(source, batch_size, views, hidden, grid)
  if batch_size > source.size:
    raise ValueError(
      f"batch_size {batch_size} is larger than the {source.size} examples of {source.name}"
    )
  mine = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
  if len(mine) == 0 or mine.min() < 0 or mine.max() >= batch_size or (np.diff(mine) <= 0).any():
    raise ValueError(f"rows must be sorted numbers in 0..{batch_size - 1}, at least one of them")
  last = None if steps is None else start_step + steps

  def plan(step):
    return Plan(*order.places(step, batch_size, mine, source.size, seed, shuffle))

  if images:
    stream = _stream(source, plan, start_step, last, seed, views, channels, workers, max_pixels)
  else:
    stream = _arrays(source, plan, start_step, last, images=False), {}
  return _ahead(source, stream, seed, hidden, text)


def _stream(
  source, plan, first, last, seed, views, channels, workers, max_pixels, known: dict | None = None
):
  """(plan, image, valid, labels) per step, and the dict of damaged images that it fills."""
  damaged = dict(known or {})
  recipe = recipe_of(views)
  if recipe == recipe_of(None) and not source.encoded:
    return _arrays(source, plan, first, last), damaged
  from ssljax.data.graph import Loader

  loader = Loader(
    source,
    plan,
    seed=seed,
    views=recipe,
    channels=channels,
    workers=workers,
    max_pixels=max_pixels,
    damaged=damaged,
  )
  return loader.run(first, last), damaged


def _arrays(source, plan, first, last, images=True):
  """Batches of arrays without views: NumPy only."""
  step = first
  while last is None or step < last:
    here = plan(step)
    made = {"image": source.fetch(here.index)} if images else {}
    yield here, made, np.ones(len(here.index), bool), None
    step += 1


def _ahead(source, stream, seed, hidden, text, valid_rows=None) -> Batches:
  """Batches with labels, hidden places and texts, made in the thread that runs ahead."""
  stream, damaged = stream

  def produce():
    for step, (plan, made, valid, labels) in enumerate(stream):
      batch = {leaf: np.ascontiguousarray(x) for leaf, x in made.items()}
      batch["index"] = plan.index.astype(np.int32)
      if source.labels is not None:
        labels = source.labels[plan.index]
      if labels is not None:
        batch["label"] = np.asarray(labels, np.int32)
      if hidden is not None:
        batch |= hidden.batch(seed, plan.epoch, plan.index)
      if text is not None:
        batch["text"] = text.draw(source, seed, plan.epoch, plan.index, batch.get("label"))
      if valid_rows is not None:
        batch["valid"] = valid & valid_rows(step)
      yield batch

  return Batches(produce(), damaged)


def check_channels(views: View | Views | None, channels: int):
  """Raises ValueError where a view needs colour that the images do not have."""
  for view in recipe_of(views).each():
    if view.colour and channels != 3:
      operation, argument = view.colour
      raise ValueError(
        f"{operation} needs RGB images, but channels is {channels}: set {argument} to zero"
      )


def _check(source, batch_size, views, hidden, grid):
  if batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}: at least 1 is needed")
  check_channels(views, source.channels)
  if hidden is not None and grid is not None and tuple(grid) != hidden.grid:
    raise ValueError(
      f"hidden places were built for the grid {hidden.grid}, the encoder's is {tuple(grid)}"
    )


def examples(
  source: Source,
  *,
  batch_size: int,
  views: View | Views | None = None,
  hidden: Hidden | None = None,
  seed: int = 0,
  grid: Sequence[int] | None = None,
  channels: int = 3,
  workers: int = 0,
  max_pixels: int = MAX_PIXELS,
  indices: Sequence[int] | None = None,
  known: dict[str, str] | None = None,
  rows: Sequence[int] | None = None,
  text: Captions | None = None,
) -> Batches:
  """One pass in order (over `indices`, or all): the last batch is padded, `valid` bool [b] says
  which rows count. Of each batch only `rows` are supplied (None: all).

  Unreadable images come with valid False and are listed. Draws are those of epoch 0, the same on
  every pass. `known`: damaged images of earlier passes, which are not named in the log again.
  """
  _check(source, batch_size, views, hidden, grid)
  wanted = np.arange(source.size) if indices is None else np.asarray(indices, np.int64)
  if len(wanted) == 0:
    raise ValueError(f"no example of {source.name} is asked for")
  mine = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)

  def plan(step):
    # Padding repeats the last example: it is decoded, and not counted.
    place = np.minimum(step * batch_size + mine, len(wanted) - 1)
    index = wanted[place]
    return Plan(np.zeros_like(index), np.full_like(index, -1), index)

  last = -(-len(wanted) // batch_size)
  stream = _stream(source, plan, 0, last, seed, views, channels, workers, max_pixels, known)
  counts = lambda step: step * batch_size + mine < len(wanted)  # noqa: E731
  return _ahead(source, stream, seed, hidden, text, counts)
