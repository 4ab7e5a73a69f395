"""Latents that a cache holds as data: x_0 = (z - offset) * scale with z drawn from a picture's posterior each time.

  --config.data.path=DIR    a cache of python -m piflow_jax.data.imagenet (docs/imagenet.md)

Of a picture and its mirror image one is drawn, each as likely. What a training step draws is a function of the run's
seed, the step and the sample; records outside of training are drawn by their number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax.data import latent_cache
from piflow_jax.data import shards
from piflow_jax.data import spec

FREE = ("path", "held_out")
_SEED = 20_251_104  # of the draws outside of training


def config(**fields):
  """A cache of latents and labels."""
  return config_lib.noun(make, dict(
      path="",  # folder of the cache, on a local disk
      held_out="",  # folder of a second one, whose records are held out; "": each 500th of the first
      shape=(),  # of a latent; (): the cache's
      classes=(),  # their names, in the order of the labels; (): the cache's
  ), fields)


def make(*, path, held_out, shape, classes):
  """data.spec.Data; see `config`."""
  shards.check_local(path=path, held_out=held_out)
  if not path and not (shape and classes):
    raise ValueError("path: is empty; give a cache of latents, which python -m piflow_jax.data.imagenet makes")
  found = {}
  if not shape or not classes:
    manifest = latent_cache.read_manifest(path)
    shape, classes = tuple(shape) or tuple(manifest.shape), tuple(classes) or tuple(manifest.classes)
    found = {"shape": shape, "classes": classes}
  shape, classes = spec.checked_shape(shape), tuple(str(name) for name in classes)
  opened = functools.cache(functools.partial(_open, shape=shape, classes=classes))
  parts = functools.partial(_part, opened, path, held_out)
  drawn = spec.Spec(shape, spec.label(len(classes)), bounds=(-1e4, 1e4))

  def records(split):
    return Drawn(*parts(split))

  def stored():
    manifest = opened(path)[0]
    as_kept = spec.Spec(manifest.stored, drawn.cond, bounds=(-65504, 65504), dtype="float16")
    return spec.Stored(as_kept, lambda split: Stored(*parts(split)), drawer(manifest))

  return spec.Data(drawn, records, classes, found, stored)


def _open(path, *, shape, classes):
  """(Manifest, bytes of its records) of a cache that fits."""
  manifest = latent_cache.read_manifest(path)
  if tuple(manifest.shape) != shape:
    raise ValueError(f"path: {path} holds latents of {tuple(manifest.shape)}, this run's are {shape}; give its own "
                     "cache")
  if tuple(manifest.classes) != classes:
    where = next((i for i, (a, b) in enumerate(zip(manifest.classes, classes)) if a != b), None)
    words = f"label {where} is {manifest.classes[where]!r} there, {classes[where]!r} here" if where is not None else (
        f"{len(manifest.classes)} there, {len(classes)} here")
    raise ValueError(f"path: {path} has other classes, or in another order: {words}; give the run's own cache")
  return manifest, shards.open_records(path, manifest)


def _part(opened, path, held_out, split):
  """(Manifest, bytes of records, numbers of the split's); raises errors.UserError."""
  try:
    if held_out:
      manifest, data = opened(held_out if split == "held_out" else path)
      if manifest.stored != opened(path)[0].stored or manifest.scale != opened(path)[0].scale:
        raise ValueError(f"held_out: {held_out} is a cache of another kind than {path}")
      return manifest, data, np.arange(manifest.count)
    manifest, data = opened(path)
    return manifest, data, shards.split_numbers(manifest.count, split)
  except ValueError as e:
    raise errors.UserError(f"config.data.{e}") from e


class Stored:
  """Random access to {"x_0": float16 as they are stored, "cond"} of some of a cache's records."""

  def __init__(self, manifest, data, numbers):
    self._manifest, self._data, self._numbers = manifest, data, numbers

  def __len__(self):
    return len(self._numbers)

  def __getitem__(self, i):
    number = int(self._numbers[int(i)])
    try:
      label, array = latent_cache.decode(self._data[number], self._manifest.stored)
    except Exception as e:  # pylint: disable=broad-exception-caught; a torn shard raises of any type
      words = " ".join(str(e).split())[:200]
      raise errors.UserError(f"config.data.path: record {number} cannot be read ({words}); look at the cache by python "
                             "-m piflow_jax.data.imagenet --check") from e
    return {"x_0": array, "cond": {"label": np.int32(label)} if len(self._manifest.classes) > 1 else {}}


class Drawn(Stored):
  """Random access to {"x_0": float32, "cond"}: a draw of each record's posterior, by its number."""

  def __getitem__(self, i):
    record = super().__getitem__(i)
    m, x = self._manifest, record["x_0"].astype(np.float32)
    rng = np.random.default_rng((_SEED, int(self._numbers[int(i)])))
    x = x[rng.integers(m.views)]
    if m.moments:
      mean, logvar = np.split(x, 2, axis=-1)
      logvar = np.clip(logvar, latent_cache.LEAST, latent_cache.MOST)
      x = mean + np.exp(logvar / 2) * rng.standard_normal(mean.shape, np.float32)
    return record | {"x_0": (x - np.float32(m.offset)) * np.float32(m.scale)}


def drawer(manifest):
  """(key, stored [views, H, W, 2 C] or [views, H, W, C]) -> x_0 [H, W, C] float32 of a record, traced.

  z = mean + exp(logvar / 2) eps of one of the views (arXiv 1312.6114, section 2.4), x_0 = (z - offset) * scale.
  """
  offset, scale = (jnp.asarray(x, jnp.float32)[None, None] for x in (manifest.offset, manifest.scale))

  def draw(key, stored):
    which, noise = jax.random.split(key)
    x = stored[jax.random.randint(which, (), 0, manifest.views)].astype(jnp.float32)
    if manifest.moments:
      mean, logvar = jnp.split(x, 2, axis=-1)
      logvar = jnp.clip(logvar, latent_cache.LEAST, latent_cache.MOST)
      x = mean + jnp.exp(logvar / 2) * jax.random.normal(noise, mean.shape)
    return (x - offset) * scale

  return draw
