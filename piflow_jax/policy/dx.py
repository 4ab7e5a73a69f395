"""The DX policy: estimates of x_0 along a segment of raw time, interpolated (method.md, 4; arXiv 2510.14974, 3.1)."""

from typing import Any

import chex
import flax
from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax.models import layers


@flax.struct.dataclass
class DXPolicy:
  """N estimates of x_0 for the raw times from tau_src down to tau_dst; they do not depend on where the point is."""

  x_0: jax.Array  # [B, N, ..., C]; a grid's first is the segment's end, its last the segment's start
  tau_src: jax.Array  # [B] raw time
  tau_dst: jax.Array  # [B]
  clock: flow.Clock  # of training, whatever the sampler's is
  polynomial: bool = flax.struct.field(pytree_node=False, default=False)
  eps: float = flax.struct.field(pytree_node=False, default=1e-4)  # least noise level, least length of a segment

  def velocity(self, x, t):
    """u = (x - x0_hat(t)) / t (method.md, 4); x [B, ..., C], t [B] noise level -> [B, ..., C]."""
    x_0 = jnp.einsum("bn,bn...->b...", self._weights(self.clock.unwarp(t)), self.x_0)
    return (x - x_0) / flow.broadcast_to(jnp.maximum(t, self.eps), x)

  def _weights(self, tau):
    """[B, N]: hats of linear interpolation, clamped at the segment's ends, or powers of raw time since the start."""
    n = self.x_0.shape[1]
    if self.polynomial:
      since = jnp.broadcast_to((self.tau_src - tau)[:, None], (len(tau), n - 1))
      return jnp.cumprod(jnp.concatenate([jnp.ones_like(tau)[:, None], since], axis=1), axis=1)
    length = jnp.maximum(self.tau_src - self.tau_dst, self.eps)
    place = jnp.clip((tau - self.tau_dst) / length, 0, 1)[:, None] * (n - 1)
    return jnp.maximum(1 - jnp.abs(place - jnp.arange(n, dtype=tau.dtype)[None]), 0)


def to_policy(u, x_src, t_src, clock, *, segment, polynomial=False, eps=1e-4):
  """The network's velocities as estimates of x_0: x0_n = x_src - t_src u_n (method.md, 4).

  Args:
    u: [B, N, ..., C].
    x_src: [B, ..., C] where the network was called.
    t_src: [B] its noise level.
    clock: flow.Clock, of which the shift counts.
    segment: raw time over which the estimates are spread; it ends at 0 at the latest.
    polynomial: u_n are coefficients of powers of the raw time since the start instead of points of a grid.
    eps: least noise level and least length of a segment.
  Returns:
    DXPolicy.
  """
  chex.assert_equal_shape([u[:, 0], x_src])
  tau_src = clock.unwarp(t_src)
  x_0 = x_src[:, None] - flow.broadcast_to(t_src, u) * u
  return DXPolicy(x_0, tau_src, jnp.maximum(tau_src - segment, 0), clock, polynomial, eps)


class DXHead(nn.Module):
  """Tokens [B, N, D] -> velocities [B, points, ..., C], by as many copies of the teacher's output layer.

  Attributes:
    points: N, points of the grid or coefficients of the polynomial.
    segment: of `to_policy`; 0 is the clock's segment.
    polynomial: of `to_policy`.
  """

  points: int
  segment: float = 0.0
  polynomial: bool = False
  dtype: Any = jnp.float32

  def to_policy(self, out, x_src, t_src, clock, *, eps=1e-4):
    """DXPolicy of the velocities out [B, points, ..., C]. With segment 0 the clock must be the one of training."""
    return to_policy(out, x_src, t_src, clock, segment=self.segment or clock.segment, polynomial=self.polynomial,
                     eps=max(eps, 1e-4))

  def perturb(self, policy, keys):
    """The behaviour policy is the live one: there is nothing to drop."""
    del keys
    return policy

  def from_teacher(self, teacher_head, fresh, key):
    """A grid's estimates start as the teacher's own; a polynomial's first does, and its other velocities are zero."""
    del key
    copies = layers.copy_output_layer(teacher_head, fresh)
    return jax.tree.map(lambda w: w.at[..., 1:, :].set(0), copies) if self.polynomial else copies

  def export_config(self, clock):
    """The policy as pi-Flow's release names it, with the arguments of its class."""
    mode = "polynomial" if self.polynomial else "grid"
    return dict(type="DX", segment_size=self.segment or clock.segment, shift=clock.shift, mode=mode)

  @nn.compact
  def __call__(self, tokens, embedding, layout):
    del embedding
    return layers.project_velocities(tokens, layout, count=self.points, dtype=self.dtype)


def config(**fields):
  """A student that returns DX policies."""
  return config_lib.noun(make, dict(
      points=10,  # N
      segment=0.0,  # raw time over which the points lie, at any nfe; 0 is a segment of the method's
      polynomial=False,  # powers of time instead of a grid
  ), fields)


def make(dtype, *, points, segment, polynomial):
  """DXHead that computes in dtype. Raises ValueError: a field out of bounds."""
  config_lib.whole("points", points)
  config_lib.number("segment", segment, least=0, most=1000)
  config_lib.one_of("polynomial", polynomial, (False, True))
  return DXHead(points, segment, polynomial, dtype)
