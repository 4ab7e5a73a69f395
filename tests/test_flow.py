"""Times and segments against the authors' vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from tests import golden


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("final_scale", [1.0, 0.5])
@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_segment_source_vectors(nfe, final_scale, shift):
  data, case = golden.load("sample_t"), f"nfe{nfe}_fs{final_scale}_shift{shift}"
  tau_src, segment = flow.segment_source(jnp.asarray(data["raw_t"]), nfe=nfe, final_scale=final_scale)
  np.testing.assert_allclose(tau_src, data[f"{case}_raw_t_src"], rtol=1e-6)
  np.testing.assert_allclose(segment, data[f"{case}_segment_size"], rtol=1e-6)
  np.testing.assert_allclose(flow.warp(tau_src, shift), data[f"{case}_sigma_t_src"], rtol=1e-6)
  np.testing.assert_allclose(1000 * flow.warp(tau_src, shift), data[f"{case}_t_src"], rtol=1e-6)


@pytest.mark.parametrize("positions", [256, 1024, 4096])
def test_dynamic_shift_vectors(positions):
  data = golden.load("sample_t")
  shift = flow.dynamic_shift(positions)
  np.testing.assert_allclose(shift, data[f"dyn{positions}_shift"], rtol=1e-7)
  tau_src, _ = flow.segment_source(jnp.asarray(data["raw_t"]), nfe=4, final_scale=0.5)
  t_src = flow.warp(tau_src, shift)
  np.testing.assert_allclose(t_src, data[f"dyn{positions}_sigma_t_src"], rtol=1e-6)
  np.testing.assert_allclose(flow.unwarp(t_src, shift), data[f"dyn{positions}_unwarp_of_sigma"], rtol=1e-5)


def test_training_times_vectors():
  data = golden.load("sample_t")
  t = flow.warp(flow.uniform_tau(jnp.asarray(data["uniform"])), 3.2)
  np.testing.assert_allclose(1000 * t, data["sampled_t_shift3.2"], rtol=1e-6)
  tau = flow.logit_normal_tau(jnp.asarray(data["normal"]), mean=0.3, std=1.2)
  np.testing.assert_allclose(1000 * flow.warp(tau, 3.2), data["logit_normal_t"], rtol=1e-5)


@pytest.mark.parametrize("nfe, final_scale", [(1, 1.0), (1, 0.5), (4, 1.0), (4, 0.5), (3, 0.25)])
def test_sampling_steps_are_the_training_segments(nfe, final_scale):
  times = np.array(flow.step_times(nfe=nfe, final_scale=final_scale))
  middles = (times[:-1] + times[1:]) / 2
  tau_src, segment = flow.segment_source(jnp.asarray(middles), nfe=nfe, final_scale=final_scale)
  np.testing.assert_allclose(np.where(nfe == 1, 1.0, tau_src), times[:-1], rtol=1e-6)
  if nfe > 1:  # a single step always covers all of [0, 1], whatever the last segment's scale
    np.testing.assert_allclose(segment, -np.diff(times), rtol=1e-5)


def test_velocity_and_x_0_are_inverse():
  x_0, noise, t = jnp.full((1, 2), 3.0), jnp.full((1, 2), -1.0), jnp.array([0.25])
  np.testing.assert_allclose(flow.velocity_to_x_0(flow.noise_data(x_0, noise, t), noise - x_0, t), x_0)


@pytest.mark.parametrize("method, want", [("euler", 4), ("midpoint", 2.56), ("heun", 2.72)])
def test_mean_velocity_by_hand(method, want):
  """u = x t from x = 4 at t = 1 to t = 0.6, in numbers; where there is no way to go it is the velocity."""
  u = lambda x, t: x * t[:, None]
  x, t_src, t_dst = jnp.full((2, 1), 4.0), jnp.array([1.0, 0.5]), jnp.array([0.6, 0.5])
  np.testing.assert_allclose(flow.mean_velocity(u, x, t_src, t_dst, method=method), [[want], [2.0]], rtol=1e-6)


def test_mean_velocity_names_its_methods():
  with pytest.raises(ValueError, match='method: .rk4. is none of "euler"'):
    flow.mean_velocity(lambda x, t: x, jnp.ones((1, 1)), jnp.ones(1), jnp.zeros(1), method="rk4")
