"""Transforms and the meeting of a table with a tree."""

import numpy as np
import pytest

from piflow_jax import errors
from piflow_jax.convert import table
from piflow_jax.convert.table import Row

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("transform, shape, there", [
    (table.PLAIN, (5, 3), (5, 3)),
    (table.FLAT, (3, 2, 4), (24,)),
    (table.Linear(), (6, 3, 2, 4), (24, 6)),
    (table.Linear(inputs=2), (2, 4, 6), (6, 8)),
    (table.CONVOLUTION, (3, 2, 5, 7), (7, 5, 3, 2)),
    (table.Pixel(), (5, 7), (7, 5, 1, 1)),
    (table.Patches(2), (20, 7), (7, 5, 2, 2)),
    (table.Negated(table.Linear()), (6, 3), (3, 6)),
])
def test_transforms_and_back(transform, shape, there):
  assert tuple(transform.shape_there(shape)) == there
  a, b = RNG.standard_normal(shape), RNG.standard_normal(there)
  assert transform.there(a).shape == there and transform.here(b, shape).shape == shape
  np.testing.assert_array_equal(transform.here(transform.there(a), shape), a)
  np.testing.assert_array_equal(transform.there(transform.here(b, shape)), b)


def test_a_linear_layer_means_the_same():
  x, w = RNG.standard_normal((2, 3, 8)), RNG.standard_normal((6, 8))
  kernel = table.Linear(inputs=2).here(w, (2, 4, 6))
  np.testing.assert_allclose(np.einsum("bnhd,hdo->bno", x.reshape(2, 3, 2, 4), kernel), x @ w.T, rtol=1e-12)
  joined = table.Linear().here(w, (8, 3, 2))
  np.testing.assert_allclose(np.einsum("bni,ihd->bnhd", x, joined).reshape(2, 3, 6), x @ w.T, rtol=1e-12)


def test_a_patch_layer_is_the_convolution_of_that_stride():
  image, weight = RNG.standard_normal((4, 6, 5)), RNG.standard_normal((7, 5, 2, 2))
  kernel = table.Patches(2).here(weight, (20, 7))
  tokens = image.reshape(2, 2, 3, 2, 5).transpose(0, 2, 1, 3, 4).reshape(6, 20)
  want = [np.einsum("dcij,ijc->d", weight, image[2 * y:2 * y + 2, 2 * x:2 * x + 2]) for y in range(2) for x in range(3)]
  np.testing.assert_allclose(tokens @ kernel, want, rtol=1e-12)


ROWS = [
    Row("in/kernel", ("in.weight",), table.Linear()),
    Row("blocks/qkv/kernel", tuple(f"blocks.{{i}}.{c}.weight" for c in "qkv"), table.Linear()),
    Row("shared", ("blocks.{i}.shared",), table.PLAIN, 2),
    Row("not/in/the/tree", ("other",), table.PLAIN),
]
SHAPES = {"in/kernel": (4, 6), "blocks/qkv/kernel": (2, 4, 3, 2, 2), "shared": (5,)}
THERE = {"in.weight": (6, 4), "blocks.0.shared": (5,), "blocks.1.shared": (5,),
         **{f"blocks.{i}.{c}.weight": (4, 4) for i in range(2) for c in "qkv"}}


def test_entries_of_parts_layers_and_copies():
  entries = table.entries(ROWS, SHAPES, "a test")
  assert {key: entry.shape_there for entry in entries for key in entry.keys} == THERE
  assert table.check(entries, THERE | {"step": ()}, "a file", (r"step",)) == ["step"]
  tree = {path: RNG.standard_normal(shape) for path, shape in SHAPES.items()}
  stored = {}
  for entry in entries:
    leaf = tree[entry.path]
    stored |= dict(entry.to_there(leaf if entry.layer is None else leaf[entry.layer]))
  assert {key: array.shape for key, array in stored.items()} == THERE
  kernel = tree["blocks/qkv/kernel"][1]
  np.testing.assert_array_equal(stored["blocks.1.k.weight"], kernel[:, 1].reshape(4, 4).T)
  for entry in entries:
    leaf = tree[entry.path]
    np.testing.assert_array_equal(entry.to_here(stored.__getitem__), leaf if entry.layer is None else leaf[entry.layer])


def test_everything_that_is_wrong_is_listed_at_once():
  entries = table.entries(ROWS, SHAPES, "a test")
  found = {k: v for k, v in THERE.items() if not k.endswith(("q.weight", "1.k.weight"))}
  found |= {"in.weight": (4, 6), "extra": (1,), "blocks.7.v.weight": (4, 4), "aside": (3,)}
  faults = {"twice": {"blocks.0.v.weight": "a and b", "aside": "a and b"}, "no floats": {"extra": "I64"},
            "not listed": {}}
  values = {key: np.full(5, i) for i, key in enumerate(("blocks.0.shared", "blocks.1.shared"))}
  with pytest.raises(errors.UserError) as e:
    table.check(entries, found, "a file", ("aside",), faults, values.__getitem__)
  assert str(e.value) == (
      "--source: a file does not fit the config's network; missing: blocks.0-1.q.weight, blocks.1.k.weight; "
      "unknown: blocks.7.v.weight, extra; misshaped: in.weight (4, 6) instead of (6, 4); "
      "twice: blocks.0.v.weight (a and b); "
      "no floats: extra (I64); unlike the first of what all layers share here: blocks.1.shared")


def test_copies_are_compared_only_where_they_can_be():
  entries = table.entries(ROWS, SHAPES, "a test")
  words = "network; misshaped: blocks.0.shared [^;]*; no floats: blocks.1.shared .I64.$"
  with pytest.raises(errors.UserError, match=words):
    table.check(entries, THERE | {"blocks.0.shared": (6,)}, "a file", (), {"no floats": {"blocks.1.shared": "I64"}},
                lambda key: 1 / 0)


def test_a_leaf_without_a_name_is_told():
  with pytest.raises(errors.UserError, match="a test has no name for span_in/kernel"):
    table.entries(ROWS, SHAPES | {"span_in/kernel": (2,)}, "a test")


def test_names_are_listed_by_what_they_differ_in():
  names = [f"blocks.{i}.a" for i in (0, 1, 2, 5)] + ["b", "c.1.d.2.e"]
  assert table.listed(names) == "blocks.0-2,5.a, b, c.1.d.2.e"
