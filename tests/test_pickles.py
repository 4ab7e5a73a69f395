"""Pickles of arrays: read as NumPy reads them, and nothing in them runs or sets up memory."""

import pickle
import struct

import numpy as np
import pytest

from piflow_jax import pickles


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_as_they_were(protocol, tmp_path):
  rng = np.random.default_rng(0)
  tree = {"a": rng.standard_normal((3, 4)), "b": [rng.standard_normal((2, 3)).astype(np.float32).T, 5, "x", None],
          "c": (np.arange(6, dtype=">i4"), np.float64(1.5), np.int64(7), True, np.zeros((0, 2))),
          "d": {"mask": np.array([True, False]), "bytes": b"ab", "half": np.ones(3, np.float16)}}
  (tmp_path / "x.pkl").write_bytes(pickle.dumps(tree, protocol))
  found = pickles.load(tmp_path / "x.pkl")
  assert found.keys() == tree.keys() and found["b"][1:] == [5, "x", None] and found["d"]["bytes"] == b"ab"
  for got, want in ((found["a"], tree["a"]), (found["b"][0], tree["b"][0]), (found["c"][0], tree["c"][0]),
                    (found["c"][4], tree["c"][4]), (found["d"]["mask"], tree["d"]["mask"]),
                    (found["d"]["half"], tree["d"]["half"])):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
  assert found["c"][1:4] == (1.5, 7, True)


class _Runs:

  def __reduce__(self):
    return exec, ("raise SystemExit('it ran')",)


class _Forged:
  """An array whose shape is not its bytes', or whose type is another."""

  def __init__(self, state):
    self._state = state

  def __reduce__(self):
    return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), self._state


def _cases():
  size = struct.calcsize("d")
  yield "runs", _Runs()
  yield "within", {"a": [_Runs()]}
  yield "short", _Forged((1, (1000,), np.dtype("f8"), False, b"0" * size))
  yield "negative", _Forged((1, (-1,), np.dtype("f8"), False, b"0" * size))
  yield "objects", np.array([{}, []], dtype=object)
  yield "records", np.zeros(2, [("a", "f4")])
  yield "texts", np.array(["a"])
  yield "set", {1, 2}
  yield "complex", 1j
  yield "unset", _Forged(None)


@pytest.mark.parametrize("tree", [pytest.param(tree, id=name) for name, tree in _cases()])
def test_all_else_is_refused_in_one_line(tree, tmp_path):
  (tmp_path / "x.pkl").write_bytes(pickle.dumps(tree))
  with pytest.raises(ValueError, match="^path: .*x.pkl is no pickle of NumPy arrays") as e:
    pickles.load(tmp_path / "x.pkl")
  assert "\n" not in str(e.value)


def test_a_torn_file_and_none(tmp_path):
  whole = pickle.dumps({"a": np.arange(100.0)})
  for cut in (0, 1, 50, len(whole) - 1):
    (tmp_path / "x.pkl").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="^path: .*x.pkl is no pickle"):
      pickles.load(tmp_path / "x.pkl")
  with pytest.raises(ValueError, match="^path: .*y.pkl cannot be read"):
    pickles.load(tmp_path / "y.pkl")
