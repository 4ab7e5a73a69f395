"""scikit-learn's 1,797 real handwritten digits, 8 x 8 grey, bundled with the package: nothing is downloaded."""

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax.data import spec

HELD_OUT = 360
SHAPE = (8, 8, 1)
NUM_CLASSES = 10


def config(**fields):
  """The digits; they have no fields."""
  return config_lib.noun(make, dict(), fields)


def make():
  """The digits as Data."""
  return spec.Data(spec.Spec(SHAPE, spec.label(NUM_CLASSES), bounds=(-1, 1)), records)


def arrays(split):
  """(images [n, 8, 8, 1] float32 in [-1, 1], labels [n] int32); split "train" (1,437), "held_out" (360) or "all"."""
  from sklearn import datasets  # only those who use the digits need scikit-learn

  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  part = {"train": order[HELD_OUT:], "held_out": order[:HELD_OUT], "all": order}[split]
  images = (images[part] / 8 - 1).astype(np.float32).reshape(-1, *SHAPE)
  return images, labels[part].astype(np.int32)


def records(split):
  """A list of records {"x_0", "cond": {"label"}}."""
  images, labels = arrays(split)
  return [{"x_0": x, "cond": {"label": y}} for x, y in zip(images, labels)]
