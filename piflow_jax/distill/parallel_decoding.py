"""Parallel decoding distillation (PDD, arXiv 2607.26004; spec section 10): the teacher's mean in each interval."""

import jax
import jax.numpy as jnp

from piflow_jax import flow
from piflow_jax.distill import segments
from piflow_jax.policy import rollout


def segment(student, teacher, *, intervals, max_block, method="midpoint", shift=1.0, loss_scale=1.0):
  """The loss of one block: 0.5 scale mean (u_k - mean velocity of the teacher over interval k)^2 at random k.

  The state at k comes from the student's own velocities, which are not differentiated. A midpoint target asks the
  teacher twice at one k, an Euler target once at two of them: the cost is the same.

  Args:
    student: (params, base, x, t, cond) -> policy, constant in each of the intervals.
    teacher: (teacher_params, x, t, cond) -> u.
    intervals: G over the whole of raw time.
    max_block: L_max, how many intervals from the block's start on are trained.
    method: "euler" or "midpoint", of `flow.mean_velocity`.
    shift: of `flow.warp`.
    loss_scale: of the loss.
  Returns:
    segment_fn of `segments`; a segment is the block's stride L_min / G, and x_dst the student's state at its end.
  """
  states = 2 if method == "euler" else 1

  def segment_fn(params, teacher_params, x_src, tau_src, length, cond, keys, step):
    del step
    policy = student(params, teacher_params, x_src, flow.warp(tau_src, shift), cond)
    behaviour = jax.lax.stop_gradient(policy)
    go = lambda x, a, b: rollout.rollout(behaviour, x, a, b, shift=shift, total_substeps=intervals)
    start = jnp.round((1 - tau_src) * intervals)
    count = jnp.minimum(start + max_block, intervals) - start

    def at(uniform):
      k = start + jnp.floor(uniform * count)
      tau_a, tau_b = 1 - k / intervals, jnp.maximum(1 - (k + 1) / intervals, 0)
      t_a, t_b = flow.warp(tau_a, shift), flow.warp(tau_b, shift)
      x_a = go(x_src, tau_src, tau_a)
      label = flow.mean_velocity(lambda x, t: teacher(teacher_params, x, t, cond), x_a, t_a, t_b, method=method)
      return jnp.mean((policy.velocity(x_a, t_a) - jax.lax.stop_gradient(label)) ** 2)

    uniforms = segments.draw_uniform(keys, states)
    loss = 0.5 * loss_scale * sum(at(uniforms[:, i]) for i in range(states)) / states
    return loss, go(x_src, tau_src, jnp.maximum(tau_src - length, 0))

  return segment_fn
