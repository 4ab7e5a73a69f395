"""The parallel-decoding policy: a fixed grid of velocities at once (PDD, arXiv 2607.26004; spec section 10)."""

from typing import Any

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import flow
from piflow_jax.models import layers


@flax.struct.dataclass
class ParallelPolicy:
  """G constant velocities: u[g] holds for raw times from 1 - g / G down to 1 - (g + 1) / G, wherever the point is."""

  u: jax.Array  # [B, G, H, W, C]
  shift: float = flax.struct.field(pytree_node=False, default=1.0)

  def velocity(self, x, t):
    """The velocity of the interval that begins at or holds t; x [B, H, W, C], t [B] noise level -> [B, H, W, C]."""
    del x
    intervals = self.u.shape[1]
    # Rounding must not put the start of an interval into the one above it.
    g = jnp.floor((1 - flow.unwarp(t, self.shift)) * intervals + 1e-3)
    g = jnp.clip(g, 0, intervals - 1).astype(jnp.int32)
    return jnp.take_along_axis(self.u, g[:, None, None, None, None], axis=1)[:, 0]

  def advance(self, x, tau_src, tau_dst):
    """x at tau_dst, exactly: a weighted sum of the velocities in between; raw times [B]."""
    spans = block_spans(tau_src[:, None], tau_dst[:, None], intervals=self.u.shape[1], shift=self.shift)
    return x + jnp.einsum("bg,bghwc->bhwc", spans, self.u)


def block_spans(tau_src, tau_dst, *, intervals, shift=1.0):
  """Change of the noise level in each interval on the way from tau_src down to tau_dst, <= 0; [..., 1] -> [..., G]."""
  edges = 1 - jnp.arange(intervals + 1, dtype=tau_src.dtype) / intervals
  clipped = flow.warp(jnp.clip(jnp.broadcast_to(edges, (*tau_src.shape[:-1], intervals + 1)), tau_dst, tau_src), shift)
  return clipped[..., 1:] - clipped[..., :-1]


class ParallelHead(nn.Module):
  """Tokens [B, N, D] -> velocities [B, intervals, H, W, C], the teacher's output layer so many times over.

  Attributes:
    intervals: G.
    channels, patch: of the latent and its tokens.
    shift: of `flow.warp`.
  """

  intervals: int
  channels: int
  patch: int
  shift: float = 1.0
  dtype: Any = jnp.float32

  def to_policy(self, u, x_src, t_src, *, eps=0.0):
    """Open loop: where the network was called does not matter any more."""
    del x_src, t_src, eps
    return ParallelPolicy(u, self.shift)

  def perturb(self, policy, keys):
    """The behaviour policy is the live one: nothing is dropped."""
    del keys
    return policy

  def from_teacher(self, teacher_head, fresh, key):
    """Every interval starts as the teacher's output layer."""
    del key
    return layers.copy_output_layer(teacher_head, fresh)

  def fuse(self, params, tau_src, tau_dst):
    """One output layer that says the mean velocity of a block: the head is linear, so its G layers average into one.

    Args:
      params: of this head.
      tau_src, tau_dst: [] raw times of the block's ends.
    Returns:
      Parameters of `layers.VelocityHead`: sampling costs what the teacher's output layer costs.
    """
    spans = block_spans(tau_src[None], tau_dst[None], intervals=self.intervals, shift=self.shift)
    return {"out": jax.tree.map(lambda w: jnp.einsum("...gc,g->...c", w, spans / spans.sum()), params["out"])}

  @nn.compact
  def __call__(self, tokens, embedding, grid):
    del embedding
    return layers.project_velocities(
        tokens, grid, count=self.intervals, channels=self.channels, patch=self.patch, dtype=self.dtype)
