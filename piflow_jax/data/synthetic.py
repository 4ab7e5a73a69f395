"""Noise in the shapes of any data set: for a first look at speed and memory, where quality does not matter."""

import functools

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax.data import spec


def config(**fields):
  """Standard normal latents with uniform labels."""
  return config_lib.noun(make, dict(
      shape=(32, 32, 4),  # of x_0
      num_classes=1000,  # 0: no labels
      size=1_281_167,  # records
  ), fields)


def make(*, shape, num_classes, size):
  """Noise as Data; its two splits differ."""
  shape = spec.checked_shape(shape)
  config_lib.whole("num_classes", num_classes, least=0)
  config_lib.whole("size", size)
  return spec.Data(spec.Spec(shape, spec.label(num_classes)), functools.partial(records, shape, num_classes, size))


class _Records:
  """Record i is drawn from (seed, i) when it is asked for, so that a million latents cost no memory."""

  def __init__(self, shape, num_classes, size, seed):
    self._shape, self._num_classes, self._size, self._seed = shape, num_classes, size, seed

  def __len__(self):
    return self._size

  def __getitem__(self, i):
    rng = np.random.default_rng((self._seed, int(i)))
    x_0 = rng.standard_normal(self._shape, np.float32)
    return {"x_0": x_0, "cond": {"label": np.int32(rng.integers(self._num_classes))} if self._num_classes else {}}


def records(shape, num_classes, size, split):
  """Random access to `size` records of a split, "train" or "held_out"."""
  return _Records(shape, num_classes, size, seed={"train": 0, "held_out": 1}[split])
