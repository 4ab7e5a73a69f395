"""FID's Inception run over many pictures, and as features that models are compared by during training."""

import functools

import jax
import numpy as np

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import sharding
from piflow_jax import weights as weights_io
from piflow_jax import workdir
from piflow_jax.convert import inception as weights_lib
from piflow_jax.evaluation import extract as extract_lib
from piflow_jax.evaluation import pictures
from piflow_jax.models import inception


def config(**fields):
  """Features of FID's Inception network, of data that are pictures, or latents of pictures."""
  return config_lib.noun(make, dict(
      weights="",  # FID's Inception weights, see docs/evaluation.md
      autoencoder="",  # of latents: workdir of the converted autoencoder that decodes them
      batch_size=32,  # pictures a device looks at at once
  ), fields)


def make(data, *, weights, autoencoder, batch_size):
  """Features "pool" of `data`'s pictures, which are rounded to bytes first; see `config`."""
  config_lib.whole("batch_size", batch_size)
  mesh = sharding.make_mesh(devices=jax.local_devices())
  try:
    decoder = load_autoencoder(autoencoder, data.spec.x_0, mesh, "autoencoder")
    params, digest = weights_lib.load(weights, "weights")
  except errors.UserError as e:
    raise ValueError(str(e)) from e
  size = batch_size * len(mesh.devices.flat)
  run, drawn = extractor(params, size, ("pool",)), pictures.by_batches(mesh, decoder, size)

  def extract(x_0):
    return run(np.concatenate([*drawn(x_0)]))["pool"]

  return extract_lib.Features(extract, None, f"Inception {digest[:8]}, pool_3")


def load_autoencoder(folder, shape, mesh, field):
  """What `weights.load_autoencoder` gives for latents of a shape; None for pictures [H, W, 1 or 3].

  Raises:
    errors.UserError: `field`, and: there is none where one is needed, or it is of other latents.
  """
  if not folder:
    if len(shape) != 3 or shape[-1] not in (1, 3):
      raise errors.UserError(f"{field}: is empty, and x_0 of {tuple(shape)} are no pictures; give the workdir of their "
                             "converted autoencoder")
    return None
  return weights_io.load_autoencoder(
      workdir.path_of(folder, field), sharding.replicated(mesh), field, channels=shape[-1])


def extractor(params, batch_size, taps=inception.TAPS):
  """(uint8 [n, H, W, 3]) -> {tap: float32 [n, ...]}, see `models.inception.apply`; compiled once for a size of picture.

  Args:
    params: of `convert.inception.load`.
    batch_size: pictures at once; this process's devices share them, a last batch is filled up.
    taps: what is wanted.
  """
  devices = np.array(jax.local_devices())
  mesh = jax.sharding.Mesh(devices, ("batch",))
  split, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("batch",), ()))
  size = -(-batch_size // len(devices)) * len(devices)
  params = jax.device_put(params, everywhere)
  run = jax.jit(functools.partial(inception.apply, taps=taps), out_shardings=split)

  def extract(images):
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(f"images: must be uint8 [n, H, W, 3], got {images.dtype} {images.shape}")
    found = []
    for start in range(0, len(images), size):
      part = images[start:start + size]
      filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.uint8)])
      found.append({tap: np.asarray(x)[:len(part)] for tap, x in run(params, jax.device_put(filled, split)).items()})
    return {tap: np.concatenate([part[tap] for part in found]) for tap in taps}

  return extract
