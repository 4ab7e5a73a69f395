"""What the `make` of a features noun returns, and what such modules share."""

from typing import Callable, NamedTuple

import numpy as np

from piflow_jax.data import spec as spec_lib


class Features(NamedTuple):
  """Numbers to compare samples by.

  Attributes:
    extract: x_0 [n, *shape], NumPy -> features [n, D], NumPy.
    predict: x_0 [n, *shape], NumPy -> labels [n]; None where nothing is classified.
    name: for the reports.
    score: (features [n, D], texts) -> [n], how well each picture fits its text; None where texts are not read.
  """

  extract: Callable
  predict: Callable | None
  name: str
  score: Callable | None = None


def first_records(data, most, split="train"):
  """(x_0 [n, *shape], labels [n], or None where labels are not all that conditions) of a split's first records."""
  records = spec_lib.checked_records(data, split)
  found = [records[i] for i in range(min(most, len(records)))]
  return np.stack([record["x_0"] for record in found]), labels_of(data.spec, [record["cond"] for record in found])


def labels_of(spec, conds):
  """Labels [n] of n records' conditions; None where a label is not all that conditions."""
  if not spec_lib.num_classes(spec):
    return None
  return np.array([next(iter(cond.values())) for cond in conds], np.int32)


def as_picture(x_0):
  """[n, *shape] of any shape as [n, H, W, C]: frames become channels, a row of cells one line, a point one cell."""
  x = np.asarray(x_0)
  if x.ndim == 5:
    x = np.moveaxis(x, 1, 3)
    return x.reshape(*x.shape[:3], -1)
  if x.ndim == 4:
    return x
  if x.ndim == 3:
    return x[:, None]
  return x.reshape(len(x), 1, 1, -1)


def shrunk(pictures, size):
  """[n, H, W, C] with sides of at most `size`, each pixel the mean of those under it."""
  for axis in (1, 2):
    length = pictures.shape[axis]
    if length > size:
      pictures = np.moveaxis(np.moveaxis(pictures, axis, -1) @ _averages(length, size), -1, axis)
  return pictures


def _averages(length, size):
  """[length, size] float32: the share of each of `length` cells in each of `size` equal ones over the same stretch."""
  edges = np.arange(size + 1) * (length / size)
  cells = np.arange(length)[:, None]
  overlap = np.minimum(cells + 1, edges[1:]) - np.maximum(cells, edges[:-1])
  return (np.clip(overlap, 0, 1) * (size / length)).astype(np.float32)
