"""Meshes, rules, and where a batch's rows lie."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from piflow_jax import sharding


def _tree(**leaves):
  return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in leaves.items()}


def test_a_size_of_minus_one_is_inferred():
  assert dict(sharding.make_mesh(-1, 2).shape) == {"slice": 1, "data": 4, "fsdp": 2, "tensor": 1}
  assert dict(sharding.make_mesh(2, 1, -1, 2).shape) == {"slice": 2, "data": 2, "fsdp": 1, "tensor": 2}
  assert dict(sharding.make_mesh(1, -1).shape) == {"slice": 1, "data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize("sizes", [
    (3, 1), (-1, 3), (-1, -1), (0, 8), (16, 1), (2, 2, 1), (-1, 1, 3), (-1, 1, 1, 3), (4, 1, 1, 0)])
def test_sizes_that_do_not_fit_are_named(sizes):
  with pytest.raises(ValueError, match="^mesh: slices=. x data=.* does not make 8 devices"):
    sharding.make_mesh(*sizes)


def test_first_rule_wins_and_optimizer_state_follows_its_parameter():
  mesh, rules = sharding.make_mesh(2, 4), ((r"a/kernel", (None, "fsdp")), (r".*kernel", ("fsdp",)))
  tree = {"params": {"a": _tree(kernel=(3, 8))}, "opt": {"mu": {"b": _tree(kernel=(8, 3))}, "count": _tree(n=())}}
  specs = jax.tree.map(lambda s: s.spec, sharding.shardings(tree, rules, mesh))
  assert specs == {"params": {"a": {"kernel": P(None, "fsdp")}},
                   "opt": {"mu": {"b": {"kernel": P("fsdp")}}, "count": {"n": P()}}}


def test_a_leaf_without_a_rule_raises():
  with pytest.raises(ValueError, match="^network: no sharding rule names a/scale"):
    sharding.shardings({"a": _tree(scale=(4,))}, ((r"kernel", ()),), sharding.make_mesh())


def test_an_axis_that_does_not_divide_is_named():
  with pytest.raises(ValueError, match="^mesh.fsdp: 8 does not divide 12, an axis of kernel"):
    sharding.shardings(_tree(kernel=(12,)), ((r"kernel", ("fsdp",)),), sharding.make_mesh(1, 8))


def test_a_batch_lies_split_over_all_devices():
  x = np.arange(16.0).reshape(16, 1)
  placed = sharding.place_batch({"x_0": x}, sharding.make_mesh(2, 4), 16)["x_0"]
  np.testing.assert_array_equal(placed, x)
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1)}


def test_tensor_splits_layers_and_not_samples():
  mesh = sharding.make_mesh(2, 2, 2)
  placed = sharding.place_batch({"x_0": np.arange(16.0).reshape(8, 2)}, mesh, 8)["x_0"]
  assert sharding.sample_parts(mesh) == 4 and {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}


def test_a_process_has_the_rows_that_its_devices_hold(monkeypatch):
  devices = np.array(jax.devices())
  crossed = jax.sharding.Mesh(devices[[0, 4, 1, 5, 7, 3, 6, 2]].reshape(1, 2, 4, 1), sharding.AXES)
  shared = sharding.make_mesh(1, 2, 4)  # both processes in each part by layers

  def held(process):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    return [sharding.rows(crossed, 16, lambda device: device.id // 4).tolist(),
            sharding.rows(shared, 16, lambda device: device.id % 4 // 2).tolist()]

  assert held(0) == [[0, 1, 4, 5, 10, 11, 14, 15], list(range(16))]
  assert held(1) == [[2, 3, 6, 7, 8, 9, 12, 13], list(range(16))]


def test_rows_that_do_not_lie_together_land_where_they_belong(monkeypatch):
  mesh, x = sharding.make_mesh(2, 4), np.arange(32.0).reshape(16, 2)
  placed = sharding.place_batch(x, mesh, 16)
  asked = []

  def make_array(shape, sharding, part):
    asked.append((shape, part((slice(2, 4), slice(None))), part((slice(8, 10), slice(None)))))

  monkeypatch.setattr(sharding, "_rows", lambda mesh, n: np.array([2, 3, 8, 9]))
  monkeypatch.setattr(jax, "make_array_from_callback", make_array)
  sharding.place_batch(x[[2, 3, 8, 9]], mesh, 16)
  (shape, first, second), = asked
  assert shape == placed.shape
  np.testing.assert_array_equal(first, x[2:4])
  np.testing.assert_array_equal(second, x[8:10])


def test_layouts_are_asked_for_where_there_is_a_mesh():
  x = jnp.zeros((8, 2))
  assert sharding.constrain(x, sharding.SAMPLES) is x
  mesh = sharding.make_mesh(2, 4)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = jax.jit(lambda x: sharding.constrain(x * 2, sharding.SAMPLES)).lower(x).as_text()
  assert "sharding_constraint" in text


def test_what_is_spread_takes_the_first_axis_that_divides():
  mesh = sharding.make_mesh(4, 2)
  rules = ((r"kernel", (None, "fsdp")), (r".*", ()))
  tree = _tree(kernel=(3, 16), other=(3, 8), small=(3,)) | {"kernel_": _tree(kernel=(8, 6))}
  specs = jax.tree.map(lambda s: s.spec, sharding.shardings(tree, rules, mesh, spread=("data",)))
  assert specs == {"kernel": P(None, ("fsdp", "data")), "other": P(None, ("data",)), "small": P(None),
                   "kernel_": {"kernel": P(("data",), "fsdp")}}


def test_each_device_its_own_part():
  assert sharding.platform() == "cpu"
  mesh = sharding.make_mesh(2, 2, 2)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    split = jax.sharding.NamedSharding(mesh, P(sharding.SAMPLES, "tensor"))
    sizes = sharding.per_device(lambda x: x + x.shape[0] * 10 + x.shape[1], split.spec, split.spec)
    parts = jax.jit(sizes, in_shardings=split)(jnp.zeros((8, 6)))
  assert (parts == 23).all()
  assert (sharding.per_device(jnp.sin, P(), P())(jnp.ones(3)) == jnp.sin(1)).all()
