"""Parallel decoding distillation on teachers that can be integrated by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax.distill import parallel_decoding
from piflow_jax.distill import segments
from piflow_jax.policy import parallel

G, SHIFT = 8, 3.2
EDGES = flow.warp(1 - jnp.arange(G + 1) / G, SHIFT)


def _objective(teacher, make=segments.on_data, min_block=4, max_block=8, method="midpoint"):
  student = lambda params, base, x, t, cond: parallel.ParallelPolicy(
      jnp.broadcast_to(params[None, :, None, None, None], (len(x), G, *x.shape[1:])), SHIFT)
  segment = parallel_decoding.segment(
      student, teacher, intervals=G, max_block=max_block, method=method, shift=SHIFT)
  extra = {} if make is segments.data_free else dict(shift=SHIFT)
  return jax.jit(make(segment, nfe=G // min_block, **extra))


BATCH = {"x_0": jnp.zeros((256, 1, 1, 2)), "cond": jnp.zeros(256)}
KEYS = jax.random.split(jax.random.key(0), 256)


@pytest.mark.parametrize("make", [segments.on_data, segments.data_free])
@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_the_minimum_is_the_teachers_mean_velocity(make, method):
  """Teacher u = t^2: the velocities that each method calls the interval's mean have no loss and no gradient."""
  teacher = lambda params, x, t, cond: flow.broadcast_to(t**2, x) + 0 * x
  at = EDGES[:-1] if method == "euler" else (EDGES[:-1] + EDGES[1:]) / 2
  objective = _objective(teacher, make, method=method)
  grads, metrics = objective(at**2, None, BATCH, KEYS, 0)
  assert float(metrics["loss"]) < 1e-12 and float(jnp.abs(grads).max()) < 1e-6
  _, metrics = objective(at**2 + 0.1, None, BATCH, KEYS, 0)
  np.testing.assert_allclose(metrics["loss"], 0.5 * 0.1**2, rtol=1e-4)


def test_states_come_from_the_students_own_velocities():
  """Teacher u = x: where the student's velocities carry all points to -3, the label is -3, too."""
  teacher = lambda params, x, t, cond: x
  u = jnp.full(G, 2.0)

  def loss(max_block):
    student = lambda params, base, x, t, cond: parallel.ParallelPolicy(
        jnp.broadcast_to(params[None, :, None, None, None], (len(x), G, *x.shape[1:])), SHIFT)
    segment_fn = parallel_decoding.segment(student, teacher, intervals=G, max_block=max_block, method="euler", shift=SHIFT)
    of_each = lambda v: jnp.full(256, v)
    return segment_fn(u, None, jnp.ones((256, 1, 1, 2)), of_each(1.0), of_each(0.5), None, KEYS, 0)

  # With one interval only the start is asked: label 1, student 2.
  value, x_dst = loss(1)
  np.testing.assert_allclose(value, 0.5, rtol=1e-6)
  np.testing.assert_allclose(x_dst, 1 + 2 * (EDGES[4] - 1), rtol=1e-5)
  # Over all of them the state at k is 1 + 2 (t_k - 1), each k as likely as the others: 512 draws of 8 values.
  want = 0.5 * np.mean((2 - (1 + 2 * (np.asarray(EDGES[:-1]) - 1))) ** 2)
  np.testing.assert_allclose(loss(8)[0], want, rtol=0.1)


def test_every_interval_is_trained_within_its_block():
  teacher = lambda params, x, t, cond: 0 * x
  reached = lambda **blocks: np.asarray(_objective(teacher, **blocks)(jnp.ones(G), None, BATCH, KEYS, 0)[0] != 0)
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
  student = lambda params, base, x, t, cond: parallel.ParallelPolicy(
      jnp.broadcast_to(params[None, :, None, None, None], (len(x), G, *x.shape[1:])), SHIFT)
  segment_fn = parallel_decoding.segment(
      student, teacher, intervals=G, max_block=G, method=method, shift=SHIFT, loss_scale=3.0)
  loss, _ = segment_fn(u, None, jnp.zeros((256, 1, 1, 2)), jnp.ones(256), jnp.ones(256), None, KEYS, 0)
  assert len(calls) == 2
  k = np.floor(np.asarray(segments.draw_uniform(KEYS, states)) * G).astype(int)  # [256, states]
  at = np.asarray(EDGES)[k] if method == "euler" else (np.asarray(EDGES)[k] + np.asarray(EDGES)[k + 1]) / 2
  np.testing.assert_allclose(loss, 0.5 * 3.0 * np.mean((np.asarray(u)[k] - at**2) ** 2), rtol=1e-5)
