"""The DX policy against the authors' vectors, on a grid and as a polynomial."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax.policy import dx
from tests import golden

CASES = ["grid10", "grid16", "grid1", "poly10", "poly3"]


def _policy(data, case, den):
  return golden.dx_policy(
      den, data[f"{case}_x_t_src"], data[f"{case}_sigma_t_src"], flow.Clock.of_shift(float(data[f"{case}_shift"])),
      segment=float(data[f"{case}_segment_size_arg"]), polynomial=str(data[f"{case}_mode"]) == "polynomial")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_vectors(case, dtype):
  with jax.enable_x64(dtype == np.float64):
    data, want = golden.load("dx_policy", dtype), golden.load("dx_policy", np.float64)
    get = lambda name: data[f"{case}_{name}"]
    x, t = golden.nhwc(get("x_t")), jnp.asarray(get("sigma_t"))
    den = jnp.asarray(get("den"))

    @jax.jit
    def velocities(den):
      return jax.vmap(_policy(data, case, den).velocity)(x, t)

    u = golden.nhwc(want[f"{case}_u"])
    # u = (x - x_0) / t magnifies float32's rounding where t is small; elsewhere float32 is good to 1e-5.
    rtol = 1e-9 if dtype == np.float64 else 1e-5 / np.maximum(np.asarray(t), 1e-4)[:, :, None, None, None]
    assert (np.abs(velocities(den) - u) <= rtol * (1 + np.abs(u))).all()

    weight = jnp.where(t > 0.01, 1.0, 0.0)[:, :, None, None, None] * golden.nhwc(get("cotangent"))
    gradient = jax.grad(lambda den: jnp.sum(velocities(den) * weight))(den)
    expected = want[f"{case}_grad_den"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-8 if dtype == np.float64 else 1e-3,
                               atol=(1e-9 if dtype == np.float64 else 1e-4) * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_segment_ends(x64, case):
  data = golden.load("dx_policy", np.float64)
  policy = _policy(data, case, jnp.asarray(data[f"{case}_den"]))
  np.testing.assert_allclose(policy.tau_src, data[f"{case}_raw_t_src"], rtol=1e-9)
  np.testing.assert_allclose(policy.tau_dst, data[f"{case}_raw_t_dst"], atol=1e-9)


def test_a_grid_says_its_points_and_lines_between():
  """Estimates 10, 20, 30 at raw times 0, 0.5, 1, by the definition x_0 = x - t u backwards."""
  x_src, t_src = jnp.full((1, 1, 1, 1), 4.0), jnp.ones(1)
  u = 4.0 - jnp.array([10.0, 20.0, 30.0]).reshape(1, 3, 1, 1, 1)
  policy = dx.to_policy(u, x_src, t_src, flow.Clock.of_shift(1.0), segment=1.0)
  for tau, x_0 in ((1.0, 30.0), (0.75, 25.0), (0.5, 20.0), (0.1, 12.0)):
    velocity = policy.velocity(x_src, jnp.array([tau]))
    np.testing.assert_allclose(4.0 - tau * velocity[0, 0, 0, 0], x_0, rtol=1e-6)


def test_a_polynomial_starts_as_the_teacher_and_zeros():
  """Against the expanded layer of the authors' Qwen student, whose rows are (order, channel, patch position)."""
  data = golden.load("dxqwen")
  rows = {"kernel": data["poly/expanded/proj_out.weight"].T.reshape(32, 3, 4, 4),
          "bias": data["poly/expanded/proj_out.bias"].reshape(3, 4, 4)}
  want = {"out": jax.tree.map(lambda w: jnp.moveaxis(jnp.asarray(w), -1, -3), rows)}  # (patch position, order, channel)
  teacher = jax.tree.map(lambda w: w[..., 0, :], want)
  fresh = jax.tree.map(jnp.ones_like, want)
  head = dx.DXHead(points=3, segment=1.0, polynomial=True)
  jax.tree.map(np.testing.assert_array_equal, head.from_teacher(teacher, fresh, None), want)
