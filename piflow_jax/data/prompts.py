"""Encode prompts once, for all trainings; with pictures beside them, if you like.

  python -m piflow_jax.data.prompts --prompts=prompts.txt --encoder=flux:FOLDER --out=DIR
  python -m piflow_jax.data.prompts --prompts=pairs.jsonl --encoder=auto:FOLDER --size=32 --out=DIR
  python -m piflow_jax.data.prompts --out=DIR --check

--prompts is a .txt file, a prompt a line; a .jsonl file of {"prompt": ..., "image": FILE}, files beside it; a .parquet
file of such columns, whose images may be files or bytes; datasets:NAME:SPLIT, of Hugging Face's hub; or release:FOLDER,
texts that pi-Flow's own tool encoded (.zst), with --negative=FILE of the negative prompt's. Prompts that come twice are
encoded once. --encoder is KIND:PLACE: flux or qwen and a diffusers folder, auto and a folder of any
encoder that transformers knows; it needs PyTorch: pip install -e '.[text]'.

--size=N takes the pictures too: N x N pixels, or with --autoencoder=WORKDIR their latents. Size and time are said
before the work starts. Several processes write shards side by side (--process, --processes), and the same command goes
on after a kill. --config.data.path=DIR of configs/flux.py, configs/qwen_image.py and configs/emoji.py trains on it.
"""

import functools
import json
import os
import pathlib
import sys
import time
from typing import Any, Callable, NamedTuple

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
from piflow_jax.data import images
from piflow_jax.data import prompt_cache
from piflow_jax.data import release_cache
from piflow_jax.data import shards
from piflow_jax.data import text_encoders
from piflow_jax.models import autoencoder as autoencoder_lib

_KIND = "prompt"  # of shards
_TRIED = 16  # prompts by which size and time are told
_LONGEST = 20_000  # letters of a prompt
_SEED = 20_261_126  # of latents, drawn from pictures' posteriors


class Prompt(NamedTuple):
  """One of a list."""

  text: str
  image: Any = None  # a file's path or bytes; None: there is none


def read_list(place, column="prompt"):
  """The Prompts that a file or a dataset lists, each once, in their order.

  Args:
    place: see the program's text.
    column: of a .jsonl, .parquet or dataset.
  Raises:
    ValueError: "prompts: ...": it cannot be read, or a line is no prompt.
  """
  kind, _, rest = place.partition(":")
  path = pathlib.Path(place).expanduser()
  if kind == "datasets" and rest:
    rows = _of_datasets(rest)
  elif not path.is_file():
    raise ValueError(f"prompts: {place!r} is not there; give a .txt, .jsonl or .parquet file, or datasets:NAME:SPLIT")
  elif path.suffix == ".parquet":
    rows = _of_parquet(path)
  elif path.suffix in (".jsonl", ".txt"):
    rows = _of_lines(path)
  else:
    raise ValueError(f"prompts: {place!r} ends in none of .txt, .jsonl, .parquet")
  found = {}
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
      raise ValueError(f"prompts: {place}: row {number} has no text {column!r}: {str(row)[:80]}")
    if len(row[column]) > _LONGEST:
      raise ValueError(f"prompts: {place}: row {number} has {len(row[column])} letters; {_LONGEST} are the most")
    image = row.get("image")
    image = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
    image = str(path.parent / image) if isinstance(image, str) else image
    found.setdefault((row[column], image), Prompt(row[column], image))
  if not found:
    raise ValueError(f"prompts: {place} lists none")
  return list(found.values())


def _of_lines(path):
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"prompts: {path} cannot be read as UTF-8 ({e})") from e
  if path.suffix == ".txt":
    return [{"prompt": line.strip()} for line in lines if line.strip()]
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      rows.append(json.loads(line))
    except (ValueError, RecursionError) as e:
      raise ValueError(f"prompts: {path}: line {number} is no JSON ({e})") from e
  return rows


def _of_parquet(path):
  try:
    from pyarrow import parquet
  except ImportError as e:
    raise ValueError("prompts: .parquet files need pyarrow: pip install -e '.[text]'") from e
  try:
    return parquet.read_table(path).to_pylist()
  except (OSError, ValueError) as e:
    raise ValueError(f"prompts: {path} cannot be read ({' '.join(str(e).split())[:200]})") from e


def _of_datasets(rest):
  name, _, split = rest.partition(":")
  try:
    import datasets
  except ImportError as e:
    raise ValueError("prompts: datasets:NAME needs Hugging Face's datasets: pip install datasets") from e
  return datasets.load_dataset(name, split=split or "train")


class Job(NamedTuple):
  """A cache to be made."""

  prompts: list  # of Prompt
  negative: str
  encoder: text_encoders.Encoder
  shape: tuple  # of x_0, () for none
  pixels: bool
  pictures: Callable | None  # (numbers, Prompts) -> x_0 of each
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
  shards.claim(folder, job.settings | {"shards": count}, [f"{p.text}\0{_name_of(p.image)}" for p in job.prompts])
  shards.fill(folder, _KIND, len(job.prompts), count, functools.partial(_shard, job), unit="prompt", process=process,
              processes=processes, before=functools.partial(_estimate, job, folder))
  return _finish(job, folder, count)


def _name_of(image):
  return image if isinstance(image, str) else "" if image is None else f"{len(image)} bytes"


def _estimate(job, folder, todo):
  some = job.prompts[:: max(len(job.prompts) // _TRIED, 1)][:_TRIED]
  began = time.time()
  texts = job.encoder.encode([p.text for p in some])
  seconds = (time.time() - began) / len(some)
  size = sum(x.nbytes for text in texts for x in text.values()) / len(some)
  size += np.prod(job.shape) * (1 if job.pixels else 2) if job.shape else 0
  print(f"{folder}: {todo:,} prompts of {np.mean([len(t['text']) for t in texts]):.0f} tokens: about "
        f"{todo * size / 1e9:.3g} GB, {todo * seconds / 60:.3g} minutes", flush=True)


def _shard(job, numbers, last, bar):
  """(records of a shard, of which nothing else is to be known)."""
  return _records(job, numbers, last, bar), dict


def _records(job, numbers, last, bar):
  for start in range(0, len(numbers), job.batch_size):
    part = numbers[start:start + job.batch_size]
    chosen = [job.prompts[i] for i in part]
    texts = job.encoder.encode([p.text for p in chosen])
    if job.pictures is not None:
      texts = [text | {"x_0": x} for text, x in zip(texts, job.pictures(part, chosen))]
    for prompt, arrays in zip(chosen, texts):
      yield prompt_cache.encode(prompt.text, arrays)
      bar.update(1)
  if last:  # the negative prompt's is the last record of all
    yield prompt_cache.encode(job.negative, job.encoder.encode([job.negative])[0])


def _finish(job, folder, count):
  found = shards.known(folder, _KIND, count)
  if found is None:
    return None
  encoder = job.encoder
  manifest = prompt_cache.Manifest(
      count=len(job.prompts), tokens=encoder.tokens, width=encoder.width, pooled=encoder.pooled, padded=encoder.padded,
      shape=job.shape, pixels=job.pixels, encoder=encoder.name, negative=job.negative, settings=job.settings,
      shards=tuple(part["shard"] for part in found))
  prompt_cache.write_manifest(folder, manifest)
  return manifest


def picture_reader(size, autoencoder):
  """(shape of x_0, whether it is pixels, (numbers, Prompts) -> x_0 of each).

  Args:
    size: side of a picture, in pixels.
    autoencoder: what `weights.load_autoencoder` gave, whose latents are kept; None: the pixels are.
  """
  def pixels(prompt):
    try:
      raw = prompt.image if isinstance(prompt.image, bytes) else pathlib.Path(prompt.image).read_bytes()
      return images.fitted(raw, size=size, channels=3, crop=True)
    except Exception as e:  # pylint: disable=broad-exception-caught; Pillow's decoders raise whatever they please
      what = _name_of(prompt.image) or "nothing"
      raise errors.UserError(f"--prompts: the picture of {prompt.text[:60]!r} ({what}) cannot be read: "
                             f"{' '.join(str(e).split()) or type(e).__name__}") from e

  if autoencoder is None:
    return (size, size, 3), True, lambda numbers, prompts: [pixels(prompt) for prompt in prompts]
  net, params, scales = autoencoder
  side = size // 2 ** (len(net.widths) - 1)

  @jax.jit
  def encode(params, pictures, numbers):
    mean, logvar = net.apply({"params": params}, pictures.astype("float32") / 127.5 - 1, method="encode")
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(_SEED), number))(numbers)
    drawn = jax.vmap(autoencoder_lib.sample)(mean, logvar, keys)
    return autoencoder_lib.to_latents(drawn, **scales).astype("float16")

  def latents(numbers, prompts):
    return list(np.asarray(encode(params, np.stack([pixels(p) for p in prompts]), np.array(numbers, np.int32))))

  return (side, side, net.latent_channels), False, latents


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
  whole("size", 0, "Side of the pictures beside the prompts, in pixels; 0: none are taken.", lower_bound=0)
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
    prompts = [Prompt(name) for name in release_cache.names(source)] if released else read_list(source, values.column)
  prompts = prompts[:values.limit] if values.limit else prompts
  shape, pixels, pictures = (), False, None
  if values.size:
    autoencoder = None
    if values.autoencoder is not None:
      folder = workdir_lib.path_of(values.autoencoder, "--autoencoder")
      autoencoder = weights.load_autoencoder(folder, sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1])))
      if values.size % 2 ** (len(autoencoder[0].widths) - 1):
        raise errors.UserError(f"--size: {values.size} is no multiple of {2 ** (len(autoencoder[0].widths) - 1)}, the "
                               "autoencoder's factor")
    if lacks := next((p.text for p in prompts if p.image is None), None):
      raise errors.UserError(f"--size: {values.prompts} has no picture beside {lacks[:60]!r}; leave --size out, or "
                             "give each row its image")
    shape, pixels, pictures = picture_reader(values.size, autoencoder)
  elif values.autoencoder is not None:
    raise errors.UserError("--autoencoder: encodes pictures, and none are taken; give --size")
  if released:
    with errors.flag("prompts"):
      encoder = release_cache.encoder(source, [prompt.text for prompt in prompts], values.tokens, values.negative)
  else:
    with errors.flag("encoder"):
      encoder = text_encoders.open_encoder(values.encoder, values.tokens, values.device)
  settings = {"encoder": encoder.name, "tokens": encoder.tokens, "negative": values.negative, "shape": shape,
              "pixels": pixels, "autoencoder": os.path.basename(values.autoencoder or "")}
  return Job(prompts, values.negative, encoder, shape, pixels, pictures, settings, values.batch)


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
