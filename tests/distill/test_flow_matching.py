"""Flow matching's loss against its definition, and what its fields may be."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax.distill import flow_matching
from tests.distill import making


@pytest.mark.parametrize("logit_mean", [None, 0.5])
def test_the_loss_is_the_regression_of_u_sample_by_sample(x64, logit_mean):
  """Against |u - (noise - x_0)|^2 written out with each sample's own key."""
  def network(params, x, t, cond):
    return jnp.tanh(params * x + flow.broadcast_to(t, x)) + flow.broadcast_to(cond["label"], x)

  def null(cond):
    return {"label": jnp.full_like(cond["label"], 7)}

  batch = {"x_0": jax.random.normal(jax.random.key(0), (32, 2, 1)), "cond": {"label": jnp.linspace(0, 1, 32)}}
  keys = jax.random.split(jax.random.key(1), 32)
  grads, metrics = flow_matching.objective(
      network, null, flow.Clock.of_shift(2.0), label_dropout=0.4, logit_mean=logit_mean, logit_std=1.5)(
          jnp.array(0.3), None, batch, keys, 0)

  def published(params):
    total = 0.0
    for i in range(32):
      key_tau, key_noise, key_drop = jax.random.split(keys[i], 3)
      if logit_mean is None:
        tau = 1 - jax.random.uniform(key_tau, ())
      else:
        tau = jax.nn.sigmoid(logit_mean + 1.5 * jax.random.normal(key_tau, ()))
      t, noise = 2 * tau / (1 + tau), jax.random.normal(key_noise, (2, 1))
      x_0, label = batch["x_0"][i], batch["cond"]["label"][i]
      label = 7.0 if jax.random.uniform(key_drop, ()) < 0.4 else label
      u = jnp.tanh(params * ((1 - t) * x_0 + t * noise) + t) + label
      total += jnp.mean((u - (noise - x_0)) ** 2)
    return total / 32

  value, want = jax.value_and_grad(published)(jnp.array(0.3))
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-9)
  np.testing.assert_allclose(grads, want, rtol=1e-9)


@pytest.mark.parametrize("name, values", {
    "label_dropout": (-1, 2, float("nan"), float("inf"), "x"), "logit_normal": ("x", 2),
    "logit_mean": (float("nan"), float("inf"), 1e30, "x"), "logit_std": (0, -1, float("nan"), 1e30),
    "solver": ("x", 0, "Kvaerno5"),
}.items())
def test_a_field_out_of_its_range_is_refused_by_name(name, values):
  parts = making.parts()
  for value in values:
    with pytest.raises(ValueError, match=rf"^{name}: .*{re.escape(str(value))}"):
      making.method(flow_matching.config(**(dict(logit_normal=True) | {name: value})), parts)


def test_what_would_have_no_effect_is_refused_by_name():
  for name, value, unset in (("logit_mean", 0.5, 0), ("logit_std", 2.0, 1)):
    with pytest.raises(ValueError, match=f"^{name}: {value} has no effect on uniform times; set {unset}"):
      making.method(flow_matching.config(**{name: value}), making.parts())
  unlabelled = making.parts(spec=making.UNLABELLED)
  with pytest.raises(ValueError, match="^label_dropout: 0.1, but the network has no null condition; set 0"):
    making.method(flow_matching.config(), unlabelled)
  assert making.method(flow_matching.config(label_dropout=0), unlabelled).passes == 3


@pytest.mark.parametrize("spec", [making.LABELLED, making.UNLABELLED], ids=["labelled", "unlabelled"])
def test_a_method_trains_and_samples_a_network(spec):
  labelled = bool(spec.cond)
  method = making.method(
      flow_matching.config(label_dropout=0.1 * labelled, solver="midpoint"), making.parts(spec=spec, shift=2.0))
  params, cond = jax.jit(method.init, static_argnums=1)(jax.random.key(0), None), making.cond(4, spec)
  assert ("class_embed" in params) == labelled
  batch, keys = {"x_0": jnp.ones((4, *making.SHAPE)), "cond": cond}, jax.random.split(jax.random.key(1), 4)
  grads, metrics = jax.jit(method.objective)(params, None, batch, keys, 0)
  assert np.isfinite(metrics["loss"]) and float(jnp.abs(grads["head"]["out"]["bias"]).max()) > 0
  x = method.flow_map(params, None, cond, method.clock.replace(nfe=2))(batch["x_0"], jnp.ones(4), jnp.full(4, 0.5))
  np.testing.assert_array_equal(x, batch["x_0"])  # a fresh network's velocity is 0
  assert method.clock == flow.Clock.of_shift(2.0) and not method.per_call and method.calls(32, 0.5) is None


def test_a_velocity_that_would_only_broadcast_is_refused():
  objective = flow_matching.objective(
      lambda params, x, t, cond: flow.broadcast_to(t, x), None, flow.Clock.of_shift(1.0))
  batch = {"x_0": jnp.zeros((3, 2, 2, 1)), "cond": {}}
  with pytest.raises(AssertionError, match="shape"):
    objective(jnp.zeros(()), None, batch, jax.random.split(jax.random.key(0), 3), 0)
