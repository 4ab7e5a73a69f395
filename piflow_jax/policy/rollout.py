"""A policy's own way through time: Euler substeps on raw time, no network (pi-Flow, arXiv 2510.14974, section 3.1)."""

import jax
import jax.numpy as jnp

from piflow_jax import flow


_SHORT = 16  # substeps


def count_substeps(tau_src, tau_dst, total_substeps):
  """n = round((tau_src - tau_dst) total), half to even as in the authors' code; [B] floats, at times below 1."""
  return jnp.round((tau_src - tau_dst) * total_substeps)


def rollout(policy, x, tau_src, tau_dst, *, shift=1.0, total_substeps=128, max_substeps=None):
  """Integrate dx = pi(x, t) dt from tau_src to tau_dst in max(n, 1) substeps that are equal in raw time.

  Args:
    policy: pytree with `velocity(x, t)`; it may offer `by_position` (see gmm.py) to be integrated in its own layout, or
      `advance(x, tau_src, tau_dst)` (see parallel.py) where it knows its integral without any substep.
    x: [B, H, W, C] start.
    tau_src, tau_dst: [B] raw times; a destination below 0 sets the substep's size but time stops at 0.
    shift: of `flow.warp`.
    total_substeps: substeps over the whole of [0, 1].
    max_substeps: static bound on n where the caller knows one; samples that are done hold still.
  Returns:
    x at tau_dst, [B, H, W, C].
  """
  if hasattr(policy, "advance"):
    return policy.advance(x, tau_src, tau_dst)
  n = jnp.maximum(count_substeps(tau_src, tau_dst, total_substeps), 1)
  steps = jnp.arange(max_substeps or total_substeps, dtype=tau_src.dtype)

  def integrate(policy, x, n, tau_src, size, *, n_max, differentiable=True):
    def advance(x, i):
      j = jnp.minimum(i, n - 1)  # who is done waits at a time that it had, not on its way to 0 where policies are sharpest
      t = flow.warp(jnp.maximum(tau_src - j * size, 0), shift)
      t_next = flow.warp(jnp.maximum(tau_src - (j + 1) * size, 0), shift)
      step = jnp.where(i < n, t_next - t, 0)
      return x + flow.broadcast_to(step, x) * policy.velocity(x, t)

    if not differentiable:
      return jax.lax.fori_loop(0, n_max.astype(jnp.int32), lambda i, x: advance(x, i.astype(x.dtype)), x)
    # Training stretches are short of the bound: what no sample needs is not computed. (Of a short bound little is spared,
    # and the derivative of what is left out would be zeros of the policy's size.) Backwards only x is remembered.
    skip = lambda x, i: jax.lax.cond(i < n_max, advance, lambda x, i: x, x, i)
    substep = jax.checkpoint(skip if len(steps) > _SHORT else advance, prevent_cse=False)
    return jax.lax.scan(lambda x, i: (substep(x, i), None), x, steps)[0]

  by_position = getattr(policy, "by_position", lambda integrate, x, n, *times: integrate(policy, x, n, *times, n_max=n.max()))
  return by_position(integrate, x, n, tau_src, (tau_src - tau_dst) / n)


def average_velocity(policy, x, tau_src, tau_dst, *, shift=1.0, total_substeps=128, max_substeps=None, eps=1e-4):
  """(x_src - x_dst) / (t_src - t_dst) by a rollout; where that is under two substeps simply pi(x, t_src).

  Arguments as for `rollout`; with max_substeps = 1 no rollout is made at all. eps is the least noise span.
  """
  t_src = flow.warp(tau_src, shift)
  instant = policy.velocity(x, t_src)
  if max_substeps is not None and max_substeps < 2:
    return instant
  x_dst = rollout(policy, x, tau_src, tau_dst, shift=shift, total_substeps=total_substeps, max_substeps=max_substeps)
  span = jnp.maximum(t_src - flow.warp(jnp.maximum(tau_dst, 0), shift), eps)
  mean = (x - x_dst) / flow.broadcast_to(span, x)
  short = count_substeps(tau_src, tau_dst, total_substeps) < 2
  return jnp.where(flow.broadcast_to(short, x), instant, mean)
