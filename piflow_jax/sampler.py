"""One sampler for every few-step model: it only knows flow maps."""

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import flow


def step_plan(*, nfe, shift=1.0, h=0.0, final_scale=1.0):
  """Noise levels and noise-keeping factors of a sampling run (pi-Flow's flow-map scheduler; spec section 6).

  Returns:
    dict of [nfe] arrays: `tau` and `t` at the start of each step, `tau_dst` and `t_dst` to which the map integrates, `t_next`
    where the step ends, `m` in [0, 1], the share of the state's noise that is kept (1: deterministic).
  """
  tau = np.array(flow.step_times(nfe=nfe, final_scale=final_scale))
  t = flow.warp(tau, shift)
  t, t_next = t[:-1], t[1:]
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = t_next * (1 - t) / (t * (1 - t_next))
  if h == 0:
    m = np.ones(nfe)
  elif np.isinf(h):
    m = np.zeros(nfe)
  else:
    m = ratio ** (h * h)
  t_dst = t_next * m / (1 - t_next + t_next * m)
  return dict(tau=tau[:-1], tau_dst=flow.unwarp(t_dst, shift), t=t, t_dst=t_dst, t_next=t_next, m=m)


def renoise(x_dst, noise, t_next, m):
  """From t_dst up to t_next with fresh noise: (1 - t' + t' m) x_dst + t' sqrt(1 - m^2) noise."""
  return (1 - t_next + t_next * m) * x_dst + t_next * (1 - m * m) ** 0.5 * noise


def sample(flow_map, noise, key, *, nfe, shift=1.0, h=0.0, final_scale=1.0):
  """Draw x_0 from noise in nfe calls of a flow map.

  Args:
    flow_map: (x [B, ...], tau_src [B], tau_dst [B], key) -> x at tau_dst. A student, or a teacher's Euler step.
    noise: [B, ...] standard normal, the state at tau = 1.
    key: random key for h > 0 and for maps that draw.
    nfe: number of calls.
    shift: of `flow.warp`.
    h: stochasticity, 0 (deterministic) to inf (full re-noising after each step).
    final_scale: length of the last segment as a share of the others.
  Returns:
    x_0, [B, ...].
  """
  plan = step_plan(nfe=nfe, shift=shift, h=h, final_scale=final_scale)

  def step(x, inputs):
    s, key = inputs
    map_key, noise_key = jax.random.split(key)
    times = lambda tau: jnp.full(x.shape[0], tau, x.dtype)
    x = flow_map(x, times(s["tau"]), times(s["tau_dst"]), map_key)
    if h > 0:
      x = renoise(x, jax.random.normal(noise_key, x.shape, x.dtype), s["t_next"], s["m"])
    return x, None

  plan = {k: jnp.asarray(v, noise.dtype) for k, v in plan.items()}
  return jax.lax.scan(step, noise, (plan, jax.random.split(key, nfe)))[0]


def euler_flow_map(velocity, *, shift=1.0):
  """The flow map of one Euler step: x + u(x, t_src) (t_dst - t_src); a many-step teacher is this, sampled at a large nfe.

  Args:
    velocity: (x [B, ...], t [B] noise level) -> u.
  """
  def flow_map(x, tau_src, tau_dst, key):
    del key
    t, t_dst = flow.warp(tau_src, shift), flow.warp(tau_dst, shift)
    return x + flow.broadcast_to(t_dst - t, x) * velocity(x, t)

  return flow_map


def policy_flow_map(student, rollout, *, shift=1.0):
  """The flow map of a few-step student: one network call makes a policy, which integrates itself to tau_dst.

  Args:
    student: (x [B, ...], t [B] noise level) -> policy.
    rollout: (policy, x, tau_src, tau_dst) -> x at tau_dst.
  """
  def flow_map(x, tau_src, tau_dst, key):
    del key
    return rollout(student(x, flow.warp(tau_src, shift)), x, tau_src, tau_dst)

  return flow_map
