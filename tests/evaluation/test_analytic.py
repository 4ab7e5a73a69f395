"""Students against the exact flow, small: more components and more training end nearer to it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gaussians
from piflow_jax import build
from piflow_jax import errors as errors_lib
from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax import teacher as teacher_lib
from piflow_jax.evaluation import analytic
from piflow_jax.evaluation import metrics
from piflow_jax.policy import dx
from piflow_jax.policy import rollout


@pytest.mark.slow
def test_end_points_come_nearer_with_size_and_training(tmp_path):
  def config_of(policy, n):
    config = gaussians.get_config(f"{policy},{n}")
    config.update(batch_size=64, log_every=100)
    config.method.total_substeps = 16
    config.optimizer.learning_rate = 2e-3
    return config

  def sweep(stops):
    return analytic.sweep(config_of, tmp_path, sizes=[1, 16], stops=stops, policies=("gm",))["gm"]

  errors = sweep([100, 200])
  # Measured 0.09 to 0.21 at this size; the bounds leave half of the difference.
  assert errors[16][1] < 0.7 * errors[16][0]
  assert errors[16][1] < 0.8 * errors[1][1]
  assert sweep([100, 200]) == errors  # what was measured on the way is not measured again at the end
  with pytest.raises(errors_lib.UserError, match="--stops: 150: the run in .*gm-1 is past that"):
    sweep([100, 150, 200])
  analytic.write(tmp_path, {"gm": errors}, [1, 16], [100, 200])
  assert json.loads((tmp_path / "analytic.json").read_text())["endpoint_error"]["gm"]["16"] == errors[16]
  assert (tmp_path / "analytic.png").read_bytes().startswith(b"\x89PNG")


def test_dx_policies_of_exact_estimates_are_nearer_with_more_points():
  """N estimates of x_0 read off the exact flow at the grid's times, then rolled out without it halfway.

  Not to the end: there u = (x - x0_hat) / t takes any x to the last estimate.
  """
  run = build.run(gaussians.get_config("dx,1"))
  params, cond = run.teacher.params(), {"label": jnp.zeros(256, jnp.int32)}
  clock = flow.Clock(1.0, total_substeps=256, nfe=1, final_scale=1.0)

  def velocity(x, t):
    return run.teacher.velocity(params, x, t, cond)

  exact_step = sampler.velocity_flow_map(velocity, clock, method="Dopri5")

  def walk(x, i):  # down to raw time 0, whose estimate is x itself
    t, t_next = (jnp.full(256, 1 - j / 128) for j in (i, i + 1))
    return exact_step(x, t, t_next), (x, x - flow.broadcast_to(t, x) * velocity(x, t))

  noise = jax.random.normal(jax.random.key(0), (256, 1, 1, 2))
  x_0, (states, estimates) = jax.jit(lambda x: jax.lax.scan(walk, x, jnp.arange(128.0)))(noise)
  estimates = jnp.concatenate([estimates, x_0[None]])

  @jax.jit
  def halfway(x_0):
    policy = dx.to_policy(noise[:, None] - jnp.moveaxis(x_0, 0, 1), noise, jnp.ones(256), clock, segment=1.0)
    return rollout.rollout(policy, noise, jnp.ones(256), jnp.full(256, 0.5), clock)

  # A grid's first point is the segment's end.
  errors = [metrics.endpoint_error(*map(np.asarray, (halfway(estimates[::-128 // (n - 1)]), states[64], cond["label"])))
            for n in (2, 5, 17, 65)]
  # Measured 0.141, 0.011, 0.0022, 0.0018: the last is what 128 substeps leave.
  assert errors[0] > 0.1 and errors[1] < 0.02 and max(errors[2:]) < 0.004


def test_exact_ends_of_one_gaussian_are_in_closed_form():
  """x_0 = mean + (std / 1) (noise - 0) for a single Gaussian: its flow is a scaling around the moving mean."""
  mixture = teacher_lib.GaussianMixture(jnp.full((1, 1, 1, 2), 1.5), 0.3, jnp.zeros((1, 1)))
  config = gaussians.get_config("gm,1")
  config.teacher.mixture = lambda shape, classes: mixture
  run = build.run(config)
  noise = jax.random.normal(jax.random.key(0), (32, 1, 1, 2))
  ends = analytic.exact_ends(run, run.teacher.params(), noise, {"label": jnp.zeros(32, jnp.int32)})
  np.testing.assert_allclose(ends, 1.5 + 0.3 * noise, atol=2e-5)  # float32 over 256 steps
