"""Data whose flow is known exactly: a Gaussian mixture over whole latents, and samples of it."""

import numpy as np

STD = 0.15
SPREAD = 1.5  # of the means
COMPONENTS = 16  # of each class's data
_RECORDS = {"train": 8192, "held_out": 1024}


def mixture(shape, num_classes):
  """(means [M, H, W, C], std, log weights [classes, M]): every class owns COMPONENTS of the M means."""
  means = SPREAD * np.random.default_rng(0).standard_normal((num_classes * COMPONENTS, *shape), np.float32)
  own = np.arange(len(means)) // COMPONENTS == np.arange(num_classes)[:, None]
  return means, np.float32(STD), np.where(own, 0.0, -np.inf).astype(np.float32)


class Samples:
  """Random access to {"x_0" [H, W, C] float32, "cond" int32}."""

  def __init__(self, shape, num_classes, start, count):
    self._means, self._std, _ = mixture(shape, num_classes)
    self._classes, self._start, self._count = num_classes, start, count

  def __len__(self):
    return self._count

  def __getitem__(self, i):
    rng = np.random.default_rng((1, self._start + i))
    cond = i % self._classes
    mean = self._means[cond * COMPONENTS + rng.integers(COMPONENTS)]
    noise = rng.standard_normal(mean.shape).astype(np.float32)
    return {"x_0": mean + self._std * noise, "cond": np.int32(cond)}


def source(split, *, shape, num_classes):
  """The records of a split, "train" or "held_out"."""
  return Samples(tuple(shape), num_classes, 0 if split == "train" else _RECORDS["train"], _RECORDS[split])
