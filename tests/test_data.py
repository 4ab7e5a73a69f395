"""Data: what records and batches are held against, and a loader whose batch is a function of (seed, number)."""

import functools
import zlib

import numpy as np
import pytest

from piflow_jax import errors
from piflow_jax.data import digits
from piflow_jax.data import gaussians
from piflow_jax.data import loader
from piflow_jax.data import spec
from piflow_jax.data import synthetic

NUMBERS = spec.Spec((), spec.label(20))
PICTURES = spec.Spec((8, 6, 3), spec.label(10))


def _take(n, records=None, **kwargs):
  records = records or [{"x_0": np.float32(i), "cond": {"label": i}} for i in range(20)]
  iterator = loader.batches(records, NUMBERS, **kwargs)
  return [next(iterator)["cond"]["label"] for _ in range(n)]


def test_batches_depend_on_seed_and_number_alone():
  ahead = _take(12, batch_size=4, seed=0)
  np.testing.assert_array_equal(ahead, _take(12, batch_size=4, seed=0))
  np.testing.assert_array_equal(ahead[7:], _take(5, batch_size=4, seed=0, start=7))
  assert not np.array_equal(ahead, _take(12, batch_size=4, seed=1))
  assert ahead[0].dtype == np.int32


def test_batches_are_those_of_the_first_release():
  # Drawn by version 0.1.0: a run that goes on under another version must see the same data.
  np.testing.assert_array_equal(_take(3, batch_size=4, seed=0), [[16, 2, 13, 14], [9, 7, 17, 6], [18, 3, 8, 15]])


def test_an_epoch_holds_each_record_once_and_the_next_is_shuffled_anew():
  ahead = np.array(_take(10, batch_size=4, seed=0))
  first, second = ahead[:5].ravel(), ahead[5:].ravel()
  assert sorted(first) == sorted(second) == list(range(20))
  assert not np.array_equal(first, second)


# Rows that lie together, and those of a mesh that follows a pod's wires.
@pytest.mark.parametrize("parts", [([0, 1], [2, 3]), ([0, 3], [1, 2]), ([0, 1, 2], [3])])
def test_processes_share_each_global_batch(parts):
  whole = np.array(_take(6, batch_size=4, seed=0))
  for rows in parts:
    np.testing.assert_array_equal(whole[:, rows], _take(6, batch_size=4, seed=0, rows=np.array(rows)))


# The checksums are those of version 0.1.0: a run that goes on under another version must see the same data.
@pytest.mark.parametrize("data, train, held_out", [
    (digits.make(), 3839190651, 2455844009),
    (gaussians.make(shape=(3, 2), num_classes=4), 2212141402, 3985491996),
    (synthetic.make(shape=(4, 4, 2), num_classes=7, size=100), 1804812886, 271288894),
], ids=["digits", "gaussians", "noise"])
def test_records_are_those_of_the_first_release(data, train, held_out):
  for split, known in (("train", train), ("held_out", held_out)):
    records = data.records(split)
    found = [part.tobytes() for i in range(100) for part in (records[i]["x_0"], records[i]["cond"]["label"])]
    assert zlib.crc32(b"".join(found)) == known


def test_digits_are_all_there_and_split_without_overlap():
  (train, _), (held_out, _), (every, labels) = (digits.arrays(s) for s in ("train", "held_out", "all"))
  assert (len(train), len(held_out), len(every)) == (1437, 360, 1797)
  assert every.dtype == np.float32 and every.min() == -1 and every.max() == 1 and set(labels) == set(range(10))
  np.testing.assert_array_equal(np.concatenate([held_out, train]), every)


def test_synthetic_records_are_drawn_by_number():
  data = synthetic.make(shape=(4, 4, 2), num_classes=7, size=10)
  records = data.records("train")
  np.testing.assert_array_equal(records[3]["x_0"], records[3]["x_0"])
  assert not np.array_equal(records[3]["x_0"], records[4]["x_0"])
  assert len(records) == 10 and records[0]["x_0"].shape == (4, 4, 2) and 0 <= records[0]["cond"]["label"] < 7
  assert not np.array_equal(records[3]["x_0"], data.records("held_out")[3]["x_0"])
  assert synthetic.make(shape=(3,), num_classes=0, size=10).records("train")[0]["cond"] == {}


SOURCES = {
    "digits": digits.config(),
    "gaussians": gaussians.config(shape=(3,), num_classes=4),
    "synthetic": synthetic.config(shape=(2, 4, 4, 3), size=50),
    "without labels": synthetic.config(shape=(5,), num_classes=0, size=50),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_keeps_to_its_spec(name):
  config = SOURCES[name]
  data = config.make(**{k: v for k, v in config.items() if k != "make"})
  spec.check(data)
  for split in ("train", "held_out"):
    records = spec.checked_records(data, split)
    for i in (0, len(records) - 1):
      spec.check_record(records[i], data.spec, "here")
    batch = next(loader.batches(records, data.spec, batch_size=3, seed=0))
    assert batch["x_0"].shape == (3, *data.spec.x_0) and batch["x_0"].dtype == np.float32
    assert {k: (v.shape, v.dtype) for k, v in batch["cond"].items()} == {
        k: ((3, *a.shape), np.dtype(a.dtype)) for k, a in data.spec.cond.items()}


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e30, 2**40, "x", 1.5])
@pytest.mark.parametrize("make, field", [
    (synthetic, "shape"), (synthetic, "num_classes"), (synthetic, "size"),
    (gaussians, "shape"), (gaussians, "num_classes")])
def test_fields_that_make_no_sense_are_refused(make, field, value):
  if (make, field, value) == (synthetic, "num_classes", 0):
    return  # no labels
  fields = {k: v for k, v in make.config().items() if k != "make"} | {field: (2, value) if field == "shape" else value}
  with pytest.raises(ValueError, match=f"^{field}: "):
    make.make(**fields)


def test_shapes_that_are_none_are_refused():
  for shape in ((), "x", 5, (2**16, 2**16, 4)):
    with pytest.raises(ValueError, match="^shape: "):
      synthetic.make(shape=shape, num_classes=1, size=1)
  with pytest.raises(ValueError, match="^num_classes: .* too many to hold"):
    gaussians.make(shape=(2,), num_classes=2**31 - 1)


def _picture(seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, PICTURES.x_0).astype(np.float32)


def _record(x=None, label=np.int32(3)):
  return {"x_0": _picture() if x is None else x, "cond": {"label": label}}


def _with(value, place=(4, 2, 1)):
  x = _picture()
  x[place] = value
  return x


# A first record, and words of the line that refuses it.
RECORDS = {
    "uint8": (_record(np.full((8, 6, 3), 200, np.uint8)), ["uint8", "divide by 127.5 and subtract 1"]),
    "float64": (_record(_picture().astype(np.float64)), ["float64", "astype(np.float32)"]),
    "a list of lists": (_record(_picture().tolist()), ["x_0 is a list", "NumPy"]),
    "0 to 255": (_record((_picture() + 1) * np.float32(127.5)), ["0..255", "Divide by 127.5"]),
    "0 to 1": (_record((_picture() + 1) / 2), ["[0, 1]", "Multiply by 2 and subtract 1"]),
    "large": (_record(_picture() * 1000), ["scale it"]),
    "NaN in a pixel": (_record(_with(np.nan)), ["nan at [4, 2, 1]", "finite"]),
    "inf in a pixel": (_record(_with(-np.inf)), ["-inf at [4, 2, 1]", "finite"]),
    "channels first": (_record(np.moveaxis(_picture(), -1, 0)), ["(3, 8, 6)", "channels first"]),
    "another size": (_record(_picture()[:4]), ["(4, 6, 3)", "(8, 6, 3)"]),
    "image and label": ({"image": _picture(), "label": 3}, ["keys image, label", '"x_0"', '"cond"', '"label"']),
    "no condition": ({"x_0": _picture()}, ["keys x_0", '"label"']),
    "a tuple": ((_picture(), 3), ["is a tuple", '"x_0"']),
    "a label for cond": ({"x_0": _picture(), "cond": 3}, ["cond is 3", '"label"']),
    "cond of another name": ({"x_0": _picture(), "cond": {"y": 3}}, ["cond has keys y", '"label"']),
    "one-hot": (_record(label=np.eye(10, dtype=np.float32)[3]), ["one-hot", "argmax"]),
    "a label of one axis": (_record(label=np.array([3], np.int32)), ["cond.label", "(1,)"]),
    "a float label": (_record(label=np.float32(3)), ["cond.label is float32", "whole numbers"]),
    "a Python float label": (_record(label=3.0), ["cond.label is 3.0", "whole numbers"]),
    "a text label": (_record(label="cat"), ["cond.label is 'cat'", "whole numbers"]),
    "a true label": (_record(label=True), ["cond.label is True"]),
    "no label": (_record(label=None), ["cond.label is None"]),
    "label -1": (_record(label=-1), ["cond.label is -1", "0 to 9"]),
    "label C": (_record(label=10), ["cond.label is 10", "null class", "begin at 1"]),
    "label C + 1": (_record(label=np.int64(11)), ["cond.label is 11", "0 to 9"]),
    "label beyond int32": (_record(label=2**40), ["cond.label is 1099511627776", "0 to 9"]),
}


def _data(records, spec_of=PICTURES):
  return spec.Data(spec_of, {"train": records, "held_out": records}.get)


@pytest.mark.parametrize("name", RECORDS)
def test_a_first_record_that_is_not_to_the_spec_is_one_line(name):
  record, words = RECORDS[name]
  with pytest.raises(errors.UserError) as refused:
    spec.checked_records(_data([record] * 4), "train")
  line = str(refused.value)
  assert line.startswith("config.data: train") and "\n" not in line
  for word in words:
    assert word in line, line


def test_a_record_to_the_spec_passes():
  for label in (0, 9, np.int32(5), np.int64(5), np.uint8(5), np.array(5)):
    spec.check_record(_record(label=label), PICTURES, "here")
  spec.checked_records(_data([_record()]), "train")


@pytest.mark.parametrize("records, words", [
    ((i for i in [_record()]), ["a generator", "random access"]),
    (iter([_record()]), ["list_iterator", "random access"]),
    (None, ["None", "random access"]),
    ({"x_0": _picture(), "cond": {}}, ["a dict", "random access"]),
    ([], ["no records"]),
    (np.zeros((5, 8, 6, 3), np.float32), ["record 0", "ndarray"]),
], ids=["generator", "iterator", "None", "dict", "empty", "array"])
def test_records_without_random_access_are_one_line(records, words):
  with pytest.raises(errors.UserError) as refused:
    spec.checked_records(_data(records), "held_out")
  line = str(refused.value)
  assert line.startswith("config.data: held_out") and "\n" not in line and all(word in line for word in words), line


def test_range_is_judged_by_several_pictures_and_where_it_can_be():
  bright, usual = _record(np.abs(_picture())), _record()
  spec.checked_records(_data([bright, bright, usual]), "train")  # a picture may be bright
  spec.checked_records(_data([_record(np.ones((8, 6, 3), np.float32))] * 9), "train")  # one colour says nothing
  with pytest.raises(errors.UserError, match="first 8 records"):
    spec.checked_records(_data([bright] * 20 + [usual]), "train")
  latents, points = spec.Spec((8, 8, 4), {}), spec.Spec((2,), {})
  spec.checked_records(_data([{"x_0": np.full((8, 8, 4), 0.5, np.float32), "cond": {}}], latents), "train")
  spec.checked_records(_data([{"x_0": np.array([0.2, 0.9], np.float32), "cond": {}}], points), "train")
  spec.checked_records(_data([bright] * 9, PICTURES._replace(bounds=(0, 1))), "train")  # who says so is believed
  with pytest.raises(errors.UserError, match=r"goes from -\d.* its spec says 0 to 1"):
    spec.checked_records(_data([usual] * 9, PICTURES._replace(bounds=(0, 1))), "train")
  with pytest.raises(errors.UserError, match=r"0\.\.255"):
    pictures = (_picture() + 1) * np.float32(127.5)
    spec.checked_records(_data([_record(pictures)] * 9, PICTURES._replace(bounds=(-1, 1))), "train")


def _four(_, split):
  return [_record()] * 4


class _Function:
  def __call__(self, split):
    return [_record()] * 4


@pytest.mark.parametrize("records", [functools.partial(_four, 1), _Function(), _Function().__call__])
def test_partials_and_callable_objects_give_records(records):
  data = spec.Data(PICTURES, records)
  spec.check(data)
  assert len(spec.checked_records(data, "train")) == 4


@pytest.mark.parametrize("made, words", [
    (None, ["returned None"]),
    ([_record()], ["returned a list"]),
    ((PICTURES, len), ["returned a tuple"]),
    (spec.Data(((8, 8, 3), {}), len), ["spec is a tuple"]),
    (spec.Data(spec.Spec((), {}), len), ["x_0"]),
    (spec.Data(spec.Spec((8, 0, 3), {}), len), ["x_0", "(8, 0, 3)"]),
    (spec.Data(spec.Spec([8, 8, 3], {}), len), ["x_0", "[8, 8, 3]"]),
    (spec.Data(spec.Spec((8, 8, 3), 10), len), ["cond is 10"]),
    (spec.Data(spec.Spec((8, 8, 3), {"label": 10}), len), ["cond['label'] is 10"]),
    (spec.Data(spec.Spec((8, 8, 3), {"label": spec.Array((), "float32", 10)}), len), ["float32", "int32"]),
    (spec.Data(spec.Spec((8, 8, 3), {"label": spec.Array(classes=-1)}), len), ["classes is -1"]),
    (spec.Data(spec.Spec((8, 8, 3), {"label": spec.Array(dtype="int33", classes=2)}), len), ["int33"]),
    (spec.Data(spec.Spec((8, 8, 3), {}, bounds=(1, -1)), len), ["bounds", "(1, -1)"]),
    (spec.Data(spec.Spec((8, 8, 3), {}), [_record()]), ["records are a list"]),
])
def test_what_is_no_data_is_one_line(made, words):
  with pytest.raises(ValueError, match="^make: ") as refused:
    spec.check(made)
  assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words), refused.value


def _batch(row, x=None, label=None):
  batch = {"x_0": np.stack([_picture(i) for i in range(6)]), "cond": {"label": np.arange(6)}}
  if x is not None:
    batch["x_0"][row, 4, 2, 1] = x
  if label is not None:
    batch["cond"]["label"][row] = label
  return batch


@pytest.mark.parametrize("fault, words", [
    (dict(x=np.nan), "nan at [4, 2, 1]"), (dict(x=np.inf), "inf at [4, 2, 1]"), (dict(x=-np.inf), "-inf at [4, 2, 1]"),
    (dict(label=-1), "is -1"), (dict(label=10), "null class"), (dict(label=11), "0 to 9"),
    (dict(label=2**40), "0 to 9")])
@pytest.mark.parametrize("bounds", [None, (-1, 1)])
def test_a_batch_with_a_fault_is_one_line(fault, words, bounds):
  held = PICTURES._replace(bounds=bounds)
  spec.check_batch(_batch(0), held)
  with pytest.raises(errors.UserError) as refused:
    spec.check_batch(_batch(3, **fault), held)
  assert "row 3" in str(refused.value) and words in str(refused.value) and "\n" not in str(refused.value)


def test_finite_numbers_whose_sum_is_not_are_finite():
  batch = _batch(0)
  batch["x_0"][:] = np.finfo(np.float32).max
  spec.check_batch(batch, PICTURES)


@pytest.mark.parametrize("fault, words", [
    (_record(np.moveaxis(_picture(), -1, 0)), "channels first"),
    (_record(_picture()[:4]), "(4, 6, 3)"),
    ((_picture(), 3), "a tuple"),
    (_record(_with(np.nan)), "nan at [4, 2, 1]"),
    (_record(label=10), "null class"),
    (_record(label=np.float32(3)), "whole numbers"),
    (_record(np.full((8, 6, 3), 200, np.uint8)), "127.5"),
])
def test_the_loader_names_batch_and_record_of_a_fault(fault, words):
  records = [_record(label=i % 10) for i in range(40)]
  records[29] = fault
  iterator = loader.batches(records, PICTURES, batch_size=4, seed=3, rows=np.array([1, 2]))
  seen = 0
  with pytest.raises(errors.UserError) as refused:
    for _ in range(200):  # in some epoch the record is in these rows
      next(iterator)
      seen += 1
  line = str(refused.value)
  assert line.startswith(f"config.data: batch {seen}, record 29: ") and words in line and "\n" not in line


def test_conditions_of_every_kind_are_arrays():
  texts = {"text": spec.Array((4, 2), "float32"), "mask": spec.Array((4,), "bool")}
  records = [{"x_0": np.zeros(2, np.float32),
              "cond": {"text": np.full((4, 2), i, np.float32), "mask": np.arange(4) <= i}} for i in range(30)]
  data = _data(records, spec.Spec((2,), texts))
  spec.check(data)
  batch = next(loader.batches(spec.checked_records(data, "train"), data.spec, batch_size=3, seed=0))
  assert batch["cond"]["text"].shape == (3, 4, 2) and batch["cond"]["mask"].dtype == bool
  cond, ids, names = spec.conditions(data, num=2)
  assert cond["text"].shape == (20, 4, 2) and cond["mask"].shape == (20, 4)
  np.testing.assert_array_equal(cond["text"][:, 0, 0], np.repeat(np.arange(10.0), 2))
  np.testing.assert_array_equal(ids, np.repeat(np.arange(10), 2))
  assert names[3] == "record 3"
  cond, ids, _ = spec.conditions(data, ["29"], num=1)
  assert cond["text"][0, 0, 0] == ids[0] == 29

  records[0]["cond"]["text"] = np.full((4, 2), np.nan, np.float32)
  with pytest.raises(errors.UserError, match="cond.text is nan"):
    spec.checked_records(data, "train")
  records[0]["cond"]["text"] = np.zeros((5, 2), np.float32)
  with pytest.raises(errors.UserError, match=r"cond.text has shape \(5, 2\)"):
    spec.checked_records(data, "train")


def test_conditions_to_draw_by_are_labels_or_nothing():
  data = spec.Data(PICTURES, None)
  cond, ids, names = spec.conditions(data, num=2)
  np.testing.assert_array_equal(cond["label"], np.repeat(np.arange(10), 2))
  np.testing.assert_array_equal(cond["label"], ids)
  assert cond["label"].dtype == np.int32 and names == [str(i) for i in range(10)]
  assert spec.conditions(data, ["7", 2], num=1)[0]["label"].tolist() == [7, 2]
  named = spec.Data(PICTURES._replace(cond=spec.label(3)), None, ("cat", "dog", "0"))
  cond, _, names = spec.conditions(named, ["dog", "0"], num=1)
  assert cond["label"].tolist() == [1, 2] and names == ["dog", "0"]  # a name that is a number is a name
  cond, ids, names = spec.conditions(spec.Data(PICTURES._replace(cond={}), None), num=5)
  assert cond == {} and ids.tolist() == [0] * 5 and names == [""]
  for chosen in ([], ["10"], ["-1"], ["x"], ["1", "1"], [2**40], [1.5]):
    with pytest.raises(ValueError, match="^chosen: .*0 to 9"):
      spec.conditions(data, chosen)
  with pytest.raises(ValueError, match="^chosen: .*nothing conditions"):
    spec.conditions(spec.Data(PICTURES._replace(cond={}), None), ["1"])
