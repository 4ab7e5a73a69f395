"""Labelled pictures where people have them: class folders, ImageNet's tars, a prepared TFDS builder."""

import tarfile
import threading
from typing import Callable, NamedTuple

from etils import epath
import numpy as np
import tqdm

from piflow_jax.data import images

KINDS = ("folder", "tars", "tfds")
_TRAIN, _VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


class Source(NamedTuple):
  """Pictures in an order that does not change."""

  place: str
  names: list  # of each, for messages
  classes: tuple  # their names, in the order of the labels
  read: Callable  # number -> (a picture file's bytes, label)


def open_source(kind, path):
  """The Source of `kind` at a path.

  Args:
    kind: "folder": of class folders, whose sorted names are the classes; "tars": with ImageNet's training tar in it, or
      the tar itself; "tfds": a prepared builder's folder, NAME/VERSION, as DIR or DIR:SPLIT.
    path: local, or for folders gs://.
  Raises:
    ValueError: "source: ...": there is no such thing.
  """
  try:
    if kind == "folder":
      found = images.open_pictures(path, labels=True)
      if found.labels is None:
        raise ValueError(f"path: {path!r} has no folders of classes")
      if isinstance(found.read(0), np.ndarray):
        raise ValueError(f"path: {path!r} is no folder")
      return Source(found.place, found.names, found.classes, lambda i: (found.read(i), int(found.labels[i])))
    if kind == "tars":
      return _of_tar(path)
    return _of_tfds(path)
  except ValueError as e:
    raise ValueError(f"source: {kind}:{str(e).removeprefix('path: ')}") from e


def _of_tar(path):
  path = epath.Path(path).expanduser()
  path = path / _TRAIN if path.is_dir() else path
  if not path.exists():
    raise ValueError(f"{path} is not there; give the folder of {_TRAIN}")
  if path.name == _VAL:
    raise ValueError(f"{path} has no labels in it; give the pictures as class folders")
  names, labels, places, classes = [], [], [], []
  try:
    with path.open("rb") as file, tarfile.open(fileobj=file) as outer:
      members = sorted(outer, key=lambda m: m.name)
      for member in tqdm.tqdm(members, unit="class", desc=f"index of {path.name}", disable=None):
        if not member.isfile() or not member.name.endswith(".tar"):
          continue
        classes.append(member.name.rpartition("/")[2].removesuffix(".tar"))
        # Headers alone are read: where a picture lies in the inner file is where it lies in the outer one.
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
          for picture in sorted((m for m in inner if m.isfile()), key=lambda m: m.name):
            names.append(f"{classes[-1]}/{picture.name}")
            labels.append(len(classes) - 1)
            places.append((member.offset_data + picture.offset_data, picture.size))
  except (OSError, tarfile.TarError) as e:
    raise ValueError(f"{path} cannot be read as a tar of tars ({e}); fetch it again") from e
  if not names:
    raise ValueError(f"{path} holds no tars of pictures; give ImageNet's {_TRAIN}")
  files = threading.local()

  def read(number):
    if not hasattr(files, "file"):  # each thread reads at a place of its own
      files.file = path.open("rb")
    start, size = places[number]
    files.file.seek(start)
    return files.file.read(size), labels[number]

  return Source(str(path), names, tuple(classes), read)


def _of_tfds(path):
  try:
    import tensorflow_datasets as tfds
  except ImportError as e:
    raise ValueError(f"{path}: TFDS cannot be imported ({e}): pip install tensorflow-datasets") from e
  folder, _, split = str(path).partition(":")
  folder, split = epath.Path(folder).expanduser(), split or "train"
  try:
    builder = tfds.builder_from_directory(str(folder))
    data = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    feature = builder.info.features["label"]
  except Exception as e:  # pylint: disable=broad-exception-caught; of many types
    words = " ".join(str(e).split())[:200]
    raise ValueError(f"{folder} is no prepared TFDS builder with {split!r}, image and label ({words}); give the folder "
                     "of its version, prepared as array_record") from e

  def read(number):
    record = data[number]
    raw = record["image"]
    return raw if isinstance(raw, bytes) else np.asarray(raw).item(), int(record["label"])

  return Source(str(folder), [f"{split} {i}" for i in range(len(data))], tuple(feature.names), read)
