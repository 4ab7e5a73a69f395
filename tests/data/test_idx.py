"""IDX files written by their definition, read back; torn and foreign ones told apart."""

import gzip
import struct

import numpy as np
import pytest

from piflow_jax import errors
from piflow_jax.data import idx
from piflow_jax.data import spec


def _write(path, array, pack=bytes):
  path.write_bytes(pack(struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()))


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for name, n in (("train", 5), ("t10k", 3)):
    _write(tmp_path / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 4, 4), np.uint8), gzip.compress)
    _write(tmp_path / f"{name}-labels.idx1-ubyte", (np.arange(n) % 2).astype(np.uint8))
  return tmp_path


def _make(folder, **fields):
  return idx.make(**(dict(path=str(folder), size=4, classes=("a", "b")) | fields))


def test_pictures_and_labels_are_those_that_were_written(folder):
  data = _make(folder)
  rng = np.random.default_rng(0)
  for split, n in (("train", 5), ("held_out", 3)):
    records, want = spec.checked_records(data, split), rng.integers(0, 256, (n, 4, 4), np.uint8)
    assert [int(record["cond"]["label"]) for record in map(records.__getitem__, range(n))] == [i % 2 for i in range(n)]
    got = np.stack([records[i]["x_0"] for i in range(n)])
    np.testing.assert_array_equal(np.round((got[..., 0] + 1) * 127.5), want)
    assert got.dtype == np.float32 and len(records) == n


@pytest.mark.parametrize("name, harm, words", [
    ("train-images-idx3-ubyte.gz", lambda data: data[:-9], "cannot be unpacked"),
    ("train-labels.idx1-ubyte", lambda data: data[:-1], r"has 4 values, its head says \(5,\): torn"),
    ("train-labels.idx1-ubyte", lambda data: b"\x89PNG" + data, "is no IDX file of uint8"),
    ("train-labels.idx1-ubyte", lambda data: b"", "is no IDX file of uint8"),
    ("train-labels.idx1-ubyte", None, "has no train-labels-idx1-ubyte, gzipped or not"),
])
def test_what_is_torn_or_missing_is_one_line(folder, name, harm, words):
  file = folder / name
  file.write_bytes(harm(file.read_bytes())) if harm else file.unlink()
  with pytest.raises(errors.UserError, match=f"^config.data.path: .*{words}"):
    _make(folder).records("train")


def test_what_does_not_fit_is_named(folder):
  with pytest.raises(errors.UserError, match=r"^config.data.size: is 28; the pictures in .* have \(4, 4\)"):
    _make(folder, size=28).records("train")
  _write(folder / "t10k-labels.idx1-ubyte", np.zeros(2, np.uint8))
  with pytest.raises(errors.UserError, match=r"t10k images \(3, 4, 4\) and labels \(2,\)"):
    _make(folder).records("held_out")
  _write(folder / "train-labels.idx1-ubyte", np.full(5, 2, np.uint8))
  with pytest.raises(errors.UserError, match="train, record 0: cond.label is 2; labels are 0 to 1"):
    spec.checked_records(_make(folder), "train")
  with pytest.raises(ValueError, match="^path: ''"):
    _make("")
  with pytest.raises(ValueError, match="^classes: "):
    _make(folder, classes=("a", "a"))
