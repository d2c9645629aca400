"""Preemption: a signal asks the run to save and leave."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
  """An event that SIGTERM and the first Ctrl-C set; a second Ctrl-C interrupts as usual.

  Only the main thread may handle signals: elsewhere (a notebook's worker) the event stays unset.
  """
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event
    return

  def handle(number, frame):
    if number == signal.SIGINT and event.is_set():
      raise KeyboardInterrupt
    event.set()

  before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield event
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
