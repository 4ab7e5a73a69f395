"""Your own pictures: a folder of class folders, a folder of pictures, or an .npz of uint8 arrays.

  FOLDER/cat/a.jpg, FOLDER/dog/b.png    labels 0, 1: the class folders in alphabetical order
  FOLDER/a.jpg, FOLDER/b.png            no labels
  FILE.npz                              images uint8 [n, H, W, C] or [n, H, W], and, if there are any, labels [n]

A picture becomes [size, size, channels] in [-1, 1] as in ADM (arXiv 2105.05233): halved by boxes while it is twice too
large, its short side brought to `size` by bicubic interpolation, its centre cut out.
"""

from collections.abc import Callable
import functools
import hashlib
import io
import math
import threading
from typing import NamedTuple
import zipfile

from absl import logging
from etils import epath
import numpy as np
from PIL import Image
from PIL import ImageOps
from PIL import UnidentifiedImageError

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax.data import spec

FREE = ("path", "cache_mib")

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".avif")
_KEYS = {"images": ("images", "x", "arr_0"), "labels": ("labels", "y", "arr_1")}  # of an .npz
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # names of folders that are no classes
_SKIPPED, _SKIPPED_SHARE = 10, 0.01  # pictures of a split that may fail to decode: so many, or this share if it is more
_LONGEST = 100  # times the short side: a longer picture would not fit into memory when its short side is enlarged


def config(**fields):
  """Pictures of your own."""
  return config_lib.noun(make, dict(
      path="",  # a folder of class folders, a folder of pictures, or an .npz; here or at gs://
      size=32,  # pixels of a side, height and width
      channels=3,  # 3: colours; 1: grey
      crop=True,  # cut the centre out; False: squeeze the whole picture into the square
      flips=True,  # train on mirror images, too
      held_out=0.1,  # share of the pictures that is not trained on, chosen by their names
      labels=True,  # condition on class folders or labels, where there are any; False: never
      classes=(),  # names of the classes by label; empty: found in the data
      cache_mib=1024,  # keep pictures in memory once decoded, if all of them fit into so many MiB
  ), fields)


def make(*, path, size, channels, crop, flips, held_out, labels, classes, cache_mib):
  """Pictures as Data; raises ValueError for fields, folders and files that are none."""
  config_lib.whole("size", size, most=8192)
  config_lib.one_of("channels", channels, (1, 3))
  config_lib.number("held_out", held_out, above=0, below=1)
  config_lib.whole("cache_mib", cache_mib, least=0)
  for name, value in (("crop", crop), ("flips", flips), ("labels", labels)):
    config_lib.one_of(name, value, (True, False))
  if not isinstance(path, str) or not path:
    raise ValueError(f"path: {path!r}; give a folder of class folders, a folder of pictures, or an .npz: "
                     "--config.data.path=FOLDER")
  if not isinstance(classes, (tuple, list)) or len(set(classes)) < len(classes) or len(classes) == 1:
    raise ValueError(f"classes: {classes!r} must be the names of two classes or more; (): those of the data")
  classes = tuple(str(name) for name in classes)
  opened = functools.cache(functools.partial(open_pictures, path, labels))
  # What a workdir's config.json says is not looked up again: samples can be drawn where the pictures are not.
  found = {}
  if labels and not classes:
    classes = opened().classes
    found = {"classes": classes} if classes else {"labels": False}
  fit = functools.partial(fitted, size=size, channels=channels, crop=crop)
  how = _How(opened, classes, fit, (size, size, channels), flips, held_out, cache_mib * 2**20)
  # Each split's records are made once, with the pictures that they keep.
  records = functools.cache(functools.partial(_records, how))
  return spec.Data(spec.Spec(how.shape, spec.label(len(classes)), bounds=(-1, 1)), records, classes, found)


class Pictures(NamedTuple):
  """Pictures where they lie."""

  place: str  # folder or file
  names: list  # of each picture: it is reported by it, and assigned to a split
  labels: np.ndarray | None
  classes: tuple  # their names; () without labels
  read: Callable  # number -> the bytes of a file, or an array


class _How(NamedTuple):
  """How records are made of pictures."""

  opened: Callable  # () -> Pictures
  classes: tuple
  fit: Callable  # picture -> uint8 array of `shape`
  shape: tuple
  flips: bool
  held_out: float
  cache: int  # bytes


def _records(how, split):
  try:
    pictures = how.opened()
    if how.classes and pictures.classes != how.classes:
      raise ValueError(f"classes: are {_few(how.classes)}, but {pictures.place} has {_few(pictures.classes) or 'none'}")
    return Records(pictures, _part(pictures, split, how.held_out), how, mirrored=how.flips and split == "train")
  except ValueError as e:
    raise errors.UserError(f"config.data.{e}") from e


class Records:
  """Random access to {"x_0", "cond"} of some pictures; with `mirrored`, a second half of records mirrors the first.

  A picture that will not decode is replaced by the next one of its class that does: a batch is a function of its number
  all the same.
  """

  def __init__(self, pictures, numbers, how, mirrored):
    self._pictures, self._numbers, self._how, self._mirrored = pictures, numbers, how, mirrored
    self._lock, self._broken, self._kept = threading.Lock(), set(), {}
    self._keep = len(numbers) * math.prod(how.shape) <= how.cache

  def __len__(self):
    return len(self._numbers) * (2 if self._mirrored else 1)

  def __getitem__(self, i):
    mirror, place = divmod(int(i), len(self._numbers))
    label = None if self._pictures.labels is None else self._pictures.labels[self._numbers[place]]
    pixels = self._decodable(place, label)
    x_0 = pixels[:, ::-1].astype(np.float32) if mirror else pixels.astype(np.float32)
    return {"x_0": x_0 / np.float32(127.5) - 1, "cond": {} if label is None else {"label": label}}

  def _decodable(self, place, label):
    pixels = self._pixels(int(self._numbers[place]))
    if pixels is not None:
      return pixels
    for number in np.roll(self._numbers, -place):
      if label is None or self._pictures.labels[number] == label:
        pixels = self._pixels(int(number))
        if pixels is not None:
          return pixels
    raise errors.UserError(f"config.data.path: {self._pictures.place}: no picture of the class of "
                           f"{self._pictures.names[self._numbers[place]]} can be decoded")

  def _pixels(self, number):
    """The decoded picture, or None where it will not decode."""
    if number in self._kept:
      return self._kept[number]
    if number in self._broken:
      return None
    raw = self._pictures.read(number)
    try:
      pixels = self._how.fit(raw)
    except Exception as e:  # pylint: disable=broad-exception-caught; Pillow's decoders raise whatever they please
      self._skip(number, e)
      return None
    if self._keep:
      self._kept[number] = pixels
    return pixels

  def _skip(self, number, error):
    most = max(_SKIPPED, int(_SKIPPED_SHARE * len(self._numbers)))
    name, words = self._pictures.names[number], " ".join(str(error).split()) or type(error).__name__
    with self._lock:
      self._broken.add(number)
      if len(self._broken) > most:
        raise errors.UserError(f"config.data.path: {self._pictures.place}: {len(self._broken)} of {len(self._numbers)} "
                               f"pictures cannot be decoded, the last {name} ({words}); remove them")
    logging.warning("%s: %s cannot be decoded (%s): another of its class takes its place (%d of at most %d)",
                    self._pictures.place, name, words, len(self._broken), most)


def _part(pictures, split, held_out):
  """The numbers of a split's pictures. A hash of each one's name decides: new pictures do not move the old ones."""
  marks = np.array([int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=7).digest())
                    for name in pictures.names])
  out = marks < held_out * 2**56
  if len(marks) < 2:
    raise ValueError(f"path: {pictures.place} has one picture only; give two at least: one is held out")
  out[np.argmin(marks)], out[np.argmax(marks)] = True, False
  return np.flatnonzero(out if split == "held_out" else ~out)


def open_pictures(path, labels):
  """The Pictures of a path; raises ValueError."""
  try:
    place = epath.Path(path).expanduser()
    if place.is_dir():
      return _open_folder(place, labels)
    if place.exists():
      return _open_npz(place, labels)
  except ValueError:
    raise
  except Exception as e:  # pylint: disable=broad-exception-caught; of the disk, or of any library behind gs://
    raise ValueError(f"path: {path!r} cannot be read ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from e
  raise ValueError(f"path: {path!r} does not exist; give a folder of class folders, a folder of pictures, or an .npz")


def _open_folder(place, labels):
  _, folders, files = next(iter(place.walk()))
  # From Python 3.12 on, Path.walk counts a link to a folder among the files.
  links = {name for name in files if not _is_picture(name) and (place / name).is_dir()}
  files = [name for name in files if name not in links]
  folders = sorted(name for name in {*folders, *links} if not _hidden(name))
  within = {name: sorted(f"{name}/{file}" for file in _files(place / name)) for name in folders}
  loose = sorted(name for name in files if not _hidden(name))
  pictures = {name: [file for file in files if _is_picture(file)] for name, files in within.items()}
  every = [file for file in loose if _is_picture(file)]
  others = len(loose) - len(every) + sum(len(within[name]) - len(pictures[name]) for name in folders)
  if labels and any(pictures.values()):
    _check_folders(place, every, pictures)
    classes = tuple(folders)
    numbers = np.repeat(np.arange(len(classes), dtype=np.int32), [len(pictures[name]) for name in classes])
  else:
    classes, numbers = (), None
  every += [file for name in folders for file in pictures[name]]
  if not every:
    raise ValueError(f"path: {str(place)!r} has no pictures ({', '.join(_SUFFIXES)})")
  if others:
    logging.warning("%s: %d files are left out, for they are not named like pictures (%s)", place, others,
                    ", ".join(_SUFFIXES))
  return Pictures(str(place), every, numbers, classes, functools.partial(_read_file, place, every))


def _check_folders(place, loose, pictures):
  """Raises ValueError: folders that are not one for each class."""
  names = list(pictures)
  if loose:
    raise ValueError(f"path: {str(place)!r} has pictures ({loose[0]}) beside folders of pictures ({_few(names)}): "
                     "give each picture's class a folder, or --config.data.labels=False")
  if len(names) > 1 and all(name.lower() in _SPLITS for name in names):
    raise ValueError(f"path: the folders in {str(place)!r} are splits, not classes ({_few(names)}): give one of them, "
                     f"for example {str(place / names[0])!r}")
  if empty := [name for name in names if not pictures[name]]:
    raise ValueError(f"path: {str(place)!r}: class folders without a picture ({_few(empty)}); remove them")
  if len(names) == 1:
    raise ValueError(f"path: {str(place)!r} has one class folder only ({names[0]}), and a single class says nothing: "
                     "for pictures without labels, --config.data.labels=False")


def _files(folder):
  """Names of all files below a folder, relative to it."""
  base = None
  for root, _, files in folder.walk():
    base = base or str(root)  # for gs:// fsspec leaves the scheme out of what it walks through
    below = [part for part in str(root)[len(base):].split("/") if part]
    yield from ("/".join([*below, name]) for name in files if name and not any(map(_hidden, [*below, name])))


def _hidden(name):
  return name.startswith((".", "__MACOSX"))


def _is_picture(name):
  return name.lower().endswith(_SUFFIXES)


def _read_file(place, names, number):
  try:
    return (place / names[number]).read_bytes()
  except Exception as e:  # pylint: disable=broad-exception-caught; of the disk, or of any library behind gs://
    raise errors.UserError(f"config.data.path: {place / names[number]} cannot be read "
                           f"({type(e).__name__}: {' '.join(str(e).split())[:200]})") from e


def _open_npz(place, labels):
  try:
    with place.open("rb") as f, np.load(f, allow_pickle=False) as file:
      images, given = (next((file[key] for key in _KEYS[kind] if key in file), None) for kind in ("images", "labels"))
      keys = list(file)
  except (ValueError, zipfile.BadZipFile, EOFError, TypeError, AttributeError) as e:
    # NumPy's own words advise to unpickle it.
    raise ValueError(f"path: {str(place)!r} is neither a folder nor a whole .npz of plain arrays") from e
  if images is None:
    raise ValueError(f"path: {str(place)!r} has arrays {_few(keys)}: name the pictures one of "
                     f"{', '.join(_KEYS['images'])}, and their labels {', '.join(_KEYS['labels'])}")
  _check_images(images, str(place))
  classes, numbers = (), None
  if labels and given is not None:
    _check_labels(given, len(images), str(place))
    numbers = given.astype(np.int32)
    classes = tuple(str(label) for label in range(int(numbers.max()) + 1))
  return Pictures(str(place), [str(i) for i in range(len(images))], numbers, classes, images.__getitem__)


def _check_images(images, place):
  if images.dtype != np.uint8:
    raise ValueError(f"path: {place!r}: images are {images.dtype}; give uint8, 0 to 255")
  if images.ndim == 4 and images.shape[1] in (1, 3, 4) and images.shape[3] not in (1, 3, 4):
    raise ValueError(f"path: {place!r}: images have shape {images.shape}: are they channels first? Channels come last: "
                     "np.moveaxis(images, 1, -1)")
  if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)) or not images.size:
    raise ValueError(f"path: {place!r}: images have shape {images.shape}; give [n, height, width] or [n, height, "
                     "width, channels] of 1, 3 or 4 channels")


def _check_labels(labels, count, place):
  if labels.ndim == 2 and labels.shape[0] == count and labels.shape[1] > 1:
    raise ValueError(f"path: {place!r}: labels have shape {labels.shape}: are they one-hot? Give np.argmax(labels, 1)")
  if labels.shape != (count,):
    raise ValueError(f"path: {place!r}: labels have shape {labels.shape}; give one for each image, ({count},)")
  if labels.dtype.kind not in "iu":
    raise ValueError(f"path: {place!r}: labels are {labels.dtype}; give whole numbers, int32")
  seen = np.unique(labels)
  if seen[0] == 1 and seen[-1] == len(seen):
    raise ValueError(f"path: {place!r}: labels go from 1 to {seen[-1]}: they begin at 0; subtract 1")
  if seen[0] != 0 or seen[-1] != len(seen) - 1:
    missing = next(i for i in range(len(seen) + 1) if i not in seen)
    raise ValueError(f"path: {place!r}: labels go from {seen[0]} to {seen[-1]}, and no image has {missing}: number the "
                     "classes from 0 on without a gap")
  if len(seen) == 1:
    raise ValueError(f"path: {place!r}: all labels are 0, and a single class says nothing: for pictures without "
                     "labels, --config.data.labels=False")


def fitted(raw, *, size, channels, crop):
  """A file's bytes, or a uint8 array, as uint8 [height, width, channels]; raises ValueError and what Pillow raises.

  Args:
    raw: see above.
    size: a square's side, or (height, width).
    channels: 1 or 3.
    crop: cut the middle out; False: squeeze the whole picture.
  """
  if isinstance(raw, np.ndarray):
    image = Image.fromarray(raw[..., 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw)
  else:
    try:
      image = Image.open(io.BytesIO(raw))
    except UnidentifiedImageError as e:
      raise ValueError("it is in no format that Pillow knows") from e
    # As a viewer shows it: cameras write pictures as the sensor lay, and beside them how it was held.
    image = ImageOps.exif_transpose(image)
  image = _eight_bits(image)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  image = image.convert({1: "L", 3: "RGB"}[channels])
  short = min(image.size)
  if max(image.size) > _LONGEST * short:
    raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are too long a picture")
  height, width = size if isinstance(size, tuple) else (size, size)
  return np.asarray(_resized(image, height, width, crop)).reshape(height, width, channels)


def adm_crop(raw, size):
  """A picture file's bytes as uint8 [size, size, 3], by guided-diffusion's own steps (image_datasets.py).

  RGB, whatever EXIF says of how it was held; halved by BOX while its shorter side is two sizes or more; by BICUBIC to
  that side, up or down; the middle cut out. Raises whatever Pillow raises.
  """
  image = Image.open(io.BytesIO(raw)).convert("RGB")
  if max(image.size) > _LONGEST * min(image.size):
    raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are too long a picture")
  return np.asarray(_resized(image, size, size, crop=True))


def _resized(image, height, width, crop):
  while image.width >= 2 * width and image.height >= 2 * height:
    image = image.resize(tuple(n // 2 for n in image.size), Image.Resampling.BOX)
  scale = max(width / image.width, height / image.height)
  across = tuple(round(n * scale) for n in image.size) if crop else (width, height)
  image = image.resize(across, Image.Resampling.BICUBIC)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height))


def _eight_bits(image):
  """Pictures of 16 bits a value in 8, which Pillow would clip; raises ValueError for values of no known range."""
  if image.mode != "F" and not image.mode.startswith("I"):
    return image
  values = np.asarray(image)
  if image.mode == "F" or values.min() < 0 or values.max() > 65535:
    raise ValueError(f"its values, of Pillow's mode {image.mode}, have no range that is known")
  return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _few(names):
  names = list(names)
  return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
