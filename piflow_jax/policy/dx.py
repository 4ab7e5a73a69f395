"""The DX policy: x_0 estimates along a segment of raw time, interpolated (pi-Flow, arXiv 2510.14974, section 3.1)."""

from typing import Any

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import flow
from piflow_jax.models import layers


@flax.struct.dataclass
class DXPolicy:
  """N estimates of x_0 that belong to the raw times from tau_src down to tau_dst; the point itself plays no part in them."""

  x_0: jax.Array  # [B, N, H, W, C]; a grid's first is the segment's end, its last the segment's start
  tau_src: jax.Array  # [B] raw time
  tau_dst: jax.Array  # [B]
  shift: float = flax.struct.field(pytree_node=False, default=1.0)  # its own, whatever the sampler's is
  polynomial: bool = flax.struct.field(pytree_node=False, default=False)
  eps: float = flax.struct.field(pytree_node=False, default=1e-4)  # least noise level, least length of a segment

  def velocity(self, x, t):
    """u = (x - x0_hat(t)) / t; x [B, H, W, C], t [B] noise level -> [B, H, W, C]."""
    x_0 = jnp.einsum("bn,bnhwc->bhwc", self._weights(flow.unwarp(t, self.shift)), self.x_0)
    return (x - x_0) / flow.broadcast_to(jnp.maximum(t, self.eps), x)

  def _weights(self, tau):
    """[B, N]: hats of linear interpolation, clamped at the segment's ends, or powers of the raw time since the start."""
    n = self.x_0.shape[1]
    if self.polynomial:
      since = jnp.broadcast_to((self.tau_src - tau)[:, None], (len(tau), n - 1))
      return jnp.cumprod(jnp.concatenate([jnp.ones_like(tau)[:, None], since], axis=1), axis=1)
    length = jnp.maximum(self.tau_src - self.tau_dst, self.eps)
    place = jnp.clip((tau - self.tau_dst) / length, 0, 1)[:, None] * (n - 1)
    return jnp.maximum(1 - jnp.abs(place - jnp.arange(n, dtype=tau.dtype)[None]), 0)


def to_policy(u, x_src, t_src, *, segment, shift=1.0, polynomial=False, eps=1e-4):
  """The network's velocities as estimates of x_0: x0_n = x_src - t_src u_n (spec section 2.2).

  Args:
    u: [B, N, H, W, C].
    x_src: [B, H, W, C] where the network was called.
    t_src: [B] its noise level.
    segment: length in raw time over which the estimates are spread; it ends at 0 at the latest.
    shift: of `flow.warp`.
    polynomial: u_n belong to powers of the raw time since the start instead of to points of a grid.
    eps: least noise level and least length of a segment.
  """
  tau_src = flow.unwarp(t_src, shift)
  x_0 = x_src[:, None] - t_src[:, None, None, None, None] * u
  return DXPolicy(x_0, tau_src, jnp.maximum(tau_src - segment, 0), shift, polynomial, eps)


class DXHead(nn.Module):
  """Tokens [B, N, D] -> velocities [B, points, H, W, C], the teacher's output layer so many times over.

  Attributes:
    points: N, of the grid or of the polynomial.
    channels, patch: of the latent and its tokens.
    segment, shift, polynomial: of `to_policy`.
  """

  points: int
  channels: int
  patch: int
  segment: float
  shift: float = 1.0
  polynomial: bool = False
  dtype: Any = jnp.float32

  def to_policy(self, u, x_src, t_src, *, eps=1e-4):
    return to_policy(
        u, x_src, t_src, segment=self.segment, shift=self.shift, polynomial=self.polynomial, eps=max(eps, 1e-4))

  def perturb(self, policy, keys):
    """The behaviour policy is the live one: nothing is dropped."""
    del keys
    return policy

  def from_teacher(self, teacher_head, fresh, key):
    """A grid's estimates start as the teacher's own; a polynomial's first does, and its other velocities are zero."""
    del key
    copies = layers.copy_output_layer(teacher_head, fresh)
    return jax.tree.map(lambda w: w.at[..., 1:, :].set(0), copies) if self.polynomial else copies

  @nn.compact
  def __call__(self, tokens, embedding, grid):
    del embedding
    return layers.project_velocities(
        tokens, grid, count=self.points, channels=self.channels, patch=self.patch, dtype=self.dtype)
