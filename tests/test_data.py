"""The loader: a batch is a function of (seed, number), split by process without gaps."""

import numpy as np
import pytest

from piflow_jax import errors
from piflow_jax.data import digits, loader, synthetic


def _take(n, **kwargs):
  iterator = loader.batches([{"x_0": np.float32(i), "cond": i} for i in range(20)], **kwargs)
  return [next(iterator)["cond"] for _ in range(n)]


def test_batches_depend_on_seed_and_number_alone():
  ahead = _take(12, batch_size=4, seed=0)
  np.testing.assert_array_equal(ahead, _take(12, batch_size=4, seed=0))
  np.testing.assert_array_equal(ahead[7:], _take(5, batch_size=4, seed=0, start=7))
  assert not np.array_equal(ahead, _take(12, batch_size=4, seed=1))


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


def test_digits_are_all_there_and_split_without_overlap():
  (train, _), (held_out, _), (every, labels) = (digits.arrays(s) for s in ("train", "held_out", "all"))
  assert (len(train), len(held_out), len(every)) == (1437, 360, 1797)
  assert every.dtype == np.float32 and every.min() == -1 and every.max() == 1 and set(labels) == set(range(10))
  np.testing.assert_array_equal(np.concatenate([held_out, train]), every)
  with pytest.raises(errors.UserError, match="config.data"):
    digits.source("train", shape=(32, 32, 4))


def test_synthetic_records_are_drawn_by_number():
  records = synthetic.source("train", shape=(4, 4, 2), num_classes=7, size=10)
  np.testing.assert_array_equal(records[3]["x_0"], records[3]["x_0"])
  assert not np.array_equal(records[3]["x_0"], records[4]["x_0"])
  assert len(records) == 10 and records[0]["x_0"].shape == (4, 4, 2) and 0 <= records[0]["cond"] < 7
  held_out = synthetic.source("held_out", shape=(4, 4, 2), num_classes=7, size=10)
  assert not np.array_equal(records[3]["x_0"], held_out[3]["x_0"])
