"""A workdir of a small autoencoder of random weights, as converting makes one."""

import json

import jax
import numpy as np

from piflow_jax import params as params_lib
from piflow_jax import weights
from piflow_jax.models import autoencoder

SETTINGS = dict(channels=3, latent_channels=4, widths=[8, 8], layers_per_block=1, groups=4)


def make(workdir):
  """Writes it; returns (net, params)."""
  net = autoencoder.Autoencoder(**SETTINGS | {"widths": tuple(SETTINGS["widths"])})
  rng = np.random.default_rng(0)

  def leaf(shape):
    x = rng.standard_normal(shape.shape, np.float32)
    return x * np.float32(0.3) if len(shape.shape) > 1 else x * np.float32(0.1)

  params = jax.tree.map(leaf, autoencoder.shapes(net))
  weights.save_weights(workdir, params_lib.named_leaves(params).items())
  (workdir / autoencoder.FILE).write_text(json.dumps({"settings": SETTINGS, "scales": {"scaling_factor": 0.18215}}))
  return net, params
