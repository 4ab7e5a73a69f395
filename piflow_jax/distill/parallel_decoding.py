"""Parallel decoding distillation (method.md, 8; PDD, arXiv 2607.26004): the teacher's mean velocity in an interval."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax.distill import imitation
from piflow_jax.distill import method as method_lib
from piflow_jax.distill import segments
from piflow_jax.policy import rollout


def config(**fields):
  """A student by parallel decoding distillation; its policy is policy.parallel's."""
  return config_lib.noun(make, dict(
      min_block=16,  # intervals: blocks begin at its multiples; a divisor of config.policy.intervals
      max_block=128,  # intervals that a block's student is trained for, from min_block to config.policy.intervals
      label="euler",  # the teacher's velocity at an interval's start; or "midpoint", its mean by one more call
      loss_scale=3.0,  # factor of the loss
      data_free=False,  # walk all blocks from noise instead of starting from noised data
  ), fields)


def make(parts, *, min_block, max_block, label, loss_scale, data_free):
  """The Method: one model for several numbers of calls, sampled through one fused output layer.

  Raises:
    ValueError: a field is out of its range, or does not fit the head's intervals.
  """
  imitation.check_parts(parts)
  student, teacher = parts.student, parts.teacher
  if not hasattr(student.head, "fuse"):
    raise ValueError("make: parallel decoding takes a head of fixed intervals, and config.policy makes a "
                     f"{type(student.head).__name__}; set it to policy.parallel.config()")
  intervals = student.head.intervals
  config_lib.whole("min_block", min_block, most=intervals)
  config_lib.whole("max_block", max_block, least=min_block, most=intervals)
  if intervals % min_block:
    raise ValueError(f"min_block: {min_block} does not divide config.policy.intervals={intervals}")
  config_lib.one_of("label", label, imitation.LABELS)
  config_lib.number("loss_scale", loss_scale, above=0)
  config_lib.one_of("data_free", data_free, (True, False))

  blocks = intervals // min_block
  trained = flow.Clock(parts.shift, total_substeps=intervals, nfe=blocks, final_scale=1.0)
  segment_fn = segment(functools.partial(student.policy, clock=trained), teacher.velocity, trained,
                       max_block=max_block, method=label, loss_scale=loss_scale, noisy=student.noisy)

  def flow_map(params, base, cond, clock):
    tree = student.tree(params, base)

    def step(x, tau_src, tau_dst):
      # One layer for the whole batch, so one block: a sampler has all samples at the same time.
      fused = tree | {"head": student.head.fuse(tree["head"], tau_src[0], tau_dst[0], clock)}

      def velocity(x, t):
        return parts.velocity.apply(fused, x, t, cond)

      return sampler.velocity_flow_map(velocity, clock)(x, tau_src, tau_dst)

    return step

  def fits(nfe, h):
    # A block that starts off the grid, or is longer than max_block, would average output layers that no update trained.
    plan = sampler.step_plan(trained.replace(nfe=nfe), h=h)
    starts, lengths = (1 - plan["tau"]) * blocks, (plan["tau"] - plan["tau_dst"]) * intervals
    return np.abs(starts - np.round(starts)).max() < 1e-3 and lengths.max() < max_block + 1e-3

  def calls(nfe, h):
    if not fits(nfe, h):
      good = ", ".join(str(n) for n in range(1, blocks + 1) if fits(n, h))
      choose = f"choose of {good}" if good else "no number of calls fits"
      raise ValueError(f"nfe: {nfe}; trained are blocks that start at multiples of {min_block} of {intervals} "
                       f"intervals and have at most {max_block}: at config.sampling.h={h} {choose}")

  return method_lib.Method(
      init=student.init, objective=(segments.data_free if data_free else segments.on_data)(segment_fn, trained),
      flow_map=flow_map, clock=trained, passes=(3 + 2 * teacher.passes) * (blocks if data_free else 1),
      per_call=False, calls=calls)


def segment(student, teacher, clock, *, max_block, method="midpoint", loss_scale=1.0, noisy=False):
  """The loss of one block: 0.5 scale mean (u_k - teacher's mean velocity in interval k)^2 at random k (method.md, 8).

  The state at k comes from the student's own velocities, which are not differentiated. A midpoint label calls the
  teacher twice at one k, an Euler label once at two of them, so that both cost the same.

  Args:
    student: (params, base, x, t, cond) -> policy, constant in each of the intervals.
    teacher: (teacher_params, x, t, cond) -> u.
    clock: `flow.Clock` whose total_substeps are the intervals G, and whose segments the blocks' strides L_min / G.
    max_block: L_max, how many intervals from the block's start on are trained.
    method: "euler" or "midpoint", of `flow.mean_velocity`.
    loss_scale: factor of the loss.
    noisy: the student takes keys=[B] too, which its network draws from in training.
  Returns:
    segment_fn of `segments`; its x_dst is the student's state at the end of the stride.
  """
  states, intervals = 2 if method == "euler" else 1, clock.total_substeps

  def segment_fn(params, teacher_params, x_src, tau_src, length, cond, keys, step):
    del step
    more = {"keys": jax.vmap(jax.random.fold_in, (0, None))(keys, 1)} if noisy else {}
    policy = student(params, teacher_params, x_src, clock.warp(tau_src), cond, **more)
    behaviour = jax.lax.stop_gradient(policy)
    start = jnp.round((1 - tau_src) * intervals)
    count = jnp.minimum(start + max_block, intervals) - start

    def velocity(x, t):
      return teacher(teacher_params, x, t, cond)

    def at(uniform):
      k = start + jnp.floor(uniform * count)
      tau_a, tau_b = 1 - k / intervals, jnp.maximum(1 - (k + 1) / intervals, 0)
      t_a, t_b = clock.warp(tau_a), clock.warp(tau_b)
      x_a = rollout.rollout(behaviour, x_src, tau_src, tau_a, clock)
      label = flow.mean_velocity(velocity, x_a, t_a, t_b, method=method)
      u = policy.velocity(x_a, t_a)
      chex.assert_equal_shape([u, label, x_src])
      return jnp.mean((u - jax.lax.stop_gradient(label)) ** 2)

    uniforms = segments.draw_uniform(keys, states)
    loss = 0.5 * loss_scale * sum(at(uniforms[:, i]) for i in range(states)) / states
    return loss, rollout.rollout(behaviour, x_src, tau_src, jnp.maximum(tau_src - length, 0), clock)

  return segment_fn
