"""Trees by path, and the EMA against the authors' vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import params
from tests import golden

TREE = {"blocks": {"qkv": {"kernel": 1, "bias": 2}}, "head": {"kernel": 3}}


def test_leaves_have_names():
  assert params.named_leaves(TREE) == {"blocks/qkv/kernel": 1, "blocks/qkv/bias": 2, "head/kernel": 3}


def test_overlay_takes_what_is_trained_and_inherits_the_rest():
  like = {"blocks": {"qkv": {"kernel": 0, "bias": 0}}, "new": 0}
  got = params.overlay(TREE, {"new": 9, "blocks": {"qkv": {"bias": 7}}}, like)
  assert got == {"blocks": {"qkv": {"kernel": 1, "bias": 7}}, "new": 9}
  with pytest.raises(KeyError):
    params.overlay(TREE, {}, like)


def test_ema_vectors():
  data = golden.load("ema")
  steps = jnp.asarray(data["iter"])
  decay = params.ema_decay(steps, gamma=7.0, start=400)
  np.testing.assert_allclose(decay[401:], data["momentum"][401:], rtol=1e-5)
  assert decay[400] == 0 and decay[0] == 0
  np.testing.assert_allclose(
      params.ema_decay(steps, gamma=7.0, start=0, max_decay=0.99), data["momentum_start0_max0p99"], rtol=1e-5, atol=1e-7)
  ema = jnp.asarray(data["weights"][0])
  for i in range(601):
    ema = params.ema_update(ema, jnp.asarray(data["weights"][i]), decay[i])
    np.testing.assert_allclose(ema, data["ema_weights"][i], rtol=1e-5, atol=1e-6, err_msg=str(i))
