"""Reads a compiled program's text: how often each instruction runs, what it sends, what its buffers take up.

XLA's own cost analysis counts the body of a loop once: a network that loops over its layers would count as one layer.
Here a loop's body counts as often as it runs, or once where the text does not have the number.
"""

import math
import re
from typing import NamedTuple

_BYTES = dict(pred=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, c64=8)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
  name: str
  type: str  # the result's, as written
  op: str
  rest: str  # operands and attributes


class Buffer(NamedTuple):
  """An array as it lies in memory."""

  text: str
  bytes: int  # of its elements
  padded: int  # bytes with what tiling adds
  on_chip: bool  # whether it lies in the core's own memory instead of HBM


def computations(text):
  """({name: [Instruction]}, name of the entry) of an optimised HLO module's text."""
  found, entry, current = {}, None, None
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      current = found.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(Instruction(*match.groups()))
  return found, entry


def runs(text):
  """[(Instruction, how often it runs, whether it is part of a fusion)] of a module."""
  table, entry = computations(text)
  found = []

  def visit(name, times, fused):
    for i in table.get(name, ()):
      if i.op == "all-reduce" and name.startswith(_SCATTER):
        i = i._replace(op=_SCATTER)
      found.append((i, times, fused))
      if i.op == "while":
        body, condition = (re.search(rf"{part}=%?([\w.\-]+)", i.rest)[1] for part in ("body", "condition"))
        visit(body, times * _trips(i, table, condition), fused)
      else:
        for one, many in _CALLED.findall(i.rest):
          for callee in [one] if one else [part.strip().lstrip("%") for part in many.split(",")]:
            # Skip a reduction's scalar add: nothing in it is counted.
            if i.op in ("fusion", "call", "conditional", "async-start"):
              visit(callee, times, fused or i.op == "fusion")

  visit(entry, 1, False)
  return found


def _trips(loop, table, condition):
  known = re.search(r'known_trip_count[^\d]*(\d+)', loop.rest)
  if known:
    return int(known[1])
  # The condition is i < n; n is a constant in it or in a computation that it calls.
  numbers, names = [], [condition]
  while names:
    for i in table.get(names.pop(), ()):
      numbers += [int(n) for n in re.findall(r"^(\d+)\)", i.rest)] if i.op == "constant" else []
      names += [one for one, _ in _CALLED.findall(i.rest) if one]
  return max(numbers, default=1)


def buffers(type_):
  """The arrays of a type."""
  found = []
  for dtype, dims, layout, memory in _ARRAY.findall(type_):
    if dtype not in _BYTES:
      continue
    shape = [int(n) for n in dims.split(",") if n]
    padded = list(shape)
    tile = re.match(r"T\(([\d,]+)\)", memory)
    if tile and shape:
      minor_first = [int(n) for n in layout.split(",")]
      for axis, size in zip(minor_first, reversed([int(n) for n in tile[1].split(",")])):
        padded[axis] = -(-shape[axis] // size) * size
    size = _BYTES[dtype]
    found.append(Buffer(f"{dtype}[{dims}]", size * math.prod(shape), size * math.prod(padded),
                        re.search(r"S\([1-9]\)", memory) is not None))
  return found


def cycles(found):
  """The compiler's own estimate of a program's cycles; `found` is the result of `runs`.

  A loop counts as often as it runs. The compiler estimates none for Pallas kernels (see `kernels`) and collectives.
  """
  # The compiler writes a number of more than 15 digits where it does not know.
  return sum(times * int(n) for i, times, fused in found if not fused
             for n in re.findall(r'"estimated_cycles":"(\d{1,15})"', i.rest)[:1])


def kernels(found):
  """How many calls of Pallas kernels run."""
  return sum(times for i, times, _ in found if 'custom_call_target="tpu_custom_call"' in i.rest)


# XLA writes a TPU's reduce-scatter as a computation of this name: an all-reduce, then a slice of its result. The chip
# sends only that slice's worth.
_SCATTER = "all-reduce-scatter"

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", _SCATTER, "all-to-all", "collective-permute", "send")


def _sent(kind, size, group):
  """Bytes that a chip sends for results of `size` bytes in a group of `group` chips."""
  if kind in ("collective-permute", "send"):
    return size
  if kind == "reduce-scatter":
    return size * (group - 1)
  return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group


def collectives(found):
  """{kind: (how many run, bytes that a chip sends)}; a "send" crosses from slice to slice."""
  table, seen = {}, set()
  for i, times, _ in found:
    kind = i.op.removesuffix("-start")
    channel = re.search(r"channel_id=(\d+)", i.rest)
    # To hide a collective behind several fusions, XLA writes it into each of them: count a channel once.
    if kind not in _KINDS or channel and channel[1] in seen:
      continue
    seen |= {channel[1]} if channel else set()
    sizes = [b.bytes for b in buffers(i.type)]
    size = max(sizes, default=0) if i.op != kind else sum(sizes)  # the result of a "-start" includes its operand
    row = "reduce-scatter" if kind == _SCATTER else kind
    count, total = table.get(row, (0, 0))
    group = 1 if kind in ("collective-permute", "send") else _group(i.rest)
    table[row] = count + times, total + times * _sent(kind, size, group)
  return table


def _group(rest):
  """The number of chips that take part in a collective."""
  axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", rest)
  if axes:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  if not iota and not listed:
    raise ValueError(f"rest: a collective without a group that can be read: {rest[:300]}")
  return int(iota[1]) if iota else len(listed[1].split(","))


def padded(found, *, least=2.0, smallest=1 << 20):
  """{Buffer}: arrays in HBM that tiling makes at least `least` times larger, to `smallest` bytes or more."""
  return {b for i, _, fused in found if not fused and i.op not in ("tuple", "get-tuple-element", "parameter", "while")
          for b in buffers(i.type) if not b.on_chip and b.padded >= smallest and b.padded >= least * b.bytes}
