"""Encoded prompts as data, with or without pictures beside them.

  --config.data.path=DIR    a cache of python -m piflow_jax.data.prompts (docs/text_to_image.md)
  --config.data.on_the_fly=FILE    a short list, of which that cache is made first, if it is not there

Without pictures x_0 is zeros of `shape`: what an objective that is data_free reads. Each 500th record is held out. Of
a cache of several sizes all are trained on, in batches of one size each; what is measured is of `shape`.
"""

import functools

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax.data import on_the_fly as on_the_fly_lib
from piflow_jax.data import prompt_cache
from piflow_jax.data import shards
from piflow_jax.data import spec

FREE = ("path", "held_out", "on_the_fly")


def config(**fields):
  """A cache of encoded prompts."""
  return config_lib.noun(make, dict(
      path="",  # folder of the cache, on a local disk
      on_the_fly="",  # list of prompts, at most 10,000, that the cache is made of by `encoder` where there is none yet
      held_out="",  # folder of a second one, whose records are held out; "": each 500th of the first
      shape=(),  # of x_0, a latent or a picture; (): of those in the cache, the first size's
      sizes=(),  # shapes of x_0 that are trained on, `shape` among them; (): all of the cache's
      tokens=0,  # of a text: shorter ones are filled up, longer ones cut; 0: the cache's
      width=0,  # of a token; 0: the cache's
      pooled=-1,  # width of the pooled vector, 0 for none; -1: the cache's
      padded=False,  # texts carry no mask: their padding was encoded with them; found in the cache
      encoder="",  # KIND:PLACE of the encoder, which encodes what is asked for by hand; "": the cache's
  ), fields)


def make(*, path, on_the_fly, held_out, shape, sizes, tokens, width, pooled, padded, encoder):
  """data.spec.Data; see `config`."""
  shards.check_local(path=path, held_out=held_out)
  config_lib.whole("tokens", tokens, least=0)
  config_lib.whole("width", width, least=0)
  config_lib.whole("pooled", pooled, least=-1)
  config_lib.one_of("padded", padded, (False, True))
  for name, value in (("encoder", encoder), ("on_the_fly", on_the_fly)):
    if not isinstance(value, str):
      raise ValueError(f"{name}: {value!r} is no text")
  if on_the_fly and not path:
    raise ValueError("path: is empty; give the folder that on_the_fly's prompts are kept in once they are encoded")
  prepare = functools.partial(on_the_fly_lib.encode, on_the_fly, path, encoder=encoder, tokens=tokens)
  found = {}
  if not (shape and tokens and width and pooled >= 0 and encoder):
    if not path:
      raise ValueError("path: is empty; give a cache of prompts, which python -m piflow_jax.data.prompts makes")
    prepare()
    manifest = prompt_cache.read_manifest(path)
    shape = tuple(shape) or tuple(manifest.shape)
    if not shape:
      raise ValueError(f"shape: {path} holds no pictures to say it; set it, e.g. to (128, 128, 16)")
    tokens, width = tokens or manifest.tokens, width or manifest.width
    pooled, encoder = manifest.pooled if pooled < 0 else pooled, encoder or manifest.encoder
    padded = manifest.padded
    found = dict(shape=shape, tokens=tokens, width=width, pooled=pooled, padded=padded, encoder=encoder)
  shape = spec.checked_shape(shape)
  sizes = _checked_sizes(sizes, shape)
  cond = {"text": spec.Array((tokens, width), "bfloat16")}
  cond |= {} if padded else {"mask": spec.Array((tokens,), "int32")}
  cond |= {"pooled": spec.Array((pooled,), "float32")} if pooled else {}

  @functools.cache
  def opened(place):
    if place == path:
      prepare()
    return _open(place, tokens=tokens, width=width, pooled=pooled, padded=padded)

  def records(split, shape=shape, own=shape):
    return Records(*_part(opened, path, held_out, split, shape, own), shape, tokens)

  def all_sizes():
    chosen = sizes or prompt_cache.shapes(_opened(opened, path, "path")[0], shape)
    return {size: functools.partial(records, shape=size) for size in chosen}

  def null():
    manifest, data = _opened(opened, path, "path")
    return _cond(prompt_cache.decode(data[manifest.count], manifest._replace(shape=()))[1], manifest, tokens)

  # Pictures lie in [-1, 1]; latents and the zeros in their place need not say so.
  bounds = (-1.0, 1.0) if shape[-1] in (1, 3) else (-1e4, 1e4)
  return spec.Data(spec.Spec(shape, cond, bounds=bounds), records, found=found, null=null, sizes=all_sizes)


def _checked_sizes(sizes, shape):
  if not isinstance(sizes, (tuple, list)):
    raise ValueError(f"sizes: {sizes!r}; give shapes of x_0, as in ((128, 128, 16), (96, 168, 16))")
  try:
    sizes = tuple(spec.checked_shape(size) for size in sizes)
  except ValueError as e:
    raise ValueError(f"sizes: {e}") from e
  if sizes and (shape not in sizes or len(set(sizes)) < len(sizes) or {size[2:] for size in sizes} != {shape[2:]}):
    raise ValueError(f"sizes: {sizes}; give shapes like data.shape, {shape}, each once and that one among them")
  return sizes


def _open(path, *, tokens, width, pooled, padded):
  """(Manifest, bytes of its records) of a cache that fits."""
  manifest = prompt_cache.read_manifest(path)
  for name, there, here in (("width", manifest.width, width), ("pooled", manifest.pooled, pooled),
                            ("padded", manifest.padded, padded)):
    if there != here:
      raise ValueError(f"{name}: {path} has {there}, this run {here}; give its own cache")
  if padded and manifest.tokens != tokens:
    raise ValueError(f"tokens: {path} has texts of {manifest.tokens} with their padding, this run {tokens}; give its "
                     "own cache")
  return manifest, shards.open_records(path, manifest)


def _opened(opened, path, name):
  try:
    return opened(path)
  except ValueError as e:
    raise errors.UserError(f"config.data.{str(e) if name == 'path' else f'{name}: {e}'}") from e


def _part(opened, path, held_out, split, shape, own):
  """(Manifest, bytes of records, numbers of the split's that have this shape); raises errors.UserError.

  A cache of held-out records may lack sizes that are trained on, all but the run's own.
  """
  apart = bool(held_out) and split == "held_out"
  manifest, data = _opened(opened, *((held_out, "held_out") if apart else (path, "path")))
  try:
    numbers = prompt_cache.numbers_of(manifest, shape)
  except ValueError as e:
    if apart and shape != own:
      return manifest, data, np.arange(0)
    raise errors.UserError(f"config.data.{f'held_out: {held_out}: ' if apart else ''}{e}") from e
  return manifest, data, numbers if held_out else numbers[shards.split_numbers(len(numbers), split)]


def _cond(arrays, manifest, tokens):
  found = prompt_cache.condition(arrays, manifest, tokens)
  return found | ({"pooled": found["pooled"].astype(np.float32)} if manifest.pooled else {})


class Records:
  """Random access to {"x_0", "cond"} of some of a cache's records."""

  def __init__(self, manifest, data, numbers, shape, tokens):
    self._manifest = prompt_cache.of_shape(manifest, shape)
    self._data, self._numbers, self._shape, self._tokens = data, numbers, shape, tokens

  def __len__(self):
    return len(self._numbers)

  def _read(self, i):
    number = int(self._numbers[int(i)])
    try:
      return prompt_cache.decode(self._data[number], self._manifest)
    except Exception as e:  # pylint: disable=broad-exception-caught; a torn shard raises of any type
      words = " ".join(str(e).split())[:200]
      raise errors.UserError(f"config.data.path: record {number} cannot be read ({words}); look at the cache by python "
                             "-m piflow_jax.data.prompts --check") from e

  def prompt(self, i):
    """The text of record i."""
    return self._read(i)[0]

  def __getitem__(self, i):
    _, arrays = self._read(i)
    if not self._manifest.shape:
      x = np.zeros(self._shape, np.float32)
    else:
      x = arrays["x_0"].astype(np.float32)
      x = x / np.float32(127.5) - 1 if self._manifest.pixels else x
    return {"x_0": x, "cond": _cond(arrays, self._manifest, self._tokens)}
