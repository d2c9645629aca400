"""python -m ssljax.launch --processes=2 [--devices_per_process=2] -- --config=… --workdir=…

Several processes of `ssljax.main` on this machine. For several machines see docs/scale.md.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

COUNT = "--xla_force_host_platform_device_count="


def free_port() -> int:
  """A port of this machine that nobody listens on now."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def commands(processes: int, port: int, words: Sequence[str]) -> list[list[str]]:
  """The command of each process. `words` are those of ssljax.main, or begin with a script."""
  script = words and re.fullmatch(r"[^-].*\.py", words[0])
  base = [sys.executable, *words] if script else [sys.executable, "-m", "ssljax.main", *words]
  where = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
  return [[*base, *where, f"--process_id={i}"] for i in range(processes)]


def environment(process: int, devices: int) -> dict[str, str]:
  """The environment of one process: as ours, with `devices` devices of its own (0: any)."""
  env = os.environ | {"PYTHONUNBUFFERED": "1"}
  if devices:
    flags = re.sub(COUNT + r"\d+", "", env.get("XLA_FLAGS", ""))
    env["XLA_FLAGS"] = f"{flags} {COUNT}{devices}".strip()  # counts on CPUs only
    mine = range(process * devices, (process + 1) * devices)
    env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, mine))  # counts on GPUs only
  return env


class Group:
  """The processes, and what they say, each line with the number of its process."""

  def __init__(self, lines: Sequence[Sequence[str]], devices: int):
    self.codes: list[int | None] = [None] * len(lines)
    self.ended = threading.Condition()
    self._voice = threading.Lock()
    # Sessions of their own: Ctrl-C reaches them through this process alone.
    self.children = [
      subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=environment(i, devices), start_new_session=True,
      )
      for i, line in enumerate(lines)
    ]  # fmt: skip
    self._readers = [
      threading.Thread(target=self._follow, args=(i, child), daemon=True)
      for i, child in enumerate(self.children)
    ]
    for reader in self._readers:
      reader.start()

  def _follow(self, number: int, child: subprocess.Popen) -> None:
    assert child.stdout
    for line in child.stdout:
      with self._voice:
        print(f"{number}: {line}", end="", flush=True)
    code = child.wait()
    with self.ended:
      self.codes[number] = code
      self.ended.notify_all()

  def send(self, number: int) -> None:
    """Sends a signal to those that still run."""
    for child in self.children:
      if child.poll() is None:
        child.send_signal(number)

  def wait(self, grace: float) -> int:
    """Until all have ended; -> the exit code of the first that failed, 0 where none did."""
    with self.ended:
      self.ended.wait_for(lambda: None not in self.codes or any(self.codes))
      bad = next((i for i, code in enumerate(self.codes) if code), None)
      if bad is None:
        return 0
      if None in self.codes:
        tell(f"process {bad} {ending(self.codes[bad])}: the others end too")
        self.ended.wait_for(lambda: None not in self.codes, timeout=grace)
    self.send(signal.SIGKILL)  # a process of several cannot go on without one
    for reader in self._readers:
      reader.join(timeout=10)
    return exit_code(self.codes[bad])


def ending(code: int | None) -> str:
  """How a process ended, in words."""
  if code is not None and code < 0:
    return f"was ended by {signal.Signals(-code).name}"
  return f"failed with exit code {code}"


def exit_code(code: int | None) -> int:
  """As shells have it: 128 + the number of the signal."""
  code = code or 0
  return 128 - code if code < 0 else code


def tell(text: str) -> None:
  print(f"launch: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; -> the first bad exit code."""
  words = list(sys.argv[1:] if argv is None else argv)
  cut = words.index("--") if "--" in words else len(words)
  parser = argparse.ArgumentParser("ssljax.launch", description=__doc__, allow_abbrev=False)
  parser.add_argument("--processes", type=int, required=True)
  parser.add_argument("--devices_per_process", type=int, default=0, help="0: all that it sees")
  parser.add_argument(
    "--grace", type=float, default=15.0, help="seconds that the others have to end by themselves"
  )
  flags = parser.parse_args(words[:cut])
  if flags.processes < 1 or flags.devices_per_process < 0:
    parser.error("--processes must be 1 or more, --devices_per_process 0 or more")
  group = Group(commands(flags.processes, free_port(), words[cut + 1 :]), flags.devices_per_process)
  asked = []

  def forward(number, frame):
    # Ctrl-C becomes SIGTERM, on which a run saves and stops; the second one ends at once.
    asked.append(number)
    group.send(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, forward)
  return group.wait(flags.grace)


if __name__ == "__main__":
  sys.exit(main())
