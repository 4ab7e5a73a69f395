"""Parallel decoding distillation on teachers that can be integrated by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax.distill import parallel_decoding
from piflow_jax.distill import segments
from piflow_jax.policy import dx
from piflow_jax.policy import parallel
from tests.distill import making

G = 8
CLOCK = flow.Clock(3.2, G, 2, 1.0)
EDGES = CLOCK.warp(1 - jnp.arange(G + 1) / G)


def _student(params, base, x, t, cond):
  """The same G velocities everywhere."""
  return parallel.ParallelPolicy(
      jnp.broadcast_to(params[None, :, None, None, None], (len(x), G, *x.shape[1:])), CLOCK)


def _objective(teacher, make=segments.on_data, min_block=4, max_block=8, method="midpoint"):
  clock = CLOCK.replace(nfe=G // min_block)
  segment = parallel_decoding.segment(_student, teacher, clock, max_block=max_block, method=method)
  return jax.jit(make(segment, clock))


BATCH = {"x_0": jnp.zeros((256, 1, 1, 2)), "cond": {}}
KEYS = jax.random.split(jax.random.key(0), 256)


@pytest.mark.parametrize("make", [segments.on_data, segments.data_free])
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_the_minimum_is_the_teachers_mean_velocity(make, method):
  """Teacher u = t^2: the velocities that each method calls the interval's mean have no loss and no gradient."""
  def teacher(params, x, t, cond):
    return flow.broadcast_to(t**2, x) + 0 * x

  at = EDGES[:-1] if method == "euler" else (EDGES[:-1] + EDGES[1:]) / 2
  objective = _objective(teacher, make, method=method)
  grads, metrics = objective(at**2, None, BATCH, KEYS, 0)
  assert float(metrics["loss"]) < 1e-12 and float(jnp.abs(grads).max()) < 1e-6
  _, metrics = objective(at**2 + 0.1, None, BATCH, KEYS, 0)
  np.testing.assert_allclose(metrics["loss"], 0.5 * 0.1**2, rtol=1e-4)


def test_states_come_from_the_students_own_velocities():
  """Teacher u = x: where the student's velocities carry all points to -3, the label is -3, too."""
  def teacher(params, x, t, cond):
    return x

  u, ones = jnp.full(G, 2.0), jnp.ones(256)

  def loss(max_block):
    segment_fn = parallel_decoding.segment(_student, teacher, CLOCK, max_block=max_block, method="euler")
    return segment_fn(u, None, jnp.ones((256, 1, 1, 2)), ones, ones / 2, {}, KEYS, 0)

  # With one interval only the start is asked: label 1, student 2.
  value, x_dst = loss(1)
  np.testing.assert_allclose(value, 0.5, rtol=1e-6)
  np.testing.assert_allclose(x_dst, 1 + 2 * (EDGES[4] - 1), rtol=1e-5)
  # Over all of them the state at k is 1 + 2 (t_k - 1), each k as likely as the others: 512 draws of 8 values.
  want = 0.5 * np.mean((2 - (1 + 2 * (np.asarray(EDGES[:-1]) - 1))) ** 2)
  np.testing.assert_allclose(loss(8)[0], want, rtol=0.1)


def test_every_interval_is_trained_within_its_block():
  def teacher(params, x, t, cond):
    return 0 * x

  def reached(**blocks):
    return np.asarray(_objective(teacher, **blocks)(jnp.ones(G), None, BATCH, KEYS, 0)[0] != 0)

  assert reached(min_block=4, max_block=8).all()
  assert reached(min_block=8, max_block=8).all()
  np.testing.assert_array_equal(reached(min_block=4, max_block=1), [True, False, False, False] * 2)


@pytest.mark.parametrize("method, states", [("euler", 2), ("midpoint", 1)])
def test_the_loss_is_the_mean_over_two_intervals_by_euler_and_one_by_midpoint(method, states):
  """Against the sum by hand of one block of all intervals, and as many calls of the teacher either way."""
  calls = []

  def teacher(params, x, t, cond):
    calls.append(t)
    return flow.broadcast_to(t**2, x) + 0 * x

  u = jax.random.normal(jax.random.key(1), (G,))
  segment_fn = parallel_decoding.segment(_student, teacher, CLOCK, max_block=G, method=method, loss_scale=3.0)
  loss, _ = segment_fn(u, None, jnp.zeros((256, 1, 1, 2)), jnp.ones(256), jnp.ones(256), {}, KEYS, 0)
  assert len(calls) == 2
  k = np.floor(np.asarray(segments.draw_uniform(KEYS, states)) * G).astype(int)  # [256, states]
  at = np.asarray(EDGES)[k] if method == "euler" else (np.asarray(EDGES)[k] + np.asarray(EDGES)[k + 1]) / 2
  np.testing.assert_allclose(loss, 0.5 * 3.0 * np.mean((np.asarray(u)[k] - at**2) ** 2), rtol=1e-5)


@functools.cache
def _parts():
  return making.parts(parallel.config(intervals=G), shift=2.0, teacher=dict(guidance_scale=2.0))


def _make(**fields):
  return making.method(parallel_decoding.config(**(dict(min_block=2, max_block=4) | fields)), _parts())


@pytest.mark.parametrize("name, values", {
    "min_block": (0, -1, 9, 2**40, 1e30, "x"), "max_block": (0, 1, 9, 2**40, float("nan"), "x"),
    "loss_scale": (0, -1, float("nan"), float("inf"), 1e30, "x"), "label": ("x", 0), "data_free": ("x", 2),
}.items())
def test_a_field_out_of_its_range_is_refused_by_name(name, values):
  for value in values:
    with pytest.raises(ValueError, match=rf"^{name}: .*{re.escape(str(value))}"):
      _make(**{name: value})


def test_what_does_not_fit_the_head_is_refused_by_name():
  with pytest.raises(ValueError, match="^min_block: 3 does not divide config.policy.intervals=8"):
    _make(min_block=3)
  with pytest.raises(ValueError, match="^make: .*fixed intervals.* DXHead"):
    making.method(parallel_decoding.config(), making.parts(dx.config(points=4)))


@pytest.mark.parametrize("data_free, passes", [(False, 3 + 4), (True, 4 * (3 + 4))])
def test_a_method_counts_its_passes_and_knows_its_clock(data_free, passes):
  method = _make(data_free=data_free)
  assert method.passes == passes and not method.per_call
  assert method.clock == flow.Clock(2.0, total_substeps=G, nfe=4, final_scale=1.0)


def test_calls_outside_of_the_trained_blocks_are_refused_with_those_inside():
  """Blocks start at multiples of 2 of 8 intervals and have at most 4: 2 or 4 calls; with h > 0 blocks reach further."""
  method = _make()
  assert method.calls(2, 0.0) is None and method.calls(4, 0.0) is None
  for nfe in (1, 3, 5, 8):
    with pytest.raises(ValueError, match=f"^nfe: {nfe}; .*multiples of 2 of 8 intervals.*at most 4: .*choose of 2, 4"):
      method.calls(nfe, 0.0)
  with pytest.raises(ValueError, match="^nfe: 2; .*config.sampling.h=inf no number of calls fits"):
    method.calls(2, float("inf"))
  assert _make(max_block=8).calls(2, float("inf")) is None


def test_one_fused_layer_draws_what_the_policies_would():
  method, parts = _make(max_block=8), _parts()
  leaves, tree = jax.tree.flatten(jax.jit(method.init)(jax.random.key(0), making.teacher_params()))
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = jax.tree.unflatten(tree, [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
  noise, cond = jax.random.normal(jax.random.key(2), (3, *making.SHAPE)), making.cond(3)
  clock = method.clock.replace(nfe=2)
  by_policy = sampler.policy_flow_map(lambda x, t: parts.student.policy(params, {}, x, t, cond, clock), clock)
  fused, whole = (jax.jit(lambda x, f=f: sampler.sample(f, x, None, clock))(noise)
                  for f in (method.flow_map(params, {}, cond, clock), by_policy))
  np.testing.assert_allclose(fused, whole, atol=1e-5)


def test_a_teacher_that_would_only_broadcast_is_refused():
  segment_fn = parallel_decoding.segment(
      _student, lambda params, x, t, cond: flow.broadcast_to(t, x), CLOCK, max_block=G, method="euler")
  with pytest.raises(AssertionError, match="shape"):
    segment_fn(jnp.ones(G), None, jnp.zeros((256, 1, 1, 2)), jnp.ones(256), jnp.ones(256), {}, KEYS, 0)
