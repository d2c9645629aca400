"""Several processes as one run: how they find each other, agree, and leave.

A process of several leaves by `os._exit`: the regular way out waits at a barrier for the others,
and would wait for ever for one that is dead.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed  # the store of keys has no public name

from ssljax.errors import explain

# Seconds without a sign of life until JAX declares a process dead and ends the others. Signs are
# sent by a thread of their own every few seconds, also while a program is compiled.
HEARTBEAT = 30
# Seconds that a failing process gives the others to say that they fail too.
ANSWER = 5.0
_turns = itertools.count()  # names of exchanges are used once; all processes count alike


def start(
  coordinator: str = "",
  num_processes: int = 0,
  process_id: int = -1,
  *,
  cluster: bool = False,
  timeout: int = 300,
) -> None:
  """Joins the other processes of the run, before any device is used.

  coordinator: HOST:PORT where process 0 listens. With nothing given, the cluster that JAX
  recognises (SLURM, TPU slices, GKE, Open MPI) says who there is; without one, or where it runs
  one process only, this process is alone. cluster: no cluster is an error. timeout: seconds to wait
  for the others.

  Raises:
    ValueError: the numbers do not make sense. OSError: the others cannot be reached.
  """
  if jax.distributed.is_initialized() or (num_processes == 1 and not coordinator):
    return
  if coordinator or num_processes or process_id >= 0:
    _check_numbers(coordinator, num_processes, process_id)
    _reach(coordinator, process_id, timeout)
    given: dict[str, Any] = dict(
      coordinator_address=coordinator, num_processes=num_processes, process_id=process_id
    )
    if "JAX_LOCAL_DEVICE_IDS" not in os.environ:
      given["cluster_detection_method"] = "deactivate"  # which devices are ours is not its affair
  elif _cluster_size(cluster) > 1:
    given = {}
  else:
    return
  try:
    jax.distributed.initialize(
      **given, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT
    )
  except jax.errors.JaxRuntimeError as error:
    raise OSError(f"the processes did not find each other in {timeout} s: {error}") from error


def _check_numbers(coordinator: str, num_processes: int, process_id: int) -> None:
  given = {
    "--coordinator": coordinator, "--num_processes": num_processes > 0,
    "--process_id": process_id >= 0,
  }  # fmt: skip
  missing = [flag for flag, there in given.items() if not there]
  if missing:
    raise ValueError(f"{', '.join(given)} go together: {', '.join(missing)} is missing")
  if not re.fullmatch(r"(\[[^]]+\]|[^:/\s]+):\d+", coordinator):
    raise ValueError(f"--coordinator {coordinator!r} is not HOST:PORT, e.g. 10.0.0.1:1234")
  if process_id >= num_processes:
    last = num_processes - 1
    raise ValueError(f"--process_id {process_id} is wrong: {num_processes} processes are 0…{last}")


def _reach(coordinator: str, process_id: int, timeout: float) -> None:
  """Says in our words what the runtime would say in its own, or end the process for."""
  host, port = coordinator.rsplit(":", 1)
  if process_id == 0:
    with socket.socket() as listener:
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        listener.bind(("", int(port)))
      except (OSError, OverflowError) as error:
        raise OSError(f"process 0 cannot listen on port {port} of --coordinator: {error}") from None
    return
  until = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except (OSError, OverflowError) as error:
      if time.monotonic() > until:
        raise OSError(
          f"process {process_id} cannot reach the coordinator {coordinator} within {timeout} s:"
          f" {error}; is process 0 running there?"
        ) from None
    time.sleep(0.2)


def _cluster_size(needed: bool) -> int:
  """How many processes the cluster runs that JAX recognises here; 1 where there is none."""
  known = [c for c in clusters.ClusterEnv._cluster_types if not c.opt_in_only_method]
  found = next((c for c in known if c.is_env_present()), None)
  if found is None:
    if needed:
      names = ", ".join(c.name or c.__name__ for c in known)
      raise ValueError(f"--distributed: no cluster is recognised here; known are {names}")
    return 1
  try:
    return found.get_process_count()
  except Exception as error:
    name = found.name or found.__name__
    raise ValueError(
      f"this looks like a cluster ({name}), but it does not say how many processes there are"
      f" ({type(error).__name__}: {error}); --num_processes=1 runs this process alone"
    ) from error


def count() -> int:
  """How many processes the run has."""
  # Not jax.process_count(): that waits for the devices of all processes.
  return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def index() -> int:
  """The number of this process, from 0."""
  return distributed.global_state.process_id if jax.distributed.is_initialized() else 0


def first() -> bool:
  """Whether this is the process that writes and speaks for all."""
  return index() == 0


def say(text: Any) -> None:
  """Prints, in the first process."""
  if first():
    print(text, flush=True)


def from_first(compute: Callable[[], Any]) -> Any:
  """What the first process computes (any JSON), in every process; the others wait for it."""
  if count() == 1:
    return compute()
  key = f"ssljax/first/{next(_turns)}"
  if first():
    _client().key_value_set(key, json.dumps(compute()))
  return json.loads(_wait_for(key))


def to_first(value: Any) -> list[Any]:
  """The values (any JSON) of all processes, in the first; in the others their own."""
  if count() == 1:
    return [value]
  key = f"ssljax/all/{next(_turns)}"
  if not first():
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [value]
  return [value, *(json.loads(_wait_for(f"{key}/{i}")) for i in range(1, count()))]


def settled(arrays: Any) -> Any:
  """The arrays, computed where that is needed before the next program is started.

  Programs that do not wait for each other run on CPUs in any order, and where both communicate,
  processes wait for each other for ever. Accelerators keep the order of the calls.
  """
  several = count() > 1 and jax.default_backend() == "cpu"
  return jax.block_until_ready(arrays) if several else arrays


def _client() -> Any:
  return distributed.global_state.client


def _wait_for(key: str) -> str:
  """The value of a key, as soon as it is there. A process that dies meanwhile ends this one."""
  while True:
    try:
      return _client().blocking_key_value_get(key, 60_000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


class Watch:
  """Knows where this process is, and ends it when it stays there longer than `seconds`."""

  def __init__(self, seconds: float, end: Callable[[str], None]):
    self.place, self._seconds, self._end = "", seconds, end
    self._deadline = float("inf")
    self._closed = threading.Event()
    if seconds > 0:
      threading.Thread(target=self._look, daemon=True).start()

  def at(self, place: str) -> None:
    """`place` begins: "step 5"."""
    self.place, self._deadline = place, time.monotonic() + self._seconds

  def rest(self) -> None:
    """What follows may take as long as it likes."""
    self._deadline = float("inf")

  def close(self) -> None:
    """Ends the thread."""
    self._closed.set()

  def _look(self) -> None:
    while not self._closed.wait(min(self._seconds / 4, 5)):
      if time.monotonic() > self._deadline:
        self._end(self.place)
        return


@contextlib.contextmanager
def together(watchdog: float = 0.0) -> Iterator[Watch]:
  """Around what all processes do alike: what fails in one ends all, with a word on who failed.

  watchdog: seconds that one step may take (0: any time); see `Watch`, which is given.
  """

  def stuck(place: str) -> None:
    faulthandler.dump_traceback(all_threads=True)
    leave(f"nothing happened for {watchdog:g} s (log.watchdog)", place)

  watch = Watch(watchdog, stuck)
  try:
    yield watch
  except FloatingPointError:  # seen by all at the same step: they end as a single process does
    raise
  except BaseException as error:
    if count() == 1:
      raise
    leave(error, watch.place)
  finally:
    watch.close()


def leave(why: BaseException | str, place: str) -> NoReturn:
  """Says why, tells the other processes, names those that do not answer, and ends the process."""
  who = f"process {index()} of {count()}" if count() > 1 else "this process"
  lost = isinstance(why, jax.errors.JaxRuntimeError)  # perhaps only the echo of another's end
  if isinstance(why, str):
    _tell(f"error: {who}, {place}: {why}")
  elif not lost:
    _tell(f"{who} ends{', ' + place if place else ''}:")
    explain(why)
  if count() > 1:
    words = str(why).strip().splitlines() or [type(why).__name__]
    told = f"{place or 'at the start'}: {'lost the others' if lost else words[0]}"
    # Watches look every few seconds, and do not fire together.
    patience = ANSWER + 10 * isinstance(why, str)
    lines = others(_answers(told, patience), named=lost or isinstance(why, str))
    for line in lines:
      _tell(f"error: {who}, {place or 'at the start'}: {line}" if lost else line)
    if isinstance(why, BaseException) and lost and not lines:  # it was no echo
      explain(why)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def others(answers: dict[int, str] | None, named: bool) -> list[str]:
  """One line each: what the other processes say, and (where `named`) which of them are silent."""
  if answers is None:
    return ["process 0 does not answer: it ended, was killed, or its machine is gone"]
  rest = [i for i in range(count()) if i != index()]
  lines = [f"process {i} ended at {answers[i]}" for i in rest if i in answers]
  lines = [line for line in lines if not line.endswith("lost the others")]
  if named:
    gone = "does not answer: it was killed, is stuck, or its machine is gone"
    lines += [f"process {i} {gone}" for i in rest if i not in answers]
  return lines


def _answers(mine: str, patience: float) -> dict[int, str] | None:
  """Leaves a last word and waits a while for those of the others; None without process 0."""
  until, found = time.monotonic() + patience, dict[int, str]()
  try:
    _client().key_value_set(f"ssljax/left/{index()}", mine, allow_overwrite=True)
    while len(found) < count() and time.monotonic() < until:
      time.sleep(0.1)
      left = _client().key_value_dir_get("ssljax/left")
      found = {int(key.rsplit("/", 1)[1]): text for key, text in left}
  except jax.errors.JaxRuntimeError:  # process 0 keeps the words
    return found or None
  if first():
    time.sleep(1)  # the others read them here
  return found


def _tell(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
