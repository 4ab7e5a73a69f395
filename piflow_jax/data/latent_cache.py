"""Latents of pictures on disk: records, shards, and a manifest that says what they are.

A cache is a folder of ArrayRecord shards and manifest.json. A record is an int32 label, little-endian, and a float16
array: mean and log variance of the posterior, [views, H, W, 2 C], unscaled; or, where `moments` is false, a draw of it,
[views, H, W, C]. View 0 is the picture's, view 1 its mirror image's.
"""

import math
from typing import NamedTuple

from etils import epath
import numpy as np

from piflow_jax.data import shards

FILE, FORMAT = shards.MANIFEST, 1
LEAST, MOST = -30.0, 20.0  # of a log variance, as Stable Diffusion's own code has it
# Of Stable Diffusion's latents of ImageNet's training images, unscaled, by channel (improved MeanFlow's vae_util.py).
KNOWN = {"mean": (0.865, -0.278, 0.216, 0.374), "deviation": (4.855, 5.319, 3.937, 3.987)}


class Manifest(NamedTuple):
  """What a cache is."""

  count: int  # records
  views: int  # 1, or 2: the picture and its mirror image
  shape: tuple  # (H, W, C) of a latent
  moments: bool  # mean and log variance; else draws of the posterior
  offset: tuple  # [C]; a model's x_0 is (z - offset) * scale
  scale: tuple  # [C]
  classes: tuple  # their names, in the order of the labels
  counts: tuple  # records of each class
  source: str  # what it was made of
  settings: dict  # how: crop, size, autoencoder and its checksum
  shards: tuple  # ({"name", "records", "bytes", "crc32"}, ...)
  skipped: tuple  # names of pictures that could not be decoded
  mean: tuple  # of z by channel, [C]
  deviation: tuple  # alike

  @property
  def stored(self):
    """Shape of a record's array."""
    height, width, channels = self.shape
    return (self.views, height, width, channels * (2 if self.moments else 1))


def encode(label, array):
  """The bytes of a record."""
  return int(label).to_bytes(4, "little", signed=True) + np.asarray(array, "<f2").tobytes()


def decode(data, shape):
  """(label, float16 array of a shape) of a record's bytes. Raises ValueError: it is of another size."""
  if len(data) != 4 + 2 * math.prod(shape):
    raise ValueError(f"a record has {len(data)} bytes, {4 + 2 * math.prod(shape)} are those of {tuple(shape)}")
  return int.from_bytes(data[:4], "little", signed=True), np.frombuffer(data, "<f2", offset=4).reshape(shape)


def write_manifest(folder, manifest):
  """Write manifest.json, whole or not at all."""
  shards.write_manifest(folder, FORMAT, manifest)


def read_manifest(folder):
  """The Manifest of a cache; raises ValueError as `shards.read_manifest` does."""
  return shards.read_manifest(folder, FORMAT, Manifest, _check_manifest, "piflow_jax.data.imagenet")


def _check_manifest(found):
  channels = found.shape[2]
  for name in ("offset", "scale", "mean", "deviation"):
    if len(getattr(found, name)) != channels or not np.isfinite(getattr(found, name)).all():
      raise ValueError(f"{name} is not {channels} numbers")
  if len(found.counts) != len(found.classes) or sum(found.counts) != found.count:
    raise ValueError("its counts of classes do not add up")
  if found.views not in (1, 2) or sum(shard["records"] for shard in found.shards) != found.count:
    raise ValueError("its counts of records do not add up")


def check(folder, bar=None):
  """Read a cache whole; returns (Manifest, remarks, texts).

  Raises:
    ValueError: "path: ...": a shard is not what was written, or a record is none.
  """
  folder = epath.Path(folder)
  manifest = read_manifest(folder)
  counts, sums = np.zeros(len(manifest.classes), np.int64), Channels(manifest.shape[2])
  shards.check_sums(folder, manifest.shards)
  for number, data in enumerate(shards.open_records(folder, manifest)):
    try:
      label, array = decode(data, manifest.stored)
    except ValueError as e:
      raise ValueError(f"path: {folder}: record {number}: {e}") from e
    if not 0 <= label < len(counts):
      raise ValueError(f"path: {folder}: record {number}: label {label}; there are {len(counts)} classes")
    if not np.isfinite(array).all():
      raise ValueError(f"path: {folder}: record {number}: holds values that are not finite")
    counts[label] += 1
    sums.update(array, manifest.moments)
    if bar is not None:
      bar.update(1)
  if tuple(counts) != tuple(manifest.counts):
    raise ValueError(f"path: {folder}: its classes have other counts than its manifest says; make the cache again")
  if manifest.moments and sums.least >= 0:
    raise ValueError(f"path: {folder}: no log variance is below 0: these are standard deviations; make the cache again")
  return manifest, remarks(manifest)


def remarks(manifest):
  """What a reader should know of a cache's channels, texts."""
  found = [f"{name} of its channels " + ", ".join(f"{x:.3f}" for x in getattr(manifest, name))
           for name in ("mean", "deviation")]
  if manifest.shape[2] == 4:
    known = ", ".join(f"{x:.3f}" for x in KNOWN["mean"]), ", ".join(f"{x:.3f}" for x in KNOWN["deviation"])
    found.append(f"Stable Diffusion's latents of ImageNet have means {known[0]} and deviations {known[1]}")
  return found


class Channels:
  """Sums over latents by channel, for their means and deviations; of shards they add up in any order of shards.

  Attributes:
    least: the least log variance.
  """

  def __init__(self, channels):
    self.count, self.total, self.square = 0, np.zeros(channels), np.zeros(channels)
    self.least = math.inf

  def update(self, array, moments):
    """Take in a record's array: its variance is that of means, and of what is drawn around them."""
    x = np.asarray(array, np.float64)
    variance = 0.0
    if moments:
      x, logvar = np.split(x, 2, axis=-1)
      self.least = min(self.least, float(logvar.min()))
      variance = np.exp(np.clip(logvar, LEAST, MOST))
    axes = tuple(range(x.ndim - 1))
    self.count += x.size // x.shape[-1]
    self.total += x.sum(axes)
    self.square += (x**2 + variance).sum(axes)

  def mean(self):
    return self.total / max(self.count, 1)

  def deviation(self):
    return np.sqrt(np.maximum(self.square / max(self.count, 1) - self.mean() ** 2, 0))
