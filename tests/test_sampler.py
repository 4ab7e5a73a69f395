"""The sampler against the authors' scheduler vectors and closed forms on a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    plan = sampler.step_plan(nfe=n, shift=shift, h=float(data["h"][i]), final_scale=float(data["final_step_size_scale"][i]))
    close = lambda got, name, at=slice(0, n), **kw: np.testing.assert_allclose(
        got, data[name][i][at], rtol=2e-5, atol=2e-6, err_msg=f"row {i} {name}")
    close(1000 * plan["t"], "timesteps")
    close(plan["t_next"], "sigmas", slice(1, n + 1))
    close(1000 * plan["t_dst"], "timesteps_dst")
    close(plan["m"], "m_vals")
    for j in range(n):
      x = sampler.renoise(data["step_model_output"][j], data["step_noise"][j], plan["t_next"][j], plan["m"][j])
      np.testing.assert_allclose(x, data["step_prev_sample"][i][j], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("h", [0.0, 1.0, float("inf")])
def test_sampling_keeps_a_gaussians_marginal(h):
  """x_0 ~ N(1, 0.5^2): the exact flow map is affine, and every h must end in the same distribution."""
  mean, std = 1.0, 0.5
  spread = lambda t: jnp.sqrt((1 - t) ** 2 * std**2 + t**2)

  def flow_map(x, tau_src, tau_dst, key):
    s, d = flow.broadcast_to(tau_src, x), flow.broadcast_to(tau_dst, x)
    return (1 - d) * mean + spread(d) / spread(s) * (x - (1 - s) * mean)

  noise = jax.random.normal(jax.random.key(0), (200_000, 1))
  x = sampler.sample(flow_map, noise, jax.random.key(1), nfe=4, h=h)
  # 5 standard errors of the mean and of the standard deviation of 200,000 draws
  np.testing.assert_allclose(x.mean(), mean, atol=5 * std / 200_000**0.5)
  np.testing.assert_allclose(x.std(), std, atol=5 * std / 400_000**0.5)
  if h == 0:
    np.testing.assert_allclose(x, mean + std * noise, atol=1e-5)


def test_euler_flow_map_is_eulers_method():
  u = lambda x, t: x * t[:, None]
  got = sampler.sample(sampler.euler_flow_map(u, shift=3.0), jnp.ones((2, 1)), jax.random.key(0), nfe=3, shift=3.0)
  x, tau = 1.0, [1, 2 / 3, 1 / 3, 0]
  for a, b in zip(tau[:-1], tau[1:]):
    x += x * flow.warp(a, 3.0) * (flow.warp(b, 3.0) - flow.warp(a, 3.0))
  np.testing.assert_allclose(got, jnp.full((2, 1), x), rtol=1e-6)
