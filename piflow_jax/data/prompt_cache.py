"""Encoded prompts on disk: records, and a manifest that says what they are (docs/text_to_image.md).

A cache is a folder of ArrayRecord shards and manifest.json. A record is a safetensors file of its own: "text" [tokens,
width] bfloat16 without padding, "pooled" [width] where the encoder gives one, "x_0" where pictures lie beside the
prompts (uint8 pixels, or float16 latents as a model takes them), and "prompt", its UTF-8 bytes. Where x_0 comes in
several sizes, records of one size lie together.
"""

import itertools
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from piflow_jax.data import shards

FORMAT = 1
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TYPES = {"BF16": BFLOAT16, "F16": "<f2", "F32": "<f4", "U8": "u1"}


class Manifest(NamedTuple):
  """What a cache is."""

  count: int  # records
  tokens: int  # at most, of a text
  width: int  # of a token
  pooled: int  # width of the pooled vector, 0: there is none
  padded: bool  # texts have all `tokens`, their padding encoded with them, and no mask belongs to them (T5 in FLUX)
  shape: tuple  # of x_0 beside the prompts, of the first size; () where there is none
  pixels: bool  # x_0 is uint8, 255 for 1 and 0 for -1
  encoder: str  # KIND:PLACE that made the texts
  negative: str  # the prompt of guidance's unconditional pass
  settings: dict  # what else decides the bytes
  shards: tuple  # ({"name", "records", "bytes", "crc32"}, ...)
  sizes: tuple = ()  # of x_0, (rows, columns, records of them) in the order in which they lie; (): there is one


def numbers_of(manifest, shape):
  """Numbers of the records whose x_0 has this shape, as it is or is to be made. Raises ValueError: none has."""
  if not manifest.sizes:
    if tuple(manifest.shape) not in ((), tuple(shape)):
      raise ValueError(f"shape: the cache's is {tuple(manifest.shape)}, this run's {tuple(shape)}; give its own cache")
    return np.arange(manifest.count)
  first = 0
  for rows, columns, count in manifest.sizes:
    if (rows, columns) == tuple(shape[:-1]) and (not manifest.shape or shape[-1] == manifest.shape[-1]):
      return np.arange(first, first + count)
    first += count
  known = ", ".join(f"{rows} x {columns}" for rows, columns, _ in manifest.sizes)
  raise ValueError(f"shape: {tuple(shape)} is none of the cache's sizes, {known}; choose one of them")


def shapes(manifest, shape):
  """Shapes of x_0 in a cache, one of which is `shape`."""
  return [(rows, columns, shape[-1]) for rows, columns, _ in manifest.sizes] or [tuple(shape)]


def of_shape(manifest, shape):
  """The manifest as of a cache whose pictures, where there are any, have that shape alone."""
  return manifest._replace(shape=tuple(shape) if manifest.shape else (), sizes=())


def encode(prompt, arrays):
  """The bytes of a record. Arrays that hold "prompt" as UTF-8 bytes say it in the place of `prompt`."""
  arrays = {"prompt": np.frombuffer(prompt.encode(), np.uint8)} | arrays
  return safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in arrays.items()})


def decode(data, manifest):
  """(prompt, {name: array}) of a record's bytes. Raises ValueError: it is none of this cache's."""
  try:
    found = {name: np.frombuffer(x["data"], _TYPES[x["dtype"]]).reshape(x["shape"])
             for name, x in safetensors.deserialize(data)}
  except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as e:
    raise ValueError(f"a record is no safetensors file ({e})") from e
  prompt = found.pop("prompt", np.zeros(0, np.uint8)).tobytes().decode(errors="replace")
  wanted = {"text"} | ({"pooled"} if manifest.pooled else set()) | ({"x_0"} if manifest.shape else set())
  if found.keys() != wanted:
    raise ValueError(f"a record has {sorted(found)}, {sorted(wanted)} are a cache's")
  text = found["text"]
  if text.dtype != BFLOAT16 or text.shape[1:] != (manifest.width,) or not 0 < len(text) <= manifest.tokens:
    raise ValueError(f"a text is {text.dtype} {text.shape}; bfloat16 of 1 to {manifest.tokens} tokens of "
                     f"{manifest.width} are this cache's")
  if manifest.pooled and found["pooled"].shape != (manifest.pooled,):
    raise ValueError(f"a pooled vector is {found['pooled'].shape}, ({manifest.pooled},) are this cache's")
  if manifest.shape and found["x_0"].shape != tuple(manifest.shape):
    raise ValueError(f"x_0 is {found['x_0'].shape}, {tuple(manifest.shape)} are this cache's")
  return prompt, found


def condition(arrays, manifest, tokens):
  """The condition of a record's arrays, its text filled up with zeros to so many tokens, or cut to them.

  Returns:
    {"text": [tokens, width] bfloat16, "mask": [tokens] int32 unless the texts are padded, "pooled" where there is one}.
  """
  text = arrays["text"][:tokens]
  found = {"text": np.concatenate([text, np.zeros((tokens - len(text), text.shape[1]), text.dtype)])}
  if not manifest.padded:
    found["mask"] = (np.arange(tokens) < len(text)).astype(np.int32)
  if manifest.pooled:
    found["pooled"] = arrays["pooled"]
  return found


def write_manifest(folder, manifest):
  """Write manifest.json, whole or not at all."""
  shards.write_manifest(folder, FORMAT, manifest)


def read_manifest(folder):
  """The Manifest of a cache; raises ValueError as `shards.read_manifest` does."""
  return shards.read_manifest(folder, FORMAT, Manifest, _check_manifest, "piflow_jax.data.prompts")


def _check_manifest(found):
  # The last record of all is the negative prompt's.
  if sum(shard["records"] for shard in found.shards) != found.count + 1 or min(found.tokens, found.width) < 1:
    raise ValueError("its counts of records do not add up")
  if found.sizes and (sum(count for _, _, count in found.sizes) != found.count
                      or min(min(size) for size in found.sizes) < 1
                      or found.shape and tuple(found.shape[:2]) != tuple(found.sizes[0][:2])):
    raise ValueError(f"its sizes, {found.sizes}, do not add up")


def _of_each(manifest):
  """The manifest by which each record is read, the negative prompt's last."""
  for shape in shapes(manifest, manifest.shape or (0,)):
    yield from itertools.repeat(of_shape(manifest, shape), len(numbers_of(manifest, shape)))
  yield manifest._replace(shape=())


def check(folder, bar=None):
  """Read a cache whole; returns its Manifest. Raises ValueError: "path: ...": it is not what was written."""
  manifest = read_manifest(folder)
  shards.check_sums(folder, manifest.shards)
  for number, (data, own) in enumerate(zip(shards.open_records(folder, manifest), _of_each(manifest))):
    try:
      _, arrays = decode(data, own)
      if bad := [name for name, x in arrays.items() if not np.isfinite(x.astype(np.float32)).all()]:
        raise ValueError(f"{bad[0]} holds values that are not finite")
    except ValueError as e:
      raise ValueError(f"path: {folder}: record {number}: {e}") from e
    if bar is not None:
      bar.update(1)
  return manifest
