"""Samples as the bytes that a FID looks at, decoded where they are latents."""

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import sharding
from piflow_jax.models import autoencoder as autoencoder_lib

_AT_ONCE = 8  # latents that a device decodes at once: a picture of 256 x 256 takes 0.22 GiB


def to_bytes(x):
  """x [n, H, W, 1 or 3] in [-1, 1] as uint8 [n, H, W, 3], the nearest value: floor(clip(127.5 x + 128, 0, 255)).

  As in DiT, SiT, MeanFlow and pi-Flow's release. ADM's own sampler cuts 127.5 (x + 1) off instead, half a level less.
  """
  found = jnp.clip(x.astype(jnp.float32) * 127.5 + 128, 0, 255).astype(jnp.uint8)
  return jnp.broadcast_to(found, (*found.shape[:-1], 3))


def maker(mesh, autoencoder=None, everywhere=False):
  """Jitted x_0 [B, ...], split over the mesh -> pictures uint8 [B, H, W, 3], NaN as 0.

  Args:
    mesh: of `sharding.make_mesh`.
    autoencoder: what `weights.load_autoencoder` gave, where x_0 are latents.
    everywhere: whether every device is to have all of them; else they stay where they are made.
  """
  parts = sharding.sample_parts(mesh)
  out = sharding.replicated(mesh) if everywhere else jax.NamedSharding(mesh, sharding.BATCH)
  if autoencoder is None:
    return jax.jit(sharding.under(mesh, to_bytes), out_shardings=out)
  net, params, scales = autoencoder

  def decode(params, x):
    return to_bytes(net.apply({"params": params}, autoencoder_lib.from_latents(x, **scales), method="decode"))

  def by_chunks(params, x):
    own = len(x) // parts
    chunks = next(n for n in range(1, own + 1) if own % n == 0 and own // n <= _AT_ONCE)
    # Each chunk has samples of all devices, as in train_step.accumulate.
    x = jnp.swapaxes(x.reshape(len(x) // chunks, chunks, *x.shape[1:]), 0, 1)
    found = jnp.swapaxes(jax.lax.map(lambda part: decode(params, part), x), 0, 1)
    return found.reshape(-1, *found.shape[2:])

  jitted = jax.jit(sharding.under(mesh, by_chunks), out_shardings=out)
  return lambda x: jitted(params, x)


def by_batches(mesh, autoencoder, size):
  """x_0 [n, ...], NumPy -> an iterator over its pictures, `size` of them at a time: uint8 [m, H, W, 3], m <= size.

  Args:
    mesh, autoencoder: of `maker`.
    size: a multiple of `sharding.sample_parts`.
  """
  draw, split = maker(mesh, autoencoder), jax.NamedSharding(mesh, sharding.BATCH)

  def drawn(x_0):
    for start in range(0, len(x_0), size):
      part = x_0[start:start + size]
      yield np.asarray(draw(jax.device_put(np.resize(part, (size, *part.shape[1:])), split)))[:len(part)]

  return drawn
