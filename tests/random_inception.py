"""Random weights of FID's Inception that keep activations near 1 through its depth."""

import jax
import numpy as np

from piflow_jax.models import inception


def params(seed=0):
  """A tree of `inception.shapes`."""
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    name, size = path[-1].key, shape.shape
    if name == "kernel":
      return (rng.standard_normal(size) * (2 / np.prod(size[:-1])) ** 0.5).astype(np.float32)
    if name in ("scale", "var"):
      return rng.uniform(0.5, 1.5, size).astype(np.float32)
    return (0.1 * rng.standard_normal(size)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, inception.shapes())
