"""What data look like: a spec, the records behind it, and checks of them that end in one line.

A record is {"x_0": float32 array, "cond": {name: array}}, a batch the same with a leading axis. `cond` is {} where
nothing conditions the network.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import types
from typing import Any, NamedTuple

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax import errors

_FIRST = 8  # records that are looked at before training: one dark picture does not say in which range all of them are
_LARGE = 8.0  # nothing scaled for noise of standard deviation 1 is so large as a rule; pictures of 0..255 are


class Array(NamedTuple):
  """One array of a condition."""

  shape: tuple = ()  # of one record
  dtype: Any = "int32"
  classes: int = 0  # values are labels in [0, classes), and label `classes` is the network's null class; 0: no labels


class Spec(NamedTuple):
  """One record."""

  x_0: tuple  # shape
  cond: dict  # {name: Array}
  bounds: tuple | None = None  # (least, most) of x_0; None: the first records must look scaled
  dtype: Any = "float32"  # of x_0; other than float32 only of what is stored


class Stored(NamedTuple):
  """Records as they are stored, of which x_0 is drawn anew each time: a latent of its posterior, say."""

  spec: Spec  # of what is stored: its x_0 is what `draw` takes
  records: Callable[[str], Any]  # split -> random access, as Data's
  draw: Callable | None  # (key, one record's stored x_0) -> x_0 as Data.spec says it; traced. None: they are the same


class Data(NamedTuple):
  """What the `make` of a data noun returns."""

  spec: Spec
  records: Callable[[str], Any]  # split, "train" or "held_out" -> random access, with a length, to records
  names: Sequence[str] = ()  # of the classes
  # Fields of the noun that `make` found in the data, for the workdir's config.json: with them, `make` needs the data no
  # more, and samples are drawn where the data are not.
  found: Mapping[str, Any] = types.MappingProxyType({})
  stored: Callable[[], Stored] | None = None  # what training reads in the place of `records`
  null: Callable[[], dict] | None = None  # () -> one record's cond, without its batch: of guidance's unconditional pass
  # () -> {shape of x_0: records of that shape}, spec's own shape among them; None: all records have it. `records` and
  # what is measured are of spec's own. Not with `stored`.
  sizes: Callable[[], Mapping] | None = None


def stored(data):
  """What training reads: Stored."""
  return Stored(data.spec, data.records, None) if data.stored is None else data.stored()


def label(classes):
  """The cond of a spec with labels in [0, classes); classes = 0: none."""
  return {"label": Array(classes=classes)} if classes else {}


def check(data):
  """Raises ValueError: what a data noun's `make` returned is no Data."""
  if not isinstance(data, Data):
    raise ValueError(f"make: returned {_kind(data)}, not a piflow_jax.data.spec.Data(spec, records)")
  spec = data.spec
  if not isinstance(spec, Spec):
    raise ValueError(f"make: its spec is {_kind(spec)}, not a piflow_jax.data.spec.Spec(x_0, cond)")
  _check_shape("x_0", spec.x_0)
  if not spec.x_0:
    raise ValueError("make: the shape of its spec.x_0 is (); give one axis at least, the channels")
  if spec.bounds is not None and not (len(spec.bounds) == 2 and spec.bounds[0] < spec.bounds[1]):
    raise ValueError(f"make: its spec.bounds are {spec.bounds!r}, not (least, most)")
  if not isinstance(spec.cond, Mapping):
    raise ValueError(f"make: its spec.cond is {_kind(spec.cond)}, not a dict of names and Arrays")
  for name, array in spec.cond.items():
    if not isinstance(array, Array):
      raise ValueError(f"make: its spec.cond[{name!r}] is {_kind(array)}, not a piflow_jax.data.spec.Array")
    _check_shape(f"cond[{name!r}]", array.shape)
    if not _is_whole(array.classes) or array.classes < 0:
      raise ValueError(f"make: its spec.cond[{name!r}].classes is {array.classes!r}, not a number of classes")
    try:
      kind = np.dtype(array.dtype).kind
    except TypeError as e:
      raise ValueError(f"make: its spec.cond[{name!r}].dtype is {array.dtype!r}, not a type of NumPy's") from e
    if array.classes and kind not in "iu":
      raise ValueError(f"make: its spec.cond[{name!r}] has labels of {array.dtype}; labels are int32")
  if not callable(data.records):
    raise ValueError(f'make: its records are {_kind(data.records)}, not a function of the split, "train" or "held_out"')


def checked_shape(shape):
  """A noun's field `shape` as a tuple; raises ValueError for what is no shape of x_0."""
  if not isinstance(shape, (tuple, list)) or not shape:
    raise ValueError(f"shape: {shape!r} is no shape of x_0; give for example (32, 32, 4)")
  for side in shape:
    config_lib.whole("shape", side)
  if math.prod(shape) > 2**31 - 1:
    raise ValueError(f"shape: {tuple(shape)} has more than 2**31 - 1 values")
  return tuple(shape)


def _check_shape(name, shape):
  if not isinstance(shape, tuple) or not all(_is_whole(n) and n > 0 for n in shape):
    raise ValueError(f"make: the shape of its spec.{name} is {shape!r}, not a tuple of whole numbers of at least 1")


def checked_records(data, split):
  """The records of a split, once their kind, the first of them whole and the range of the first few are looked at.

  Args:
    data: Data, or Stored.
    split: "train" or "held_out".
  Raises errors.UserError.
  """
  where = f"config.data: {split}"
  records = data.records(split)
  if isinstance(records, Mapping) or not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
    raise errors.UserError(f"{where}: its records are {_kind(records)}; give random access: something with a length "
                           "whose [i] is record i, for example a list")
  if not len(records):
    raise errors.UserError(f"{where}: has no records")
  first = []
  for i in range(min(_FIRST, len(records))):
    first.append(records[i])
    check_record(first[-1], data.spec, f"{where}, record {i}")
  _check_range([np.asarray(record["x_0"]) for record in first], data.spec, where)
  return records


def check_record(record, spec, where):
  """Holds a record whole against the spec.

  Raises:
    errors.UserError: `where`, what is wrong, and what to do.
  """
  if words := misfit(record, spec):
    raise errors.UserError(f"{where}: {words}")
  batch = {"x_0": np.asarray(record["x_0"])[None], "cond": {k: np.asarray(v)[None] for k, v in record["cond"].items()}}

  def here(row):
    del row  # there is one
    return where

  check_batch(batch, spec, here)


def misfit(record, spec):
  """What is wrong with a record's keys, types or shapes, in words, or None."""
  if not isinstance(record, Mapping):
    return f"is {_kind(record)}; give {_wanted(spec)}"
  if record.keys() != {"x_0", "cond"}:
    return f"has keys {_listed(record)}; give {_wanted(spec)}"
  if words := _x_0_misfit(record["x_0"], spec.x_0, np.dtype(spec.dtype)):
    return words
  cond = record["cond"]
  if not isinstance(cond, Mapping):
    return f"cond is {_kind(cond)}; give {_wanted(spec)}"
  if cond.keys() != spec.cond.keys():
    return f"cond has keys {_listed(cond) or 'none'}; give {_wanted(spec)}"
  for name, array in spec.cond.items():
    if words := _cond_misfit(name, cond[name], array):
      return words
  return None


def _wanted(spec):
  names = ", ".join(f'"{name}": ...' for name in spec.cond)
  return f'{{"x_0": ..., "cond": {{{names}}}}}'


def _x_0_misfit(x, shape, dtype):
  if not isinstance(x, (np.ndarray, np.generic)):
    return f"x_0 is {_kind(x)}; give a NumPy array, {dtype} of shape {shape}"
  if x.dtype == dtype and x.shape == shape:
    return None
  if x.dtype == np.uint8:
    return "x_0 is uint8; divide by 127.5 and subtract 1, for float32 in [-1, 1]"
  if x.dtype != dtype:
    return f"x_0 is {x.dtype}; give {dtype}: x_0.astype(np.{dtype})"
  if len(shape) > 1 and x.shape == (shape[-1], *shape[:-1]):
    return f"x_0 has shape {x.shape}, not {shape}: is it channels first? Channels come last: np.moveaxis(x_0, 0, -1)"
  return f"x_0 has shape {x.shape}; the data's spec says {shape}"


def _cond_misfit(name, value, array):
  if isinstance(value, bool) or not isinstance(value, (np.ndarray, np.generic, int)):
    if array.classes and isinstance(value, (float, str)):
      return f"cond.{name} is {value!r}; labels are whole numbers, int32"
    return f"cond.{name} is {_kind(value)}; give a NumPy array, {np.dtype(array.dtype)} of shape {array.shape}"
  value = np.asarray(value)
  if array.classes and value.shape == (*array.shape, array.classes):
    return f"cond.{name} has shape {value.shape}: is it one-hot? Give the label itself: np.argmax({name}, -1)"
  if array.classes and value.dtype.kind not in "iu":
    return f"cond.{name} is {value.dtype}; labels are whole numbers, int32"
  if value.shape != array.shape:
    return f"cond.{name} has shape {value.shape}; the data's spec says {array.shape}"
  if not array.classes and value.dtype != array.dtype:
    return f"cond.{name} is {value.dtype}; the data's spec says {np.dtype(array.dtype)}"
  return None


def _row(row):
  return f"config.data: row {row} of a batch"


def check_batch(batch, spec, where=_row):
  """Holds the values of a batch against the spec: labels in range, numbers finite and within bounds.

  Args:
    batch: NumPy arrays of the shapes that the spec says, with a leading axis.
    spec: Spec.
    where: number of a row -> words for it.
  Raises:
    errors.UserError: where, what is wrong, and what to do.
  """
  faults = [_value_fault("x_0", batch["x_0"], spec.bounds)]
  for name, array in spec.cond.items():
    values = batch["cond"][name]
    if array.classes:
      faults.append(_label_fault(f"cond.{name}", values, array.classes))
    elif np.dtype(array.dtype).kind not in "iub":
      faults.append(_value_fault(f"cond.{name}", values))
  for fault in faults:
    if fault:
      raise errors.UserError(f"{where(fault[0])}: {fault[1]}")


def _value_fault(name, x, bounds=None):
  """(row, words) of the first of x's rows that has a value which is not finite or out of bounds, or None."""
  # A NaN or an infinity stays in a sum, and in the least and the most, which read all values but write none. A sum of
  # finite values can overflow: hence the second look.
  if bounds is None:
    with np.errstate(over="ignore", invalid="ignore"):
      if np.isfinite(np.sum(x)):
        return None
  elif bounds[0] <= x.min() and x.max() <= bounds[1]:
    return None
  bad = ~np.isfinite(x)
  if bad.any():
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    count = int(bad[place[0]].sum())
    more = "" if count == 1 else f", as are {count - 1} more of its values"
    return place[0], f"{name} is {x[place]} at {list(place[1:])}{more}; every value must be finite"
  if bounds is None:
    return None
  row = int(np.argwhere((x < bounds[0]) | (x > bounds[1]))[0][0])
  least, most = x[row].min(), x[row].max()
  hint = ""
  if tuple(bounds) == (-1, 1) and least >= 0 and _LARGE < most <= 255:
    hint = ": are these pictures in 0..255? Divide by 127.5 and subtract 1"
  return row, f"{name} goes from {least:g} to {most:g}; its spec says {bounds[0]:g} to {bounds[1]:g}{hint}"


def _label_fault(name, labels, classes):
  """(row, words) of the first label that is not in [0, classes), or None."""
  if not labels.size or (labels.min() >= 0 and labels.max() < classes):
    return None
  bad = (labels < 0) | (labels >= classes)
  place = tuple(int(i) for i in np.argwhere(bad)[0])
  value, hint = int(labels[place]), ""
  if value == classes:
    hint = f": {classes} is the network's null class. Do your labels begin at 1? Subtract 1"
  elif value == -1:
    hint = ": leave records without a label out"
  return place[0], f"{name} is {value}; labels are 0 to {classes - 1}{hint}"


def _check_range(xs, spec, where):
  """Raises errors.UserError where x_0 of the first records look like pictures or numbers that nobody has scaled."""
  least, most = min(float(x.min()) for x in xs), max(float(x.max()) for x in xs)
  pictures = len(spec.x_0) >= 3 and spec.x_0[-1] in (1, 3)
  spans = f"{where}: x_0 of the first {len(xs)} records goes from {least:g} to {most:g}"
  leave = "if they are right as they are, say so by Spec(..., bounds=(least, most))"
  if spec.bounds is None and pictures and least >= 0 and _LARGE < most <= 255:
    raise errors.UserError(f"{spans}: are these pictures in 0..255? Divide by 127.5 and subtract 1; {leave}")
  size = math.sqrt(np.mean([np.mean(np.square(x, dtype=np.float64)) for x in xs]))
  if spec.bounds is None and size > _LARGE:
    raise errors.UserError(f"{spans}, {size:.3g} in the root mean square, and is to be mixed with noise of 1: scale it "
                           f"to about 1; {leave}")
  # One colour says nothing.
  if spec.bounds is None and pictures and 0 <= least < most <= 1:
    raise errors.UserError(f"{spans}: are these pictures in [0, 1]? Multiply by 2 and subtract 1; {leave}")


def conditions(data, chosen=None, num=8):
  """Conditions to draw by: `num` of each row that is chosen, row after row.

  Args:
    data: whose records have labels, or other conditions, or none.
    chosen: rows. Labels or names of classes; where labels are not all that conditions, numbers of held-out records.
      None: the first ten.
    num: samples of each row.
  Returns:
    (cond tree [n, ...], ids [n] int32, names [rows]); an id is the row's label or record, 0 where nothing conditions.
  Raises:
    ValueError: "chosen: ...".
  """
  cond = data.spec.cond
  if not cond:
    if chosen:
      raise ValueError(f"chosen: {_listed(chosen)}; nothing conditions these data: there is no row to choose")
    return {}, np.zeros(num, np.int32), [""]
  if classes := num_classes(data.spec):
    rows = _rows(chosen, classes, data.names, "classes")
    tree = {name: np.array(rows, array.dtype) for name, array in cond.items()}
    names = [str(data.names[row]) if data.names else str(row) for row in rows]
  else:
    records = data.records("held_out")
    rows = _rows(chosen, len(records), (), "held-out records")
    found = [records[row]["cond"] for row in rows]
    tree = {name: np.stack([np.asarray(c[name], array.dtype) for c in found]) for name, array in cond.items()}
    names = [f"record {row}" for row in rows]
  return {name: np.repeat(x, num, axis=0) for name, x in tree.items()}, np.repeat(np.array(rows, np.int32), num), names


def num_classes(spec):
  """The number of classes where one label is all that conditions, else 0."""
  arrays = list(spec.cond.values())
  return arrays[0].classes if len(arrays) == 1 and arrays[0].shape == () else 0


def _rows(chosen, count, names, what):
  """The numbers of chosen rows, by number or name; where a name is a number, it is the name that counts."""
  if chosen is None:
    return list(range(min(10, count)))
  named = {str(name): i for i, name in enumerate(names)}
  texts = [str(one).strip() for one in chosen]
  rows = [named.get(text, int(text) if text.isdecimal() else count) for text in texts]
  if not rows or max(rows) >= count or len(set(rows)) < len(rows):
    or_names = f" or names ({_listed(names)})" if names else ""
    raise ValueError(f"chosen: {_listed(texts) or 'nothing'}; give {what} from 0 to {count - 1}{or_names}, each once")
  return rows


def _is_whole(value):
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _kind(value):
  """What a value is, in few words."""
  if isinstance(value, (bool, int, float, str)) or value is None:
    return repr(value)
  name = type(value).__name__
  return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _listed(names):
  names = [str(name) for name in names]
  return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
