"""Trees by path, and the EMA against the authors' vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import params
from tests import golden

TREE = {"blocks": {"qkv": {"kernel": 1, "bias": 2}}, "head": {"kernel": 3}}


def _arrays(tree):
  return jax.tree.map(np.float32, tree)


def test_leaves_have_names():
  assert params.named_leaves(TREE) == {"blocks/qkv/kernel": 1, "blocks/qkv/bias": 2, "head/kernel": 3}
  assert params.map_with_path(lambda name, leaf: f"{name}={leaf}", {"a": {"b": 1}}) == {"a": {"b": "a/b=1"}}


@pytest.mark.parametrize("pattern, matches", [
    ("kernel", True), ("qkv/kernel", True), ("blocks/qkv/kernel", True), (".*", True), (r"qkv/\w+", True),
    ("kern", False), ("nel", False), ("kv/kernel", False), ("qkv", False), ("blocks/.*l", True), ("bias|kernel", True),
    ("head/kernel", False)])
def test_a_pattern_matches_whole_names_at_the_end_of_a_path(pattern, matches):
  assert params.ends_with(pattern, "blocks/qkv/kernel") is matches
  assert params.is_any((pattern,), "blocks/qkv/kernel") is matches


def test_one_of_several_patterns_is_enough():
  assert params.is_any(("nothing", "bias", "other"), "blocks/qkv/bias")
  assert not params.is_any(("nothing", "other"), "blocks/qkv/bias") and not params.is_any((), "head/kernel")


def test_a_selection_keeps_leaves_by_their_path_and_no_empty_branch():
  def kernel(name):
    return params.ends_with("kernel", name)

  assert params.select(TREE, kernel) == {"blocks": {"qkv": {"kernel": 1}}, "head": {"kernel": 3}}
  assert params.select(TREE, lambda name: name.startswith("head")) == {"head": {"kernel": 3}}
  assert params.select(TREE, lambda name: True) == TREE and params.select(TREE, lambda name: False) == {}


def test_a_selection_and_the_rest_overlay_to_the_whole():
  tree = _arrays(TREE)
  picked, rest = params.select(tree, lambda name: "qkv" in name), params.select(tree, lambda name: "qkv" not in name)
  assert params.overlay(rest, picked, tree) == tree


def test_overlay_takes_what_is_trained_and_inherits_the_rest():
  like = _arrays({"blocks": {"qkv": {"kernel": 0, "bias": 0}}, "new": 0})
  got = params.overlay(_arrays(TREE), _arrays({"new": 9, "blocks": {"qkv": {"bias": 7}}}), like)
  assert got == {"blocks": {"qkv": {"kernel": 1, "bias": 7}}, "new": 9}


def test_overlay_refuses_gaps_and_shapes_that_clash():
  like = {"a": jnp.zeros(3), "b": jnp.zeros((2, 4))}
  with pytest.raises(ValueError, match="^b: is neither trained nor in the base"):
    params.overlay({"a": jnp.zeros(3)}, {}, like)
  with pytest.raises(ValueError, match="^a: is neither trained nor in the base"):
    params.overlay(None, {"b": jnp.zeros((2, 4))}, like)
  with pytest.raises(ValueError, match=r"^b: is \(4, 2\), the network has \(2, 4\)"):
    params.overlay({"a": jnp.zeros(3)}, {"b": jnp.zeros((4, 2))}, like)
  with pytest.raises(ValueError, match=r"^a: is \(\), the network has \(3,\)"):
    params.overlay({"a": jnp.zeros(())}, {"b": jnp.zeros((2, 4))}, like)


def test_ema_vectors():
  data = golden.load("ema")
  steps = jnp.asarray(data["iter"])
  decay = params.ema_decay(steps, gamma=7.0, start=400)
  np.testing.assert_allclose(decay[401:], data["momentum"][401:], rtol=1e-5)
  assert decay[400] == 0 and decay[0] == 0
  bounded = params.ema_decay(steps, gamma=7.0, start=0, max_decay=0.99)
  np.testing.assert_allclose(bounded, data["momentum_start0_max0p99"], rtol=1e-5, atol=1e-7)
  ema = jnp.asarray(data["weights"][0])
  for i in range(601):
    ema = params.ema_update(ema, jnp.asarray(data["weights"][i]), decay[i])
    np.testing.assert_allclose(ema, data["ema_weights"][i], rtol=1e-5, atol=1e-6, err_msg=str(i))
