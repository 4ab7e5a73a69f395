"""MeanFlow (arXiv 2505.13447) and improved MeanFlow (arXiv 2512.02012): a network learns the flow's mean velocities."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax import params as params_lib
from piflow_jax import sampler
from piflow_jax import student as student_lib
from piflow_jax.distill import method as method_lib
from piflow_jax.distill import segments

_LABEL_DROPOUT = 0.1


def config(**fields):
  """MeanFlow on a network of two times, from data or from a teacher's velocity."""
  return config_lib.noun(make, dict(
      improved=False,  # improved MeanFlow: the derivative's direction is the network's own velocity
      target="data",  # or "teacher", its velocity; either starts from config.teacher.checkpoint, if any
      ratio=0.25,  # share of samples whose two times differ; improved MeanFlow's release has 0.5
      logit_mean=-0.4,  # of both times, which are logit-normal
      logit_std=1.0,  # of both times
      norm_power=1.0,  # p of the adaptive weight 1 / (|error|^2 + norm_eps)^p
      norm_eps=0.01,  # of the adaptive weight
      label_dropout=_LABEL_DROPOUT,  # target "data": chance that a sample's condition is dropped; 0 without a condition
      guidance_scale=1.0,  # target "data": trained into the network, none for w <= 1; a teacher has its own
  ), fields)


def make(parts, *, improved, target, ratio, logit_mean, logit_std, norm_power, norm_eps, label_dropout, guidance_scale):
  """The Method. Raises ValueError for a field that is out of its range or has no effect."""
  config_lib.one_of("improved", improved, (True, False))
  config_lib.one_of("target", target, ("data", "teacher"))
  config_lib.number("ratio", ratio, least=0, most=1)
  config_lib.number("logit_mean", logit_mean)
  config_lib.number("logit_std", logit_std, above=0)
  config_lib.number("norm_power", norm_power, least=0)
  config_lib.number("norm_eps", norm_eps, above=0)
  config_lib.number("label_dropout", label_dropout, least=0, most=1)
  config_lib.number("guidance_scale", guidance_scale, least=0)
  by_teacher = target == "teacher"
  _check_effect(parts, by_teacher, label_dropout, guidance_scale)
  if parts.two_times is None:
    raise ValueError("make: MeanFlow needs a network of two times that has a forward-mode derivative; config.network "
                     'makes none (dit makes one with attention "auto" or "xla")')
  clock = flow.Clock.of_shift(parts.shift)
  network = parts.two_times

  def init(key, teacher_params):
    fresh = network.init(key)
    if teacher_params is None or not parts.inherits:
      return fresh
    whole = params_lib.overlay(fresh, student_lib.fitting(fresh, teacher_params), fresh)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), whole, fresh)

  def flow_map(params, base, cond, clock):
    del base
    return sampler.mean_flow_map(lambda x, t, t_dst: network.apply(params, x, t, cond, t_dst), clock)

  label = parts.teacher.passes if by_teacher else int(guidance_scale > 1)
  return method_lib.Method(
      init=init,
      objective=objective(
          network.apply, parts.teacher.velocity if by_teacher else None, parts.null, clock,
          times=Times(ratio, logit_mean, logit_std), weight=Weight(norm_power, norm_eps), improved=improved,
          label_dropout=label_dropout, guidance_scale=guidance_scale),
      flow_map=flow_map, clock=clock, passes=4 + label + int(improved), per_call=False, calls=method_lib.any_calls)


def _check_effect(parts, by_teacher, label_dropout, guidance_scale):
  if by_teacher:
    if parts.teacher is None:
      raise ValueError('target: "teacher", and config.teacher is not set; set it, or target="data"')
    if guidance_scale != 1:
      raise ValueError(f'guidance_scale: {guidance_scale} is for target "data"; a teacher is guided by '
                       "config.teacher.guidance_scale, set 1")
    if label_dropout not in (0, _LABEL_DROPOUT):
      raise ValueError(f'label_dropout: {label_dropout} is for target "data"; set 0')
    return
  if parts.teacher is not None and parts.teacher.passes > 1:
    raise ValueError('target: "data", on which the guidance of config.teacher has no effect; set its guidance_scale to '
                     "1, and this method's own")
  if parts.null is None:
    for name, value, unset in (("label_dropout", label_dropout, 0), ("guidance_scale", guidance_scale, 1)):
      if value > unset:
        raise ValueError(f"{name}: {value}, but the network has no null condition; set {unset}")


class Times(NamedTuple):
  """How the two times are drawn.

  Attributes:
    ratio: share of samples with t_dst < t; in the others t_dst = t. 0.25 in MeanFlow's release, 0.5 in the improved.
    logit_mean, logit_std: of the two raw times, drawn logit-normally; the larger is t's.
  """

  ratio: float = 0.25
  logit_mean: float = -0.4
  logit_std: float = 1.0


class Weight(NamedTuple):
  """p and c of a sample's weight 1 / (|error|^2 + c)^p, |error|^2 summed over the sample (method.md, 9)."""

  power: float = 1.0
  eps: float = 0.01


def total_derivative(network, x, t, t_dst, tangent):
  """(u, du/dt) of u(x, t, t_dst) along the flow, du/dt = tangent . grad_x u + d_t u, by one jvp (method.md, 9)."""
  return jax.jvp(network, (x, t, t_dst), (tangent, jnp.ones_like(t), jnp.zeros_like(t_dst)))


def compound_velocity(u, du_dt, t, t_dst):
  """V = u + (t - t_dst) du/dt, the velocity at (x, t) if u is the mean velocity: MeanFlow's identity (method.md, 9)."""
  return u + flow.broadcast_to(t - t_dst, u) * du_dt


def objective(network, teacher, null, clock, *, times=Times(), weight=Weight(), improved=False, label_dropout=0.0,
              guidance_scale=1.0):
  """Regress V = u + (t - t_dst) sg(du/dt) to the velocity v; u is the mean velocity from t to t_dst (method.md, 9).

  The gradient is that of |u - sg(v - (t - t_dst) du/dt)|^2, as MeanFlow's paper writes it. v is noise - x_0, or the
  teacher's velocity where there is one. The improved form differs in the tangent of du/dt: MeanFlow takes v, which on
  data holds more than x_t determines, the improved form the network's own u(x, t, t).

  Args:
    network: (params, x [B, ...], t [B] noise level, cond, t_dst [B]) -> u.
    teacher: (teacher_params, x, t, cond) -> u, or None: learn from data.
    null: cond -> the null condition; None where the network has none, and nothing is dropped or guided.
    clock: `flow.Clock`; its `warp` makes noise levels of the raw times that are drawn.
    times, weight: Times, Weight.
    improved: the tangent is the network's own velocity.
    label_dropout: chance that a sample's condition is dropped; on data alone.
    guidance_scale: w of v = w (noise - x_0) + (1 - w) u(x, t, t, null); on data alone, where w > 1.
  Returns:
    objective(params, teacher_params, batch, keys [B], step) -> (grads, metrics); "loss" is weighted, "error" is not.
  Raises:
    AssertionError: when it is traced, a velocity of another shape than x.
  """
  def loss_fn(params, teacher_params, batch, keys):
    x_0, cond = batch["x_0"], batch["cond"]
    key_times, key_ratio, key_noise, key_drop = segments.split(keys, 4)
    tau = flow.logit_normal_tau(
        segments.draw_noise(key_times, (len(keys), 2)), mean=times.logit_mean, std=times.logit_std)
    t, t_dst = clock.warp(tau.max(1)), clock.warp(tau.min(1))
    t_dst = jnp.where(segments.draw_uniform(key_ratio) < times.ratio, t_dst, t)
    noise = segments.draw_noise(key_noise, x_0.shape)
    x = flow.noise_data(x_0, noise, t)
    detached = jax.lax.stop_gradient(params)

    if teacher is not None:
      v = teacher(teacher_params, x, t, cond)
    else:
      v = noise - x_0
      if null is not None:
        dropped = segments.draw_uniform(key_drop) < label_dropout
        cond = segments.drop(cond, null, dropped)
      if guidance_scale > 1:
        guided = guidance_scale * v + (1 - guidance_scale) * network(detached, x, t, null(cond), t)
        v = jnp.where(flow.broadcast_to(dropped, v), v, guided)
    v = jax.lax.stop_gradient(v)
    chex.assert_equal_shape([v, x])
    tangent = network(detached, x, t, cond, t) if improved else v
    u, du_dt = total_derivative(lambda x, t, t_dst: network(params, x, t, cond, t_dst), x, t, t_dst, tangent)
    chex.assert_equal_shape([u, x])
    error = compound_velocity(u, jax.lax.stop_gradient(du_dt), t, t_dst) - v
    square = jnp.sum(error**2, axis=tuple(range(1, error.ndim)))
    sample_weight = jax.lax.stop_gradient(1 / (square + weight.eps) ** weight.power)
    return jnp.mean(sample_weight * square), jnp.mean(error**2)

  def objective(params, teacher_params, batch, keys, step):
    del step
    (loss, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, teacher_params, batch, keys)
    return grads, {"loss": loss, "error": error}

  return objective
