"""The path between data and noise, its clock, and the segments of a few-step model (method.md, 1 and 2).

Two times: `t` in [0, 1] is the noise level (1 = pure noise), which networks see; `tau` in [0, 1] is raw time, in which
segments and substeps are uniform. A `Clock` turns one into the other. Arrays of times are [B].
"""

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Clock:
  """How raw time becomes noise levels, segments and substeps: one value, required wherever time is read.

  A shift that is a Python number is part of the program: JAX compiles it in. One that is an array is the clock's only
  leaf and may be traced: it differs between latents of different sizes.

  Attributes:
    shift: s of the time shift, above 0.
    total_substeps: Euler substeps of a policy over all of raw time.
    nfe: segments, each of which one network call covers.
    final_scale: length of the last segment, the one at the data, as a share of the others.
  Raises:
    ValueError: total_substeps or nfe below 1, or a final_scale outside (0, 1].
  """

  shift: Any
  total_substeps: int
  nfe: int
  final_scale: float

  def __post_init__(self):
    config_lib.whole("total_substeps", self.total_substeps)
    config_lib.whole("nfe", self.nfe)
    config_lib.number("final_scale", self.final_scale, above=0, most=1)

  @classmethod
  def of_shift(cls, shift):
    """The clock of maps that read the shift alone, as a teacher's do."""
    return cls(shift, total_substeps=128, nfe=1, final_scale=1.0)

  def replace(self, **fields):
    """This clock with other values in some of its fields."""
    return dataclasses.replace(self, **fields)

  def warp(self, tau):
    """Raw time to noise level: t = s tau / (1 + (s - 1) tau) (method.md, 1; SD3, arXiv 2403.03206, eq. 23)."""
    return self.shift * tau / (1 + (self.shift - 1) * tau)

  def unwarp(self, t):
    """Noise level to raw time, the inverse of `warp`: tau = t / (s + (1 - s) t) (method.md, 1)."""
    return t / (self.shift + (1 - self.shift) * t)

  @property
  def segment(self):
    """Raw time of a full segment, 1 / (nfe - 1 + final_scale)."""
    return 1 / (self.nfe - 1 + self.final_scale)

  @property
  def max_segment(self):
    """Raw time of the longest segment that there is: with nfe = 1 the last one is the only one."""
    return (1 if self.nfe > 1 else self.final_scale) / (self.nfe - 1 + self.final_scale)

  def segment_source(self, tau, eps=1e-4):
    """The segment that each raw time falls in (method.md, 2; pi-Flow, arXiv 2510.14974, section 3).

    From tau = 1 down to 0 the segments are base, ..., base, final_scale * base long.

    Args:
      tau: [B] raw times in [0, 1].
      eps: least raw time.
    Returns:
      (tau_src [B], segment [B]): the upper end of the segment, and its length.
    """
    base = 1 / (self.nfe - 1 + self.final_scale)
    tau = jnp.maximum(tau, eps)
    index = jnp.clip(jnp.ceil(tau / base + (1 - self.final_scale)), 1, self.nfe)
    tau_src = jnp.clip((index - 1 + self.final_scale) * base, eps, 1.0)
    segment = jnp.where(index == 1, self.final_scale * base, base)
    return tau_src, segment

  def step_times(self):
    """Raw times of the ends of all segments, a list of nfe + 1 numbers from 1 to 0 (method.md, 2)."""
    last = (self.final_scale - 1) / (self.nfe + self.final_scale - 1)
    return [max(1 + (last - 1) * i / self.nfe, 0.0) for i in range(self.nfe)] + [0.0]

  def tree_flatten(self):
    """For JAX: (leaves, all else)."""
    static = (self.total_substeps, self.nfe, self.final_scale)
    return ((), (self.shift, *static)) if isinstance(self.shift, (int, float)) else ((self.shift,), static)

  @classmethod
  def tree_unflatten(cls, static, leaves):
    """For JAX: the clock of `tree_flatten`'s result."""
    return cls(*leaves, *static)


def config(**fields):
  """A noise schedule of one shift."""
  return config_lib.noun(make, dict(
      shift=1.0,  # above 1 spends more of the time on noisy latents
  ), fields)


def make(tokens, *, shift):
  """The shift, however many tokens there are. Raises ValueError: a shift that is none."""
  del tokens
  config_lib.number("shift", shift, above=0, most=1e4)
  return shift


def dynamic_config(**fields):
  """A noise schedule whose shift grows with the number of tokens (FLUX): its logarithm is linear in it."""
  return config_lib.noun(make_dynamic, dict(
      base_tokens=256,  # (H / patch) (W / patch); the line goes on beyond both
      max_tokens=4096,  # above base_tokens
      base_log_shift=0.5,  # logarithm of the shift at base_tokens
      max_log_shift=1.15,  # and at max_tokens
  ), fields)


def make_dynamic(tokens, *, base_tokens, max_tokens, base_log_shift, max_log_shift):
  """`dynamic_shift` of a network's number of tokens.

  Raises:
    ValueError: a field out of bounds, or tokens is None: the network does not count tokens.
  """
  config_lib.whole("base_tokens", base_tokens)
  config_lib.whole("max_tokens", max_tokens, least=base_tokens + 1)
  config_lib.number("base_log_shift", base_log_shift, least=-9, most=9)
  config_lib.number("max_log_shift", max_log_shift, least=-9, most=9)
  if tokens is None:
    raise ValueError("make: the shift goes by the number of tokens, and the network does not say how many it has")
  return dynamic_shift(tokens, base_tokens=base_tokens, max_tokens=max_tokens, base_log_shift=base_log_shift,
                       max_log_shift=max_log_shift)


def dynamic_shift(tokens, *, base_tokens=256, max_tokens=4096, base_log_shift=0.5, max_log_shift=1.15):
  """The shift of a latent of so many tokens: log s is linear in their number (method.md, 1; FLUX)."""
  slope = (max_log_shift - base_log_shift) / (max_tokens - base_tokens)
  return math.exp(base_log_shift + slope * (tokens - base_tokens))


def broadcast_to(t, x):
  """t [B] -> [B, 1, ..., 1], with as many axes as x."""
  return jnp.reshape(t, t.shape + (1,) * (x.ndim - t.ndim))


def noise_data(x_0, noise, t):
  """x_t = (1 - t) x_0 + t noise (method.md, 1); x_0, noise [B, ...], t [B] noise level."""
  t = broadcast_to(t, x_0)
  return (1 - t) * x_0 + t * noise


def velocity_to_x_0(x, u, t):
  """x_0 = x - t u, as u = noise - x_0 (method.md, 1); x, u [B, ...], t [B] noise level."""
  return x - broadcast_to(t, x) * u


def uniform_tau(uniform):
  """Raw times for training: tau = 1 - U[0, 1), so that 0 is never drawn and 1 can be."""
  return 1 - uniform


def logit_normal_tau(normal, *, mean=0.0, std=1.0):
  """Raw times for a teacher's training: tau = sigmoid(mean + std z) (SD3, arXiv 2403.03206, eq. 19)."""
  return jax.nn.sigmoid(mean + std * normal)


def mean_velocity(velocity, x, t_src, t_dst, *, method="euler", u=None):
  """Mean velocity from t_src to t_dst by one Runge-Kutta step: (x_dst - x) / (t_dst - t_src) (method.md, 6.2).

  Args:
    velocity: (x [B, ...], t [B] noise level) -> u [B, ...].
    x: [B, ...] at t_src.
    t_src, t_dst: [B] noise levels; where they are equal the result is the velocity itself.
    method: "euler" (one call: the velocity at t_src), "midpoint" or "heun" (two calls).
    u: the velocity at (x, t_src), where the caller has it already.
  Raises:
    ValueError: another method.
  """
  u = velocity(x, t_src) if u is None else u
  chex.assert_equal_shape([u, x])
  if method == "euler":
    return u
  if method == "midpoint":
    t_mid = (t_src + t_dst) / 2
    return velocity(x + broadcast_to(t_mid - t_src, x) * u, t_mid)
  if method == "heun":
    return (u + velocity(x + broadcast_to(t_dst - t_src, x) * u, t_dst)) / 2
  raise ValueError(f'method: {method!r} is none of "euler", "midpoint", "heun"')
