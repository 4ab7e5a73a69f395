"""Weights here and in PyTorch: a table of rows for each model and naming, read in either direction.

A row says which leaf here is which tensors there, and by what transform. `entries` meets a table with a tree and makes
of it steps that each convert one tensor: nothing here holds more than one leaf's layer at a time.

A transform has three methods: shape_there(shape here) -> shape there; here(array there, shape here) -> array here;
there(array here) -> array there.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import numpy as np

from piflow_jax import errors


class Plain:
  """The same on both sides."""

  def shape_there(self, shape):
    return tuple(shape)

  def here(self, x, shape):
    return x.reshape(shape)

  def there(self, x):
    return x


class Flat:
  """An array <-> a vector of its numbers."""

  def shape_there(self, shape):
    return (math.prod(shape),)

  def here(self, x, shape):
    return x.reshape(shape)

  def there(self, x):
    return x.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Linear:
  """A kernel whose first `inputs` axes are summed over <-> a weight (out, in)."""

  inputs: int = 1

  def shape_there(self, shape):
    return math.prod(shape[self.inputs:]), math.prod(shape[:self.inputs])

  def here(self, x, shape):
    return x.T.reshape(shape)

  def there(self, x):
    return x.reshape(self.shape_there(x.shape)[::-1]).T


class Convolution:
  """A convolution's kernel [h, w, in, out] <-> (out, in, h, w)."""

  def shape_there(self, shape):
    return shape[3], shape[2], shape[0], shape[1]

  def here(self, x, shape):
    del shape
    return x.transpose(2, 3, 1, 0)

  def there(self, x):
    return x.transpose(3, 2, 0, 1)


class Pixel:
  """A linear layer [in, out] <-> a convolution of one pixel (out, in, 1, 1)."""

  def shape_there(self, shape):
    return shape[1], shape[0], 1, 1

  def here(self, x, shape):
    return x[:, :, 0, 0].T.reshape(shape)

  def there(self, x):
    return x.T[:, :, None, None]


@dataclasses.dataclass(frozen=True)
class Patches:
  """A linear layer on patches [p p C, D] <-> the convolution of that stride (D, C, p, p)."""

  patch: int

  def _unflat(self, shape):
    return self.patch, self.patch, shape[0] // self.patch**2, shape[1]

  def shape_there(self, shape):
    return CONVOLUTION.shape_there(self._unflat(shape))

  def here(self, x, shape):
    return CONVOLUTION.here(x, shape).reshape(shape)

  def there(self, x):
    return CONVOLUTION.there(x.reshape(self._unflat(x.shape)))


@dataclasses.dataclass(frozen=True)
class PackedPatches(Patches):
  """A linear layer on patches [p p C, D] <-> one on packed patches (D, C p p), FLUX's order: channels come first."""

  def shape_there(self, shape):
    return shape[1], shape[0]

  def here(self, x, shape):
    patch = self.patch
    return super().here(x.reshape(x.shape[0], -1, patch, patch), shape)

  def there(self, x):
    return super().there(x).reshape(self.shape_there(x.shape))


class Packed:
  """An output layer [D, cells, ...] <-> (... cells, D): in packed patches a token's cells count fastest."""

  def shape_there(self, shape):
    return math.prod(shape[1:]), shape[0]

  def here(self, x, shape):
    return np.moveaxis(x.T.reshape(shape[0], *shape[2:], shape[1]), -1, 1)

  def there(self, x):
    return np.moveaxis(x, 1, -1).reshape(x.shape[0], -1).T


class PackedFlat:
  """The bias of such a layer: [cells, ...] <-> (... cells)."""

  def shape_there(self, shape):
    return (math.prod(shape),)

  def here(self, x, shape):
    return np.moveaxis(x.reshape(*shape[1:], shape[0]), -1, 0)

  def there(self, x):
    return np.moveaxis(x, 0, -1).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Negated:
  """A transform with the opposite sign: of an output that means the opposite."""

  transform: Any

  def shape_there(self, shape):
    return self.transform.shape_there(shape)

  def here(self, x, shape):
    return -self.transform.here(x, shape)

  def there(self, x):
    return -self.transform.there(x)


@dataclasses.dataclass(frozen=True)
class Scaled:
  """A transform with a factor there, in float32: of an adapter whose scale has no place in a file's names."""

  transform: Any
  factor: float

  def shape_there(self, shape):
    return self.transform.shape_there(shape)

  def here(self, x, shape):
    return self.transform.here(x, shape).astype(np.float32) / np.float32(self.factor)

  def there(self, x):
    return self.transform.there(x).astype(np.float32) * np.float32(self.factor)


PLAIN, FLAT, CONVOLUTION = Plain(), Flat(), Convolution()


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
  transform: Any
  copies: int = 0


class Entry(NamedTuple):
  """A row at one layer: (leaf `path`, `layer` or None) <-> the joined tensors `keys`, or `keys` that are all equal."""

  path: str
  layer: int | None
  keys: tuple[str, ...]
  transform: Any
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
    raise errors.UserError(f"--format: {what} has no name for {listed(nameless)}; paths has one for every array")
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


def check(entries_, found, where, ignored=(), faults={}, read=None, hints=()):
  """Hold the tensors of a file against what is wanted, before any is converted; returns the keys that are left out.

  Args:
    entries_: of `entries`.
    found: {key: shape} of the file.
    where: the file, for messages.
    ignored: patterns of keys that are known and not needed.
    faults: of `files.Source`.
    read: key -> array, by which copies are compared; None: they are not.
    hints: of `hints`; the message begins with them.
  Raises:
    errors.UserError: one that lists every key that is missing, unknown, of another shape, among the file's own faults,
      or not the copy that it should be.
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
    raise errors.UserError(
        f"--source: {where} does not fit the config's network; {'; '.join(filter(None, [*hints, *wrong]))}")
  return sorted(left_out)


class Size(NamedTuple):
  """A field of the config that the size of an axis is a multiple of."""

  leaf: str  # path here of a leaf that has such an axis
  axis: int | None  # of the leaf's tensor there; None: the field is the number of the leaf's layers
  field: str  # "config.policy.components", for messages
  value: int  # of the config
  more: int = 0  # what the axis has beside multiples of the field's value


def hints(rows, sizes, wanted, found):
  """["config.policy.components is 8, set 4", ...] where sizes of tensors say that a field is another.

  Args:
    rows: the naming's table.
    sizes: Sizes.
    wanted, found: {key: shape}, as the config has them and as they are.
  """
  said, by_leaf = [], {row.here: row for row in rows}
  for size in sizes:
    if size.leaf in by_leaf and (value := _size_of(by_leaf[size.leaf].there[0], size, wanted, found)):
      said.append(f"{size.field} is {size.value}, set {value}")
  return said


def _size_of(there, size, wanted, found):
  """The other value of a field that the tensors there have, or None."""
  if size.axis is None:
    number = re.compile(re.escape(there).replace(re.escape("{i}"), r"(\d{1,6})"))
    layers = sum(number.fullmatch(key) is not None for key in found)
    return layers if layers != size.value else None
  mine, theirs = (shapes.get(there.format(i=0)) for shapes in (wanted, found))
  if mine is None or theirs is None or len(mine) != len(theirs) or size.axis >= len(mine):
    return None
  # Both are the field's value times the same factors.
  value, rest = divmod((theirs[size.axis] - size.more) * size.value, max(mine[size.axis] - size.more, 1))
  return value if not rest and value > 0 and value != size.value else None


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


def is_finite(array):
  """Whether all numbers of a float32 array are finite: by their sum in float64, which finite ones cannot overflow."""
  with np.errstate(invalid="ignore"):
    return bool(np.isfinite(np.sum(array, dtype=np.float64)))


_LISTED, _LONGEST = 60, 200  # names, or groups of names, in a message, and letters in one of them
_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")


def listed(names):
  """All names, those that differ in one number alone as "a.0-27.b"."""
  groups = {}
  for name in names:
    number = _NUMBER.search(name)
    pattern = _NUMBER.sub("{}", name, count=1) if number else name
    numbers = groups.setdefault((pattern, number is None), [])
    if number:
      numbers.append(int(number.group()))
  found = [(pattern.replace("{}", _runs(sorted(numbers)), 1) if numbers else pattern)[:_LONGEST]
           for (pattern, _), numbers in groups.items()]
  return ", ".join(found[:_LISTED]) + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")


def _runs(numbers):
  """"0-2,5" of ascending numbers."""
  runs = []
  for n in numbers:
    if runs and n == runs[-1][1] + 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
