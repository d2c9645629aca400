"""Preemption: a signal asks the run to save and leave."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from ssljax import processes


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
  """Whether to stop after a step: SIGTERM or the first Ctrl-C ask for it, a second Ctrl-C
  interrupts as usual. To be called once after every step.

  Only the main thread may handle signals: elsewhere (a notebook's worker) only those of several
  processes are heard. Of several processes one needs to be signalled; all stop after the same step.
  """
  event = threading.Event()
  several = processes.count() > 1

  def handle(number, frame):
    if number == signal.SIGINT and event.is_set():
      raise KeyboardInterrupt
    event.set()
    if several:
      os.kill(os.getpid(), signal.SIGTERM)

  def agreed(step: int) -> bool:
    # The runtime's own handler of SIGTERM spreads the word in the background; all stop one step
    # after the furthest of them. A step costs a look at a number, no message and no collective.
    return multihost_utils.reached_preemption_sync_point(step)

  numbers = [signal.SIGINT] if several else [signal.SIGTERM, signal.SIGINT]
  if threading.current_thread() is not threading.main_thread():
    numbers = []
  before = {number: signal.signal(number, handle) for number in numbers}
  try:
    yield agreed if several else lambda step: event.is_set()
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
