"""Guidance against the authors' vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import teacher
from tests import golden

CASES = {
    "plain": dict(interval=(0, 0.6)),
    "orth1": dict(interval=(0, 0.6), orthogonal=1.0),
    "orth0p5": dict(interval=(0, 0.6), orthogonal=0.5),
    "nointerval": {},
    "orth1_nointerval": dict(orthogonal=1.0),
    "off": {},
    "low": {},
    "interval_mid": dict(interval=(0.1, 0.5999995)),
}


@pytest.mark.parametrize("case", CASES)
def test_guidance_vectors(x64, case):
  data = golden.load("guidance", np.float64)
  # Noise levels divide by 1000 inexactly; the interval's ends are compared where the authors compare them.
  settings = {k: tuple(1000 * v for v in value) if k == "interval" else value for k, value in CASES[case].items()}
  x, t = golden.nhwc(data["x_t"]), jnp.asarray(data["t"])
  u_cond, u_null = golden.nhwc(data["u_pos"]), golden.nhwc(data["u_neg"])
  if f"{case}_u_model" in data:
    u_cond = golden.nhwc(data[f"{case}_u_model"])
  settings.setdefault("interval", (0, 1000))
  scale = float(data[f"{case}_guidance_scale"])
  if settings.get("orthogonal"):
    # x_0 = x - t u needs t as noise level: give the interval in the same unit
    settings["interval"] = tuple(v / 1000 for v in settings["interval"])
    t = t / 1000
  got = teacher.guided_velocity(u_cond, u_null, x, t, scale=scale, **settings)
  np.testing.assert_allclose(got, golden.nhwc(data[f"{case}_u"]), rtol=1e-6, atol=1e-6)


def test_network_teacher_is_two_passes_guided():
  network = lambda params, x, t, cond: params * x + cond[:, None] * t[:, None]
  x, t, cond = jnp.arange(6.0).reshape(3, 2), jnp.array([0.1, 0.5, 0.9]), jnp.array([1, 2, 3])
  null = lambda cond: jnp.zeros_like(cond)
  got = teacher.network_teacher(network, null, guidance_scale=3.0, guidance_interval=(0.2, 0.7))(2.0, x, t, cond)
  u_cond, u_null = network(2.0, x, t, cond), network(2.0, x, t, null(cond))
  want = np.where(np.array([[False], [True], [False]]), u_cond + 2 * (u_cond - u_null), u_cond)
  np.testing.assert_allclose(got, want, rtol=1e-6)
