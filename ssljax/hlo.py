"""What a compiled program moves, read from its text: bytes between devices, bytes to and from
memory. Loops count as often as they run; the compiler's own counts take a loop's body once.

The text is that of `compiled.as_text()`. It is not a stable format: what is not understood counts
nothing, and `tests/test_plan.py` compares programs whose numbers are known.
"""

import collections
import functools
import math
import re
from collections import Counter
from typing import NamedTuple

SIZES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # bytes; the others say their bits: f32, u8
_PIECE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute",
)  # fmt: skip
# No traffic of their own: names for what lies somewhere, or callers of what is counted itself.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "after-all", "partition-id", "replica-id", "opt-barrier", "async-start",
}  # fmt: skip


class Instruction(NamedTuple):
  name: str
  type: str
  op: str
  operands: list[str]
  rest: str  # attributes
  root: bool


class Program(NamedTuple):
  computations: dict[str, list[Instruction]]
  entry: str


def parse(text: str) -> Program:
  """Computations by name, each a list of instructions."""
  computations: dict[str, list[Instruction]] = {}
  entry, body = "", []
  for line in text.splitlines():
    if head := _HEAD.match(line):
      body = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif found := _NAME.match(line):
      body.append(_instruction(found[2], line[found.end() :], bool(found[1])))
  return Program(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
  """`type op(operands), attributes`; a tuple's type has parentheses and spaces of its own."""
  cut = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  rest = text[cut:].lstrip()
  start = rest.index("(")
  end = _closing(rest, start)
  operands = re.findall(r"%([\w.\-]+)", rest[start:end])
  if not operands:  # some versions print names without %
    operands = re.findall(r"[\w.\-]+", rest[start:end])
  return Instruction(name, text[:cut], rest[:start], operands, rest[end + 1 :], root)


def _closing(text: str, start: int) -> int:
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  return len(text) - 1


def pieces(type_: str, hbm: bool = False) -> list[tuple[str, int]]:
  """(dtype, bytes) of each array of a type; with `hbm` those in on-chip memory, `S(1)`, are 0."""
  found = []
  for dtype, dims, layout in _PIECE.findall(type_):
    bits = re.search(r"\d+", dtype)
    size = SIZES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
    inside = hbm and re.search(r"S\([1-9]", layout)
    found.append(
      (dtype, 0 if inside else int(size * math.prod(map(int, filter(None, dims.split(","))))))
    )
  return found


def size(type_: str, hbm: bool = False) -> int:
  return sum(number for _, number in pieces(type_, hbm))


def called(instruction: Instruction) -> list[str]:
  names = _CALLED.findall(instruction.rest)
  for group in _BRANCHES.findall(instruction.rest):
    names += [name.strip().lstrip("%") for name in group.split(",") if name.strip()]
  return names


def trip_count(program: Program, loop: Instruction) -> int:
  """How often a while loop runs: said by the compiler (CPU, GPU), or the largest whole number that
  its condition knows (TPU); 1 where neither is there."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
  numbers = [1]
  for instruction in program.computations.get(condition[1], []) if condition else []:
    if instruction.op == "constant" and re.match(r"[su]\d+\[\]", instruction.type):
      numbers += map(int, instruction.operands)
  return max(numbers)


def times(program: Program) -> tuple[Counter, Counter]:
  """How often each computation runs; and those alone that are no part of a fused operation."""
  every, outer = Counter[str](), Counter[str]()

  def visit(name: str, count: int, fused: bool) -> None:
    every[name] += count
    outer[name] += 0 if fused else count
    for instruction in program.computations.get(name, []):
      loop = trip_count(program, instruction) if instruction.op == "while" else 1
      inside = fused or instruction.op not in ("while", "conditional", "call", "async-start")
      for inner in called(instruction):
        visit(inner, count * loop, inside)

  visit(program.entry, 1, False)
  return every, outer


def group_size(rest: str, devices: int) -> int:
  """How many devices take part in one group of a collective."""
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([\w.]+)'", found[2]))
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
    return int(found[1])
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return found[1].count(",") + 1
  return devices


def collectives(text: str, devices: int) -> dict[tuple[str, str], float]:
  """Bytes that one device sends in one run, by kind and dtype.

  As on a ring of n devices: all-gather and reduce-scatter (n-1)/n of the whole array, all-reduce
  twice that, all-to-all (n-1)/n, a permutation everything. On TPU a reduce-scatter is written as a
  fusion `all-reduce-scatter` of an all-reduce and a slice, and a collective that runs beside other
  work as a chain of fusions, each of which names it again: it counts once.
  """
  program = parse(text)
  every, _ = times(program)
  total: dict[tuple[str, str], float] = collections.defaultdict(float)
  chains = set()
  for name, count in every.items():
    for instruction in program.computations.get(name, []):
      kind = instruction.op.removesuffix("-start")
      if kind not in COLLECTIVES:
        continue
      if "chain_id=" in instruction.rest:
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key = (channel and channel[1], kind, re.sub(r"\{.*?\}", "", instruction.type))
        if key in chains:
          continue
        chains.add(key)
      n = group_size(instruction.rest, devices)
      scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
      for dtype, number in pieces(instruction.type):
        sent = _sent(kind, number, n, instruction.op.endswith("-start"))
        total["reduce-scatter" if scattered else kind, dtype] += count * sent / (1 + scattered)
  return {key: value for key, value in total.items() if value >= 1}


def _sent(kind: str, number: float, n: int, start: bool) -> float:
  """Bytes of a ring, from one array of the result; a `-start` names its input as well."""
  if kind == "all-gather":  # the pieces of a start are n and 1 parts of n + 1
    return number * (n - 1) / (n + 1 if start else n)
  if kind == "all-reduce":
    return 2 * number * (n - 1) / n
  if kind == "reduce-scatter":
    return number * (n - 1)
  if kind == "collective-permute":
    return number / 2 if start else number
  return number * (n - 1) / n


def traffic(text: str) -> float:
  """Bytes that one device reads from and writes to its memory in one run: operands and results of
  every operation that is not part of a fused one. An estimate: what a cache or on-chip memory keeps
  without the text saying so is counted."""
  program = parse(text)
  _, outer = times(program)
  reach = functools.partial(_moved, program)
  total = 0.0
  for name, count in outer.items():
    if count:
      types = {i.name: i.type for i in program.computations.get(name, [])}
      total += count * sum(reach(types, i) for i in program.computations.get(name, []))
  return total


def _moved(program: Program, types: dict[str, str], instruction: Instruction) -> float:
  """Bytes of one operation."""
  op = instruction.op
  if op in _FREE or op.endswith("-done") or "AllocateBuffer" in instruction.rest:
    return 0
  reads = [types.get(name, "") for name in instruction.operands]
  if op == "fusion":
    return _fused(program, instruction, reads)
  if op == "dynamic-slice":
    return size(instruction.type, hbm=True) + _part(instruction.type, reads[0])
  if op == "dynamic-update-slice":
    return size(reads[1], hbm=True) + _part(reads[1], reads[0])
  written: float = size(instruction.type, hbm=True)
  if op.endswith(
    "-start"
  ):  # (destination, source, …) or (source, destination, …): as often written
    written = sum(n for _, n in pieces(instruction.type, hbm=True)) - sum(
      size(r, hbm=True) for r in reads
    )
  return max(written, 0) + sum(size(r, hbm=True) for r in reads)


def _part(piece: str, whole: str) -> int:
  """Bytes of a part of an array: none where the whole lies in on-chip memory."""
  return size(piece) if size(whole, hbm=True) else 0


def _fused(program: Program, fusion: Instruction, reads: list[str]) -> float:
  """Operands and result of a fusion; of an array that is only sliced or updated, the slice."""
  inside = program.computations.get((called(fusion) or [""])[0], [])
  if any("chain_id=" in i.rest for i in inside):
    # A step of a collective beside other work: its buffers are handed on, not read again.
    own = {re.sub(r"\{.*", "", i.type) for i in inside if i.op in COLLECTIVES}
    reads = [r for r in reads if re.sub(r"\{.*", "", r) not in own]
    return sum(size(r, hbm=True) for r in reads)
  total = 0.0
  for parameter in (i for i in inside if i.op == "parameter"):
    number = int(parameter.operands[0]) if parameter.operands else 0
    whole = reads[number] if number < len(reads) else parameter.type
    total += _read(program, inside, parameter.name, whole)
  for which, (_, whole_size) in enumerate(pieces(fusion.type, hbm=True)):
    part = _written(program, inside, which)
    total += whole_size if part is None else min(part, whole_size)
  return total


def _read(program: Program, inside: list[Instruction], name: str, whole: str) -> float:
  """Bytes that a fused computation reads of one of its values: the slices, if slices are all."""
  total = 0.0
  for user in (i for i in inside if name in i.operands):
    place = user.operands.index(name)
    if user.op == "bitcast":
      total += _read(program, inside, user.name, whole)
    elif user.op == "fusion":
      inner = program.computations.get((called(user) or [""])[0], [])
      parameters = [i for i in inner if i.op == "parameter" and i.operands == [str(place)]]
      total += sum(_read(program, inner, i.name, whole) for i in parameters)
    elif user.op == "dynamic-slice" and place == 0:
      total += _part(user.type, whole)
    elif user.op != "dynamic-update-slice" or place:  # updated in place: not read
      return size(whole, hbm=True)
  return min(total, size(whole, hbm=True))


def _written(program: Program, inside: list[Instruction], which: int) -> float | None:
  """Bytes of the part that a fused computation writes of its result number `which`, where it is
  updated in place; None where it is written whole."""
  by_name = {i.name: i for i in inside}
  value = next((i for i in inside if i.root), None)
  if value is not None and value.op == "tuple":
    value = by_name.get(value.operands[which])
    which = 0
  while value is not None and value.op in ("bitcast", "copy"):
    value = by_name.get(value.operands[0])
  if value is not None and value.op == "get-tuple-element":
    found = re.search(r"index=(\d+)", value.rest)
    which = int(found[1]) if found else 0
    value = by_name.get(value.operands[0])
  if value is None:
    return None
  if value.op == "fusion":
    return _written(program, program.computations.get((called(value) or [""])[0], []), which)
  if value.op == "dynamic-update-slice":
    return size(by_name[value.operands[1]].type) if value.operands[1] in by_name else 0.0
  return None
