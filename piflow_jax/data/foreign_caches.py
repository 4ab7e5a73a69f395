"""Caches of latents that other codebases made, read as they are; `data.imagenet` copies them into this one's form.

  lakonlab      a list of "NAME.pth label" lines; {x}: (C, H, W), one draw of the posterior, times 0.18215 already
  repa          dataset.json {"labels": [[name, label], ...]} and its .npy: (2 C, H, W), mean and standard deviation
  meanflow      00000000.pt ...: {image: (2 C, H, W), mean and standard deviation, label}
  mar           CLASS/NAME.npz: moments, moments_flip: (2 C, H, W), mean and log variance
  lightningdit  *.safetensors of latents, latents_flip (n, C, H, W), labels (n); latents_stats.pt: mean, std

Channels come first there, last here. Nothing that is pickled is run.
"""

import functools
import json
from typing import Callable, NamedTuple

from etils import epath
import numpy as np
from safetensors import SafetensorError
from safetensors import safe_open
import tqdm

KINDS = ("lakonlab", "repa", "meanflow", "mar", "lightningdit")
_SD, _MAR = 0.18215, 0.2325  # scales of Stable Diffusion's latents, and of MAR's KL-16
_LOOKED_AT = 8  # records by which a form is known for what it says it is


class Latents(NamedTuple):
  """Somebody's cache."""

  place: str
  labels: np.ndarray  # [n] int32
  names: list  # of records, for messages
  classes: tuple  # their names, in the order of the labels; "0", "1", ... where the cache knows none
  shape: tuple  # (H, W, C) of a latent
  views: int  # 1, or 2: the picture's and its mirror image's
  moments: bool  # whether `read` gives mean and log variance, else draws of the posterior
  offset: np.ndarray  # [C]; x_0 = (z - offset) * scale
  scale: np.ndarray  # [C]
  read: Callable  # number -> float32 [views, H, W, 2 C or C], unscaled; ValueError("source: ...")


def open_cache(kind, path):
  """The Latents of one of KINDS at a path. Raises ValueError("source: ..."): it is none, and what is wrong."""
  place = epath.Path(path).expanduser()
  if not place.exists():
    raise ValueError(f"source: {path!r} is not there; give {_FORMS[kind][1]}")
  found = _FORMS[kind][0](place)
  for number in range(min(_LOOKED_AT, len(found.names))):
    found.read(number)
  return found


def _sequence(path, key):
  try:
    tree = json.loads(path.read_text())
    pairs = [(str(name), label) for name, label in tree[key]]
  except (KeyError, OSError, RecursionError, TypeError, ValueError) as e:
    raise ValueError(f"source: {path} has no {key!r} of names and labels ({type(e).__name__}); give REPA's "
                     "dataset.json") from e
  return pairs


def _labels(pairs, place):
  """[n] int32 of (name, label) pairs."""
  for name, label in pairs:
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < 2**20:
      raise ValueError(f"source: {place}: the label of {name} is {label!r}; labels are whole numbers from 0 on")
  if not pairs:
    raise ValueError(f"source: {place} names no latents")
  return np.array([label for _, label in pairs], np.int32)


def _numbered(labels):
  return tuple(str(i) for i in range(int(labels.max()) + 1))


def _same(channels, value):
  return np.full(channels, value, np.float32)


def _array(place, x, shape=None):
  """x as float32 [C, H, W] or [C, H, W] of the first record's shape, finite."""
  x = np.asarray(x)
  if x.ndim == 4 and len(x) == 1:
    x = x[0]
  if x.dtype.kind != "f" or x.ndim != 3 or shape not in (None, x.shape):
    raise ValueError(f"source: {place} is {x.dtype} {x.shape}, "
                     + ("not floats [C, H, W]" if shape is None else f"the first record {shape}"))
  if not np.isfinite(x).all():
    raise ValueError(f"source: {place} holds values that are not finite; leave it out, or make it again")
  return x.astype(np.float32)


def _channels_last(x):
  return np.moveaxis(x, 0, -1)


def _of_deviation(place, x):
  """[2 C, H, W] of mean and standard deviation as [H, W, 2 C] of mean and log variance."""
  mean, deviation = np.split(x, 2)
  if deviation.min() < 0:
    raise ValueError(f"source: {place}: values that should be standard deviations are below 0: these look like log "
                     "variances, as MAR writes them")
  logvar = 2 * np.log(np.maximum(deviation, np.float32(1e-12)))
  return _channels_last(np.concatenate([mean, logvar]))


def _halves(place, shape):
  if shape[0] % 2:
    raise ValueError(f"source: {place} has {shape[0]} channels; mean and deviation have as many each")
  return (*shape[1:], shape[0] // 2)


def _load_torch(path):
  try:
    import torch
  except ImportError as e:
    raise ValueError(f"source: reading {path.name} needs PyTorch: pip install -e '.[torch]'") from e
  try:
    with path.open("rb") as file:
      tree = torch.load(file, map_location="cpu", weights_only=True)  # tensors and plain containers; nothing is run
  except Exception as e:  # pylint: disable=broad-exception-caught; PyTorch's unpickler raises errors of many types
    words = str(e).strip().splitlines()[0][:150] if str(e).strip() else type(e).__name__
    raise ValueError(f"source: {path} cannot be read as tensors alone ({words}); make it again") from e
  if not isinstance(tree, dict):
    raise ValueError(f"source: {path} holds {type(tree).__name__}, not a dict")
  return tree


def _tensor(path, tree, key, dtype=None):
  if key not in tree:
    raise ValueError(f"source: {path} has {', '.join(map(str, list(tree)[:5])) or 'nothing'}, no {key!r}")
  found = np.asarray(tree[key])
  return found if dtype is None else found.astype(dtype)


def _lakonlab(path):
  pairs = []
  for number, line in enumerate(path.read_text().splitlines()):
    name, _, label = line.rstrip().rpartition(" ")
    if line.strip():
      if not name or not label.isdecimal():
        raise ValueError(f"source: {path}: line {number + 1} is {line[:80]!r}, not a path and a label")
      pairs.append((name, int(label)))
  labels, folder = _labels(pairs, path), path.parent

  @functools.cache
  def shape():
    return raw(0).shape

  def raw(number, like=None):
    place = folder / pairs[number][0]
    if not place.exists():
      raise ValueError(f"source: {place}, which {path.name} names, is not there")
    tree = _load_torch(place)
    if "y" in tree and int(_tensor(place, tree, "y")) != labels[number]:
      raise ValueError(f"source: {place} has the label {int(tree['y'])}, {path.name} says {labels[number]}")
    return _array(place, _tensor(place, tree, "x"), like)

  def read(number):
    return _channels_last(raw(number, shape()))[None] / np.float32(_SD)

  channels, height, width = shape()
  return Latents(str(path), labels, [name for name, _ in pairs], _numbered(labels), (height, width, channels), 1, False,
                 _same(channels, 0), _same(channels, _SD), read)


def _repa(path):
  folder = path if path.is_dir() else path.parent
  pairs = sorted(_sequence(folder / "dataset.json", "labels"))
  labels = _labels(pairs, folder / "dataset.json")

  @functools.cache
  def shape():
    return raw(0).shape

  def raw(number, like=None):
    place = folder / pairs[number][0]
    try:
      with place.open("rb") as file:
        x = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
      raise ValueError(f"source: {place} cannot be read as .npy ({str(e)[:100]})") from e
    return _array(place, x, like)

  def read(number):
    return _of_deviation(folder / pairs[number][0], raw(number, shape()))[None]

  size = _halves(folder, shape())
  return Latents(str(folder), labels, [name for name, _ in pairs], _numbered(labels), size, 1, True,
                 _same(size[2], 0), _same(size[2], _SD), read)


def _meanflow(folder):
  names = sorted(p.name for p in folder.iterdir() if p.suffix == ".pt")
  if not names:
    raise ValueError(f"source: {folder} holds no 00000000.pt; give MeanFlow's folder of latents")
  pairs = []
  for name in tqdm.tqdm(names, unit="file", desc=f"labels of {folder}", disable=None):  # each lies in its record's file
    label = _tensor(folder / name, _load_torch(folder / name), "label")
    pairs.append((name, label.item() if label.size == 1 else label.tolist()))
  labels = _labels(pairs, folder)

  @functools.cache
  def shape():
    return raw(0).shape

  def raw(number, like=None):
    place = folder / names[number]
    return _array(place, _tensor(place, _load_torch(place), "image"), like)

  def read(number):
    return _of_deviation(folder / names[number], raw(number, shape()))[None]

  size = _halves(folder, shape())
  return Latents(str(folder), labels, names, _numbered(labels), size, 1, True, _same(size[2], 0), _same(size[2], _SD),
                 read)


def _mar(folder):
  classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
  pairs = [(f"{name}/{file}", label) for label, name in enumerate(classes)
           for file in sorted(p.name for p in (folder / name).iterdir() if p.suffix == ".npz")]
  labels = _labels(pairs, folder)

  @functools.cache
  def shape():
    return raw(0)[0].shape

  def raw(number, like=None):
    place = folder / pairs[number][0]
    try:
      with place.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        both = [archive[key] for key in ("moments", "moments_flip")]
    except (OSError, ValueError, EOFError, KeyError) as e:
      raise ValueError(f"source: {place} cannot be read as .npz of moments and moments_flip ({str(e)[:100]})") from e
    return [_array(place, x, like) for x in both]

  def read(number):
    return np.stack([_channels_last(x) for x in raw(number, shape())])

  size = _halves(folder, shape())
  if min(read(i)[..., size[2]:].min() for i in range(min(_LOOKED_AT, len(pairs)))) >= 0:
    raise ValueError(f"source: {folder}: no log variance of the first records is below 0: these look like standard "
                     "deviations, as REPA and MeanFlow write them")
  return Latents(str(folder), labels, [name for name, _ in pairs], tuple(classes), size, 2, True, _same(size[2], 0),
                 _same(size[2], _MAR), read)


def _lightningdit(folder):
  paths = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
  if not paths:
    raise ValueError(f"source: {folder} holds no .safetensors; give LightningDiT's folder of latents")
  tree = _load_torch(folder / "latents_stats.pt")
  mean, deviation = (_tensor(folder / "latents_stats.pt", tree, key, np.float32).ravel() for key in ("mean", "std"))
  pairs, places, shape = [], [], None
  for path in paths:
    with _opened(path) as file:
      if lost := {"latents", "latents_flip", "labels"} - set(file.keys()):
        raise ValueError(f"source: {path} has no {', '.join(sorted(lost))}")
      n, *one = file.get_slice("latents").get_shape()
      if shape not in (None, one) or len(one) != 3:
        raise ValueError(f"source: {path} holds latents {one}, the first file {shape or '[C, H, W]'}")
      shape = one
      found = file.get_tensor("labels").ravel()
      if len(found) != n:
        raise ValueError(f"source: {path} has {len(found)} labels of {n} latents; make it again")
      pairs += [(f"{path.name} {i}", int(label)) for i, label in enumerate(found)]
      places += [(path, i) for i in range(n)]
  labels = _labels(pairs, folder)
  channels, height, width = shape
  if len(mean) != channels or len(deviation) != channels or not (deviation > 0).all():
    raise ValueError(f"source: {folder / 'latents_stats.pt'} is not of {channels} channels, with deviations above 0")

  def read(number):
    path, row = places[number]
    with _opened(path) as file:
      both = [file.get_slice(key)[row:row + 1][0] for key in ("latents", "latents_flip")]
    return np.stack([_channels_last(_array(pairs[number][0], x, (channels, height, width))) for x in both])

  return Latents(str(folder), labels, [name for name, _ in pairs], _numbered(labels), (height, width, channels), 2,
                 False, mean, 1 / deviation, read)


def _opened(path):
  try:
    return safe_open(str(path), "numpy")
  except (OSError, SafetensorError) as e:
    raise ValueError(f"source: {path} cannot be read as safetensors ({e}); fetch it again") from e


_FORMS = {
    "lakonlab": (_lakonlab, "LakonLab's list of latents"), "repa": (_repa, "the folder of REPA's dataset.json"),
    "meanflow": (_meanflow, "MeanFlow's folder of latents"), "mar": (_mar, "MAR's folder of class folders"),
    "lightningdit": (_lightningdit, "LightningDiT's folder of latents")}
