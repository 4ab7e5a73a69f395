"""Rollout and average velocity against the authors' vectors, a closed form, and a loop written out."""

import operator

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax.policy import gmm
from piflow_jax.policy import rollout as lib
from tests import golden


def _clock(substeps):
  return flow.Clock.of_shift(1.0).replace(total_substeps=substeps)


def _case(data, case):
  # The authors count substeps in float32, where some of the lengths here sit on the edge of rounding.
  times = {k: jnp.asarray(data[f"{case}_{k}"]) for k in ("raw_t_start", "raw_t_end", "raw_t_src", "avg_raw_t_end")}
  shift, x_src = float(data[f"{case}_shift"]), data[f"{case}_x_t_src"]
  if case.startswith("gm"):
    output = golden.mixture(data, f"{case}_den_")
    policy_at = lambda output, t_src: gmm.to_policy(output, golden.nhwc(x_src), t_src, eps=1e-6)
  else:
    output = jnp.asarray(data[f"{case}_den"])
    settings = dict(segment=float(data[f"{case}_policy_segment_size"]), polynomial=case.startswith("poly"))
    own = flow.Clock.of_shift(float(data[f"{case}_policy_shift"]))
    policy_at = lambda output, t_src: golden.dx_policy(output, x_src, t_src, own, **settings)
  return output, policy_at, times, golden.nhwc(data[f"{case}_x_t_start"]), flow.Clock.of_shift(shift)


CASES = ["gm_s1", "gm_s3.2", "dx_s1", "dx_s3.2", "poly_s3.2"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_rollout_vectors(case, dtype, rtol):
  with jax.enable_x64(dtype == np.float64):
    data = golden.load("rollout", dtype)
    want = golden.load("rollout", np.float64)
    output, policy_at, times, x, clock = _case(data, case)
    policy = policy_at(output, golden.scalars(data[f"{case}_sigma_t_src"]))
    n = np.maximum(lib.count_substeps(times["raw_t_start"], times["raw_t_end"], 128), 1)
    np.testing.assert_array_equal(n, data[f"{case}_num_substeps"])
    run = jax.jit(lambda policy, x, a, b: lib.rollout(policy, x, a, b, clock))
    got = run(policy, x, times["raw_t_start"], times["raw_t_end"])
    np.testing.assert_allclose(got, golden.nhwc(want[f"{case}_x_t_end"]), rtol=rtol, atol=rtol)

    policy = policy_at(output, clock.warp(times["raw_t_src"]))
    got = run(policy, golden.nhwc(data[f"{case}_x_t_src"]), times["raw_t_src"], jnp.zeros_like(times["raw_t_src"]))
    np.testing.assert_allclose(got, golden.nhwc(want[f"{case}_fromsrc_x_t_end"]), rtol=rtol, atol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_average_velocity_vectors(x64, case):
  data = golden.load("rollout", np.float64)
  output, policy_at, times, x, clock = _case(data, case)
  t_src = golden.scalars(data[f"{case}_sigma_t_src"])

  @jax.jit
  def mean_velocity(output, tau_end):
    return lib.average_velocity(policy_at(output, t_src), x, times["raw_t_start"], tau_end, clock)

  got = mean_velocity(output, times["avg_raw_t_end"])
  np.testing.assert_allclose(got, golden.nhwc(data[f"{case}_avg_u"]), rtol=1e-8, atol=1e-9)
  small = mean_velocity(output, jnp.asarray(data[f"{case}_avg_small_raw_t_end"]))
  np.testing.assert_allclose(small, golden.nhwc(data[f"{case}_avg_small_u"]), rtol=1e-8, atol=1e-9)

  cotangent = golden.nhwc(data[f"{case}_cotangent"])
  grads = jax.grad(lambda m: jnp.sum(mean_velocity(m, times["avg_raw_t_end"]) * cotangent))(output)
  want = golden.mixture(data, f"{case}_avg_grad_") if case.startswith("gm") else data[f"{case}_avg_grad_den"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), grads, want)


def test_single_gaussian_rollout_is_the_linear_flow(x64):
  """K = 1 from pure noise: x_t = (1 - t) mu + s(t) x_1 with s = sqrt((1 - t)^2 v + t^2), exactly, as substeps grow."""
  mu, v = jnp.full((1, 1, 1, 4), 1.5), jnp.array([0.09])
  policy = gmm.GMPolicy(mu, jnp.zeros((1, 1, 4)), v, jnp.zeros((1, 1, 4)), jnp.ones(1), 1e-6)
  x = jnp.array([-1.0, 0.0, 0.5, 2.0]).reshape(1, 2, 2, 1)
  tau = jnp.array([0.4])
  errors = []
  for substeps in (256, 512):
    got = lib.rollout(policy, x, jnp.ones(1), tau, _clock(substeps))
    want = 0.6 * 1.5 + jnp.sqrt(0.36 * 0.09 + 0.16) * x
    errors.append(float(jnp.abs(got - want).max()))
  assert errors[0] < 2e-3
  np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.02)  # Euler is of first order


def test_samples_that_are_done_hold_still_and_the_rest_go_on():
  """Three lengths in one batch equal three rollouts of one."""
  key = jax.random.split(jax.random.key(0), 3)
  b = 3
  policy = gmm.GMPolicy(
      jax.random.normal(key[0], (b, 2, 4, 6)), jax.nn.log_softmax(jax.random.normal(key[1], (b, 4, 6)), 1),
      jnp.full(b, 0.1), jnp.zeros((b, 2, 6)), jnp.ones(b), 1e-6)
  x = jax.random.normal(key[2], (b, 2, 3, 2))
  src, dst = jnp.array([1.0, 0.5, 0.9]), jnp.array([0.9, 0.0, 0.9])
  together = lib.rollout(policy, x, src, dst, _clock(32))
  for i in range(b):
    one = slice(i, i + 1)
    alone = lib.rollout(jax.tree.map(operator.itemgetter(one), policy), x[one], src[one], dst[one], _clock(32))
    np.testing.assert_allclose(together[one], alone, rtol=1e-6, atol=1e-6)
  bounded = lib.rollout(policy, x, src, dst, _clock(32), max_substeps=16)
  np.testing.assert_array_equal(together, bounded)


def test_samples_that_are_done_wait_at_a_time_of_their_own():
  @flax.struct.dataclass
  class Until:
    end: jax.Array

    def velocity(self, x, t):
      return flow.broadcast_to(jnp.where(t > self.end, 1.0, jnp.nan), x) * jnp.ones_like(x)

  src, dst = jnp.array([1.0, 0.5, 0.9]), jnp.array([0.75, 0.0, 0.65])
  run = lambda x: lib.rollout(Until(dst), x, src, dst, _clock(32))
  want = -(src - dst)[:, None, None, None]
  np.testing.assert_allclose(run(jnp.zeros((3, 1, 1, 1))), want, rtol=1e-6)
  np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(run(x)))(jnp.zeros((3, 1, 1, 1))), 1.0)


@pytest.mark.slow
def test_rollout_is_the_exact_flow_when_the_mixture_is_the_data(x64):
  """Data: five Gaussians in a plane. The policy from pure noise with that mixture, against scipy on the exact flow."""
  from scipy import integrate
  import scipy.special

  mu = np.array(jax.random.normal(jax.random.key(0), (2, 5)))  # [C, K]
  weights, var = np.array([0.1, 0.3, 0.2, 0.25, 0.15]), 0.04
  noise = np.array(jax.random.normal(jax.random.key(1), (2, 6)))

  def exact_velocity(t, x):  # E[noise - x_0 | x_t = x], by Bayes' rule over components of the marginal at t
    x, a = x.reshape(2, 6), 1 - t
    total = a**2 * var + t**2
    distance = x[:, None] - a * mu[:, :, None]
    w = scipy.special.softmax(np.log(weights)[:, None] - (distance**2).sum(0) / (2 * total), axis=0)
    x_0 = (w * (mu[:, :, None] + a * var / total * distance)).sum(1)
    return ((x - x_0) / t).ravel()

  end = 0.01
  exact = integrate.solve_ivp(exact_velocity, (1, end), noise.ravel(), rtol=1e-10, atol=1e-10).y[:, -1].reshape(2, 6)
  policy = gmm.GMPolicy(
      jnp.broadcast_to(jnp.asarray(mu)[None, :, :, None], (1, 2, 5, 6)),
      jnp.broadcast_to(jnp.log(jnp.asarray(weights))[None, :, None], (1, 5, 6)), jnp.array([var]),
      jnp.asarray(noise)[None], jnp.ones(1), 1e-6)
  x = gmm.from_positions(jnp.asarray(noise)[None], (1, 2, 3, 2))
  end = jnp.array([end])
  run = lambda n: np.asarray(gmm.to_positions(lib.rollout(policy, x, jnp.ones(1), end, _clock(n))))[0]
  coarse, fine = run(2048), run(4096)
  # Euler is of first order, and its limit is the exact flow.
  np.testing.assert_allclose(np.abs(coarse - exact).max() / np.abs(fine - exact).max(), 2, rtol=0.1)
  np.testing.assert_allclose(2 * fine - coarse, exact, atol=1.5e-5)


def test_gradients_of_a_window_near_the_data_keep_float32s_digits():
  rng = np.random.default_rng(0)
  drawn = [rng.standard_normal(shape) for shape in ((4, 4, 8, 16), (4, 8, 16), *[(4, 4, 4, 4)] * 3)]

  def loss(trained, tau, x_0, noise, weight, substeps):
    means, logweights, logstd = trained
    t = jnp.full(4, tau)
    policy = gmm.to_policy(gmm.Mixture(means, jax.nn.log_softmax(logweights, axis=1), logstd), noise, jnp.ones_like(t))
    x = (1 - tau) * x_0 + tau * noise
    return jnp.sum(weight * lib.average_velocity(policy, x, t, t - 3 / substeps, _clock(substeps), max_substeps=3))

  def gradients(dtype):
    means, logweights, *rest = (jnp.asarray(a, dtype) for a in drawn)
    gradient = jax.jit(jax.grad(loss), static_argnums=5)
    trained = means, logweights, jnp.full(4, -1.0, dtype)
    return [jax.device_get(gradient(trained, jnp.asarray(tau, dtype), *rest, substeps))
            for tau, substeps in ((0.0234, 128), (0.004, 1024), (0.0015, 2048))]

  with jax.enable_x64(True):
    exact = gradients(jnp.float64)
  for got, want in zip(jax.tree.leaves(gradients(jnp.float32)), jax.tree.leaves(exact), strict=True):
    # With a derivative through the reference point this is missed up to a thousandfold.
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())
