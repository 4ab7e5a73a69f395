"""The tiled rollout against a plain loop over `velocity`, on one device and on a mesh."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax import sharding
from piflow_jax.policy import gmm
from piflow_jax.policy import rollout as lib


def _case(b, h, w, c, k, seed=0):
  key = jax.random.split(jax.random.key(seed), 6)
  mixture = gmm.Mixture(
      jax.random.normal(key[0], (b, c, k, h * w)), jax.nn.log_softmax(jax.random.normal(key[1], (b, k, h * w)), axis=1),
      0.3 * jax.random.normal(key[2], (b,)))
  x, tau = jax.random.normal(key[3], (b, h, w, c)), jax.random.uniform(key[4], (b,), minval=0.3)
  return mixture, x, tau, tau * jax.random.uniform(key[5], (b,), minval=-0.1)


def _clock(substeps):
  return flow.Clock.of_shift(1.0).replace(total_substeps=substeps)


def _plain(mixture, x, tau, tau_dst, substeps):
  """Sample by sample, substep by substep."""
  ends = []
  for i in range(len(x)):
    one = slice(i, i + 1)
    policy = gmm.to_policy(jax.tree.map(operator.itemgetter(one), mixture), x[one], tau[one])
    n = max(round(float((tau[i] - tau_dst[i]) * substeps)), 1)
    y, size = x[one], (tau[one] - tau_dst[one]) / n
    for j in range(n):
      t, t_next = (jnp.maximum(tau[one] - m * size, 0) for m in (j, j + 1))  # at shift 1
      y = y + flow.broadcast_to(t_next - t, y) * policy.velocity(y, t)
    ends.append(y)
  return jnp.concatenate(ends)


# Positions that a tile divides, that it does not, and one that is alone.
@pytest.mark.parametrize("shape", [(3, 8, 8, 2, 4), (2, 5, 7, 3, 3), (1, 1, 1, 1, 1), (600, 2, 2, 1, 2)])
def test_tiles_change_nothing_but_rounding(x64, shape):
  mixture, x, tau, tau_dst = _case(*shape)
  policy = gmm.to_policy(mixture, x, tau)
  got = jax.jit(lambda x: lib.rollout(policy, x, tau, tau_dst, _clock(16)))(x)
  some = slice(0, 3)
  part = jax.tree.map(lambda a: a[some], (mixture, x, tau, tau_dst))
  np.testing.assert_allclose(got[some], _plain(*part, 16), rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_gradients_go_through_the_tiles(x64):
  mixture, x, tau, tau_dst = _case(2, 4, 4, 2, 3)
  loss = lambda run: lambda m: jnp.sum(jnp.sin(run(m)))
  fast = jax.grad(loss(lambda m: lib.rollout(gmm.to_policy(m, x, tau), x, tau, tau_dst, _clock(8))))(mixture)
  plain = jax.grad(loss(lambda m: _plain(m, x, tau, tau_dst, 8)))(mixture)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), fast, plain)


def test_a_batch_spread_over_devices_is_rolled_out_where_it_lies():
  mixture, x, tau, tau_dst = _case(16, 8, 8, 4, 8)
  run = lambda mixture, x: lib.rollout(gmm.to_policy(mixture, x, tau), x, tau, tau_dst, _clock(16))
  want = jax.jit(run)(mixture, x)
  placed = jax.device_put((mixture, x), jax.NamedSharding(sharding.make_mesh(2, 4), sharding.BATCH))
  compiled = jax.jit(run).lower(*placed).compile()
  np.testing.assert_allclose(compiled(*placed), want, rtol=1e-5, atol=1e-5)
  gathered = [line for line in compiled.as_text().splitlines() if "all-gather" in line or "all-to-all" in line]
  assert not gathered, gathered


@pytest.mark.parametrize("logstd", [-8.0, -12.0, -30.0])
def test_sharp_mixtures_stay_finite(logstd):
  """Logits reach 1e9 where a destination below 0 has the time wait at 1e-6: a rounding of them may do no harm."""
  key = jax.random.split(jax.random.key(0), 4)
  x, tau_dst = jax.random.normal(key[0], (256, 1, 1, 2)), jax.random.uniform(key[1], (256,))
  logweights = jax.nn.log_softmax(jax.random.normal(key[3], (256, 8, 1)), axis=1)
  mixture = gmm.Mixture(3 * jax.random.normal(key[2], (256, 2, 8, 1)), logweights, jnp.full(256, logstd))

  @jax.jit
  def end(mixture, tau_src, tau_dst):
    return lib.rollout(gmm.to_policy(mixture, x, jnp.ones(256)), x, tau_src, tau_dst, _clock(32))

  for share in (1.0, 0.7):
    assert np.isfinite(end(mixture, jnp.full(256, share), share * tau_dst - 0.5)).all()
  gradients = jax.grad(lambda mixture: jnp.sum(end(mixture, jnp.ones(256), tau_dst - 0.5) ** 2))(mixture)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
