"""A policy's own way through time: Euler substeps in raw time, no network (method.md, 5; arXiv 2510.14974, 3.1)."""

import chex
import jax
import jax.numpy as jnp

from piflow_jax import flow
from piflow_jax import policy as contract

_SHORT = 16  # substeps


def count_substeps(tau_src, tau_dst, total_substeps):
  """n = round((tau_src - tau_dst) total), half to even as in the authors' code (method.md, 5); [B] floats, maybe 0."""
  return jnp.round((tau_src - tau_dst) * total_substeps)


def rollout(policy, x, tau_src, tau_dst, clock, *, max_substeps=None):
  """Integrate dx = pi(x, t) dt from tau_src to tau_dst in max(n, 1) substeps of equal raw time (method.md, 5).

  Args:
    policy: see `piflow_jax.policy`.
    x: [B, ..., C] start.
    tau_src, tau_dst: [B] raw times; a destination below 0 sets the substep's size but time stops at 0.
    clock: flow.Clock.
    max_substeps: static bound on n where the caller knows one, else clock.total_substeps.
  Returns:
    x at tau_dst, [B, ..., C].
  """
  chex.assert_shape([tau_src, tau_dst], x.shape[:1])
  if isinstance(policy, contract.Integral):
    return policy.advance(x, tau_src, tau_dst)
  n = jnp.maximum(count_substeps(tau_src, tau_dst, clock.total_substeps), 1)
  # An array in the clock travels as a number of each sample, so that it gets into every layout and kernel.
  leaves, tree = jax.tree.flatten(clock)

  def integrate(policy, x, n, tau_src, size, *leaves, **how):
    return euler(policy, x, n, tau_src, size, tree.unflatten(leaves), bound=max_substeps or clock.total_substeps, **how)

  times = [tau_src, (tau_src - tau_dst) / n, *(jnp.broadcast_to(leaf, n.shape) for leaf in leaves)]
  if isinstance(policy, contract.ByPosition):
    return policy.by_position(integrate, x, n, *times)
  return integrate(policy, x, n, *times, n_max=n.max())


def euler(policy, x, n, tau_src, size, clock, *, bound, n_max, differentiable=True):
  """n Euler substeps; samples with fewer than n_max hold still afterwards.

  Args:
    policy: `velocity(x, t)` alone is called.
    x: [B, ..., C], or in a layout to which n, tau_src and size broadcast.
    n: substeps, floats >= 1.
    tau_src, size: raw time at the start, and of one substep.
    clock: flow.Clock.
    bound: static bound on n_max.
    n_max: [] largest n.
    differentiable: False: a loop of n_max turns that no derivative goes through.
  Returns:
    x after the substeps.
  """
  def advance(x, i):
    # A sample that is done waits at its last substep's time: on the way to 0 a policy is sharpest, and may overflow.
    j = jnp.minimum(i, n - 1)
    t = clock.warp(jnp.maximum(tau_src - j * size, 0))
    t_next = clock.warp(jnp.maximum(tau_src - (j + 1) * size, 0))
    step = jnp.where(i < n, t_next - t, 0)
    u = policy.velocity(x, t)
    chex.assert_equal_shape([u, x])
    return x + flow.broadcast_to(step, x) * u

  def skip(x, i):
    return jax.lax.cond(i < n_max, advance, _stay, x, i)

  if not differentiable:
    return jax.lax.fori_loop(0, n_max.astype(jnp.int32), lambda i, x: advance(x, i.astype(x.dtype)), x)
  # Most stretches need fewer substeps than the static bound: skip those that no sample needs. Below 17 substeps that
  # saves little, and its gradient would materialise zeros as large as the policy. Remat keeps only x for each substep.
  substep = jax.checkpoint(skip if bound > _SHORT else advance, prevent_cse=False)
  return jax.lax.scan(lambda x, i: (substep(x, i), None), x, jnp.arange(bound, dtype=tau_src.dtype))[0]


def _stay(x, i):
  del i
  return x


def average_velocity(policy, x, tau_src, tau_dst, clock, *, max_substeps=None, eps=1e-4):
  """(x_src - x_dst) / (t_src - t_dst) by a rollout; pi(x, t_src) where that is under two substeps (method.md, 5).

  Args:
    policy, x, tau_src, tau_dst, clock: of `rollout`.
    max_substeps: of `rollout`; with 1 no rollout is made at all.
    eps: least noise span that is divided by.
  Returns:
    [B, ..., C].
  """
  t_src = clock.warp(tau_src)
  instant = policy.velocity(x, t_src)
  if max_substeps is not None and max_substeps < 2:
    return instant
  x_dst = rollout(policy, x, tau_src, tau_dst, clock, max_substeps=max_substeps)
  span = jnp.maximum(t_src - clock.warp(jnp.maximum(tau_dst, 0)), eps)
  mean = (x - x_dst) / flow.broadcast_to(span, x)
  short = count_substeps(tau_src, tau_dst, clock.total_substeps) < 2
  return jnp.where(flow.broadcast_to(short, x), instant, mean)
