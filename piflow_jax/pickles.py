"""Pickles of NumPy arrays in plain containers, read without running what is in them.

NumPy's own part is not let in either: its types set their memory up as a pickle says, and one that lies ends the
process.
"""

import io
import math
import pickle

from etils import epath
import numpy as np

_KINDS = "fiub"  # of the types that are read: floats, whole numbers, truth values


class _Type:
  """What a pickle says of a NumPy type."""

  def __init__(self, code, *_):
    self._code, self._order = code, "="

  def __setstate__(self, state):
    self._order = state[1]

  def made(self):
    if not isinstance(self._code, str) or self._order not in ("<", ">", "=", "|"):
      raise pickle.UnpicklingError(f"a type {self._code!r}")
    found = np.dtype(self._code).newbyteorder(self._order)
    if found.kind not in _KINDS:
      raise pickle.UnpicklingError(f"an array of {self._code}")
    return found


class _Array:
  """What a pickle says of a NumPy array."""

  def __init__(self, *_):
    self._state = None

  def __setstate__(self, state):
    _, shape, dtype, fortran, data = state
    self._state = data, dtype, shape, "F" if fortran else "C"

  def made(self):
    data, dtype, shape, order = self._state
    dtype, data = dtype.made(), bytes(data)
    if not all(isinstance(n, int) and n >= 0 for n in shape) or len(data) != math.prod(shape) * dtype.itemsize:
      raise pickle.UnpicklingError(f"{len(data)} bytes for an array {shape}")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _from_buffer(data, dtype, shape, order):
  found = _Array()
  found.__setstate__((1, shape, dtype, order == "F", data))
  return found


def _scalar(dtype, data=b""):
  return _from_buffer(data, dtype, (), "C")


def _nothing():  # how Python 2 is given no bytes
  return b""


def _encode(text, encoding="latin1"):
  if encoding != "latin1":  # how Python 3 writes bytes for Python 2
    raise pickle.UnpicklingError(f"a text in {encoding!r}")
  return text.encode("latin1")


# What NumPy's pickles name; all else is refused.
_KNOWN = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type, ("_codecs", "encode"): _encode,
          ("__builtin__", "bytes"): _nothing}
for _core in ("numpy.core", "numpy._core"):
  _KNOWN |= {(f"{_core}.multiarray", "_reconstruct"): _Array, (f"{_core}.multiarray", "scalar"): _scalar,
             (f"{_core}.numeric", "_frombuffer"): _from_buffer}


class _Unpickler(pickle.Unpickler):

  def find_class(self, module, name):
    if (module, name) not in _KNOWN:
      raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
    return _KNOWN[module, name]


def load(path):
  """The tree of dicts, lists, texts, numbers and NumPy arrays in a pickle.

  Raises:
    ValueError: "path: ...": the file is no pickle, is torn, or holds anything else, which is not run.
  """
  try:
    return _made(_Unpickler(io.BytesIO(epath.Path(path).read_bytes())).load())
  except OSError as e:
    raise ValueError(f"path: {path} cannot be read: {e}") from e
  except Exception as e:  # pylint: disable=broad-exception-caught; torn pickles raise errors of any type
    raise ValueError(f"path: {path} is no pickle of NumPy arrays in dicts and lists ({str(e)[:200]})") from e


def _made(tree):
  """A tree with arrays in the place of what a pickle says of them."""
  if isinstance(tree, _Array):
    found = tree.made()
    return found if found.ndim else found[()]
  if isinstance(tree, dict):
    return {name: _made(value) for name, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return type(tree)(map(_made, tree))
  if tree is None or isinstance(tree, (str, bytes, int, float)):
    return tree
  raise pickle.UnpicklingError(f"a {type(tree).__name__}")
