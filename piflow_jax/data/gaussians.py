"""Data whose flow is known exactly: a Gaussian mixture over whole latents, and samples of it."""

import functools
import math

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax.data import spec

STD = 0.15
SPREAD = 1.5  # of the means
COMPONENTS = 16  # of each class's data
_RECORDS = {"train": 8192, "held_out": 1024}
_MOST = 2**28  # values of all means, or weights of all classes: 1 GiB


def config(**fields):
  """Samples of a Gaussian mixture, whose exact flow `teacher.exact_config` has."""
  return config_lib.noun(make, dict(
      shape=(1, 1, 2),  # of x_0
      num_classes=1,  # each has 16 means of its own
  ), fields)


def make(*, shape, num_classes):
  """Samples of `mixture(shape, num_classes)` as Data."""
  shape = spec.checked_shape(shape)
  config_lib.whole("num_classes", num_classes)
  if num_classes * COMPONENTS * max(num_classes, math.prod(shape)) > _MOST:
    raise ValueError(f"num_classes: {num_classes} classes of {COMPONENTS} means of shape {shape} are too many to hold")
  return spec.Data(spec.Spec(shape, spec.label(num_classes)), functools.partial(records, shape, num_classes))


def mixture(shape, num_classes):
  """(means [M, *shape], std, log weights [classes, M]): every class owns COMPONENTS of the M means."""
  means = SPREAD * np.random.default_rng(0).standard_normal((num_classes * COMPONENTS, *shape), np.float32)
  own = np.arange(len(means)) // COMPONENTS == np.arange(num_classes)[:, None]
  return means, np.float32(STD), np.where(own, 0.0, -np.inf).astype(np.float32)


class Samples:
  """Random access to {"x_0" float32, "cond": {"label" int32}}."""

  def __init__(self, shape, num_classes, start, count):
    self._means, self._std, _ = mixture(shape, num_classes)
    self._classes, self._start, self._count = num_classes, start, count

  def __len__(self):
    return self._count

  def __getitem__(self, i):
    rng = np.random.default_rng((1, self._start + i))
    label = i % self._classes
    mean = self._means[label * COMPONENTS + rng.integers(COMPONENTS)]
    noise = rng.standard_normal(mean.shape).astype(np.float32)
    return {"x_0": mean + self._std * noise, "cond": {"label": np.int32(label)}}


def records(shape, num_classes, split):
  """The records of a split, "train" or "held_out"."""
  return Samples(tuple(shape), num_classes, 0 if split == "train" else _RECORDS["train"], _RECORDS[split])
