"""The parallel-decoding policy: a fixed grid of velocities at once (method.md, 8; PDD, arXiv 2607.26004)."""

from typing import Any

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax.models import layers


@flax.struct.dataclass
class ParallelPolicy:
  """G constant velocities: u[g] holds for raw times from 1 - g / G down to 1 - (g + 1) / G, wherever the point is."""

  u: jax.Array  # [B, G, ..., C]
  clock: flow.Clock  # of which the shift counts

  def velocity(self, x, t):
    """The velocity of the interval that begins at or holds t; x [B, ..., C], t [B] noise level -> [B, ..., C]."""
    del x
    intervals = self.u.shape[1]
    # Rounding must not move the start of an interval into the one above it.
    g = jnp.floor((1 - self.clock.unwarp(t)) * intervals + 1e-3)
    g = jnp.clip(g, 0, intervals - 1).astype(jnp.int32)
    return jnp.take_along_axis(self.u, flow.broadcast_to(g, self.u), axis=1)[:, 0]

  def advance(self, x, tau_src, tau_dst):
    """x at tau_dst, exactly: a weighted sum of the velocities in between (method.md, 8); raw times [B]."""
    spans = block_spans(tau_src[:, None], tau_dst[:, None], self.clock, intervals=self.u.shape[1])
    return x + jnp.einsum("bg,bg...->b...", spans, self.u)


def block_spans(tau_src, tau_dst, clock, *, intervals):
  """Change of the noise level in each interval on the way from tau_src down to tau_dst, <= 0; [..., 1] -> [..., G]."""
  edges = 1 - jnp.arange(intervals + 1, dtype=tau_src.dtype) / intervals
  clipped = clock.warp(jnp.clip(jnp.broadcast_to(edges, (*tau_src.shape[:-1], intervals + 1)), tau_dst, tau_src))
  return clipped[..., 1:] - clipped[..., :-1]


class ParallelHead(nn.Module):
  """Tokens [B, N, D] -> velocities [B, intervals, ..., C], by as many copies of the teacher's output layer.

  Attributes:
    intervals: G.
  """

  intervals: int
  dtype: Any = jnp.float32

  def to_policy(self, out, x_src, t_src, clock, *, eps=0.0):
    """ParallelPolicy of the velocities out [B, intervals, ..., C]: open loop, x_src and t_src do not enter."""
    del x_src, t_src, eps
    return ParallelPolicy(out, clock)

  def perturb(self, policy, keys):
    """The behaviour policy is the live one: there is nothing to drop."""
    del keys
    return policy

  def from_teacher(self, teacher_head, fresh, key):
    """Every interval starts as the teacher's output layer."""
    del key
    return layers.copy_output_layer(teacher_head, fresh)

  def fuse(self, params, tau_src, tau_dst, clock):
    """One output layer for a block's mean velocity: as the head is linear, its layers average into one (method.md, 8).

    Args:
      params: of this head.
      tau_src, tau_dst: [] raw times of the block's ends.
      clock: flow.Clock, of which the shift counts.
    Returns:
      Parameters of `layers.VelocityHead`: a sampling call then costs what a call of the teacher costs.
    """
    spans = block_spans(tau_src[None], tau_dst[None], clock, intervals=self.intervals)
    return {"out": jax.tree.map(lambda w: jnp.einsum("...gc,g->...c", w, spans / spans.sum()), params["out"])}

  def export_config(self, clock):
    """The policy as pi-Flow's release names it, with the arguments of its class."""
    return dict(type="ParallelDecoding", shift=clock.shift)

  @nn.compact
  def __call__(self, tokens, embedding, layout):
    del embedding
    return layers.project_velocities(tokens, layout, count=self.intervals, dtype=self.dtype)


def config(**fields):
  """A student that returns parallel-decoding policies."""
  return config_lib.noun(make, dict(
      intervals=128,  # G, over the whole of raw time
  ), fields)


def make(dtype, *, intervals):
  """ParallelHead that computes in dtype. Raises ValueError: a field out of bounds."""
  config_lib.whole("intervals", intervals)
  return ParallelHead(intervals, dtype)
