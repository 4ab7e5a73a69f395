"""Many pictures in one file, as evaluators exchange them: an .npz with arr_0 uint8 [n, H, W, 3]; or a folder of them.

ImageNet's 50,000 are 9.8 GB: they are written and read in slices.
"""

import contextlib
import zipfile

from etils import epath
import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

_MEMBER = "arr_0.npy"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@contextlib.contextmanager
def writer(path, shape):
  """A function that takes the next uint8 [b, H, W, 3], until all n are written; all of the file, or nothing.

  Args:
    path: FILE.npz, here or at gs://.
    shape: (n, H, W, 3) of arr_0.
  Raises:
    ValueError: pictures of another shape, or another number of them.
  """
  path, count = epath.Path(path), [0]
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
      with archive.open(_MEMBER, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))})

        def add(images):
          if images.dtype != np.uint8 or images.shape[1:] != tuple(shape[1:]) or count[0] + len(images) > shape[0]:
            raise ValueError(f"images: {images.dtype} {images.shape} after {count[0]}; arr_0 is uint8 {tuple(shape)}")
          count[0] += len(images)
          member.write(np.ascontiguousarray(images).tobytes())

        yield add
    if count[0] != shape[0]:
      raise ValueError(f"images: {count[0]} were given, {shape[0]} announced")
    partial.replace(path)
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def shape_of(path):
  """(n, H, W, 3) of a file or folder. Raises ValueError: "path: ...": it holds no such pictures."""
  path = epath.Path(path)
  if path.is_dir():
    names = _names(path)
    return (len(names), *_picture(names[0]).shape)
  with _member(path) as (_, shape):
    return shape


def batches(path, size, most=None):
  """uint8 [size, H, W, 3] after another, the last one shorter, of a file or of a folder in the order of its names.

  Args:
    path: local or gs://.
    size: of a batch.
    most: pictures to read, the first ones; None for all.
  Raises:
    ValueError: "path: ...": it holds no such pictures, or is torn.
  """
  path = epath.Path(path)
  if path.is_dir():
    names = _names(path)[:most]
    shape = _picture(names[0]).shape
    for start in range(0, len(names), size):
      yield np.stack([_picture(name, shape) for name in names[start:start + size]])
    return
  with _member(path) as (stream, shape):
    row, count = int(np.prod(shape[1:])), shape[0] if most is None else min(shape[0], most)
    for start in range(0, count, size):
      n = min(size, count - start)
      data = _read(stream, n * row)
      if len(data) < n * row:
        raise ValueError(f"path: {path} ends after {start + len(data) // row} of {shape[0]} pictures: is it torn?")
      yield np.frombuffer(data, np.uint8).reshape(n, *shape[1:])


def _names(folder):
  names = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
  if not names:
    raise ValueError(f"path: {folder} holds no pictures ({', '.join(_SUFFIXES)})")
  return names


def _picture(path, shape=None):
  try:
    with path.open("rb") as file:
      found = np.asarray(Image.open(file).convert("RGB"))
  except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as e:
    raise ValueError(f"path: {path} is no picture ({e})") from e
  if shape is not None and found.shape != shape:
    raise ValueError(f"path: {path} is {found.shape}, the first one {shape}; all must be of one size")
  return found


@contextlib.contextmanager
def _member(path):
  """(stream at the first picture, shape)."""
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      names = archive.namelist()
      if _MEMBER not in names:
        raise ValueError(f"path: {path} holds {', '.join(names[:5]) or 'nothing'}, no arr_0")
      with archive.open(_MEMBER) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran or not shape[0]:
          raise ValueError(f"path: {path}: arr_0 is {dtype} {shape}, not uint8 [n, H, W, 3]")
        yield stream, shape
  except (OSError, zipfile.BadZipFile) as e:
    raise ValueError(f"path: {path} cannot be read as .npz ({e})") from e


def _read(stream, count):
  parts = []
  while count:
    part = stream.read(min(count, 1 << 24))
    if not part:
      break
    parts.append(part)
    count -= len(part)
  return b"".join(parts)
