"""Flow matching (Lipman et al., arXiv 2210.02747): how a teacher is trained in the first place."""

import chex
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax.distill import method as method_lib
from piflow_jax.distill import segments

FREE = ("solver",)  # how a trained model is sampled: may change on a restart


def config(**fields):
  """A teacher by flow matching."""
  return config_lib.noun(make, dict(
      label_dropout=0.1,  # chance that a sample's condition is dropped, which guidance needs; 0 without a condition
      logit_normal=False,  # draw times logit-normally rather than uniformly
      logit_mean=0.0,  # of the logit-normal times
      logit_std=1.0,  # of the logit-normal times
      # Of the steps that the model is sampled in: "euler", "midpoint", "heun", or a solver of diffrax, e.g. "Tsit5".
      # Evaluation takes Euler steps, so that its network calls are what it says.
      solver="euler",
  ), fields)


def make(parts, *, label_dropout, logit_normal, logit_mean, logit_std, solver):
  """The Method. Raises ValueError for a field that is out of its range or has no effect."""
  config_lib.number("label_dropout", label_dropout, least=0, most=1)
  config_lib.one_of("logit_normal", logit_normal, (True, False))
  config_lib.number("logit_mean", logit_mean)
  config_lib.number("logit_std", logit_std, above=0)
  if not logit_normal and (logit_mean, logit_std) != (0, 1):
    name, value, default = ("logit_mean", logit_mean, 0) if logit_mean != 0 else ("logit_std", logit_std, 1)
    raise ValueError(f"{name}: {value} has no effect on uniform times; set {default}, or logit_normal=True")
  if parts.null is None and label_dropout:
    raise ValueError(f"label_dropout: {label_dropout}, but the network has no null condition; set 0")
  clock = flow.Clock.of_shift(parts.shift)
  apply = parts.velocity.apply
  try:
    sampler.velocity_flow_map(apply, clock, method=solver)  # refuses an unknown solver now, not at the first picture
  except ValueError as e:
    raise ValueError(f"solver: {str(e).partition(': ')[2]}") from e

  def init(key, teacher_params):
    del teacher_params
    return parts.velocity.init(key)

  def flow_map(params, base, cond, clock):
    del base
    return sampler.velocity_flow_map(lambda x, t: apply(params, x, t, cond), clock, method=solver)

  return method_lib.Method(
      init=init,
      objective=objective(apply, parts.null, clock, label_dropout=label_dropout,
                          logit_mean=logit_mean if logit_normal else None, logit_std=logit_std),
      flow_map=flow_map, clock=clock, passes=3, per_call=False, calls=method_lib.any_calls)


def objective(network, null, clock, *, label_dropout=0.0, logit_mean=None, logit_std=1.0):
  """Regress u = noise - x_0 at a random point of the path (method.md, 1).

  Args:
    network: (params, x [B, ...], t [B] noise level, cond) -> u.
    null: cond -> the null condition; None where the network has none, and label_dropout is 0.
    clock: `flow.Clock`; its `warp` makes noise levels of the raw times that are drawn.
    label_dropout: chance that a sample's condition is dropped.
    logit_mean, logit_std: of the logit-normal raw time; it is uniform where the mean is None.
  Returns:
    objective(params, teacher_params, batch, keys [B], step) -> (grads, metrics); batch is {"x_0": [B, ...], "cond":
    tree of [B, ...]}.
  Raises:
    AssertionError: when it is traced, a network whose u has another shape than x.
  """
  def loss_fn(params, batch, keys):
    x_0, cond = batch["x_0"], batch["cond"]
    key_tau, key_noise, key_drop = segments.split(keys, 3)
    if logit_mean is None:
      tau = flow.uniform_tau(segments.draw_uniform(key_tau))
    else:
      tau = flow.logit_normal_tau(segments.draw_noise(key_tau, (len(keys),)), mean=logit_mean, std=logit_std)
    t = clock.warp(tau)
    noise = segments.draw_noise(key_noise, x_0.shape)
    if null is not None:
      cond = segments.drop(cond, null, segments.draw_uniform(key_drop) < label_dropout)
    u = network(params, flow.noise_data(x_0, noise, t), t, cond)
    chex.assert_equal_shape([u, x_0])
    return jnp.mean((u - (noise - x_0)) ** 2)

  def objective(params, teacher_params, batch, keys, step):
    del teacher_params, step
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, keys)
    return grads, {"loss": loss}

  return objective
