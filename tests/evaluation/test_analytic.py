"""Students against the exact flow, small: more components and more training end nearer to it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gaussians
from piflow_jax import build
from piflow_jax import errors as errors_lib
from piflow_jax import teacher as teacher_lib
from piflow_jax.evaluation import analytic


@pytest.mark.slow
def test_end_points_come_nearer_with_size_and_training(tmp_path):
  def config_of(policy, n):
    config = gaussians.get_config(f"{policy},{n}")
    config.update(batch_size=64, log_every=100)
    config.flow.total_substeps = 16
    config.optimizer.learning_rate = 2e-3
    return config

  sweep = lambda stops: analytic.sweep(config_of, tmp_path, sizes=[1, 16], stops=stops, policies=("gm",))["gm"]
  errors = sweep([50, 300])
  # Measured 0.05 to 0.2 at this size; the bounds leave half of the difference.
  assert errors[16][1] < 0.7 * errors[16][0]
  assert errors[16][1] < 0.8 * errors[1][1]
  assert sweep([50, 300]) == errors  # what was measured on the way is not measured again at the end
  with pytest.raises(errors_lib.UserError, match="--stops: 100: the run in .*gm-1 is past that"):
    sweep([50, 100, 300])
  analytic.write(tmp_path, {"gm": errors}, [1, 16], [50, 300])
  assert json.loads((tmp_path / "analytic.json").read_text())["endpoint_error"]["gm"]["16"] == errors[16]
  assert (tmp_path / "analytic.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_dx_students_end_where_as_many_euler_steps_do(tmp_path):
  """Of the exact flow, whose one step ends 0.707 off and eight 0.143; trained a little, N = 8 is on its way there."""
  def config_of(policy, n):
    config = gaussians.get_config(f"{policy},{n}")
    config.update(batch_size=64, log_every=100)
    config.flow.total_substeps = 16
    config.imitation.window_substeps = 16 // n
    config.optimizer.learning_rate = 2e-3
    return config

  errors = analytic.sweep(config_of, tmp_path, sizes=[1, 8], stops=[50], policies=("dx",))["dx"]
  # Measured 0.66 and 0.22.
  assert 0.5 < errors[1][0] < 0.8 and errors[8][0] < 0.35


def test_exact_ends_of_one_gaussian_are_in_closed_form():
  """x_0 = mean + (std / 1) (noise - 0) for a single Gaussian: its flow is a scaling around the moving mean."""
  mixture = teacher_lib.GaussianMixture(jnp.full((1, 1, 1, 2), 1.5), 0.3, jnp.zeros((1, 1)))
  config = gaussians.get_config("gm,1")
  config.teacher.mixture = lambda shape, classes: mixture
  noise = jax.random.normal(jax.random.key(0), (32, 1, 1, 2))
  ends = analytic.exact_ends(config, build.exact_teacher(config), noise, jnp.zeros(32, jnp.int32))
  np.testing.assert_allclose(ends, 1.5 + 0.3 * noise, atol=2e-5)  # float32 over 256 steps
