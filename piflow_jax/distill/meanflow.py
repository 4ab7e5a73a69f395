"""MeanFlow (arXiv 2505.13447) and improved MeanFlow (arXiv 2512.02012): one network learns the flow's mean velocities."""

import functools

import jax
import jax.numpy as jnp

from piflow_jax import flow
from piflow_jax.distill import segments


def total_derivative(network, x, t, t_dst, tangent):
  """(u, du/dt) of u(x, t, t_dst) along the flow: du/dt = tangent . grad_x u + d_t u, one forward-mode pass (eq. 8)."""
  return jax.jvp(network, (x, t, t_dst), (tangent, jnp.ones_like(t), jnp.zeros_like(t_dst)))


def compound_velocity(u, du_dt, t, t_dst):
  """V = u + (t - t_dst) du/dt: by MeanFlow's identity the velocity at (x, t), if u is the mean velocity (eq. 6)."""
  return u + flow.broadcast_to(t - t_dst, u) * du_dt


def objective(network, teacher, drop_condition, null_condition, *, improved=False, ratio=0.25, logit_mean=-0.4,
              logit_std=1.0, norm_power=1.0, norm_eps=0.01, guidance_scale=1.0, shift=1.0):
  """Regress V = u + (t - r) sg(du/dt) to the velocity v, r being the time to which u is the mean.

  The gradient is that of |u - sg(v - (t - r) du/dt)|^2, the form in which MeanFlow's paper has it. v is noise - x_0, or
  the teacher's velocity where there is one. What sets the improved form apart is the tangent of du/dt: MeanFlow takes v,
  which for data holds more than x_t tells, the improved form the network's own u(x, t, t).

  Args:
    network: (params, x [B, ...], t [B] noise level, t_dst [B], cond) -> u.
    teacher: (teacher_params, x, t, cond) -> u, or None: learn from data.
    drop_condition: (cond, uniform [B]) -> (cond, dropped [B]), null for some; for data alone.
    null_condition: cond -> the null condition; needed for guidance on data.
    improved: the tangent is the network's own.
    ratio: share of samples with t_dst < t; in the others t_dst = t. 0.25 in MeanFlow's release, 0.5 in the improved.
    logit_mean, logit_std: of the two raw times, drawn logit-normally; the larger is t's.
    norm_power, norm_eps: p and c of the weight 1 / (|error|^2 + c)^p, |error|^2 summed over a sample.
    guidance_scale: w of v = w (noise - x_0) + (1 - w) u(x, t, t, null), for data (eq. 19 with kappa = 0).
    shift: of `flow.warp`.
  Returns:
    objective(params, teacher_params, batch, keys [B], step) -> (grads, metrics); metrics "loss" is weighted, "error" not.
  """
  def loss_fn(params, teacher_params, batch, keys):
    x_0, cond = batch["x_0"], batch["cond"]
    key_times, key_ratio, key_noise, key_drop = jax.vmap(
        functools.partial(jax.random.split, num=4), out_axes=1)(keys)
    tau = flow.logit_normal_tau(segments.draw_noise(key_times, (len(keys), 2)), mean=logit_mean, std=logit_std)
    t, t_dst = flow.warp(tau.max(1), shift), flow.warp(tau.min(1), shift)
    t_dst = jnp.where(segments.draw_uniform(key_ratio) < ratio, t_dst, t)
    noise = segments.draw_noise(key_noise, x_0.shape)
    x = flow.noise_data(x_0, noise, t)
    detached = jax.lax.stop_gradient(params)

    if teacher is not None:
      v = teacher(teacher_params, x, t, cond)
    else:
      v = noise - x_0
      cond, dropped = drop_condition(cond, segments.draw_uniform(key_drop))
      if guidance_scale > 1:
        guided = guidance_scale * v + (1 - guidance_scale) * network(detached, x, t, t, null_condition(cond))
        v = jnp.where(flow.broadcast_to(dropped, v), v, guided)
    v = jax.lax.stop_gradient(v)
    tangent = network(detached, x, t, t, cond) if improved else v
    u, du_dt = total_derivative(lambda x, t, t_dst: network(params, x, t, t_dst, cond), x, t, t_dst, tangent)
    error = compound_velocity(u, jax.lax.stop_gradient(du_dt), t, t_dst) - v
    square = jnp.sum(error**2, axis=tuple(range(1, error.ndim)))
    weight = jax.lax.stop_gradient(1 / (square + norm_eps) ** norm_power)
    return jnp.mean(weight * square), jnp.mean(error**2)

  def objective(params, teacher_params, batch, keys, step):
    del step
    (loss, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, teacher_params, batch, keys)
    return grads, {"loss": loss, "error": error}

  return objective
