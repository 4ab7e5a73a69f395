"""MNIST's form: four IDX files of grey pictures and labels, gzipped or not (yann.lecun.com/exdb/mnist, "file formats").

  PATH/train-images-idx3-ubyte[.gz]  train-labels-idx1-ubyte[.gz]    what is trained on
  PATH/t10k-images-idx3-ubyte[.gz]   t10k-labels-idx1-ubyte[.gz]     what is held out

A file is 0, 0, the type (8: uint8), the number of axes, each axis' length (big-endian int32), then the values.
"""

import functools
import gzip
import math
import zlib

from etils import epath
import numpy as np

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax.data import spec

FREE = ("path",)
_SPLITS = {"train": "train", "held_out": "t10k"}
_UINT8 = 8  # the type's number


def config(**fields):
  """Pictures in IDX files."""
  return config_lib.noun(make, dict(
      path="",  # the folder of the four files, here or at gs://
      size=28,  # pixels of a side
      classes=tuple(str(n) for n in range(10)),  # names of the classes, by label
  ), fields)


def make(*, path, size, classes):
  """The pictures as Data, [size, size, 1] in [-1, 1]; raises ValueError for fields that are none."""
  config_lib.whole("size", size, most=8192)
  if not isinstance(path, str) or not path:
    raise ValueError(f"path: {path!r}; give the folder of the four IDX files: --config.data.path=FOLDER")
  if not isinstance(classes, (tuple, list)) or len(set(classes)) < max(len(classes), 2):
    raise ValueError(f"classes: {classes!r} must be the names of two classes or more")
  wanted = spec.Spec((size, size, 1), spec.label(len(classes)), bounds=(-1, 1))
  return spec.Data(wanted, functools.cache(functools.partial(_records, path, size)), tuple(map(str, classes)))


class _Records:
  """Random access to {"x_0", "cond"} of uint8 pictures [n, H, W]."""

  def __init__(self, images, labels):
    self._images, self._labels = images, labels

  def __len__(self):
    return len(self._images)

  def __getitem__(self, i):
    x_0 = self._images[i][..., None].astype(np.float32) / np.float32(127.5) - 1
    return {"x_0": x_0, "cond": {"label": np.int32(self._labels[i])}}


def _records(path, size, split):
  images = read(_find(path, f"{_SPLITS[split]}-images", "idx3"))
  labels = read(_find(path, f"{_SPLITS[split]}-labels", "idx1"))
  if images.ndim != 3 or labels.shape != images.shape[:1]:
    raise errors.UserError(f"config.data.path: {path} has {_SPLITS[split]} images {images.shape} and labels "
                           f"{labels.shape}, not [n, H, W] and [n]")
  if images.shape[1:] != (size, size):
    raise errors.UserError(f"config.data.size: is {size}; the pictures in {path} have {images.shape[1:]}")
  return _Records(images, labels)


def _find(path, name, kind):
  tried = [epath.Path(path) / f"{name}{dot}{kind}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
  for file in tried:
    if file.exists():
      return file
  raise errors.UserError(f"config.data.path: {path} has no {tried[0].name}, gzipped or not")


def read(file):
  """The uint8 array of an IDX file; raises errors.UserError for a file that is torn or of another kind."""
  data = epath.Path(file).read_bytes()
  try:
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
  except (OSError, EOFError, zlib.error) as e:
    raise errors.UserError(f"config.data.path: {file} cannot be unpacked: {errors.reason(e)}") from e
  axes = data[3] if len(data) > 3 else 0
  start = 4 + 4 * axes
  if data[:2] != b"\0\0" or data[2] != _UINT8 or len(data) < start:
    raise errors.UserError(f"config.data.path: {file} is no IDX file of uint8")
  shape = tuple(int(n) for n in np.frombuffer(data, ">i4", axes, 4))
  if len(data) != start + math.prod(shape):
    raise errors.UserError(f"config.data.path: {file} has {len(data) - start} values, its head says {shape}: torn?")
  return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
