"""The sampler against the authors' scheduler vectors and flows with closed forms."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import errors
from piflow_jax import flow
from piflow_jax import sampler
from tests import golden


def test_scheduler_vectors():
  data = golden.load("flow_map_sde")
  for i in range(len(data["nfe"])):
    n = int(data["nfe"][i])
    shift = float(data["shift"][i])
    if data["use_dynamic_shifting"][i] and data["seq_len"][i]:
      shift = flow.dynamic_shift(int(data["seq_len"][i]))
    final_scale = float(data["final_step_size_scale"][i])
    plan = sampler.step_plan(nfe=n, shift=shift, h=float(data["h"][i]), final_scale=final_scale)
    close = lambda got, name, at=slice(0, n), **kw: np.testing.assert_allclose(
        got, data[name][i][at], rtol=2e-5, atol=2e-6, err_msg=f"row {i} {name}")
    close(1000 * plan["t"], "timesteps")
    close(plan["t_next"], "sigmas", slice(1, n + 1))
    close(1000 * plan["t_dst"], "timesteps_dst")
    close(plan["m"], "m_vals")
    for j in range(n):
      x = sampler.renoise(data["step_model_output"][j], data["step_noise"][j], plan["t_next"][j], plan["m"][j])
      np.testing.assert_allclose(x, data["step_prev_sample"][i][j], rtol=1e-4, atol=1e-5)


MEAN, STD = 1.0, 0.5


def _spread(t):
  return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


def _gaussian_map(x, t, t_dst):
  """The exact flow of x_0 ~ N(MEAN, STD^2): x keeps its distance from the mean in standard deviations."""
  return (1 - t_dst) * MEAN + _spread(t_dst) / _spread(t) * (x - (1 - t) * MEAN)


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
@pytest.mark.parametrize("h", [0.0, 0.5, 1.0, 2.0, float("inf")])
def test_every_step_keeps_a_gaussians_moments(h, nfe, shift):
  """Map and renoising are affine, so mean and standard deviation pass through them exactly."""
  plan = sampler.step_plan(nfe=nfe, shift=shift, h=h, final_scale=0.5)
  mean, std = 0.0, 1.0
  for t, t_dst, t_next, m in zip(*(plan[k] for k in ("t", "t_dst", "t_next", "m"))):
    high, low = (_gaussian_map(mean + s * std, t, t_dst) for s in (1, -1))
    mean, std = sampler.renoise((high + low) / 2, 0, t_next, m), sampler.renoise((high - low) / 2, 0, t_next, m)
    std = np.hypot(std, sampler.renoise(0, 1, t_next, m))
    np.testing.assert_allclose([mean, std], [(1 - t_next) * MEAN, _spread(t_next)], atol=1e-12)
  np.testing.assert_allclose([mean, std], [MEAN, STD], atol=1e-12)


@pytest.mark.parametrize("h", [0.0, 0.5, 1.0, float("inf")])
def test_sampling_keeps_a_gaussians_marginal(h):
  def flow_map(x, tau_src, tau_dst, key):
    return _gaussian_map(x, *(flow.broadcast_to(flow.warp(tau, 3.2), x) for tau in (tau_src, tau_dst)))

  draws = 200_000
  noise = jax.random.normal(jax.random.key(0), (draws, 1))
  x = sampler.sample(flow_map, noise, jax.random.key(1), nfe=4, shift=3.2, h=h)
  # 5 standard errors of the mean and of the standard deviation
  np.testing.assert_allclose(x.mean(), MEAN, atol=5 * STD / draws**0.5)
  np.testing.assert_allclose(x.std(), STD, atol=5 * STD / (2 * draws) ** 0.5)
  if h == 0:
    np.testing.assert_allclose(x, MEAN + STD * noise, atol=1e-5)


# dx/dt = exp(-x) cos t, so that exp(x) - sin t stays what it is
_nonlinear = lambda x, t: jnp.exp(-x) * jnp.cos(flow.broadcast_to(t, x))
_nonlinear_end = lambda x, t, t_dst: jnp.log(jnp.exp(x) + jnp.sin(t_dst) - jnp.sin(t))


@pytest.mark.parametrize("final_scale", [1.0, 0.5])
def test_an_exact_map_is_elastic_in_nfe(x64, final_scale):
  def flow_map(x, tau_src, tau_dst, key):
    return _nonlinear_end(x, *(flow.broadcast_to(flow.warp(tau, 3.2), x) for tau in (tau_src, tau_dst)))

  noise = jnp.linspace(0.2, 2, 6).reshape(3, 2)
  for nfe in (1, 2, 3, 8):
    x = sampler.sample(flow_map, noise, jax.random.key(0), nfe=nfe, shift=3.2, final_scale=final_scale)
    np.testing.assert_allclose(x, _nonlinear_end(noise, 1, 0), rtol=1e-12)


@pytest.mark.parametrize("method, order, calls", [
    ("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2), ("Ralston", 2, 2), ("Bosh3", 3, 4), ("Dopri5", 5, 7),
    ("Tsit5", 5, 7)])
def test_order_and_network_calls_of_each_method(x64, method, order, calls):
  counted = []

  def velocity(x, t):
    jax.debug.callback(lambda: counted.append(1))
    return _nonlinear(x, t)

  noise, flow_map = jnp.linspace(0.5, 2, 6).reshape(3, 2), sampler.velocity_flow_map(velocity, shift=2.0, method=method)
  wrong = []
  for nfe in (8, 16):
    x = jax.jit(lambda x: sampler.sample(flow_map, x, jax.random.key(0), nfe=nfe, shift=2.0))(noise)
    wrong.append(np.abs(x - _nonlinear_end(noise, 1, 0)).max())
  jax.effects_barrier()
  assert len(counted) == 24 * calls
  # The next term of the error is smaller by a step, so an order measured between 1/8 and 1/16 is off by sixteenths. Of
  # the fifth order methods it is still the larger term, and their order looks higher.
  measured = np.log2(wrong[0] / wrong[1])
  assert order - 0.2 < measured < (order + 0.2 if order < 5 else 7)


@pytest.mark.parametrize("own, other", [("midpoint", "Midpoint"), ("heun", "Heun")])
def test_own_methods_are_diffraxs_with_times_by_sample(x64, own, other):
  x, tau_src, tau_dst = jnp.linspace(0.5, 2, 6).reshape(3, 2), jnp.array([1, 0.5, 0.3]), jnp.array([0.9, 0, 0.3])
  maps = [sampler.velocity_flow_map(_nonlinear, shift=2.0, method=m) for m in (own, other)]
  got, want = (flow_map(x, tau_src, tau_dst, None) for flow_map in maps)
  np.testing.assert_allclose(got, want, rtol=1e-14)
  np.testing.assert_array_equal(got[2], x[2])  # no way to go


def test_unknown_solvers_are_told_in_one_line(monkeypatch):
  for method in ("rk4", "Kvaerno5", "AbstractERK", "diffeqsolve"):
    with pytest.raises(errors.UserError, match=f"config.sampling.solver: '{method}' .* no explicit Runge-Kutta"):
      sampler.velocity_flow_map(_nonlinear, method=method)
  monkeypatch.setitem(sys.modules, "diffrax", None)
  with pytest.raises(errors.UserError, match="config.sampling.solver: 'Tsit5' .* installed: pip install"):
    sampler.velocity_flow_map(_nonlinear, method="Tsit5")


def test_velocity_flow_map_is_eulers_method():
  u = lambda x, t: x * t[:, None]
  got = sampler.sample(sampler.velocity_flow_map(u, shift=3.0), jnp.ones((2, 1)), jax.random.key(0), nfe=3, shift=3.0)
  x, tau = 1.0, [1, 2 / 3, 1 / 3, 0]
  for a, b in zip(tau[:-1], tau[1:]):
    x += x * flow.warp(a, 3.0) * (flow.warp(b, 3.0) - flow.warp(a, 3.0))
  np.testing.assert_allclose(got, jnp.full((2, 1), x), rtol=1e-6)


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_mean_flow_map_of_exact_mean_velocities_is_exact(x64, nfe):
  """u = A x flows by exp((t_dst - t) A); its mean velocity in closed form."""
  matrix = jnp.array([[0.3, -1.2], [0.8, -0.5]])

  def network(x, t, t_dst):
    step = lambda x, length: (jax.scipy.linalg.expm(length * matrix) @ x - x) / length
    return jax.vmap(step)(x, t_dst - t)

  noise = jnp.linspace(-1, 2, 6).reshape(3, 2)
  x = sampler.sample(sampler.mean_flow_map(network, shift=3.2), noise, jax.random.key(0), nfe=nfe, shift=3.2)
  np.testing.assert_allclose(x, noise @ jax.scipy.linalg.expm(-matrix).T, rtol=1e-12)


def test_batches_have_one_shape_and_lose_nothing():
  rows, squares = np.arange(7), np.arange(14).reshape(7, 2)
  parts = sampler.batches(3, rows, squares)
  assert [part[0].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]
  np.testing.assert_array_equal(np.concatenate([part[1] for part in parts])[:7], squares)
  assert [part[0].tolist() for part in sampler.batches(5, np.arange(2))] == [[0, 1, 0, 1, 0]]  # fewer than a batch
