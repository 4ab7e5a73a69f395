"""A GM policy with K = N C components follows any trajectory of N steps (pi-Flow, arXiv 2510.14974, theorem on it).

Why: let the components have no width. At step n the posterior mean is m_n if sum_k w_k L_n(mu_k) (mu_k - m_n) = 0, with
L_n(mu) = exp(mu . nu_n - zeta_n |mu|^2 / 2): N C equations that are linear in the weights. Zero lies in the convex hull
of the vectors V(mu) = (L_n(mu) (mu - m_n))_n: were there a c with c . V(mu) > 0 everywhere, then far out the term of
the least zeta_n with c_n != 0 would rule, and its sign turns with mu's. By Caratheodory some N C + 1 of them hold zero;
as the V(mu) are a connected set, N C do (Fenchel and Bunt). Built as the proof goes: a vertex of the linear program
over a net of means, then means and weights moved until one component is gone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy import special

from piflow_jax import flow
from piflow_jax import teacher
from piflow_jax.policy import gmm
from piflow_jax.policy import rollout

EPS = 1e-6


def _trajectory(seed, steps, channels):
  """N Euler steps of an analytic teacher from noise at one position: points, noise levels, x_0 estimates."""
  key = jax.random.split(jax.random.key(seed), 2)
  mixture = teacher.GaussianMixture(1.5 * jax.random.normal(key[0], (4, channels)), 0.2, jnp.zeros(4))
  x, t = np.asarray(jax.random.normal(key[1], (1, channels))), 1 - np.arange(steps + 1) / steps
  points, estimates = [x[0]], []
  for now, then in zip(t, t[1:]):
    u = np.asarray(teacher.gaussian_mixture_teacher(mixture, jnp.asarray(x), jnp.array([now])))
    estimates.append((x - now * u)[0])
    x = x + (then - now) * u
    points.append(x[0])
  return np.array(points), t, np.array(estimates)


def _conditions(means, points, t, estimates):
  """log L_n(mu_k) [N, K], as the policy has it, and mu_k - m_n [N, K, C]."""
  a = (1 - t[:-1]) / t[:-1]
  zeta, nu = a**2 - a[0] ** 2, (a / t[:-1])[:, None] * points[:-1] - a[0] / t[0] * points[0]
  log_l = nu @ means.T - zeta[:, None] * np.sum(means**2, 1) / 2
  return log_l, means[None] - estimates[:, None]


def _build(points, t, estimates):
  """(means [N C, C], log weights [N C]) whose posterior means are the estimates."""
  steps, channels = estimates.shape
  axis = np.linspace(-4, 4, 41 if channels == 2 else 401)
  net = np.stack(np.meshgrid(*[axis] * channels, indexing="ij"), -1).reshape(-1, channels)
  log_l, away = _conditions(net, points, t, estimates)
  rows = np.exp(log_l - log_l.max(1, keepdims=True))[:, :, None] * away
  rows = rows.transpose(0, 2, 1).reshape(steps * channels, -1)
  rows /= np.abs(rows).max(1, keepdims=True)
  vertex = optimize.linprog(
      np.zeros(len(net)), A_eq=np.vstack([rows, np.ones(len(net))]), b_eq=np.append(np.zeros(len(rows)), 1.0),
      method="highs-ds").x
  kept = np.argsort(-vertex)[:steps * channels]  # a vertex has at most N C + 1
  start = np.concatenate([net[kept].ravel(), np.log(np.maximum(vertex[kept], 1e-6))])

  def residual(free):
    means, logweights = free[:-len(kept)].reshape(-1, channels), free[-len(kept):]
    log_l, away = _conditions(means, points, t, estimates)
    return np.einsum("nk,nkc->nc", special.softmax(logweights + log_l, axis=1), away).ravel()

  solved = optimize.least_squares(residual, start, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=2000).x
  return solved[:-len(kept)].reshape(-1, channels), special.log_softmax(solved[-len(kept):])


@pytest.mark.parametrize("steps, channels", [(2, 1), (6, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_as_many_components_as_steps_times_channels_follow_any_trajectory(x64, steps, channels, seed):
  points, t, estimates = _trajectory(seed, steps, channels)
  means, logweights = _build(points, t, estimates)
  assert means.shape == (steps * channels, channels)
  policy = gmm.GMPolicy(
      jnp.asarray(means.T)[None, :, :, None], jnp.asarray(logweights)[None, :, None], jnp.array([1e-14]),
      jnp.asarray(points[0])[None, :, None], jnp.ones(1), EPS)
  x, clock = jnp.asarray(points[0]).reshape(1, 1, 1, channels), flow.Clock(1.0, steps, 1, 1.0)
  for n in range(1, steps + 1):
    got = rollout.rollout(policy, x, jnp.ones(1), jnp.array([t[n]]), clock)
    np.testing.assert_allclose(np.ravel(got), points[n], atol=1e-6)


def test_one_component_cannot(x64):
  """What the construction is for: the best single Gaussian is far from a trajectory that turns."""
  points, t, estimates = _trajectory(0, 6, 2)

  def end(free):
    means, var = jnp.asarray(free[:2]).reshape(1, 2, 1, 1), jnp.exp(jnp.asarray(free[2:]))
    policy = gmm.GMPolicy(
        means, jnp.zeros((1, 1, 1)), var, jnp.asarray(points[0])[None, :, None], jnp.ones(1), EPS)
    x = jnp.asarray(points[0]).reshape(1, 1, 1, 2)
    clock = flow.Clock(1.0, 6, 1, 1.0)
    ends = [rollout.rollout(policy, x, jnp.ones(1), jnp.array([s]), clock).ravel() for s in t[1:]]
    return jnp.concatenate(ends) - points[1:].ravel()

  best = optimize.least_squares(jax.jit(end), np.array([*estimates[-1], 0.0]), jac=jax.jit(jax.jacobian(end)))
  assert np.abs(best.fun).max() > 1e-2
