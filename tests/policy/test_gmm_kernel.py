"""The TPU kernel, interpreted, against XLA's loop; that it compiles for TPUs is tests/plan's to show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import sharding
from piflow_jax.policy import gmm
from piflow_jax.policy import gmm_kernel
from piflow_jax.policy import rollout as lib
from tests.policy import test_fast_rollout


@pytest.fixture
def kernel(monkeypatch):
  """Calls are counted: a test of a kernel that is not reached would pass."""
  calls = []

  def interpreted(*args, integrate=gmm_kernel.integrate):
    calls.append(args)
    return integrate(*args, interpret=True)

  monkeypatch.setattr(gmm_kernel, "suits", lambda x: sharding.splits(x.shape[0]))
  monkeypatch.setattr(gmm_kernel, "integrate", interpreted)
  return calls


def _loop(*args, **more):
  """A rollout through `velocity` alone."""
  policy, *rest = args

  class Bare:
    velocity = staticmethod(policy.velocity)

  return lib.rollout(Bare, *rest, **more)


# A block that positions fill partly, exactly, and with some left for a second; stretches of every length, one backwards.
@pytest.mark.parametrize("shape", [(3, 5, 7, 3, 4), (2, 32, 32, 1, 2), (1, 33, 32, 2, 3)])
def test_the_kernel_changes_nothing_but_rounding(kernel, shape):
  mixture, x, tau, tau_dst = test_fast_rollout._case(*shape)
  policy = gmm.to_policy(mixture, x, tau)
  got = lib.rollout(policy, x, tau, tau_dst, total_substeps=16, shift=3.2)
  assert len(kernel) == 1
  np.testing.assert_allclose(got, _loop(policy, x, tau, tau_dst, total_substeps=16, shift=3.2), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("logstd", [-8.0, -30.0])
def test_sharp_mixtures_stay_finite(kernel, logstd):
  mixture, x, *_ = test_fast_rollout._case(4, 4, 4, 2, 8)
  policy = gmm.to_policy(mixture.replace(logstd=jnp.full(4, logstd)), x, jnp.ones(4))
  got = lib.rollout(policy, x, jnp.ones(4), jnp.array([0, 0.3, 0.5, 0.9]), total_substeps=32)
  assert len(kernel) == 1 and np.isfinite(got).all()


def test_a_derivative_is_that_of_xlas_loop(kernel):
  mixture, x, tau, tau_dst = test_fast_rollout._case(2, 4, 4, 2, 3)
  policy = lambda m: gmm.to_policy(m, x, tau)
  loss = lambda roll: lambda m: jnp.sum(jnp.sin(roll(policy(m), x, tau, tau_dst, total_substeps=8)))
  got, want = (jax.jit(jax.grad(loss(roll)))(mixture) for roll in (lib.rollout, _loop))
  assert not kernel  # what a derivative needs the kernel does not keep
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_a_trajectory_beside_a_derivative_is_the_kernels(kernel):
  mixture, x, tau, tau_dst = test_fast_rollout._case(2, 4, 4, 2, 3)

  def loss(mixture):
    policy = gmm.to_policy(mixture, x, tau)
    x_dst = lib.rollout(jax.lax.stop_gradient(policy), x, tau, tau_dst, total_substeps=8)
    return jnp.sum(policy.velocity(x_dst, jnp.maximum(tau_dst, 0)))

  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(mixture)))
  assert len(kernel) == 1


@pytest.mark.slow
def test_each_device_rolls_out_its_own_samples(kernel):
  mixture, x, tau, tau_dst = test_fast_rollout._case(8, 4, 4, 2, 3)
  mesh = sharding.make_mesh(2, 2, 2)
  run = lambda mixture, x: lib.rollout(gmm.to_policy(mixture, x, tau), x, tau, tau_dst, total_substeps=16)
  placed = jax.device_put((mixture, x), jax.NamedSharding(mesh, sharding.BATCH))
  compiled = jax.jit(sharding.under(mesh, run)).lower(*placed).compile()
  assert len(kernel) == 1
  np.testing.assert_allclose(compiled(*placed), run(mixture, x), rtol=2e-5, atol=2e-5)
  gathered = [line for line in compiled.as_text().splitlines() if "all-gather" in line or "all-to-all" in line]
  assert not gathered, gathered


def test_it_is_for_tpus_whose_devices_have_whole_samples(monkeypatch):
  x = jnp.zeros((8, 4, 4, 1))
  suits = functools.partial(gmm_kernel.suits, x)
  assert not suits()  # a CPU
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  assert suits() == (jax.device_count() == 1)
  under = lambda mesh: sharding.under(mesh, suits)()
  assert under(sharding.make_mesh(8))
  assert not sharding.under(sharding.make_mesh(8), lambda: gmm_kernel.suits(x[:6]))()
  assert not under(jax.make_mesh((8,), ("mine",)))
