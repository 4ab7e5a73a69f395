"""Times and segments against the authors' vectors."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax.policy import rollout
from tests import golden


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("final_scale", [1.0, 0.5])
@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_segment_source_vectors(nfe, final_scale, shift):
  data, case = golden.load("sample_t"), f"nfe{nfe}_fs{final_scale}_shift{shift}"
  clock = flow.Clock(shift, 128, nfe, final_scale)
  tau_src, segment = clock.segment_source(jnp.asarray(data["raw_t"]))
  np.testing.assert_allclose(tau_src, data[f"{case}_raw_t_src"], rtol=1e-6)
  np.testing.assert_allclose(segment, data[f"{case}_segment_size"], rtol=1e-6)
  np.testing.assert_allclose(clock.warp(tau_src), data[f"{case}_sigma_t_src"], rtol=1e-6)
  np.testing.assert_allclose(1000 * clock.warp(tau_src), data[f"{case}_t_src"], rtol=1e-6)
  np.testing.assert_allclose(clock.max_segment, data[f"{case}_segment_size"].max(), rtol=1e-6)
  if nfe > 1:
    np.testing.assert_allclose(clock.segment, clock.max_segment, rtol=1e-12)


@pytest.mark.parametrize("positions", [256, 1024, 4096])
def test_dynamic_shift_vectors(positions):
  data = golden.load("sample_t")
  shift = flow.dynamic_shift(positions)
  np.testing.assert_allclose(shift, data[f"dyn{positions}_shift"], rtol=1e-7)
  clock = flow.Clock(shift, 128, 4, 0.5)
  tau_src, _ = clock.segment_source(jnp.asarray(data["raw_t"]))
  t_src = clock.warp(tau_src)
  np.testing.assert_allclose(t_src, data[f"dyn{positions}_sigma_t_src"], rtol=1e-6)
  np.testing.assert_allclose(clock.unwarp(t_src), data[f"dyn{positions}_unwarp_of_sigma"], rtol=1e-5)


def test_training_times_vectors():
  data, clock = golden.load("sample_t"), flow.Clock.of_shift(3.2)
  t = clock.warp(flow.uniform_tau(jnp.asarray(data["uniform"])))
  np.testing.assert_allclose(1000 * t, data["sampled_t_shift3.2"], rtol=1e-6)
  tau = flow.logit_normal_tau(jnp.asarray(data["normal"]), mean=0.3, std=1.2)
  np.testing.assert_allclose(1000 * clock.warp(tau), data["logit_normal_t"], rtol=1e-5)


@pytest.mark.parametrize("nfe, final_scale", [(1, 1.0), (1, 0.5), (4, 1.0), (4, 0.5), (3, 0.25)])
def test_sampling_steps_are_the_training_segments(nfe, final_scale):
  clock = flow.Clock(1.0, 128, nfe, final_scale)
  times = np.array(clock.step_times())
  middles = (times[:-1] + times[1:]) / 2
  tau_src, segment = clock.segment_source(jnp.asarray(middles))
  np.testing.assert_allclose(np.where(nfe == 1, 1.0, tau_src), times[:-1], rtol=1e-6)
  if nfe > 1:  # a single step always covers all of [0, 1], whatever the last segment's scale
    np.testing.assert_allclose(segment, -np.diff(times), rtol=1e-5)


def test_a_clocks_shift_may_be_an_argument_of_a_program():
  """One program for all shifts, and the numbers of a shift that is compiled in."""
  count, tau = 0, jnp.linspace(0.05, 1, 7)

  @jax.jit
  def times(clock, tau):
    nonlocal count
    count += 1
    return clock.warp(tau), clock.unwarp(tau), clock.segment_source(tau)

  for shift in (1.0, 3.2):
    clock = flow.Clock(shift, 128, 2, 0.5)
    assert not jax.tree.leaves(clock) and jax.tree.leaves(clock.replace(shift=jnp.array(shift))) == [shift]
    got, want = times(clock.replace(shift=jnp.array(shift)), tau), times(clock, tau)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
  assert count == 3  # one for the array, one for each number


def test_a_clock_refuses_what_is_none():
  good = dict(shift=1.0, total_substeps=128, nfe=1, final_scale=1.0)
  for field, value in (("total_substeps", 0), ("total_substeps", 1.5), ("nfe", 0), ("nfe", 2**40), ("final_scale", 0.0),
                       ("final_scale", 1.5), ("final_scale", float("nan"))):
    with pytest.raises(ValueError, match=f"^{field}: "):
      flow.Clock(**good | {field: value})
  for field in good:
    with pytest.raises(TypeError, match=field):
      flow.Clock(**{k: v for k, v in good.items() if k != field})


def test_whoever_reads_time_must_be_given_a_clock():
  """A shift with a default trains and samples differently without a word."""
  for f in (rollout.rollout, rollout.average_velocity, rollout.euler, sampler.sample, sampler.step_plan,
            sampler.mean_flow_map, sampler.velocity_flow_map, sampler.policy_flow_map):
    parameters = inspect.signature(f).parameters
    assert parameters["clock"].default is inspect.Parameter.empty, f
    assert not {"shift", "nfe", "total_substeps", "final_scale"} & set(parameters), f


def test_schedules_of_a_config():
  make = lambda noun, tokens: noun.make(tokens, **config_lib.fields_of(noun))
  assert make(flow.config(), 256) == 1 and make(flow.config(shift=3.2), None) == 3.2
  assert make(flow.dynamic_config(), 256) == flow.dynamic_shift(256)
  assert make(flow.dynamic_config(max_log_shift=2.0), 512) == flow.dynamic_shift(512, max_log_shift=2.0)
  with pytest.raises(ValueError, match="^make: the shift goes by the number of tokens"):
    make(flow.dynamic_config(), None)
  with pytest.raises(ValueError, match="^max_tokens: 256 "):  # not above base_tokens
    make(flow.dynamic_config(max_tokens=256), 256)
  for config, fields in ((flow.config, ("shift",)), (flow.dynamic_config, (
      "base_tokens", "max_tokens", "base_log_shift", "max_log_shift"))):
    for field in fields:
      for value in (float("nan"), float("inf"), 1e30, 2**40, "x", True, *(() if "log" in field else (0, -1))):
        with pytest.raises(ValueError, match=f"^{field}: "):
          make(config(**{field: value}), 256)
    with pytest.raises(ValueError, match="^nfe: "):
      config(nfe=1)


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


def test_a_velocity_of_another_shape_is_refused():
  with pytest.raises(AssertionError, match="shape"):
    flow.mean_velocity(lambda x, t: x[:, :1], jnp.ones((1, 2)), jnp.ones(1), jnp.zeros(1))
