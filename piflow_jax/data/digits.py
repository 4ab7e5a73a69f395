"""scikit-learn's 1,797 real handwritten digits, 8 x 8 grey, bundled with the package: nothing is downloaded."""

import numpy as np

from piflow_jax import errors

HELD_OUT = 360
SHAPE = (8, 8, 1)
NUM_CLASSES = 10


def arrays(split):
  """(images [n, 8, 8, 1] float32 in [-1, 1], labels [n] int32); split "train" (1,437), "held_out" (360) or "all"."""
  from sklearn import datasets  # only those who use the digits need scikit-learn

  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  part = {"train": order[HELD_OUT:], "held_out": order[:HELD_OUT], "all": order}[split]
  images = (images[part] / 8 - 1).astype(np.float32).reshape(-1, *SHAPE)
  return images, labels[part].astype(np.int32)


def source(split, *, shape=SHAPE, num_classes=NUM_CLASSES):
  """Random access to records {"x_0", "cond"}; raises errors.UserError for a config of other shapes."""
  if tuple(shape) != SHAPE or num_classes != NUM_CLASSES:
    raise errors.UserError(
        f"config.data: the digits are {SHAPE} of {NUM_CLASSES} classes, not {tuple(shape)} of {num_classes}")
  images, labels = arrays(split)
  return [{"x_0": x, "cond": y} for x, y in zip(images, labels)]
