"""Pickles of NumPy arrays in plain containers, read without running what is in them."""

import codecs
import io
import pickle

from etils import epath
import numpy as np

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")


def _reconstruct(kind, shape, typecode):
  if kind is not np.ndarray:
    raise pickle.UnpicklingError(f"an array of type {kind!r}")
  return np.ndarray.__new__(np.ndarray, shape, typecode)


def _encode(text, encoding="latin1"):
  if encoding != "latin1":  # how Python 3 writes bytes for Python 2
    raise pickle.UnpicklingError(f"a text in {encoding!r}")
  return codecs.encode(text, "latin1")


def _scalar(dtype, data=b""):
  return np.frombuffer(data, dtype, 1)[0]


# What NumPy's pickles name. None of these runs anything of the file's; all others are refused.
_KNOWN = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _encode}
_KNOWN |= {(module, "_reconstruct"): _reconstruct for module in _MULTIARRAY}
_KNOWN |= {(module, "scalar"): _scalar for module in _MULTIARRAY}


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
    return _Unpickler(io.BytesIO(epath.Path(path).read_bytes())).load()
  except OSError as e:
    raise ValueError(f"path: {path} cannot be read: {e}") from e
  except Exception as e:  # torn pickles raise errors of any type
    raise ValueError(f"path: {path} is no pickle of NumPy arrays in dicts and lists ({str(e)[:200]})") from e
