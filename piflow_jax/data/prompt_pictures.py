"""Pictures beside prompts: which size each goes to, and x_0 of each, pixels or latents."""

import functools
import io
import math
import pathlib
from typing import Callable, NamedTuple

import jax
import numpy as np
from PIL import Image
import tqdm

from piflow_jax import errors
from piflow_jax.data import images
from piflow_jax.models import autoencoder as autoencoder_lib

_SEED = 20_261_126  # of latents, drawn from pictures' posteriors
_ORIENTATION, _ACROSS = 274, (5, 6, 7, 8)  # of EXIF: a camera was held upright


class Pictures(NamedTuple):
  """What x_0 a cache has, or is to be trained at."""

  shape: tuple = ()  # of x_0 of the first size, () where there are no pictures
  pixels: bool = False  # x_0 is uint8
  read: Callable | None = None  # (numbers, Prompts of one size) -> x_0 of each
  sizes: tuple = ()  # (rows, columns of x_0, prompts of them), in the prompts' order; () for one size


def parsed(text):
  """((height, width) in pixels, ...) of "1024", "1024x768" (width first) or several with commas. Raises ValueError."""
  sizes = []
  for part in text.split(","):
    sides = part.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) <= 2**16 for side in sides):
      raise ValueError(f"size: {part!r}; give a side, or WIDTHxHEIGHT, in pixels")
    sizes.append((int(sides[-1]), int(sides[0])))
  if len(set(sizes)) < len(sizes):
    raise ValueError(f"size: {text} says one twice")
  return tuple(sizes)


def placed(prompts, sizes):
  """(prompts, how many are of each size): those of one size together, each in the size of nearest aspect.

  Args:
    prompts: prompt_list.Prompts.
    sizes: (height, width) of each.
  Raises:
    ValueError: "size: ...": neither a picture nor its list says what aspect one has.
  """
  parts = [[] for _ in sizes]
  for prompt in tqdm.tqdm(prompts, unit="picture", desc="sizes", leave=False):
    distance = functools.partial(_distance, prompt.size or _size_of(prompt))
    parts[sizes.index(min(sizes, key=distance))].append(prompt)
  return [prompt for part in parts for prompt in part], [len(part) for part in parts]


def _distance(a, b):
  """Of two sizes: by aspect first, then by area."""
  return abs(math.log(a[0] / a[1] * b[1] / b[0])), abs(math.log(a[0] * a[1] / (b[0] * b[1])))


def _size_of(prompt):
  if prompt.image is None:
    raise ValueError(f"size: of several, and {prompt.text[:60]!r} has neither a picture nor \"width\" and \"height\" "
                     "in its row to choose one by")
  try:
    image = Image.open(io.BytesIO(prompt.image) if isinstance(prompt.image, bytes) else prompt.image)
    turned = image.getexif().get(_ORIENTATION) in _ACROSS
  except Exception as e:  # pylint: disable=broad-exception-caught; Pillow's decoders raise whatever they please
    raise _unread(prompt, e) from e
  return image.size if turned else image.size[::-1]


def name_of(image):
  """A picture's file, or how many bytes it has, in words."""
  return image if isinstance(image, str) else "" if image is None else f"{len(image)} bytes"


def _unread(prompt, e):
  return errors.UserError(f"--prompts: the picture of {prompt.text[:60]!r} ({name_of(prompt.image) or 'nothing'}) "
                          f"cannot be read: {' '.join(str(e).split()) or type(e).__name__}")


def reader(sizes, counts, autoencoder):
  """Pictures of prompts that lie by size.

  Args:
    sizes: (height, width) of each, in pixels.
    counts: prompts of each.
    autoencoder: what `weights.load_autoencoder` gave, whose latents are kept; None: the pixels are.
  Raises:
    ValueError: "size: ...": the autoencoder's factor does not divide one.
  """
  ends = np.cumsum(counts)

  def pixels(number, prompt):
    try:
      raw = prompt.image if isinstance(prompt.image, bytes) else pathlib.Path(prompt.image).read_bytes()
      return images.fitted(raw, size=sizes[int(np.searchsorted(ends, number, "right"))], channels=3, crop=True)
    except Exception as e:  # pylint: disable=broad-exception-caught; Pillow's decoders raise whatever they please
      raise _unread(prompt, e) from e

  if autoencoder is None:
    known = _known(sizes, counts, 1)
    return Pictures((*sizes[0], 3), True, lambda numbers, prompts: list(map(pixels, numbers, prompts)), known)
  net, params, scales = autoencoder
  factor = 2 ** (len(net.widths) - 1)

  @jax.jit
  def encode(params, pictures, numbers):
    mean, logvar = net.apply({"params": params}, pictures.astype("float32") / 127.5 - 1, method="encode")
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(_SEED), number))(numbers)
    drawn = jax.vmap(autoencoder_lib.sample)(mean, logvar, keys)
    return autoencoder_lib.to_latents(drawn, **scales).astype("float16")

  def latents(numbers, prompts):
    return list(np.asarray(encode(params, np.stack([*map(pixels, numbers, prompts)]), np.array(numbers, np.int32))))

  known, first = _known(sizes, counts, factor), tuple(side // factor for side in sizes[0])
  return Pictures((*first, net.latent_channels), False, latents, known)


def without(sizes, counts, factor):
  """Pictures of prompts that lie by size and have none: the sizes alone, x_0 being `factor` times smaller."""
  return Pictures(sizes=_known(sizes, counts, factor))


def _known(sizes, counts, factor):
  for height, width in sizes:
    if height % factor or width % factor:
      raise ValueError(f"size: {width}x{height} is no multiple of {factor}, the autoencoder's factor")
  rows = [(height // factor, width // factor, count) for (height, width), count in zip(sizes, counts)]
  return tuple(rows) if len(rows) > 1 else ()
