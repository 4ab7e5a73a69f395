"""The TPU kernel, interpreted, against XLA's loop; tests/plan compiles it for TPUs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax import sharding
from piflow_jax.policy import gmm
from piflow_jax.policy import gmm_kernel
from piflow_jax.policy import gmm_tiles
from piflow_jax.policy import rollout as lib
from tests.policy import test_fast_rollout


@pytest.fixture
def kernel(monkeypatch):
  """Calls are counted: a test of a kernel that is not reached would pass."""
  calls = []

  def interpreted(*args):
    calls.append(args)
    return gmm_kernel.integrate(*args, interpret=True)

  monkeypatch.setitem(gmm_tiles.KERNELS, "cpu", types.SimpleNamespace(suits=sharding.splits, integrate=interpreted))
  return calls


def _clock(substeps, shift=1.0):
  return flow.Clock(shift, substeps, 1, 1.0)


def _loop(*args, **more):
  """A rollout through `velocity` alone."""
  policy, *rest = args

  class Bare:
    velocity = staticmethod(policy.velocity)

  return lib.rollout(Bare, *rest, **more)


# Positions that fill a block partly, exactly, and with some left over; stretches of every length, one backwards.
@pytest.mark.parametrize("shape", [(3, 5, 7, 3, 4), (2, 32, 32, 1, 2), (1, 33, 32, 2, 3)])
def test_the_kernel_changes_nothing_but_rounding(kernel, shape):
  mixture, x, tau, tau_dst = test_fast_rollout._case(*shape)
  policy = gmm.to_policy(mixture, x, tau)
  want = _loop(policy, x, tau, tau_dst, _clock(16, 3.2))
  for shift in (3.2, jnp.array(3.2)):  # compiled in, and as an argument, which the kernel must be given as one
    kernel.clear()
    got = jax.jit(lib.rollout)(policy, x, tau, tau_dst, _clock(16, shift))
    assert len(kernel) == 1
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("logstd", [-8.0, -30.0])
def test_sharp_mixtures_stay_finite(kernel, logstd):
  mixture, x, *_ = test_fast_rollout._case(4, 4, 4, 2, 8)
  policy = gmm.to_policy(mixture.replace(logstd=jnp.full(4, logstd)), x, jnp.ones(4))
  got = lib.rollout(policy, x, jnp.ones(4), jnp.array([0, 0.3, 0.5, 0.9]), _clock(32))
  assert len(kernel) == 1 and np.isfinite(got).all()


def test_a_derivative_is_that_of_xlas_loop(kernel):
  mixture, x, tau, tau_dst = test_fast_rollout._case(2, 4, 4, 2, 3)
  policy = lambda m: gmm.to_policy(m, x, tau)
  loss = lambda roll: lambda m: jnp.sum(jnp.sin(roll(policy(m), x, tau, tau_dst, _clock(8))))
  got, want = (jax.jit(jax.grad(loss(roll)))(mixture) for roll in (lib.rollout, _loop))
  assert not kernel  # what a derivative needs the kernel does not keep
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_a_trajectory_beside_a_derivative_is_the_kernels(kernel):
  mixture, x, tau, tau_dst = test_fast_rollout._case(2, 4, 4, 2, 3)

  def loss(mixture):
    policy = gmm.to_policy(mixture, x, tau)
    x_dst = lib.rollout(jax.lax.stop_gradient(policy), x, tau, tau_dst, _clock(8))
    return jnp.sum(policy.velocity(x_dst, jnp.maximum(tau_dst, 0)))

  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(mixture)))
  assert len(kernel) == 1


@pytest.mark.slow
def test_each_device_rolls_out_its_own_samples(kernel):
  mixture, x, tau, tau_dst = test_fast_rollout._case(8, 4, 4, 2, 3)
  mesh = sharding.make_mesh(2, 2, 2)
  run = lambda mixture, x: lib.rollout(gmm.to_policy(mixture, x, tau), x, tau, tau_dst, _clock(16))
  placed = jax.device_put((mixture, x), jax.NamedSharding(mesh, sharding.BATCH))
  compiled = jax.jit(sharding.under(mesh, run)).lower(*placed).compile()
  assert len(kernel) == 1
  np.testing.assert_allclose(compiled(*placed), run(mixture, x), rtol=2e-5, atol=2e-5)
  gathered = [line for line in compiled.as_text().splitlines() if "all-gather" in line or "all-to-all" in line]
  assert not gathered, gathered


def test_it_is_for_tpus_whose_devices_have_whole_samples(monkeypatch):
  def kernel_under(mesh, batch=8):
    return sharding.under(mesh, lambda: gmm_tiles.kernel_for(batch))()

  assert gmm_tiles.kernel_for(8) is None and kernel_under(sharding.make_mesh(8)) is None  # CPUs
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  assert (gmm_tiles.kernel_for(8) is gmm_kernel) == (jax.device_count() == 1)
  assert kernel_under(sharding.make_mesh(8)) is gmm_kernel
  assert kernel_under(sharding.make_mesh(8), batch=6) is None
  assert kernel_under(jax.make_mesh((8,), ("mine",))) is None
