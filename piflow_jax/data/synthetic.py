"""Noise in the shapes of any data set: for a first look at speed and memory, where quality does not matter."""

import numpy as np


class _Records:
  """Record i is drawn from (seed, i) when it is asked for, so that a million latents cost no memory."""

  def __init__(self, shape, num_classes, size, seed):
    self._shape, self._num_classes, self._size, self._seed = tuple(shape), num_classes, size, seed

  def __len__(self):
    return self._size

  def __getitem__(self, i):
    rng = np.random.default_rng((self._seed, int(i)))
    return {"x_0": rng.standard_normal(self._shape, np.float32), "cond": np.int32(rng.integers(self._num_classes))}


def source(split, *, shape, num_classes, size=1_281_167):
  """Random access to `size` records of standard normal latents and uniform labels; the splits differ."""
  return _Records(shape, num_classes, size, seed={"train": 0, "held_out": 1}[split])
