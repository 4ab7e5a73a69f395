"""Parallel decoding: intervals in their order, an exact integral, and the fused head of sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax.models import layers
from piflow_jax.policy import parallel
from piflow_jax.policy import rollout

INTERVALS, CLOCK = 8, flow.Clock.of_shift(3.2)


def _policy(b=5):
  return parallel.ParallelPolicy(jax.random.normal(jax.random.key(0), (b, INTERVALS, 2, 2, 3)), CLOCK)


def test_velocity_counts_intervals_from_noise():
  policy, x = _policy(1), jnp.zeros((1, 2, 2, 3))
  for g in range(INTERVALS):
    for inside in (0.0, 0.5, 0.98):
      t = CLOCK.warp(jnp.array([1 - (g + inside) / INTERVALS]))
      np.testing.assert_array_equal(policy.velocity(x, t), policy.u[:, g])
  np.testing.assert_array_equal(policy.velocity(x, jnp.zeros(1)), policy.u[:, -1])


def test_advance_is_what_fine_substeps_come_to(x64):
  """Against the general rollout by velocity alone, whose substeps are cut where the intervals are."""
  policy = jax.tree.map(lambda u: u.astype(jnp.float64), _policy())

  class ByVelocity:
    velocity = staticmethod(policy.velocity)

  x = jax.random.normal(jax.random.key(1), (5, 2, 2, 3), jnp.float64)
  tau_src, tau_dst = jnp.array([1.0, 0.75, 0.5, 0.875, 0.25]), jnp.array([0.0, 0.25, 0.5, 0.3125, 0.0])
  got = rollout.rollout(policy, x, tau_src, tau_dst, CLOCK)
  # One way's length is no whole number of intervals: 9 substeps of 1/16, still cut at the intervals' borders.
  want = rollout.rollout(ByVelocity, x, tau_src, tau_dst, CLOCK.replace(total_substeps=16))
  np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
  np.testing.assert_array_equal(got[2], x[2])


@pytest.mark.parametrize("tau_src, tau_dst", [(1.0, 0.0), (0.75, 0.5), (0.6, 0.13)])
def test_fused_head_is_the_unfused_sum(tau_src, tau_dst):
  head = parallel.ParallelHead(intervals=INTERVALS)
  tokens, embedding = jax.random.normal(jax.random.key(2), (5, 1, 16)), jnp.zeros((5, 16))
  layout = layers.patches((2, 2, 3), 2)
  params = {"out": {"kernel": jax.random.normal(jax.random.key(3), (16, 4, INTERVALS, 3)),
                    "bias": jax.random.normal(jax.random.key(4), (4, INTERVALS, 3))}}
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
      jnp.shape, head.init(jax.random.key(0), tokens, embedding, layout)["params"])
  x, tau_src, tau_dst = jax.random.normal(jax.random.key(5), (5, 2, 2, 3)), jnp.array(tau_src), jnp.array(tau_dst)
  policy = head.to_policy(head.apply({"params": params}, tokens, embedding, layout), x, CLOCK.warp(tau_src), CLOCK)
  want = policy.advance(x, jnp.full(5, tau_src), jnp.full(5, tau_dst))

  fused = head.fuse(params, tau_src, tau_dst, CLOCK)
  plain = layers.VelocityHead()
  assert jax.tree.map(jnp.shape, fused) == jax.tree.map(
      jnp.shape, plain.init(jax.random.key(0), tokens, embedding, layout)["params"])
  u = plain.apply({"params": fused}, tokens, embedding, layout)
  got = x + (CLOCK.warp(tau_dst) - CLOCK.warp(tau_src)) * u
  np.testing.assert_allclose(got, want, atol=3e-5)  # float32, sums of 16 x 8 products of order 1
