"""Weights here and in PyTorch: a table of rows for each model and naming, read in either direction.

A row says which leaf here is which tensors there, and by what transform. `entries` meets a table with a tree and makes
of it what one tensor after the other can be converted by: nothing here holds more than one leaf's layer at a time.
"""

import math
import re
from typing import Callable, NamedTuple

import numpy as np

from piflow_jax import errors


class Transform(NamedTuple):
  """One tensor (or a leaf's layer) both ways."""

  shape_there: Callable  # shape here -> shape there
  here: Callable  # (array there, shape here) -> array here
  there: Callable  # array here -> array there


class Row(NamedTuple):
  """A leaf and its tensors.

  Attributes:
    here: path of the leaf, "blocks/mlp/in/kernel".
    there: keys. Several are the parts of one tensor, cut along its first axis. A "{i}" stands for the layer: the leaf
      carries the layers as its first axis; or, with `copies`, the same tensor is stored once a layer.
    transform: between the leaf (its layer, where there is "{i}") and the joined tensor.
    copies: see `there`.
  """

  here: str
  there: tuple[str, ...]
  transform: Transform
  copies: int = 0


class Entry(NamedTuple):
  """A row at one layer: (leaf `path`, `layer` or None) <-> the joined tensors `keys`, or `keys` that are all equal."""

  path: str
  layer: int | None
  keys: tuple[str, ...]
  transform: Transform
  copies: bool
  shape: tuple[int, ...]  # here, of the layer

  @property
  def shape_there(self):
    """Of each of the keys."""
    first, *rest = self.transform.shape_there(self.shape)
    return (first if self.copies else first // len(self.keys), *rest)

  def to_here(self, read):
    """The leaf's layer from read(key) -> array; of copies, which `check` has compared, the first."""
    parts = [read(key) for key in (self.keys[:1] if self.copies else self.keys)]
    return self.transform.here(parts[0] if len(parts) == 1 else np.concatenate(parts), self.shape)

  def to_there(self, array):
    """(key, array) for each of the keys."""
    joined = self.transform.there(array)
    parts = [joined] * len(self.keys) if self.copies else np.split(joined, len(self.keys))
    return list(zip(self.keys, parts, strict=True))


PLAIN = Transform(lambda shape: shape, lambda x, shape: x.reshape(shape), lambda x: x)
FLAT = Transform(lambda shape: (math.prod(shape),), lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))


def linear(inputs=1):
  """A kernel whose first `inputs` axes are summed over <-> a weight (out, in)."""
  split = lambda shape: (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
  return Transform(split, lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(split(x.shape)[::-1]).T)


# A convolution's kernel [h, w, in, out] <-> (out, in, h, w).
CONVOLUTION = Transform(lambda s: (s[3], s[2], s[0], s[1]), lambda x, _: x.transpose(2, 3, 1, 0),
                        lambda x: x.transpose(3, 2, 0, 1))


def patches(patch):
  """A linear layer on patches [p p C, D] <-> the convolution of that stride (D, C, p, p)."""
  unflat = lambda shape: (patch, patch, shape[0] // patch**2, shape[1])
  return Transform(
      lambda shape: CONVOLUTION.shape_there(unflat(shape)),
      lambda x, shape: CONVOLUTION.here(x, shape).reshape(shape),
      lambda x: CONVOLUTION.there(x.reshape(unflat(x.shape))))


def negated(transform):
  """The same with the opposite sign: of an output that means the opposite."""
  return Transform(transform.shape_there, lambda x, shape: -transform.here(x, shape), lambda x: -transform.there(x))


def entries(table, shapes, what):
  """Meet a table with a tree: what there is to convert.

  Args:
    table: rows; those whose leaf is not in the tree are passed over.
    shapes: {path: shape} of the tree's leaves.
    what: the naming, for messages.
  Raises:
    errors.UserError: leaves that no row names.
  """
  rows = {row.here: row for row in table}
  if len(rows) < len(table):
    raise ValueError(f"a leaf has two rows: {sorted(row.here for row in table)}")
  nameless = sorted(shapes.keys() - rows.keys())
  if nameless:
    raise errors.UserError(f"{what} has no name for {listed(nameless)}")
  found = []
  for path, shape in shapes.items():
    row = rows[path]
    if row.copies:
      keys = tuple(key.format(i=i) for i in range(row.copies) for key in row.there)
      found.append(Entry(path, None, keys, row.transform, True, tuple(shape)))
    elif "{i}" in row.there[0]:
      for i in range(shape[0]):
        keys = tuple(key.format(i=i) for key in row.there)
        found.append(Entry(path, i, keys, row.transform, False, tuple(shape[1:])))
    else:
      found.append(Entry(path, None, row.there, row.transform, False, tuple(shape)))
  return found


def check(entries_, found, where, ignored=(), faults={}, read=None):
  """Hold the tensors of a file against what is wanted, before any is converted; returns the keys that are left out.

  Args:
    entries_: of `entries`.
    found: {key: shape} of the file.
    where: the file, for messages.
    ignored: patterns of keys that are known and not needed.
    faults: of `files.Source`.
    read: key -> array, by which copies are compared; None: they are not.
  Raises:
    errors.UserError: one that lists every key that is missing, unknown, of another shape, among the file's own faults, or
      not the copy that it should be.
  """
  wanted = {key: entry.shape_there for entry in entries_ for key in entry.keys}
  left_out = {key for key in found.keys() - wanted.keys() if any(re.fullmatch(p, key) for p in ignored)}
  wrong = [difference(wanted, {key: shape for key, shape in found.items() if key not in left_out})]
  for what, keys in faults.items():
    wrong.append(_part(what, [f"{key} ({why})" for key, why in keys.items() if key not in left_out]))
  readable = {key for key, shape in wanted.items() if found.get(key) == shape}.difference(*faults.values())
  wrong.append(_part("unlike the first of what all layers share here", [
      key for entry in entries_ if entry.copies and read
      for key in _unlike_the_first([key for key in entry.keys if key in readable], read)]))
  if any(wrong):
    raise errors.UserError(f"--source: {where} does not fit the config's network; {'; '.join(filter(None, wrong))}")
  return sorted(left_out)


def _part(what, names):
  return f"{what}: {listed(sorted(names))}" if names else ""


def _unlike_the_first(keys, read):
  if not keys:
    return []
  first = read(keys[0])
  return [key for key in keys[1:] if not np.array_equal(first, read(key))]


def difference(expected, found):
  """What sets two {path: shape} apart, in words."""
  misshaped = [f"{name} {tuple(found[name])} instead of {tuple(shape)}"
               for name, shape in expected.items() if name in found and tuple(found[name]) != tuple(shape)]
  return "; ".join(filter(None, (_part("missing", expected.keys() - found.keys()),
                                 _part("unknown", found.keys() - expected.keys()), _part("misshaped", misshaped))))


def listed(names):
  """All names, those that differ in one number alone as "a.0-27.b"."""
  groups = {}
  for name in names:
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "{}", name, count=1) if numbers else name), []).append(
        int(numbers[0]) if numbers else None)
  found = []
  for pattern, numbers in groups.items():
    if numbers[0] is None:
      found.append(pattern)
      continue
    numbers.sort()
    runs = [[numbers[0]] * 2]
    for n in numbers[1:]:
      if n == runs[-1][1] + 1:
        runs[-1][1] = n
      else:
        runs.append([n, n])
    found.append(pattern.replace("{}", ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs), 1))
  return ", ".join(found)
