"""The sampler against the authors' scheduler vectors and flows with closed forms."""

import functools
import sys

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
    final_scale = float(data["final_step_size_scale"][i])
    plan = sampler.step_plan(flow.Clock(shift, 128, n, final_scale), float(data["h"][i]))
    for got, name, first in ((1000 * plan["t"], "timesteps", 0), (plan["t_next"], "sigmas", 1),
                             (1000 * plan["t_dst"], "timesteps_dst", 0), (plan["m"], "m_vals", 0)):
      np.testing.assert_allclose(
          got, data[name][i][first:first + n], rtol=2e-5, atol=2e-6, err_msg=f"row {i} {name}")
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
  plan = sampler.step_plan(flow.Clock(shift, 128, nfe, 0.5), h)
  mean, std = 0.0, 1.0
  for t, t_dst, t_next, m in zip(*(plan[k] for k in ("t", "t_dst", "t_next", "m"))):
    high, low = (_gaussian_map(mean + s * std, t, t_dst) for s in (1, -1))
    mean, std = sampler.renoise((high + low) / 2, 0, t_next, m), sampler.renoise((high - low) / 2, 0, t_next, m)
    std = np.hypot(std, sampler.renoise(0, 1, t_next, m))
    np.testing.assert_allclose([mean, std], [(1 - t_next) * MEAN, _spread(t_next)], atol=1e-12)
  np.testing.assert_allclose([mean, std], [MEAN, STD], atol=1e-12)


@pytest.mark.parametrize("h", [0.0, 0.5, 1.0, float("inf")])
def test_sampling_keeps_a_gaussians_marginal(h):
  clock = flow.Clock(3.2, 128, 4, 1.0)

  def flow_map(x, tau_src, tau_dst):
    return _gaussian_map(x, *(flow.broadcast_to(clock.warp(tau), x) for tau in (tau_src, tau_dst)))

  draws = 200_000
  noise = jax.random.normal(jax.random.key(0), (draws, 1))
  x = sampler.sample(flow_map, noise, jax.random.split(jax.random.key(1), draws), clock, h=h)
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
  def flow_map(x, tau_src, tau_dst):
    clock = flow.Clock.of_shift(3.2)
    return _nonlinear_end(x, *(flow.broadcast_to(clock.warp(tau), x) for tau in (tau_src, tau_dst)))

  noise = jnp.linspace(0.2, 2, 6).reshape(3, 2)
  for nfe in (1, 2, 3, 8):
    x = sampler.sample(flow_map, noise, None, flow.Clock(3.2, 128, nfe, final_scale))
    np.testing.assert_allclose(x, _nonlinear_end(noise, 1, 0), rtol=1e-12)


@pytest.mark.parametrize("method, order, calls", [
    ("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2), ("Ralston", 2, 2), ("Bosh3", 3, 4), ("Dopri5", 5, 7),
    ("Tsit5", 5, 7)])
def test_order_and_network_calls_of_each_method(x64, method, order, calls):
  counted = []

  def velocity(x, t):
    jax.debug.callback(lambda: counted.append(1))
    return _nonlinear(x, t)

  noise, clock = jnp.linspace(0.5, 2, 6).reshape(3, 2), flow.Clock.of_shift(2.0)
  flow_map = sampler.velocity_flow_map(velocity, clock, method)
  wrong = []
  for nfe in (8, 16):
    x = jax.jit(functools.partial(sampler.sample, flow_map, clock=clock.replace(nfe=nfe), keys=None))(noise)
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
  maps = [sampler.velocity_flow_map(_nonlinear, flow.Clock.of_shift(2.0), m) for m in (own, other)]
  got, want = (flow_map(x, tau_src, tau_dst) for flow_map in maps)
  np.testing.assert_allclose(got, want, rtol=1e-14)
  np.testing.assert_array_equal(got[2], x[2])  # no way to go


def test_unknown_solvers_are_named_in_one_line(monkeypatch):
  clock = flow.Clock.of_shift(1.0)
  for method in ("rk4", "Kvaerno5", "AbstractERK", "diffeqsolve"):
    with pytest.raises(ValueError, match=f"^method: '{method}' .* no explicit Runge-Kutta"):
      sampler.velocity_flow_map(_nonlinear, clock, method)
  monkeypatch.setitem(sys.modules, "diffrax", None)
  with pytest.raises(ValueError, match="^method: 'Tsit5' .* installed: pip install"):
    sampler.velocity_flow_map(_nonlinear, clock, "Tsit5")


def test_velocity_flow_map_is_eulers_method():
  u = lambda x, t: x * t[:, None]
  clock = flow.Clock(3.0, 128, 3, 1.0)
  got = sampler.sample(sampler.velocity_flow_map(u, clock), jnp.ones((2, 1)), None, clock)
  x, tau = 1.0, [1, 2 / 3, 1 / 3, 0]
  for a, b in zip(tau[:-1], tau[1:]):
    x += x * clock.warp(a) * (clock.warp(b) - clock.warp(a))
  np.testing.assert_allclose(got, jnp.full((2, 1), x), rtol=1e-6)


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_mean_flow_map_of_exact_mean_velocities_is_exact(x64, nfe):
  """u = A x flows by exp((t_dst - t) A); its mean velocity in closed form."""
  matrix = jnp.array([[0.3, -1.2], [0.8, -0.5]])

  def network(x, t, t_dst):
    step = lambda x, length: (jax.scipy.linalg.expm(length * matrix) @ x - x) / length
    return jax.vmap(step)(x, t_dst - t)

  noise = jnp.linspace(-1, 2, 6).reshape(3, 2)
  clock = flow.Clock(3.2, 128, nfe, 1.0)
  x = sampler.sample(sampler.mean_flow_map(network, clock), noise, None, clock)
  np.testing.assert_allclose(x, noise @ jax.scipy.linalg.expm(-matrix).T, rtol=1e-12)


@pytest.mark.parametrize("h", [0.0, 0.7, float("inf")])
def test_a_sample_does_not_depend_on_its_neighbours(h):
  """In another batch, at another place, a sample is the same but for rounding; beside another one, to the bit."""
  noise, keys = jax.random.normal(jax.random.key(0), (6, 3, 2)), jax.random.split(jax.random.key(1), 6)
  clock = flow.Clock(3.2, 128, 4, 1.0)
  flow_map = sampler.velocity_flow_map(_nonlinear, clock)
  draw = jax.jit(lambda noise, keys: sampler.sample(flow_map, noise, keys, clock, h=h))
  together = draw(noise, keys)
  for rows in ([4], [5, 4, 0]):
    rows = np.array(rows)
    np.testing.assert_allclose(draw(noise[rows], keys[rows]), together[rows], rtol=1e-5, atol=1e-6)
  other = draw(noise, keys.at[4].set(jax.random.key(7)))
  changed = np.asarray(other != together).any((1, 2))
  np.testing.assert_array_equal(changed, (np.arange(6) == 4) & (h > 0))


def test_every_step_draws_anew():
  """Maps that forget where they came from: what is left is each step's noise, of which h = inf keeps the last."""
  clock, drawn = flow.Clock(1.0, 128, 3, 1.0), []

  def flow_map(x, tau_src, tau_dst):
    jax.debug.callback(lambda x: drawn.append(np.asarray(x)), x)
    return jnp.zeros_like(x)

  sampler.sample(flow_map, jnp.zeros((2, 4)), jax.random.split(jax.random.key(0), 2), clock, h=float("inf"))
  jax.effects_barrier()
  seen = np.array(sorted(drawn, key=lambda x: np.abs(x).sum()))
  assert len(seen) == 3 and not seen[0].any()
  units = (seen[1:] / np.linalg.norm(seen[1:], axis=-1, keepdims=True)).reshape(4, 4)  # two steps, two samples
  assert np.abs(units @ units.T - np.eye(4)).max() < 0.999


def test_h_must_be_a_stochasticity():
  for h in (-1.0, float("nan")):
    with pytest.raises(ValueError, match="^h: "):
      sampler.sample(lambda x, a, b: x, jnp.ones((1, 1)), None, flow.Clock.of_shift(1.0), h=h)


def test_a_flow_map_of_another_shape_is_refused():
  with pytest.raises(AssertionError, match="shape"):
    sampler.sample(lambda x, a, b: x[:, :1], jnp.ones((1, 2)), None, flow.Clock.of_shift(1.0))


def test_batches_have_one_shape_and_lose_nothing():
  rows, squares = np.arange(7), np.arange(14).reshape(7, 2)
  parts = sampler.batches(3, rows, squares)
  assert [part[0].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 0, 1]]
  np.testing.assert_array_equal(np.concatenate([part[1] for part in parts])[:7], squares)
  assert [part[0].tolist() for part in sampler.batches(5, np.arange(2))] == [[0, 1, 0, 1, 0]]  # fewer than a batch
