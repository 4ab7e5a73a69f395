"""Pictures as ImageNet's files hold them."""

import io
import tarfile

import numpy as np
from PIL import Image


def jpeg(rng, size=(40, 30), form="JPEG", mode="RGB"):
  """A picture file's bytes."""
  blocks = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(blocks).resize(size).convert(mode).save(file, form)
  return file.getvalue()


def tars(folder, *, classes, pictures, size=(40, 30), also=None):
  """ILSVRC2012_img_train.tar, a tar of a tar for each class n01, n02, ...; some pictures CMYK, some PNG by content.

  Args:
    folder: for the tar.
    classes, pictures: how many, and how many of each.
    size: of a picture.
    also: folder for the same pictures in class folders, or None.
  """
  rng = np.random.default_rng(0)
  with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
    for name in (f"n{i + 1:02}" for i in range(classes)):
      inner_file = io.BytesIO()
      with tarfile.open(fileobj=inner_file, mode="w") as inner:
        for i in range(pictures):
          raw = jpeg(rng, size, form="PNG" if i == 2 else "JPEG", mode="CMYK" if i == 1 else "RGB")
          _add(inner, f"{name}_{i}.JPEG", raw)
          if also is not None:
            (also / name).mkdir(parents=True, exist_ok=True)
            (also / name / f"{name}_{i}.JPEG").write_bytes(raw)
      _add(outer, f"{name}.tar", inner_file.getvalue())


def _add(archive, name, raw):
  info = tarfile.TarInfo(name)
  info.size = len(raw)
  archive.addfile(info, io.BytesIO(raw))
