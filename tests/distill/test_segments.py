"""The two ways to make an objective of segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax.distill import segments


def _recording(calls):
  """A segment whose loss is (p - tau)^2 |x|^2 and whose end moves with p: what must not be differentiated."""
  def segment_fn(params, teacher_params, x_src, tau_src, segment, cond, keys, step):
    calls.append((x_src, tau_src, segment))
    size = jnp.mean(x_src**2, axis=(1, 2, 3))
    loss = jnp.mean((params - tau_src) ** 2 * size)
    return loss, x_src * (1 - params * flow.broadcast_to(segment, x_src))

  return segment_fn


@pytest.mark.parametrize("nfe, final_scale", [(1, 1.0), (4, 0.5)])
def test_data_free_is_a_walk_of_separate_segments(nfe, final_scale):
  """Against the walk written out: losses by length, and each segment's gradient with its start held fixed."""
  objective = segments.data_free(_recording([]), flow.Clock(1.0, 128, nfe, final_scale))
  keys = jax.random.split(jax.random.key(0), 3)
  batch = {"x_0": jnp.full((3, 2, 2, 1), jnp.nan), "cond": {}}  # no data are read
  p = jnp.array(0.3)
  grads, metrics = jax.jit(objective)(p, None, batch, keys, 0)

  base = 1 / (nfe - 1 + final_scale)
  lengths = [base] * (nfe - 1) + [final_scale * base]
  taus = 1 - np.concatenate([[0], np.cumsum(lengths)[:-1]])
  x = segments.draw_noise(jax.vmap(jax.random.split)(keys)[:, 0], (3, 2, 2, 1))
  size, loss, grad = np.mean(np.asarray(x) ** 2), 0.0, 0.0
  for tau, length in zip(taus, lengths):
    loss += length * (0.3 - tau) ** 2 * size
    grad += length * 2 * (0.3 - tau) * size
    size *= (1 - 0.3 * length) ** 2
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(grads, grad, rtol=1e-5)


def test_on_data_starts_each_sample_at_its_segments_source():
  calls = []
  objective = segments.on_data(_recording(calls), flow.Clock(3.0, 128, 4, 0.5))
  x_0 = jax.random.normal(jax.random.key(1), (400, 1, 1, 50))
  objective(jnp.array(0.3), None, {"x_0": x_0, "cond": {}}, jax.random.split(jax.random.key(2), 400), 0)
  x_src, tau_src, segment = (np.asarray(jax.lax.stop_gradient(a)) for a in jax.tree.map(_value, calls[0]))
  sources = np.array([1, 2.5 / 3.5, 1.5 / 3.5, 0.5 / 3.5])
  which = np.abs(tau_src[:, None] - sources).argmin(1)
  np.testing.assert_allclose(tau_src, sources[which], rtol=1e-5)
  np.testing.assert_allclose(segment, np.where(which == 3, 0.5, 1) / 3.5, rtol=1e-5)
  # A time falls into a segment as often as the segment is long: 400 draws, three standard errors.
  share = np.bincount(which, minlength=4) / 400
  np.testing.assert_allclose(share, np.array([1, 1, 1, 0.5]) / 3.5, atol=3 * 0.0226)
  # x_src = (1 - t) x_0 + t noise: what is left of x_0 by regression, 50 values a sample.
  t = 3 * sources[which] / (1 + 2 * sources[which])
  noise = (x_src - (1 - t)[:, None, None, None] * np.asarray(x_0)) / t[:, None, None, None]
  np.testing.assert_allclose(noise.std(), 1, atol=0.03)
  assert abs(np.mean(noise * np.asarray(x_0))) < 0.03


def test_a_dropped_condition_is_null_in_all_its_arrays():
  cond = {"label": jnp.arange(3), "text": jnp.arange(24.0).reshape(3, 4, 2)}

  def null(cond):
    return {"label": jnp.full_like(cond["label"], 9), "text": -jnp.ones_like(cond["text"])}

  dropped = segments.drop(cond, null, jnp.array([False, True, False]))
  np.testing.assert_array_equal(dropped["label"], [0, 9, 2])
  np.testing.assert_array_equal(dropped["text"], np.where(np.array([0, 1, 0])[:, None, None], -1, cond["text"]))
  # For each of several layers by itself.
  each = segments.drop(cond, null, jnp.array([[False, True, False], [True, False, False]]))
  np.testing.assert_array_equal(each["label"], [[0, 9, 2], [9, 1, 2]])
  assert each["text"].shape == (2, 3, 4, 2)
  np.testing.assert_array_equal(each["text"][1], np.where(np.array([1, 0, 0])[:, None, None], -1, cond["text"]))


def _value(x):
  """The number inside a tracer of jax.grad."""
  while hasattr(x, "primal"):
    x = x.primal
  return x
