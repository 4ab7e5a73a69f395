"""MeanFlow's identity where the mean velocity is known, and what its two forms differ in."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from piflow_jax import flow
from piflow_jax.distill import meanflow
from tests.distill import making

CLOCK = flow.Clock.of_shift(1.0)
A = np.array([[-0.7, 1.3], [-1.1, 0.4]])


def _mean_velocity(params, x, t, cond, t_dst):
  """Of the linear flow dx/dt = A x: (x - exp(A (t_dst - t)) x) / (t - t_dst), a series that t = t_dst is in too."""
  del cond
  # phi(-A s) = sum_n (-A s)^n / (n + 1)!, s = t - t_dst; u = A phi(-A s) x.
  s, term, total = (t - t_dst)[:, None, None], jnp.eye(2)[None], 0
  for n in range(24):
    total = total + term
    term = term @ (-params[None] * s) / (n + 2)
  return jnp.einsum("ij,bjk,b...k->b...i", params, total, x)


def test_the_series_is_the_flow(x64):
  x, t, t_dst = jax.random.normal(jax.random.key(0), (3, 2)), jnp.array([1.0, 0.8, 0.3]), jnp.array([0.0, 0.1, 0.3])
  u = _mean_velocity(jnp.asarray(A), x, t, {}, t_dst)
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
      lambda x, t, t_dst: _mean_velocity(jnp.asarray(A), x, t, {}, t_dst), x, t, t_dst, v)
  np.testing.assert_allclose(meanflow.compound_velocity(u, du_dt, t, t_dst), v, rtol=1e-9, atol=1e-10)
  # And only along the flow: another tangent breaks it.
  _, wrong = meanflow.total_derivative(
      lambda x, t, t_dst: _mean_velocity(jnp.asarray(A), x, t, {}, t_dst), x, t, t_dst, v + 1)
  assert float(jnp.abs(meanflow.compound_velocity(u, wrong, t, t_dst) - v).max()) > 0.1


@pytest.mark.parametrize("improved", [False, True])
def test_the_mean_velocity_has_no_loss_against_its_teacher(x64, improved):
  def teacher(params, x, t, cond):
    return jnp.einsum("ij,b...j->b...i", jnp.asarray(A), x)

  objective = jax.jit(meanflow.objective(
      _mean_velocity, teacher, None, CLOCK, improved=improved, times=meanflow.Times(ratio=0.7)))
  batch = {"x_0": jax.random.normal(jax.random.key(0), (32, 1, 1, 2)), "cond": {}}
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
  def network(params, x, t, cond, t_dst):
    s = flow.broadcast_to(t - 0.5 * t_dst, x)
    return jnp.tanh(x @ params + s) * (1 + flow.broadcast_to(cond["label"], x))

  params = jax.random.normal(jax.random.key(3), (2, 2))
  batch = {"x_0": jax.random.normal(jax.random.key(0), (16, 2)), "cond": {"label": jnp.linspace(0, 1, 16)}}
  keys = jax.random.split(jax.random.key(1), 16)
  grads, metrics = meanflow.objective(
      network, None, None, CLOCK, times=meanflow.Times(ratio=1.0), weight=meanflow.Weight(0.75, 1e-3),
      improved=improved)(params, None, batch, keys, 0)

  def published(params):
    total = 0.0
    for i in range(16):
      key_times, _, key_noise, _ = jax.random.split(keys[i], 4)
      tau = jax.nn.sigmoid(-0.4 + jax.random.normal(key_times, (2,)))
      t, r, noise = tau.max(), tau.min(), jax.random.normal(key_noise, (2,))
      x_0, cond = batch["x_0"][i], batch["cond"]["label"][i]

      def u_of(z, r, t, cond=cond):
        return jnp.tanh(z @ params + (t - 0.5 * r)) * (1 + cond)

      v, z = noise - x_0, (1 - t) * x_0 + t * noise
      u, du_dt = jax.jvp(u_of, (z, r, t), (u_of(z, t, t) if improved else v, 0.0, 1.0))
      error = u - jax.lax.stop_gradient(v - (t - r) * du_dt)
      total += jnp.sum(error**2) / jax.lax.stop_gradient(jnp.sum(error**2) + 1e-3) ** 0.75
    return total / 16

  value, want = jax.value_and_grad(published)(params)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-9)
  np.testing.assert_allclose(grads, want, rtol=1e-8)


def test_guidance_on_data_mixes_in_the_networks_own_null_velocity():
  """A network that says 5 for the null class, 0 for others: at w = 2 the target is 2 v - 5, where dropped v."""
  def network(params, x, t, cond, t_dst):
    return params + 5.0 * flow.broadcast_to(cond["label"], x) + 0 * x

  def null(cond):
    return {"label": jnp.ones_like(cond["label"])}

  batch = {"x_0": jnp.zeros((4000, 1, 1, 1)), "cond": {"label": jnp.zeros(4000)}}
  keys = jax.random.split(jax.random.key(0), 4000)

  def error(w):
    objective = meanflow.objective(network, None, null, CLOCK, times=meanflow.Times(ratio=0.0), label_dropout=0.5,
                                   guidance_scale=w)
    return float(objective(jnp.zeros(()), None, batch, keys, 0)[1]["error"])

  # Errors: kept samples 0 - (w v - (w - 1) 5), dropped ones 5 - v; v is noise, of mean 0 and variance 1.
  np.testing.assert_allclose(error(1.0), 0.5 * 1 + 0.5 * 26, rtol=0.06)
  np.testing.assert_allclose(error(2.0), 0.5 * (4 + 25) + 0.5 * 26, rtol=0.06)


@functools.cache
def _parts():
  return making.parts(shift=2.0)


@pytest.mark.parametrize("name, values", {
    "improved": ("x", 2), "target": ("x", 0), "ratio": (-1, 1.5, float("nan"), "x"),
    "logit_mean": (float("nan"), float("inf"), 1e30, "x"), "logit_std": (0, -1, float("nan"), float("inf"), 1e30),
    "norm_power": (-1, float("nan"), float("inf"), 1e30, "x"), "norm_eps": (0, -1, float("nan"), 1e30),
    "label_dropout": (-1, 2, float("nan"), "x"), "guidance_scale": (-1, float("nan"), float("inf"), 1e30, "x"),
}.items())
def test_a_field_out_of_its_range_is_refused_by_name(name, values):
  parts = _parts()
  for value in values:
    with pytest.raises(ValueError, match=rf"^{name}: .*{re.escape(str(value))}"):
      making.method(meanflow.config(**{name: value}), parts)


@pytest.mark.parametrize("fields, changed, words", [
    (dict(target="teacher"), dict(teacher=None), "^target: .*config.teacher is not set"),
    (dict(target="teacher", guidance_scale=2.0), {}, "^guidance_scale: 2.0 .*config.teacher.guidance_scale, set 1"),
    (dict(target="teacher", label_dropout=0.3), {}, "^label_dropout: 0.3 .*set 0"),
    ({}, dict(null=None), "^label_dropout: 0.1.*set 0"),
    (dict(label_dropout=0, guidance_scale=2.0), dict(null=None), "^guidance_scale: 2.0.*set 1"),
    ({}, dict(two_times=None), "^make: .*two times.*"),
])
def test_what_would_have_no_effect_is_refused_by_name(fields, changed, words):
  with pytest.raises(ValueError, match=words):
    making.method(meanflow.config(**fields), _parts()._replace(**changed))


def test_a_teachers_guidance_has_no_effect_on_data():
  parts = making.parts(teacher=dict(guidance_scale=2.0))
  with pytest.raises(ValueError, match='^target: "data".*guidance'):
    making.method(meanflow.config(), parts)
  assert making.method(meanflow.config(target="teacher"), parts).passes == 4 + 2


@pytest.mark.parametrize("fields, passes", [
    ({}, 4), (dict(improved=True), 5), (dict(guidance_scale=2.0), 5), (dict(target="teacher", improved=True), 6)])
def test_a_method_counts_its_passes(fields, passes):
  """Forward 1, backward 2, derivative 1; the improved form's own tangent 1; the label's network calls."""
  method = making.method(meanflow.config(**fields), _parts())
  assert method.passes == passes and not method.per_call and method.calls(7, 1.0) is None
  assert method.clock == flow.Clock.of_shift(2.0)


def test_a_model_starts_as_its_teacher_where_there_is_one_to_start_from():
  parts = _parts()
  params, key = making.teacher_params(), jax.random.key(2)
  x, t, cond = jax.random.normal(key, (2, *making.SHAPE)), jnp.array([0.3, 0.9]), making.cond(2)
  want = parts.velocity.apply(params, x, t, cond)
  started = jax.jit(making.method(meanflow.config(), parts).init)(key, params)
  np.testing.assert_array_equal(parts.two_times.apply(started, x, t, cond, t / 2), want)
  fresh = jax.jit(parts.two_times.init)(key)
  for given, init_from in ((parts, None), (parts._replace(inherits=False), params)):
    init = jax.jit(making.method(meanflow.config(), given).init)
    jax.tree.map(np.testing.assert_array_equal, init(key, init_from), fresh)


def test_a_network_without_conditions_is_trained_on_data():
  parts = making.parts(spec=making.UNLABELLED)
  method = making.method(meanflow.config(label_dropout=0, improved=True), parts)
  batch = {"x_0": jax.random.normal(jax.random.key(0), (4, *making.SHAPE)), "cond": {}}
  params = making.teacher_params(making.UNLABELLED)
  params = jax.jit(method.init)(jax.random.key(1), params)
  _, metrics = jax.jit(method.objective)(params, None, batch, jax.random.split(jax.random.key(2), 4), 0)
  assert float(metrics["error"]) > 0


def test_a_velocity_that_would_only_broadcast_is_refused():
  objective = meanflow.objective(lambda params, x, t, cond, t_dst: flow.broadcast_to(t, x), None, None, CLOCK)
  batch = {"x_0": jnp.zeros((3, 2, 2, 1)), "cond": {}}
  with pytest.raises(AssertionError, match="shape"):
    objective(jnp.zeros(()), None, batch, jax.random.split(jax.random.key(0), 3), 0)
