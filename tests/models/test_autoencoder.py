"""What the autoencoder says by itself; its layers are compared with diffusers' in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax.models import autoencoder


def test_posterior_draws_have_its_mean_and_variance():
  mean = jnp.array([[-1.0, 0.0, 5.0]])
  logvar = jnp.log(jnp.array([[0.25, 1.0, 4.0]]))
  keys = jax.random.split(jax.random.key(0), 2000)
  draws = np.asarray(jax.vmap(lambda key: autoencoder.sample(mean, logvar, key))(keys))
  assert draws.shape == (2000, 1, 3)
  std = np.exp(logvar / 2)
  # Five standard errors of the estimates.
  np.testing.assert_array_less(np.abs(draws.mean(0) - mean) / std, 5 / 2000**0.5)
  np.testing.assert_allclose(draws.var(0), std**2, rtol=5 * (2 / 2000) ** 0.5)
  correlation = np.corrcoef(draws[:, 0].T) - np.eye(3)
  assert np.abs(correlation).max() < 5 / 2000**0.5  # each entry has noise of its own
  certain = autoencoder.sample(mean, jnp.full_like(mean, -30.0), keys[0])
  np.testing.assert_allclose(certain, mean, atol=1e-5)


def test_norms_keep_what_lies_on_a_large_mean():
  block = autoencoder.Resnet(16, 4, jnp.float32)
  # Multiples of 2^-10, so that adding 1000 rounds nothing: what differs is the norm's doing.
  x = np.round(np.random.default_rng(0).standard_normal((2, 6, 4, 16)) * 1024).astype(np.float32) / 1024
  params = block.init(jax.random.key(0), x)
  added = lambda x: np.asarray(block.apply(params, x)) - x
  assert np.abs(added(x)).max() > 0.5
  # The first norm takes the offset out again.
  np.testing.assert_allclose(added(x + 1000), added(x), atol=1e-3)


@pytest.mark.parametrize("fields, words", [
    (dict(channels=0), "channels: 0 must be"), (dict(widths=()), r"widths: \(\) must be"),
    (dict(widths=(8, -1), groups=4), "widths: -1 must be"),
    (dict(widths=(8,), groups=3), "groups: 3 does not divide width 8"),
    (dict(layers_per_block=10**9), "layers_per_block: 1000000000 must be"),
    (dict(quant_conv="no"), "quant_conv: 'no' must be true or false")])
def test_fields_that_cannot_be_name_themselves(fields, words):
  with pytest.raises(ValueError, match=f"^{words}"):
    autoencoder.Autoencoder(**fields)
