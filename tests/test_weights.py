"""Weights in: which checkpoint, which leaves, which dtype; and what is said where they do not fit."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import checksums
from piflow_jax import errors
from piflow_jax import weights
from tests import test_checkpoint

state, flip, arrays = test_checkpoint.state, test_checkpoint.flip, test_checkpoint.arrays


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  return test_checkpoint.write(tmp_path_factory.mktemp("two") / "run", 1, 2)


@pytest.fixture
def run(two, tmp_path):
  return shutil.copytree(two, tmp_path / "run")


def shapes(dtype=jnp.float32):
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def shape(x):
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=one)

  return jax.tree.map(shape, state(0)["ema"])


@pytest.mark.parametrize("which", ["ema", "params"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_newest_in_the_dtype_that_is_asked_for(two, which, dtype):
  found = weights.load(two, shapes(dtype), which, "--workdir")
  jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda x: x.astype(dtype), state(2)[which]))
  assert found["a"].dtype == dtype


def test_a_part_of_them(two):
  part = {"b": shapes()["b"]}
  found = weights.load(two, part, "params", "--workdir", strict=False)
  assert list(found) == ["b"] and (found["b"]["c"] == 2).all()
  with pytest.raises(errors.UserError, match=r"^--workdir: '.*run' does not fit this config: a is not in this"):
    weights.load(two, part, "params", "--workdir")


@pytest.mark.parametrize("field", ["--workdir", "config.teacher.checkpoint"])
def test_what_does_not_fit_is_named_and_whose_fault_it_is_not(two, field):
  other = {"a": jax.ShapeDtypeStruct((64, 3), jnp.float32), "b": {"d": jax.ShapeDtypeStruct((3,), jnp.float32)}}
  with pytest.raises(errors.UserError) as e:
    weights.load(two, other, "ema", field)
  assert str(e.value) == (f"{field}: {str(two)!r} does not fit this config: b/d is missing; b/c is not in this "
                          "network; a is (64, 512), expected (64, 3)")
  other |= {name: other["a"] for name in "uvwxyz"}
  with pytest.raises(errors.UserError, match=r"^--workdir: .* u is missing; v is missing and \d more$"):
    weights.load(two, other, "ema", "--workdir")


def _torn(path):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("break_it", [_torn, lambda path: flip(path, 1000), lambda path: path.unlink()])
def test_a_newest_checkpoint_that_is_torn_is_passed_over(run, break_it, caplog):
  break_it(arrays(run / "checkpoints" / "2"))
  found = weights.load(run, shapes(), "ema", "config.teacher.checkpoint")
  jax.tree.map(np.testing.assert_array_equal, found, state(1)["ema"])
  with weights.open_weights(run, "params", "--workdir") as (leaves, read):
    assert leaves == {"a": (64, 512), "b/c": (3,)}
    np.testing.assert_array_equal(read("a"), state(1)["params"]["a"])
  words = [message for message in caplog.messages if "checkpoint 2 cannot be read and is passed over" in message]
  assert len(words) == 2 and all(str(run) in message for message in words)
  # It is another run's: nothing in it is moved.
  assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]


def test_where_all_are_torn_that_is_one_line(run):
  for step in "12":
    flip(arrays(run / "checkpoints" / step), 1000)
  for call in (lambda: weights.load(run, shapes(), "ema", "--workdir"),
               lambda: weights.open_weights(run, "ema", "--workdir").__enter__()):
    with pytest.raises(errors.UserError, match=r"^--workdir: no checkpoint in .* can be read \(step 2: its bytes are"):
      call()


def test_what_is_no_run(two, tmp_path):
  (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
  (tmp_path / "foreign" / "checkpoints" / "3" / "other").mkdir(parents=True)
  for name, words in (("none", "no checkpoint in"), ("empty", "no finished checkpoint in"),
                      ("foreign", "is not a checkpoint of this program")):
    with pytest.raises(errors.UserError, match=f"^--workdir: .*{words}"):
      weights.load(tmp_path / name, shapes(), "ema", "--workdir")


def test_imported_weights_have_checksums_and_only_an_average(tmp_path):
  draws = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
  weights.save_weights(tmp_path, [("a/b", draws), ("c", np.ones(2, np.float32))])
  with weights.open_weights(tmp_path, "ema", "--workdir") as (leaves, read):
    assert leaves == {"a/b": (64, 64), "c": (2,)}
    np.testing.assert_array_equal(read("a/b"), draws)
  with pytest.raises(errors.UserError, match="holds averaged weights alone, no 'params'"):
    weights.load(tmp_path, {}, "params", "--workdir")
  with pytest.raises(errors.UserError, match="holds checkpoints already"):
    weights.save_weights(tmp_path, [])
  assert (tmp_path / "checkpoints" / "0" / "state" / checksums.FILE).exists()
  flip(arrays(tmp_path / "checkpoints" / "0"), 1000)
  with pytest.raises(errors.UserError, match="its bytes are not those that were written"):
    weights.open_weights(tmp_path, "ema", "--workdir").__enter__()
