"""The path between data and noise, its two clocks, and the segments of a few-step model.

Two clocks: `t` in [0, 1] is the noise level (1 = pure noise; what a network sees), `tau` in [0, 1] is raw
time, in which segments and substeps are uniform. `t = warp(tau)`. Arrays of times are [B].
"""

import math

import jax
import jax.numpy as jnp


def broadcast_to(t, x):
  """t [B] -> [B, 1, ..., 1], with as many axes as x."""
  return jnp.reshape(t, t.shape + (1,) * (x.ndim - t.ndim))


def warp(tau, shift):
  """Raw time to noise level: t = s tau / (1 + (s - 1) tau) (SD3, arXiv 2403.03206, eq. 23)."""
  return shift * tau / (1 + (shift - 1) * tau)


def unwarp(t, shift):
  """Noise level to raw time, the inverse of `warp`: tau = t / (s + (1 - s) t)."""
  return t / (shift + (1 - shift) * t)


def dynamic_shift(tokens, *, base_tokens=256, max_tokens=4096, base_log_shift=0.5, max_log_shift=1.15):
  """The shift for a latent that the network cuts into so many tokens: log s is linear in their number (FLUX)."""
  slope = (max_log_shift - base_log_shift) / (max_tokens - base_tokens)
  return math.exp(base_log_shift + slope * (tokens - base_tokens))


def noise_data(x_0, noise, t):
  """x_t = (1 - t) x_0 + t noise; x_0, noise [B, ...], t [B] noise level."""
  t = broadcast_to(t, x_0)
  return (1 - t) * x_0 + t * noise


def velocity_to_x_0(x, u, t):
  """x_0 = x - t u, as u = noise - x_0; x, u [B, ...], t [B] noise level."""
  return x - broadcast_to(t, x) * u


def segment_source(tau, *, nfe, final_scale=1.0, eps=1e-4):
  """The segment that each raw time falls in (pi-Flow, arXiv 2510.14974, section 3; spec section 4).

  `nfe` segments split [0, 1]: base, ..., base, final_scale * base, from tau = 1 down to 0.

  Args:
    tau: [B] raw times in [0, 1].
    nfe: number of segments (network calls).
    final_scale: length of the last segment as a share of the others.
    eps: least raw time.
  Returns:
    (tau_src [B], segment [B]): the upper end of the segment, and its length.
  """
  base = 1 / (nfe - 1 + final_scale)
  tau = jnp.maximum(tau, eps)
  index = jnp.clip(jnp.ceil(tau / base + (1 - final_scale)), 1, nfe)
  tau_src = jnp.clip((index - 1 + final_scale) * base, eps, 1.0)
  segment = jnp.where(index == 1, final_scale * base, base)
  return tau_src, segment


def step_times(*, nfe, final_scale=1.0):
  """Raw times of the ends of all segments, [nfe + 1] from 1 to 0 (a static list: one network call a step)."""
  last = (final_scale - 1) / (nfe + final_scale - 1)
  return [max(1 + (last - 1) * i / nfe, 0.0) for i in range(nfe)] + [0.0]


def uniform_tau(uniform):
  """Raw times for training: tau = 1 - U[0, 1), so that 0 is never drawn and 1 can be."""
  return 1 - uniform


def logit_normal_tau(normal, *, mean=0.0, std=1.0):
  """Raw times of a teacher's training: tau = sigmoid(mean + std z) (SD3, arXiv 2403.03206, eq. 19)."""
  return jax.nn.sigmoid(mean + std * normal)


def mean_velocity(velocity, x, t_src, t_dst, *, method="euler", u=None):
  """Mean velocity of the flow from t_src to t_dst by one Runge-Kutta step: (x_dst - x) / (t_dst - t_src).

  Args:
    velocity: (x [B, ...], t [B] noise level) -> u.
    x: [B, ...] at t_src.
    t_src, t_dst: [B] noise levels; where they are equal the result is the velocity itself.
    method: "euler" (one call: the velocity at t_src), "midpoint" or "heun" (two calls).
    u: the velocity at (x, t_src), where the caller has it already.
  Raises:
    ValueError: another method.
  """
  u = velocity(x, t_src) if u is None else u
  if method == "euler":
    return u
  if method == "midpoint":
    t_mid = (t_src + t_dst) / 2
    return velocity(x + broadcast_to(t_mid - t_src, x) * u, t_mid)
  if method == "heun":
    return (u + velocity(x + broadcast_to(t_dst - t_src, x) * u, t_dst)) / 2
  raise ValueError(f'method: {method!r} is none of "euler", "midpoint", "heun"')
