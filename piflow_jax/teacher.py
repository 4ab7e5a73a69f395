"""What the student imitates: the velocity of a many-step model, guided."""

import jax
import jax.numpy as jnp

from piflow_jax import flow


def guided_velocity(u_cond, u_null, x, t, *, scale, interval=(0.0, 1.0), orthogonal=0.0):
  """Classifier-free guidance u_c + (w - 1)(u_c - u_n) inside an interval of noise levels (arXiv 2207.12598, 2404.07724).

  Args:
    u_cond, u_null: [B, ...] velocities with and without the condition.
    x, t: [B, ...] points and their noise levels [B].
    scale: w; no guidance for w <= 1.
    interval: noise levels, both ends included, at which guidance is active.
    orthogonal: share of the guidance term's projection onto the conditional x_0 estimate that is taken out of it.
  Returns:
    [B, ...].
  """
  if scale <= 1:
    return u_cond
  term = u_cond - u_null
  if orthogonal:
    axes = tuple(range(1, x.ndim))
    x_0 = flow.velocity_to_x_0(x, u_cond, t)
    share = jnp.sum(term * x_0, axes, keepdims=True) / jnp.maximum(jnp.sum(x_0**2, axes, keepdims=True), 1e-6)
    term = term - orthogonal * share * x_0
  active = (t >= interval[0]) & (t <= interval[1])
  return u_cond + jnp.where(flow.broadcast_to(active, x), (scale - 1) * term, 0)


def network_teacher(network, null_condition, *, guidance_scale=1.0, guidance_interval=(0.0, 1.0), orthogonal=0.0):
  """teacher(params, x, t, cond) -> u from a velocity network, both passes of guidance in one doubled batch.

  Args:
    network: (params, x [B, ...], t [B], cond) -> u.
    null_condition: cond -> the condition of the unconditional pass.
    guidance_scale, guidance_interval, orthogonal: of `guided_velocity`; the interval in noise level.
  """
  if guidance_scale <= 1:
    return network

  def teacher(params, x, t, cond):
    # Stacked sample by sample, not batch by batch: on a mesh both passes of a sample stay on its device.
    twice = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
    both = jax.tree.map(twice, null_condition(cond), cond)
    u = network(params, twice(x, x), twice(t, t), both)
    u_null, u_cond = jnp.moveaxis(u.reshape(-1, 2, *u.shape[1:]), 1, 0)
    return guided_velocity(
        u_cond, u_null, x, t, scale=guidance_scale, interval=guidance_interval, orthogonal=orthogonal)

  return teacher
