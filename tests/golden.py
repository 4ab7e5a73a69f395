"""Vectors computed by the authors' PyTorch code, turned from NCHW to the layouts used here."""

import pathlib

import jax.numpy as jnp
import numpy as np

from piflow_jax.policy import gmm

FOLDER = pathlib.Path(__file__).parent / "goldens"


def load(name, dtype=np.float32):
  """All arrays of a file by name, in float32 or as the float64 twin (of inputs, a cast)."""
  data = dict(np.load(FOLDER / f"{name}.npz"))
  if dtype == np.float64:
    plain = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in data.items() if not k.endswith("_f64")}
    return plain | {k.removesuffix("_f64"): v for k, v in data.items() if k.endswith("_f64")}
  return data


def nhwc(x):
  """[..., C, H, W] -> [..., H, W, C]."""
  return jnp.moveaxis(jnp.asarray(x), -3, -1)


def means(x):
  """[B, K, C, H, W] -> [B, C, K, P]."""
  x = jnp.asarray(x)
  return jnp.swapaxes(x.reshape(*x.shape[:3], -1), 1, 2)


def logweights(x):
  """[B, K, 1, H, W] -> [B, K, P]."""
  x = jnp.asarray(x)
  return x.reshape(*x.shape[:2], -1)


def scalars(x):
  return jnp.asarray(x).reshape(-1)


def mixture(data, prefix):
  """The u-space mixture stored as {prefix}means, {prefix}logweights, {prefix}logstds."""
  return gmm.Mixture(
      means(data[f"{prefix}means"]),
      logweights(data[f"{prefix}logweights"]),
      scalars(data[f"{prefix}logstds"]))
