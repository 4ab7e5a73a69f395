"""Imitation distillation, pi-ID (pi-Flow, arXiv 2510.14974, section 3.2): match the teacher along the policy's own path."""

import functools

import flax
import jax
import jax.numpy as jnp

from piflow_jax import flow
from piflow_jax.distill import segments
from piflow_jax.policy import rollout as rollout_lib


@flax.struct.dataclass
class Draws:
  """The uniforms of one training segment, an argument so that a test or another framework can give its own."""

  policy: jax.Array  # [B, M]
  teacher: jax.Array  # [B, M - 1]


def stretches(draws, segment, window, teacher_ratio):
  """How long policy and teacher take turns along a segment, in raw time.

  With S = segment - window: policy stretches are the gaps, counted from 0, of M sorted uniforms on [0, (1 - r) S]; teacher
  stretches the M gaps that M - 1 sorted uniforms cut out of [0, r S].

  Returns:
    (policy [M, B], teacher [M, B]).
  """
  span = (segment - window)[:, None]
  gaps = lambda x: jnp.diff(x, axis=1, prepend=0)
  policy = gaps(jnp.sort(draws.policy, axis=1) * (1 - teacher_ratio) * span)
  cuts = jnp.sort(draws.teacher, axis=1) * teacher_ratio * span
  teacher = gaps(jnp.concatenate([cuts, teacher_ratio * span], axis=1))
  return policy.T, teacher.T


def segment_loss(policy, behaviour, teacher, x_src, tau_src, segment, draws, *, shift=1.0, total_substeps=128,
                 window_substeps=0, teacher_ratio=0.0, loss_scale=1.0, method="euler", max_segment=1.0):
  """One segment of imitation: 0.5 scale mean (u_policy - u_teacher)^2 over M states (eq. 5; spec section 5).

  Gradients reach `policy` alone: neither the trajectory nor the teacher is differentiated.

  Args:
    policy: the live policy, made at (x_src, tau_src).
    behaviour: the policy that makes the trajectory, usually the live one perturbed; detached here.
    teacher: (x [B, ...], t [B] noise level) -> u.
    x_src: [B, ...] start of the segment.
    tau_src, segment: [B] raw time there, and the segment's length.
    draws: Draws for M states.
    shift: of `flow.warp`.
    total_substeps: Euler substeps over the whole of [0, 1].
    window_substeps: substeps over which velocities are averaged beyond the teacher's stretch.
    teacher_ratio: share r in [0, 1] of the trajectory that the teacher walks (scheduled trajectory mixing); a Python 0
      where it is never anything else saves the rollouts of the averages.
    loss_scale: of the loss.
    method: of `flow.mean_velocity`, the label over the averaging window: "euler" is the teacher's velocity at its start,
      "midpoint" asks the teacher once more (PDD, spec section 10). The teacher's own stretch stays an Euler step.
    max_segment: static bound on `segment`.
  Returns:
    (loss, aux) with aux the trajectory: x_a [M, B, ...], tau_a [M, B], tau_average [M, B] (end of the averaging window),
    u_teacher, u_policy [M, B, ...], x_dst [B, ...], tau_dst [B].
  """
  behaviour = jax.lax.stop_gradient(behaviour)
  substep = segment / jnp.maximum(jnp.round(segment * total_substeps), 1)
  window = jnp.minimum(window_substeps * substep, segment)
  policy_stretch, teacher_stretch = stretches(draws, segment, window, teacher_ratio)
  in_segment = max(round(max_segment * total_substeps), 1)
  run = functools.partial(
      rollout_lib.rollout, shift=shift, total_substeps=total_substeps, max_substeps=in_segment)

  def walk(carry, stretch):
    x, tau = carry
    by_policy, by_teacher = stretch
    tau_a = jnp.maximum(tau - by_policy, 0)
    x_a = run(behaviour, x, tau, tau_a)
    t_a = flow.warp(tau_a, shift)
    u = jax.lax.stop_gradient(teacher(x_a, t_a))
    tau_b = jnp.maximum(tau_a - by_teacher, 0)
    x_b = x_a + flow.broadcast_to(flow.warp(tau_b, shift) - t_a, u) * u
    t_average = flow.warp(jnp.maximum(tau_b - window, 0), shift)
    label = jax.lax.stop_gradient(flow.mean_velocity(teacher, x_a, t_a, t_average, method=method, u=u))
    return (x_b, tau_b), (x_a, tau_a, tau_b - window, label)

  (x, tau), (x_a, tau_a, tau_average, u_teacher) = jax.lax.scan(
      walk, (x_src, tau_src), (policy_stretch, teacher_stretch))
  # The rest of the way is for those who go on to the next segment; where x_dst is not used the compiler drops it.
  tau_dst = jnp.maximum(tau_src - segment, 0)
  x_dst = run(behaviour, x, tau, tau_dst)

  never_mixed = isinstance(teacher_ratio, (int, float)) and teacher_ratio == 0
  # One more than the window, as the segment's substep may be a little longer than 1 / total_substeps; of no window, one.
  in_window = min(window_substeps + 1, in_segment) if never_mixed else in_segment

  def average(state):
    return rollout_lib.average_velocity(
        policy, *state, shift=shift, total_substeps=total_substeps, max_substeps=in_window)

  u_policy = jax.lax.map(jax.checkpoint(average), (x_a, tau_a, tau_average))
  loss = 0.5 * loss_scale * jnp.mean((u_policy - u_teacher) ** 2)
  return loss, dict(x_a=x_a, tau_a=tau_a, tau_average=tau_average, u_teacher=u_teacher, u_policy=u_policy, x_dst=x_dst,
                    tau_dst=tau_dst)


def teacher_ratio_at(step, num_decay_steps):
  """Scheduled trajectory mixing: r falls linearly from 1 to 0 over num_decay_steps; 0 of them is r = 0 at once."""
  return 0 if num_decay_steps == 0 else jnp.maximum(1 - step / num_decay_steps, 0.0)


def segment(student, teacher, perturb, *, num_states, window_substeps=0, total_substeps=128, shift=1.0,
            loss_scale=1.0, num_decay_steps=0, method="euler", max_segment=1.0):
  """`segment_loss` of a student: what `segments.on_data` and `segments.data_free` make an objective of.

  Args:
    student: (params, base, x, t, cond) -> policy, live in params.
    teacher: (teacher_params, x, t, cond) -> u.
    perturb: (policy, key a sample [B]) -> policy; what sets the behaviour policy apart from the live one.
    num_states: M, teacher queries a segment.
    The rest: see `segment_loss`, `teacher_ratio_at`.
  """
  def segment_fn(params, teacher_params, x_src, tau_src, length, cond, keys, step):
    key_perturb, key_policy, key_teacher = jax.vmap(functools.partial(jax.random.split, num=3), out_axes=1)(keys)
    draws = Draws(segments.draw_uniform(key_policy, num_states), segments.draw_uniform(key_teacher, num_states - 1))
    policy = student(params, teacher_params, x_src, flow.warp(tau_src, shift), cond)
    behaviour = perturb(jax.lax.stop_gradient(policy), key_perturb)
    loss, aux = segment_loss(
        policy, behaviour, lambda x, t: teacher(teacher_params, x, t, cond), x_src, tau_src, length, draws, shift=shift,
        total_substeps=total_substeps, window_substeps=window_substeps,
        teacher_ratio=teacher_ratio_at(step, num_decay_steps), loss_scale=loss_scale, method=method,
        max_segment=max_segment)
    return loss, aux["x_dst"]

  return segment_fn
