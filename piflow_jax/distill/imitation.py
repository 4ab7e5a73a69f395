"""Imitation distillation, pi-ID (pi-Flow, arXiv 2510.14974, 3.2): match the teacher along the policy's own path."""

import functools
from typing import NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax.distill import method as method_lib
from piflow_jax.distill import segments
from piflow_jax.policy import rollout as rollout_lib

LABELS = ("euler", "midpoint")


def config(**fields):
  """A few-step student by imitation of a teacher, on data or without."""
  return config_lib.noun(make, dict(
      nfe=1,  # network calls, i.e. segments, that the student is trained for
      final_scale=1.0,  # length of the last segment as a share of the others, above 0 and at most 1
      total_substeps=128,  # Euler substeps of the policy over all segments
      num_states=2,  # M, teacher queries a segment
      window_substeps=0,  # span over which velocities are averaged
      loss_scale=3.0,  # factor of the loss
      num_decay_steps=0,  # scheduled trajectory mixing: steps until no teacher stretch is left; 0 is none ever
      label="euler",  # the teacher's velocity; or "midpoint", its mean over the window by one more call
      data_free=False,  # walk all segments from noise instead of starting from noised data
  ), fields)


def make(parts, *, nfe, final_scale, total_substeps, num_states, window_substeps, loss_scale, num_decay_steps, label,
         data_free):
  """The Method. Raises ValueError for a field that is out of its range or does not fit another."""
  config_lib.whole("total_substeps", total_substeps, most=2**16)
  config_lib.whole("nfe", nfe, most=total_substeps)
  config_lib.number("final_scale", final_scale, above=0, most=1)
  config_lib.whole("num_states", num_states)
  config_lib.whole("window_substeps", window_substeps, least=0, most=total_substeps)
  config_lib.number("loss_scale", loss_scale, above=0)
  config_lib.whole("num_decay_steps", num_decay_steps, least=0)
  config_lib.one_of("label", label, LABELS)
  config_lib.one_of("data_free", data_free, (True, False))
  if label != "euler" and not window_substeps:
    raise ValueError(f"label: {label!r} is the teacher's mean over a window, and there is none; set window_substeps")
  check_parts(parts)
  student, teacher = parts.student, parts.teacher
  trained = flow.Clock(parts.shift, total_substeps=total_substeps, nfe=nfe, final_scale=final_scale)
  segment_fn = segment(
      functools.partial(student.policy, clock=trained), teacher.velocity, student.head.perturb, trained,
      Matching(window_substeps, label, loss_scale), num_states=num_states, num_decay_steps=num_decay_steps,
      noisy=student.noisy)

  def flow_map(params, base, cond, clock):
    last = clock.warp(clock.step_times()[-2])

    def policy(x, t):
      # The authors sample with a larger floor under the noise level than they train with. The trained clock, since the
      # points of a DX policy lie as in training, whatever nfe it is sampled with.
      made = student.policy(params, base, x, t, cond, trained, eps=1e-4)
      # To sharpen the last call's policy would cost detail; the calls before it only choose what the picture shows.
      return student.head.sharpen(made, t <= 1.001 * last) if hasattr(student.head, "sharpen") else made

    return sampler.policy_flow_map(policy, clock)

  def calls(asked, h):
    del h
    if asked == nfe:
      return None
    why = "each call covers more than it was trained to" if asked < nfe else (
        "calls start at noise levels that the network was not trained at")
    return f"config.sampling.nfe: {asked}, trained for {nfe}: {why}; config.method.nfe={asked} trains another student"

  a_state = teacher.passes * (2 if label == "midpoint" else 1)
  return method_lib.Method(
      init=student.init, objective=(segments.data_free if data_free else segments.on_data)(segment_fn, trained),
      flow_map=flow_map, clock=trained, passes=(3 + num_states * a_state) * (nfe if data_free else 1),
      per_call=True, calls=calls)


def check_parts(parts):
  """Raises ValueError: a student has no policy, or no teacher."""
  if parts.student is None:
    raise ValueError("make: a student is trained, and config.policy is not set; set it, e.g. to policy.gmm.config()")
  if parts.teacher is None:
    raise ValueError("make: a student needs a teacher, and config.teacher is not set; set it, e.g. to teacher.config()")


@flax.struct.dataclass
class Draws:
  """The uniforms of one training segment, an argument so that a test or another framework can give its own."""

  policy: jax.Array  # [B, M]
  teacher: jax.Array  # [B, M - 1]


class Matching(NamedTuple):
  """How the policy's velocity is compared with the teacher's.

  Attributes:
    window_substeps: substeps behind each state over which the policy's velocity is averaged (method.md, 6.2).
    label: method of `flow.mean_velocity` for the teacher's velocity over that window: "euler" is its velocity at the
      state, "midpoint" calls it once more. The teacher's own stretch stays an Euler step.
    loss_scale: factor of the loss.
  """

  window_substeps: int = 0
  label: str = "euler"
  loss_scale: float = 1.0


def stretches(draws, segment, window, teacher_ratio):
  """Lengths in raw time of the stretches that policy and teacher walk in turn along a segment (method.md, 6.1).

  With S = segment - window: policy stretches are the gaps, counted from 0, of M sorted uniforms on [0, (1 - r) S];
  teacher stretches the M gaps that M - 1 sorted uniforms cut out of [0, r S].

  Returns:
    (policy [M, B], teacher [M, B]).
  """
  span = (segment - window)[:, None]
  policy = jnp.diff(jnp.sort(draws.policy, axis=1) * (1 - teacher_ratio) * span, axis=1, prepend=0)
  cuts = jnp.sort(draws.teacher, axis=1) * teacher_ratio * span
  teacher = jnp.diff(jnp.concatenate([cuts, teacher_ratio * span], axis=1), axis=1, prepend=0)
  return policy.T, teacher.T


def segment_loss(policy, behaviour, teacher, x_src, tau_src, segment, draws, clock, matching, *, teacher_ratio=0.0):
  """One segment of imitation: 0.5 scale mean (u_policy - u_teacher)^2 over M states (method.md, 6; pi-Flow, eq. 5).

  Gradients reach `policy` alone: neither the trajectory nor the teacher is differentiated.

  Args:
    policy: the live policy, made at (x_src, tau_src).
    behaviour: the policy that makes the trajectory, usually the live one perturbed; detached here.
    teacher: (x [B, ...], t [B] noise level) -> u.
    x_src: [B, ...] start of the segment.
    tau_src, segment: [B] raw time there, and the segment's length, at most clock.max_segment.
    draws: Draws for M states.
    clock: `flow.Clock`.
    matching: Matching.
    teacher_ratio: share r in [0, 1] of the trajectory that the teacher walks (method.md, 6.3). Pass a Python 0 where it
      is never anything else: rollouts of the averages are then no longer than the window.
  Returns:
    (loss, aux) with aux the trajectory: x_a [M, B, ...], tau_a [M, B], tau_average [M, B] (end of the averaging
    window), u_teacher, u_policy [M, B, ...], x_dst [B, ...], tau_dst [B].
  Raises:
    AssertionError: when it is traced, a velocity of another shape than x_src, or times that are not [B].
  """
  chex.assert_shape([tau_src, segment], (len(x_src),))
  behaviour = jax.lax.stop_gradient(behaviour)
  substep = segment / jnp.maximum(jnp.round(segment * clock.total_substeps), 1)
  window = jnp.minimum(matching.window_substeps * substep, segment)
  policy_stretch, teacher_stretch = stretches(draws, segment, window, teacher_ratio)
  in_segment = max(round(clock.max_segment * clock.total_substeps), 1)

  def run(x, tau_from, tau_to):
    return rollout_lib.rollout(behaviour, x, tau_from, tau_to, clock, max_substeps=in_segment)

  def walk(carry, stretch):
    x, tau = carry
    by_policy, by_teacher = stretch
    tau_a = jnp.maximum(tau - by_policy, 0)
    x_a = run(x, tau, tau_a)
    t_a = clock.warp(tau_a)
    u = jax.lax.stop_gradient(teacher(x_a, t_a))
    chex.assert_equal_shape([u, x_a])
    tau_b = jnp.maximum(tau_a - by_teacher, 0)
    x_b = x_a + flow.broadcast_to(clock.warp(tau_b) - t_a, u) * u
    t_average = clock.warp(jnp.maximum(tau_b - window, 0))
    label = jax.lax.stop_gradient(flow.mean_velocity(teacher, x_a, t_a, t_average, method=matching.label, u=u))
    return (x_b, tau_b), (x_a, tau_a, tau_b - window, label)

  (x, tau), (x_a, tau_a, tau_average, u_teacher) = jax.lax.scan(
      walk, (x_src, tau_src), (policy_stretch, teacher_stretch))
  # Only a walk that goes on to the next segment needs the rest of the way; where x_dst is unused XLA drops the rollout.
  tau_dst = jnp.maximum(tau_src - segment, 0)
  x_dst = run(x, tau, tau_dst)

  never_mixed = isinstance(teacher_ratio, (int, float)) and teacher_ratio == 0
  # Static bound on the substeps in the averaging window: window_substeps + 1, since a segment's substep may be slightly
  # longer than 1 / total_substeps. Without a window it is 1, and no rollout is made.
  in_window = min(matching.window_substeps + 1, in_segment) if never_mixed else in_segment

  def average(state):
    return rollout_lib.average_velocity(policy, *state, clock, max_substeps=in_window)

  u_policy = jax.lax.map(jax.checkpoint(average), (x_a, tau_a, tau_average))
  chex.assert_equal_shape([u_policy, u_teacher, x_a])
  loss = 0.5 * matching.loss_scale * jnp.mean((u_policy - u_teacher) ** 2)
  return loss, dict(x_a=x_a, tau_a=tau_a, tau_average=tau_average, u_teacher=u_teacher, u_policy=u_policy, x_dst=x_dst,
                    tau_dst=tau_dst)


def teacher_ratio_at(step, num_decay_steps):
  """Scheduled trajectory mixing (method.md, 6.3): r falls linearly from 1 to 0 in num_decay_steps; for 0 it is 0."""
  return 0 if num_decay_steps == 0 else jnp.maximum(1 - step / num_decay_steps, 0.0)


def segment(student, teacher, perturb, clock, matching, *, num_states, num_decay_steps=0, noisy=False):
  """`segment_loss` of a student, as `segments.on_data` and `segments.data_free` take it.

  Args:
    student: (params, base, x, t, cond) -> policy, live in params.
    teacher: (teacher_params, x, t, cond) -> u.
    perturb: (policy, keys [B]) -> the behaviour policy, e.g. the live one with components dropped (method.md, 3.4).
    clock: `flow.Clock` of training.
    matching: Matching.
    num_states: M, teacher queries a segment.
    num_decay_steps: of `teacher_ratio_at`.
    noisy: the student takes keys=[B] too, which its network draws from in training.
  """
  def segment_fn(params, teacher_params, x_src, tau_src, length, cond, keys, step):
    key_perturb, key_policy, key_teacher = segments.split(keys, 3)
    draws = Draws(segments.draw_uniform(key_policy, num_states), segments.draw_uniform(key_teacher, num_states - 1))
    more = {"keys": jax.vmap(jax.random.fold_in, (0, None))(key_perturb, 1)} if noisy else {}
    policy = student(params, teacher_params, x_src, clock.warp(tau_src), cond, **more)
    behaviour = perturb(jax.lax.stop_gradient(policy), key_perturb)

    def velocity(x, t):
      return teacher(teacher_params, x, t, cond)

    loss, aux = segment_loss(policy, behaviour, velocity, x_src, tau_src, length, draws, clock, matching,
                             teacher_ratio=teacher_ratio_at(step, num_decay_steps))
    return loss, aux["x_dst"]

  return segment_fn
