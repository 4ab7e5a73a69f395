"""Make a cache of latents of labelled pictures, once, for all trainings: ImageNet's, or one's own.

  python -m piflow_jax.data.imagenet --source=tars:DIR --autoencoder=WORKDIR --out=DIR
  python -m piflow_jax.data.imagenet --source=folder:DIR --autoencoder=WORKDIR --out=DIR --process=0 --processes=8
  python -m piflow_jax.data.imagenet --source=repa:DIR --out=DIR
  python -m piflow_jax.data.imagenet --out=DIR --check

--source is KIND:PATH. Pictures: folder (class folders), tars (ILSVRC2012_img_train.tar), tfds (a prepared builder's
folder, PATH:SPLIT). Others' caches: lakonlab, repa, meanflow, mar, lightningdit (docs/imagenet.md). Pictures are cut as
guided-diffusion cuts them, and encoded by --autoencoder, the workdir that piflow_jax.convert from-torch made of Stable
Diffusion's; the mirror image is encoded too. Several processes write shards side by side; the same command goes on
after a kill, and the bytes at the end are the same. --config.data.path=DIR of configs/imagenet_dit.py trains on it.
"""

from concurrent import futures
import functools
import hashlib
import json
import sys
from typing import Any, Callable, NamedTuple

from absl import flags
from absl import logging
from etils import epath
import jax
import numpy as np
import tqdm

from piflow_jax import errors
from piflow_jax import program
from piflow_jax import sharding
from piflow_jax import weights
from piflow_jax import workdir as workdir_lib
from piflow_jax.data import foreign_caches
from piflow_jax.data import images
from piflow_jax.data import latent_cache
from piflow_jax.data import shards
from piflow_jax.data import sources

_KIND = "latent"  # of shards
_THREADS = 8
_SKIPPED, _SKIPPED_SHARE = 100, 1e-4  # pictures that may be undecodable, whichever is more


class Job(NamedTuple):
  """A cache to be made."""

  names: list  # of all items
  classes: tuple
  shape: tuple  # of a latent
  views: int
  moments: bool
  offset: tuple
  scale: tuple
  arrays: Callable  # numbers -> iterator of (label, array) or (None, why not), in their order
  settings: dict  # what else decides the bytes, for the manifest


def make(job, folder, count, process=0, processes=1):
  """Write this process's shards, and the manifest once all of them are there.

  Args:
    job: Job.
    folder: epath.Path.
    count: shards, so many.
    process, processes: shard k is process k % processes's.
  Returns:
    The Manifest, or None where shards of other processes are not there yet.
  Raises:
    errors.UserError: the folder holds another cache, or too many pictures cannot be decoded.
  """
  shards.claim(folder, job.settings | {"shards": count, "classes": job.classes, "views": job.views}, job.names)
  shards.fill(folder, _KIND, len(job.names), count, functools.partial(_shard, job, folder, count), unit="image",
              process=process, processes=processes)
  return finish(job, folder, count)


def _shard(job, folder, count, numbers, last, bar):
  """(records of a shard, what is known of it once they are written)."""
  del last
  sums, counts, skipped = latent_cache.Channels(job.shape[2]), {}, []

  def records():
    for number, (label, array) in zip(numbers, job.arrays(numbers)):
      bar.update(1)
      if label is None:
        logging.warning("%s cannot be decoded (%s): left out", job.names[number], array)
        skipped.append(job.names[number])
        _check_skipped(job, folder, count, skipped)
        continue
      counts[label] = counts.get(label, 0) + 1
      sums.update(np.asarray(array, np.float16), job.moments)
      yield latent_cache.encode(label, array)

  def known():
    return {"counts": {str(label): n for label, n in sorted(counts.items())}, "skipped": skipped,
            "cells": sums.count, "total": list(sums.total), "square": list(sums.square)}

  return records(), known


def _check_skipped(job, folder, count, here):
  """Raises errors.UserError: too many pictures could not be decoded."""
  known = [json.loads(path.read_text())["skipped"] for path in shards.sidecars(folder, _KIND, count) if path.exists()]
  failed, most = len(here) + sum(map(len, known)), max(_SKIPPED, int(_SKIPPED_SHARE * len(job.names)))
  if failed > most:
    raise errors.UserError(f"--source: {failed} of {len(job.names)} pictures cannot be decoded, the last {here[-1]}; "
                           "look at the source")


def finish(job, folder, count):
  """The Manifest, written, or None where shards are missing. Whoever writes it writes the same."""
  found = shards.known(folder, _KIND, count)
  if found is None:
    return None
  sums = latent_cache.Channels(job.shape[2])
  counts = [0] * len(job.classes)
  for part in found:
    sums.count += part["cells"]
    sums.total += part["total"]
    sums.square += part["square"]
    for label, n in part["counts"].items():
      counts[int(label)] += n
  manifest = latent_cache.Manifest(
      count=sum(counts), views=job.views, shape=job.shape, moments=job.moments, offset=job.offset, scale=job.scale,
      classes=job.classes, counts=tuple(counts), source=job.settings["source"], settings=job.settings,
      shards=tuple(part["shard"] for part in found), skipped=tuple(name for part in found for name in part["skipped"]),
      mean=tuple(sums.mean()), deviation=tuple(sums.deviation()))
  latent_cache.write_manifest(folder, manifest)
  return manifest


def of_pictures(kind, path, autoencoder, *, size, mirror, batch_size, name):
  """A Job that encodes pictures.

  Args:
    kind, path: of `sources.open_source`.
    autoencoder: what `weights.load_autoencoder` gave, on this process's devices.
    size: side of a picture.
    mirror: whether the mirror image is encoded too.
    batch_size: pictures a device encodes at once.
    name: {"autoencoder": ..., "sha256": ...} for the manifest.
  """
  source = sources.open_source(kind, path)
  net, params, scales = autoencoder
  mesh = sharding.make_mesh(devices=jax.local_devices())
  split, views = jax.NamedSharding(mesh, sharding.BATCH), 2 if mirror else 1
  batch_size *= len(mesh.devices.flat)

  def encode(params, pictures):
    x = pictures.astype("float32") / 127.5 - 1
    # The mirror image's latent is not the latent's mirror image.
    both = [x, x[:, :, ::-1]][:views]
    moments = [jax.numpy.concatenate(net.apply({"params": params}, y, method="encode"), -1) for y in both]
    return jax.numpy.stack(moments, 1).astype("float16")

  run = jax.jit(sharding.under(mesh, encode), out_shardings=split)
  side = size // 2 ** (len(net.widths) - 1)

  def picture(number):
    raw, label = source.read(number)
    try:
      return label, images.adm_crop(raw, size)
    except Exception as e:  # pylint: disable=broad-exception-caught; Pillow's decoders raise whatever they please
      return None, " ".join(str(e).split()) or type(e).__name__

  def arrays(numbers):
    blank = np.zeros((size, size, 3), np.uint8)
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      for start in range(0, len(numbers), batch_size):
        found = list(pool.map(picture, numbers[start:start + batch_size]))
        pixels = [blank if label is None else x for label, x in found]
        pixels += [blank] * (batch_size - len(pixels))
        moments = np.asarray(run(params, jax.device_put(np.stack(pixels), split)))
        for (label, words), x in zip(found, moments):
          yield (None, words) if label is None else (label, x)

  channels = net.latent_channels
  return Job(
      source.names, source.classes, (side, side, channels), views, True,
      _by_channel(scales.get("shift_factor", 0.0), channels), _by_channel(scales["scaling_factor"], channels), arrays,
      {"source": f"{kind}:{source.place}", "crop": "adm", "size": size} | name)


def _by_channel(value, channels):
  return (float(value),) * channels if isinstance(value, (int, float)) else tuple(map(float, value))


def of_latents(kind, path):
  """A Job that copies another's cache."""
  found = foreign_caches.open_cache(kind, path)

  def arrays(numbers):
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      for start in range(0, len(numbers), 256):
        for number, x in zip(numbers[start:start + 256], pool.map(found.read, numbers[start:start + 256])):
          yield int(found.labels[number]), x

  return Job(found.names, found.classes, tuple(found.shape), found.views, found.moments,
             tuple(map(float, found.offset)), tuple(map(float, found.scale)), arrays,
             {"source": f"{kind}:{found.place}"})


def _define(values):
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  string("source", None, "KIND:PATH of pictures (folder, tars, tfds) or of another's cache (lakonlab, repa, meanflow, "
         "mar, lightningdit).")
  string("autoencoder", None, "Workdir of the converted autoencoder that encodes pictures.")
  string("out", None, "Folder of the cache, here or at gs://.")
  whole = functools.partial(flags.DEFINE_integer, upper_bound=10**6, flag_values=values)
  whole("size", 256, "Side of a picture.", lower_bound=1)
  whole("shards", 64, "Files to write.", lower_bound=1)
  whole("batch", 8, "Pictures that a device encodes at once.", lower_bound=1)
  whole("process", 0, "This process's number.", lower_bound=0)
  whole("processes", 1, "Processes that share the work.", lower_bound=1)
  flags.DEFINE_bool("mirror", True, "Encode the mirror image too.", flag_values=values)
  flags.DEFINE_bool("check", False, "Read the cache in --out whole, and do nothing else.", flag_values=values)


def _job(values):
  kind, colon, path = (values.source or "").partition(":")
  if kind in foreign_caches.KINDS and colon:
    if values.autoencoder is not None:
      raise errors.UserError(f"--autoencoder: {kind} holds latents already; leave it out")
    return of_latents(kind, path)
  if kind not in sources.KINDS or not path:
    raise errors.UserError(f"--source: {values.source!r}; give KIND:PATH, of {', '.join(sources.KINDS)} or of others' "
                           f"caches {', '.join(foreign_caches.KINDS)}")
  if values.autoencoder is None:
    raise errors.UserError("--autoencoder: missing; give the workdir of the converted autoencoder")
  folder = workdir_lib.path_of(values.autoencoder, "--autoencoder")
  placed = sharding.replicated(sharding.make_mesh(devices=jax.local_devices()))
  autoencoder = weights.load_autoencoder(folder, placed)
  if values.size % 2 ** (len(autoencoder[0].widths) - 1):
    raise errors.UserError(f"--size: {values.size} is no multiple of {2 ** (len(autoencoder[0].widths) - 1)}, the "
                           "autoencoder's factor")
  return of_pictures(kind, path, autoencoder, size=values.size, mirror=values.mirror, batch_size=values.batch,
                     name={"autoencoder": epath.Path(folder).name, "sha256": _digest(autoencoder[1])})


def _digest(params):
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    found.update(np.asarray(leaf).tobytes())
  return found.hexdigest()


def _main(given):
  values: Any = given.flags
  folder = epath.Path(workdir_lib.path_of(values.out, "--out"))
  if values.check:
    with errors.flag("out"):
      with tqdm.tqdm(unit="record", desc=str(folder)) as bar:
        manifest, remarks = latent_cache.check(folder, bar)
    print(f"{folder}: {manifest.count:,} records of {len(manifest.classes)} classes, whole")
    print("\n".join(remarks))
    return 0
  process, processes = values.process, values.processes
  if jax.process_count() > 1:
    process, processes = jax.process_index(), jax.process_count()
  if process >= processes:
    raise errors.UserError(f"--process: {process} is not below --processes, {processes}")
  with errors.flag("source"):
    job = _job(values)
    try:
      manifest = make(job, folder, min(values.shards, len(job.names)), process, processes)
    except OSError as e:
      raise errors.UserError(f"--out: {folder} cannot be written ({errors.reason(e)}); whole shards are kept, and the "
                             "same command goes on from there") from e
  if manifest is None:
    print(f"{folder}: this process's shards are written; the manifest comes with the last one's")
    return 0
  print(f"{folder}: {manifest.count:,} records of {len(manifest.classes)} classes, {len(manifest.skipped)} left out")
  print("\n".join(latent_cache.remarks(manifest)))
  return 0


PROGRAM = program.Program(_main, _define, __doc__, needs=("out",), config="optional")

if __name__ == "__main__":
  program.run(PROGRAM, sys.argv)
