"""MeanFlow's identity where the mean velocity is known, and what its two forms differ in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from piflow_jax import flow
from piflow_jax.distill import meanflow

A = np.array([[-0.7, 1.3], [-1.1, 0.4]])


def _mean_velocity(params, x, t, t_dst, cond):
  """Of the linear flow dx/dt = A x: (x - exp(A (t_dst - t)) x) / (t - t_dst), its series written so that t = t_dst is fine."""
  del cond
  # phi(-A s) = sum_n (-A s)^n / (n + 1)!, s = t - t_dst; u = A phi(-A s) x.
  s, term, total = (t - t_dst)[:, None, None], jnp.eye(2)[None], 0
  for n in range(24):
    total = total + term
    term = term @ (-params[None] * s) / (n + 2)
  return jnp.einsum("ij,bjk,b...k->b...i", params, total, x)


def test_the_series_is_the_flow(x64):
  x, t, t_dst = jax.random.normal(jax.random.key(0), (3, 2)), jnp.array([1.0, 0.8, 0.3]), jnp.array([0.0, 0.1, 0.3])
  u = _mean_velocity(jnp.asarray(A), x, t, t_dst, None)
  for i in range(2):
    end = scipy.linalg.expm(A * float(t_dst[i] - t[i])) @ x[i]
    np.testing.assert_allclose(u[i], (x[i] - end) / float(t[i] - t_dst[i]), rtol=1e-12)
  np.testing.assert_allclose(u[2], A @ x[2], rtol=1e-12)


def test_identity_on_a_linear_field(x64):
  """V = u + (t - r) du/dt is the velocity A x wherever u is the mean velocity (eq. 6), for every t and r."""
  x = jax.random.normal(jax.random.key(0), (64, 3, 1, 2))
  t, t_dst = jax.random.uniform(jax.random.key(1), (2, 64))
  v = jnp.einsum("ij,b...j->b...i", jnp.asarray(A), x)
  u, du_dt = meanflow.total_derivative(
      lambda x, t, t_dst: _mean_velocity(jnp.asarray(A), x, t, t_dst, None), x, t, t_dst, v)
  np.testing.assert_allclose(meanflow.compound_velocity(u, du_dt, t, t_dst), v, rtol=1e-9, atol=1e-10)
  # And only along the flow: another tangent breaks it.
  _, wrong = meanflow.total_derivative(
      lambda x, t, t_dst: _mean_velocity(jnp.asarray(A), x, t, t_dst, None), x, t, t_dst, v + 1)
  assert float(jnp.abs(meanflow.compound_velocity(u, wrong, t, t_dst) - v).max()) > 0.1


@pytest.mark.parametrize("improved", [False, True])
def test_the_mean_velocity_has_no_loss_against_its_teacher(x64, improved):
  teacher = lambda params, x, t, cond: jnp.einsum("ij,b...j->b...i", jnp.asarray(A), x)
  objective = jax.jit(meanflow.objective(_mean_velocity, teacher, None, None, improved=improved, ratio=0.7))
  batch = {"x_0": jax.random.normal(jax.random.key(0), (32, 1, 1, 2)), "cond": jnp.zeros(32)}
  keys = jax.random.split(jax.random.key(1), 32)
  grads, metrics = objective(jnp.asarray(A), None, batch, keys, 0)
  assert float(metrics["error"]) < 1e-18 and float(jnp.abs(grads).max()) < 1e-7
  _, metrics = objective(jnp.asarray(A) * 1.2, None, batch, keys, 0)
  assert float(metrics["error"]) > 1e-3


@pytest.mark.parametrize("improved", [False, True])
def test_gradient_is_that_of_the_published_form(x64, improved):
  """Against |u - sg(v - (t - r) du/dt)|^2 / sg(|.|^2 + c)^p, written out from the papers sample by sample.

  du/dt is along noise - x_0 in MeanFlow, along the network's own velocity u(z, t, t) in the improved form.
  """
  def network(params, x, t, t_dst, cond):
    s = flow.broadcast_to(t - 0.5 * t_dst, x)
    return jnp.tanh(x @ params + s) * (1 + flow.broadcast_to(cond, x))

  params = jax.random.normal(jax.random.key(3), (2, 2))
  batch = {"x_0": jax.random.normal(jax.random.key(0), (16, 2)), "cond": jnp.linspace(0, 1, 16)}
  keys = jax.random.split(jax.random.key(1), 16)
  keep = lambda cond, uniform: (cond, uniform < 0)
  grads, metrics = meanflow.objective(
      network, None, keep, None, improved=improved, ratio=1.0, norm_power=0.75, norm_eps=1e-3)(params, None, batch, keys, 0)

  def published(params):
    total = 0.0
    for i in range(16):
      key_times, _, key_noise, _ = jax.random.split(keys[i], 4)
      tau = jax.nn.sigmoid(-0.4 + jax.random.normal(key_times, (2,)))
      t, r, noise = tau.max(), tau.min(), jax.random.normal(key_noise, (2,))
      x_0, cond = batch["x_0"][i], batch["cond"][i]
      u_of = lambda z, r, t: jnp.tanh(z @ params + (t - 0.5 * r)) * (1 + cond)
      v, z = noise - x_0, (1 - t) * x_0 + t * noise
      u, du_dt = jax.jvp(u_of, (z, r, t), (u_of(z, t, t) if improved else v, 0.0, 1.0))
      error = u - jax.lax.stop_gradient(v - (t - r) * du_dt)
      total += jnp.sum(error**2) / jax.lax.stop_gradient(jnp.sum(error**2) + 1e-3) ** 0.75
    return total / 16

  value, want = jax.value_and_grad(published)(params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-9)
  np.testing.assert_allclose(grads, want, rtol=1e-8)


def test_guidance_on_data_mixes_in_the_networks_own_null_velocity():
  """A network that says 5 for the null class and v's mean for no other: at w = 2 the target is 2 v - 5, at dropped ones v."""
  network = lambda params, x, t, t_dst, cond: params + 5.0 * flow.broadcast_to(cond, x) + 0 * x
  drop = lambda cond, uniform: (jnp.where(uniform < 0.5, 1.0, cond), uniform < 0.5)
  batch = {"x_0": jnp.zeros((4000, 1, 1, 1)), "cond": jnp.zeros(4000)}
  keys = jax.random.split(jax.random.key(0), 4000)
  error = lambda w: float(meanflow.objective(
      network, None, drop, jnp.ones_like, ratio=0.0, guidance_scale=w)(jnp.zeros(()), None, batch, keys, 0)[1]["error"])
  # Errors: kept samples 0 - (w v - (w - 1) 5), dropped ones 5 - v; v is noise, of mean 0 and variance 1.
  np.testing.assert_allclose(error(1.0), 0.5 * 1 + 0.5 * 26, rtol=0.06)
  np.testing.assert_allclose(error(2.0), 0.5 * (4 + 25) + 0.5 * 26, rtol=0.06)
