"""What docs/bring_your_own_model.md shows is run: adapters where the flow is known, a policy of one's own, a config."""

import functools
import json
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from piflow_jax import build
from piflow_jax import sampler
from piflow_jax import train_loop
from piflow_jax.distill import imitation
from piflow_jax.distill import segments
from piflow_jax.policy import rollout

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "bring_your_own_model.md").read_text(), re.DOTALL)
RUN_HERE = "def from_noise", "class OneGuess", "def distil"


def _run(name, **names):
  """The names that the page's block with `name` in it defines, given those that it takes for granted."""
  block, = (block for block in BLOCKS if name in block)
  names |= dict(jax=jax, jnp=jnp, NamedTuple=NamedTuple, functools=functools, base=base, build=build, sampler=sampler,
                imitation=imitation, segments=segments, rollout=rollout)
  exec(compile(block, f"the page's {name}", "exec"), names)
  return names


def test_every_block_of_the_page_is_the_notebooks_or_run_here():
  cells = json.loads((ROOT / "notebooks" / "bring_your_own_model.ipynb").read_text())["cells"]
  code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
  elsewhere = [block for block in BLOCKS if block.rstrip() not in code]
  assert [[name for name in RUN_HERE if name in block] for block in elsewhere] == [[name] for name in RUN_HERE]


MEAN, STD = jnp.array([1.0, -0.5]), 0.4


def _exact_velocity(x, t):
  """Of x_0 ~ N(MEAN, STD^2): along the flow x keeps its distance from the mean in standard deviations."""
  t = t[:, None, None, None]
  spread = lambda s: ((1 - s) ** 2 * STD**2 + s**2) ** 0.5
  flow = lambda s: (1 - s) * MEAN[None, None, None] + spread(s) / spread(t) * (x - (1 - t) * MEAN[None, None, None])
  return jax.jvp(flow, (t,), (jnp.ones_like(t),))[1]


def _posterior(x, alpha, sigma):
  """(E[x_0 | x], E[noise | x]) of x = alpha x_0 + sigma noise, by Gaussian regression on x."""
  alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
  away = (x - alpha * MEAN[None, None, None]) / (alpha**2 * STD**2 + sigma**2)
  return MEAN[None, None, None] + alpha * STD**2 * away, sigma * away


x_0_of = lambda *args: _posterior(*args)[0]
noise_of = lambda *args: _posterior(*args)[1]


def _v_of(x, alpha, sigma):
  x_0, noise = _posterior(x, alpha, sigma)
  return alpha[:, None, None, None] * noise - sigma[:, None, None, None] * x_0


# Every foreign model by its own convention, exact on the same Gaussian.
FOREIGN = {
    "sign": lambda a: a["other_sign"](lambda x, t: x_0_of(x, 1 - t, t) - noise_of(x, 1 - t, t)),
    "clock": lambda a: a["other_clock"](lambda x, s: x_0_of(x, s, 1 - s) - noise_of(x, s, 1 - s)),
    "x_0": lambda a: a["from_x_0"](lambda x, t: x_0_of(x, 1 - t, t)),
    "noise": lambda a: a["from_noise"](lambda x, t: noise_of(x, 1 - t, t)),
    "variance-preserving noise": lambda a: a["from_noise"](a["vp"](noise_of)),
    "variance-preserving x_0": lambda a: a["from_x_0"](a["vp"](x_0_of)),
    "variance-preserving v": lambda a: a["vp_v"](_v_of),
    "EDM": lambda a: a["edm"](lambda x, sigma: x_0_of(x, jnp.ones_like(sigma), sigma)),
}


@pytest.mark.parametrize("model", FOREIGN)
def test_adapters_are_exact_on_a_gaussian(x64, model):
  x, t = 2 * jax.random.normal(jax.random.key(0), (6, 1, 2, 2)), jnp.array([0.002, 0.1, 0.4, 0.5, 0.9, 0.998])
  velocity = FOREIGN[model](_run("def from_noise"))
  np.testing.assert_allclose(velocity(x, t), _exact_velocity(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", FOREIGN)
def test_adapters_hold_at_both_ends_of_time(model):
  """In float32: times nearer to an end than 1e-3 may be moved by as much."""
  x, t = 2 * jax.random.normal(jax.random.key(0), (2, 1, 2, 2)), jnp.array([0.0, 1.0])
  velocity = FOREIGN[model](_run("def from_noise"))
  np.testing.assert_allclose(velocity(x, t), _exact_velocity(x, t), atol=0.05)


def test_change_of_variables_of_the_variance_preserving_path(x64):
  """The page's formula in words: x = x_vp / (alpha + sigma) at t = sigma / (alpha + sigma)."""
  angle = jnp.array([0.01, 0.3, 0.8, 1.2, 1.56])
  alpha, sigma = jnp.cos(angle), jnp.sin(angle)
  x_vp = jax.random.normal(jax.random.key(0), (5, 1, 1, 2))
  got = _run("def from_noise")["vp_point"](x_vp / (alpha + sigma)[:, None, None, None], sigma / (alpha + sigma))
  for value, want in zip(got, (x_vp, alpha, sigma)):
    np.testing.assert_allclose(value, want, rtol=1e-12)


def test_clock_of_a_table_of_steps():
  alphas_cumprod = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, 1000))  # DDPM (arXiv 2006.11239, section 4)
  steps = jnp.array([0, 1, 500, 998, 999])
  alpha, sigma = jnp.sqrt(alphas_cumprod[steps]), jnp.sqrt(1 - alphas_cumprod[steps])
  vp_step = _run("def from_noise")["vp_step"]
  np.testing.assert_allclose(vp_step(alphas_cumprod, alpha, sigma), steps, atol=0.01)
  ends = vp_step(alphas_cumprod, jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
  np.testing.assert_array_equal(ends, [0, 999])


def test_a_policy_of_ones_own_in_rollout_loss_and_sampler():
  policy_of = _run("class OneGuess")["OneGuess"]
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  student = lambda params, base, x, t, cond: policy_of(params + 0 * x)
  teacher = lambda params, x, t, cond: (x - 0.5) / jnp.maximum(t, 1e-4)[:, None, None, None]  # all data are 0.5
  segment = imitation.segment(student, teacher, lambda policy, keys: policy, num_states=2, total_substeps=16)
  objective = segments.data_free(segment, nfe=1)
  batch, keys = {"x_0": x, "cond": None}, jax.random.split(jax.random.key(1), 3)
  grads, metrics = jax.jit(objective)(jnp.array(0.5), None, batch, keys, 0)
  assert abs(float(metrics["loss"])) < 1e-9 and abs(float(grads)) < 1e-4
  grads, metrics = jax.jit(objective)(jnp.array(0.8), None, batch, keys, 0)
  assert float(metrics["loss"]) > 0 and float(grads) > 0
  roll = functools.partial(rollout.rollout, total_substeps=16)
  flow_map = sampler.policy_flow_map(lambda x, t: student(0.8, None, x, t, None), roll)
  np.testing.assert_allclose(sampler.sample(flow_map, x, jax.random.key(0), nfe=2), jnp.full_like(x, 0.8), atol=1e-5)


@pytest.mark.slow
def test_the_config_trains(tmp_path):
  policy_of = _run("class OneGuess")["OneGuess"]

  def student(params, base, x, t, cond):
    layer = params["blocks"]["in"]
    return policy_of(x @ layer["kernel"] + layer["bias"][None, None, None])

  page = _run(
      "def distil", student=student, teacher=lambda _, x, t, cond: x,
      init=lambda key, _: {"blocks": {"in": {"kernel": jax.random.normal(key, (2, 2)), "bias": jnp.zeros(2)}}})
  config = page["get_config"]()
  config.update(steps=2, batch_size=16)
  assert train_loop.train(config, tmp_path / "run") == 0
  assert (tmp_path / "run" / "metrics.jsonl").exists()
