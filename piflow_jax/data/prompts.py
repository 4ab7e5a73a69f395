"""Encode prompts once, for all trainings; with pictures beside them, if you like.

  python -m piflow_jax.data.prompts --prompts=prompts.txt --encoder=flux:FOLDER --out=DIR
  python -m piflow_jax.data.prompts --prompts=pairs.jsonl --encoder=auto:FOLDER --size=32 --out=DIR
  python -m piflow_jax.data.prompts --out=DIR --check

--prompts is a .txt file, a prompt a line; a .jsonl file of {"prompt": ..., "image": FILE}, files beside it; a .parquet
file of such columns, whose images may be files or bytes; datasets:NAME:SPLIT, of Hugging Face's hub; or release:FOLDER,
texts that pi-Flow's own tool encoded (.zst), with --negative=FILE of the negative prompt's. Prompts that come twice are
encoded once. --encoder is KIND:PLACE: flux or qwen and a diffusers folder, auto and a folder of any encoder that
transformers knows; it needs PyTorch: pip install -e '.[text]'.

--size=N takes the pictures too: N x N pixels, or with --autoencoder=WORKDIR their latents. Of several sizes,
--size=1024x1024,1344x768 (WIDTHxHEIGHT), each picture goes to the one whose aspect is nearest to its own; a list
without pictures says "width" and "height" beside each prompt, for an autoencoder of --factor=8. A training batch is of
one size. Size and time are said before the work starts. Several processes write shards side by side (--process,
--processes), and the same command goes on after a kill. --config.data.path=DIR of configs/flux.py,
configs/qwen_image.py and configs/emoji.py trains on it.
"""

import functools
import itertools
import math
import os
import sys
import time
from typing import Any, NamedTuple

from absl import flags
from etils import epath
import jax
import numpy as np
import tqdm

from piflow_jax import errors
from piflow_jax import program
from piflow_jax import sharding
from piflow_jax import weights
from piflow_jax import workdir as workdir_lib
from piflow_jax.data import prompt_cache
from piflow_jax.data import prompt_list
from piflow_jax.data import prompt_pictures
from piflow_jax.data import release_cache
from piflow_jax.data import shards
from piflow_jax.data import text_encoders

_KIND = "prompt"  # of shards
_TRIED = 16  # prompts by which size and time are told


class Job(NamedTuple):
  """A cache to be made."""

  prompts: list  # of prompt_list.Prompt
  negative: str
  encoder: text_encoders.Encoder
  pictures: prompt_pictures.Pictures
  settings: dict  # what decides the bytes
  batch_size: int


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
    errors.UserError: the folder holds another cache, or a picture cannot be read.
  """
  shards.claim(folder, job.settings | {"shards": count},
               [f"{p.text}\0{prompt_pictures.name_of(p.image)}" for p in job.prompts])
  shards.fill(folder, _KIND, len(job.prompts), count, functools.partial(_shard, job), unit="prompt", process=process,
              processes=processes, before=functools.partial(_estimate, job, folder))
  return _finish(job, folder, count)


def _estimate(job, folder, todo):
  some = job.prompts[:: max(len(job.prompts) // _TRIED, 1)][:_TRIED]
  began = time.time()
  texts = job.encoder.encode([p.text for p in some])
  seconds = (time.time() - began) / len(some)
  size = sum(x.nbytes for text in texts for x in text.values()) / len(some)
  size += math.prod(job.pictures.shape) * (1 if job.pictures.pixels else 2) if job.pictures.shape else 0
  print(f"{folder}: {todo:,} prompts of {np.mean([len(t['text']) for t in texts]):.0f} tokens: about "
        f"{todo * size / 1e9:.3g} GB, {todo * seconds / 60:.3g} minutes", flush=True)


def _shard(job, numbers, last, bar):
  """(records of a shard, of which nothing else is to be known)."""
  return _records(job, numbers, last, bar), dict


def _records(job, numbers, last, bar):
  ends = np.cumsum([count for _, _, count in job.pictures.sizes])[:-1]
  edges = sorted({numbers.start, numbers.stop, *(int(end) for end in ends if numbers.start < end < numbers.stop)})
  parts = [range(first, min(first + job.batch_size, stop)) for start, stop in itertools.pairwise(edges)
           for first in range(start, stop, job.batch_size)]
  for part in parts:
    chosen = [job.prompts[i] for i in part]
    texts = job.encoder.encode([p.text for p in chosen])
    if job.pictures.read is not None:
      texts = [text | {"x_0": x} for text, x in zip(texts, job.pictures.read(part, chosen))]
    for prompt, arrays in zip(chosen, texts):
      yield prompt_cache.encode(prompt.text, arrays)
      bar.update(1)
  if last:  # the negative prompt's is the last record of all
    yield prompt_cache.encode(job.negative, job.encoder.encode([job.negative])[0])


def _finish(job, folder, count):
  found = shards.known(folder, _KIND, count)
  if found is None:
    return None
  encoder, pictures = job.encoder, job.pictures
  manifest = prompt_cache.Manifest(
      count=len(job.prompts), tokens=encoder.tokens, width=encoder.width, pooled=encoder.pooled, padded=encoder.padded,
      shape=pictures.shape, pixels=pictures.pixels, sizes=pictures.sizes, encoder=encoder.name, negative=job.negative,
      settings=job.settings, shards=tuple(part["shard"] for part in found))
  prompt_cache.write_manifest(folder, manifest)
  return manifest


def _define(values):
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  string("prompts", None, "The list: .txt, .jsonl, .parquet, datasets:NAME:SPLIT, or release:FOLDER.")
  string("column", "prompt", "Where the text is, of a .jsonl, .parquet or dataset.")
  string("encoder", None, "KIND:PLACE of the text encoder: flux, qwen or auto, and a folder.")
  string("negative", "", "The prompt of guidance's unconditional pass.")
  string("autoencoder", None, "Workdir of the converted autoencoder that encodes pictures.")
  string("out", None, "Folder of the cache, here or at gs://.")
  string("device", "cpu", "PyTorch's device for the encoder.")
  whole = functools.partial(flags.DEFINE_integer, upper_bound=10**6, flag_values=values)
  whole("tokens", 512, "The longest text, in tokens; longer ones are cut.", lower_bound=1)
  string("size", None, "Of the pictures beside the prompts, in pixels: a side, or WIDTHxHEIGHT,...; none are taken "
         "if not given.")
  whole("factor", 8, "Of the autoencoder that latents of these sizes come from, where a list has no pictures.",
        lower_bound=1)
  whole("limit", 0, "Only the first so many prompts; 0: all.", lower_bound=0)
  whole("shards", 16, "Files to write.", lower_bound=1)
  whole("batch", 32, "Prompts that are encoded at once.", lower_bound=1)
  whole("process", 0, "This process's number.", lower_bound=0)
  whole("processes", 1, "Processes that share the work.", lower_bound=1)
  flags.DEFINE_bool("check", False, "Read the cache in --out whole, and do nothing else.", flag_values=values)


def _job(values):
  released = (values.prompts or "").startswith("release:")
  for name in ("prompts",) if released else ("prompts", "encoder"):
    if not values[name].value:
      raise errors.UserError(f"--{name}: missing; {values[name].help}")
  source = values.prompts.removeprefix("release:")
  with errors.flag("prompts"):
    prompts = ([prompt_list.Prompt(name) for name in release_cache.names(source)] if released else
               prompt_list.read(source, values.column))
  prompts = prompts[:values.limit] if values.limit else prompts
  prompts, pictures = _pictures(values, prompts)
  if released:
    with errors.flag("prompts"):
      encoder = release_cache.encoder(source, [prompt.text for prompt in prompts], values.tokens, values.negative)
  else:
    with errors.flag("encoder"):
      encoder = text_encoders.open_encoder(values.encoder, values.tokens, values.device)
  settings = {"encoder": encoder.name, "tokens": encoder.tokens, "negative": values.negative,
              "shape": pictures.shape, "pixels": pictures.pixels,
              "autoencoder": os.path.basename(values.autoencoder or "")}
  settings |= {"sizes": pictures.sizes} if pictures.sizes else {}
  return Job(prompts, values.negative, encoder, pictures, settings, values.batch)


def _pictures(values, prompts):
  """(prompts, those of one size together; their prompt_pictures.Pictures)."""
  if values.size is None:
    if values.autoencoder is not None:
      raise errors.UserError("--autoencoder: encodes pictures, and none are taken; give --size")
    return prompts, prompt_pictures.Pictures()
  with errors.flag("size"):
    sizes = prompt_pictures.parsed(values.size)
    counts, several = [len(prompts)], len(sizes) > 1
    if several:
      prompts, counts = prompt_pictures.placed(prompts, sizes)
      print(", ".join(f"{width}x{height}: {n:,} prompts" for (height, width), n in zip(sizes, counts)), flush=True)
      sizes, counts = zip(*((size, count) for size, count in zip(sizes, counts) if count))
    if several and all(p.image is None for p in prompts):
      return prompts, prompt_pictures.without(sizes, counts, values.factor)
    lacks = next((p.text for p in prompts if p.image is None), None)
    if lacks is not None:
      raise ValueError(f"size: {values.prompts} has no picture beside {lacks[:60]!r}; leave --size out, or give each "
                       "row its image")
    autoencoder = None
    if values.autoencoder is not None:
      folder = workdir_lib.path_of(values.autoencoder, "--autoencoder")
      autoencoder = weights.load_autoencoder(folder, sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1])))
    return prompts, prompt_pictures.reader(sizes, counts, autoencoder)


def _main(given):
  values: Any = given.flags
  folder = epath.Path(workdir_lib.path_of(values.out, "--out"))
  if values.check:
    with errors.flag("out"), tqdm.tqdm(unit="record", desc=str(folder)) as bar:
      manifest = prompt_cache.check(folder, bar)
    print(f"{folder}: {manifest.count:,} prompts by {manifest.encoder}, whole")
    return 0
  if values.process >= values.processes:
    raise errors.UserError(f"--process: {values.process} is not below --processes, {values.processes}")
  job = _job(values)
  try:
    manifest = make(job, folder, min(values.shards, len(job.prompts)), values.process, values.processes)
  except OSError as e:
    raise errors.UserError(f"--out: {folder} cannot be written ({errors.reason(e)}); whole shards are kept, and the "
                           "same command goes on from there") from e
  if manifest is None:
    print(f"{folder}: this process's shards are written; the manifest comes with the last one's")
    return 0
  size = sum(shard["bytes"] for shard in manifest.shards)
  print(f"{folder}: {manifest.count:,} prompts by {manifest.encoder}, {size / 1e6:.3g} MB")
  return 0


PROGRAM = program.Program(_main, _define, __doc__, needs=("out",), config="optional")

if __name__ == "__main__":
  program.run(PROGRAM, sys.argv)
