"""What docs/your_own.md shows, run from the page itself: a network by config, a teacher, adapters, a policy."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax.distill import imitation
from piflow_jax.distill import segments
from piflow_jax.policy import gmm
from tests import tiny

PAGE = (tiny.ROOT / "docs" / "your_own.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHORT = {"steps": 6, "batch_size": 16, "eval_every": 3, "image_every": 6, "checkpoint_every": 3, "log_every": 1,
         "optimizer.warmup_steps": 2, "ema.start": 2, "evaluation.samples": 40, "evaluation.batch_size": 40,
         "data.records": 64}


def _block(name):
  block, = (block for block in BLOCKS if name in block)
  return block


def _run(name):
  """The names that the page's block with `name` in it defines; it takes nothing for granted."""
  names = {}
  exec(compile(_block(name), f"the page's {name}", "exec"), names)
  return names


# Videos, points, pictures: who needs a grid says so, and nobody here does.
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 4, 4, 1), (6,)], ids=["video", "points"])
def test_a_foreign_network_goes_the_whole_way_by_config(shape, tmp_path, monkeypatch):
  """Programs as users start them, in a folder of their own, outside the clone: only mine.py and a config's fields."""
  (tmp_path / "mine.py").write_text(_block("class Mixer"))
  env = tiny.environment(JAX_PLATFORMS="cpu", PYTHONPATH=str(tiny.ROOT))
  fields = [f"--config.{k}={v}" for k, v in SHORT.items()] + [f"--config.data.shape={shape}".replace(" ", "")]

  def start(module, *arguments):
    done = subprocess.run([sys.executable, "-m", f"piflow_jax.{module}", *arguments], cwd=tmp_path, env=env, text=True,
                          capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout

  for role in ("teacher", "student"):
    start("main", f"--config=mine.py:{role}", f"--workdir=runs/mine/{role}", *fields)
  run = tmp_path / "runs" / "mine" / "student"
  lines = tiny.metrics(run)
  assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
  pictures = list((run / "pictures").glob("*.png")) if (run / "pictures").exists() else []
  assert len(pictures) == (1 if len(shape) == 4 else 0)  # points are no picture
  start("sample", "--workdir=runs/mine/student", "--out=a.npz", "--labels=0,5", "--num=3")
  drawn = np.load(tmp_path / "a.npz")
  assert drawn["x_0"].shape == (6, *shape) and drawn["labels"].tolist() == [0, 0, 0, 5, 5, 5]
  out = start("evaluate", "--workdir=runs/mine/student")
  assert "student" in out and json.loads((run / "report" / "report.json").read_text())["rows"]
  start("convert", "to-torch", "--workdir=runs/mine/student", "--out=exported")
  assert list((tmp_path / "exported").glob("*.safetensors")) and (tmp_path / "exported" / "config.json").exists()


def test_every_block_of_the_page_is_run():
  names = ("class Mixer", "def distil", "def from_noise", "class OneGuess")
  assert [[name for name in names if name in block] for block in BLOCKS] == [[name] for name in names]


def test_the_readmes_lines_run():
  """Its own teacher and student, for names that a reader would have."""
  block, = re.findall(r"```python\n(.*?)```", (tiny.ROOT / "README.md").read_text(), re.DOTALL)

  def network(params, x, t, cond):
    weights = jax.nn.log_softmax(jnp.zeros((len(x), 3, 1)), axis=1)
    return params[None, None, :, None] * x[:, :, None, None], weights, jnp.zeros(len(x))

  names = dict(
      flow=flow, gmm=gmm, imitation=imitation, sampler=sampler, segments=segments, your_network=network,
      their_velocity=lambda params, x, t, cond: params * x, params=jnp.ones(3), teacher_params=2.0,
      batch={"x_0": jnp.zeros((4, 2)), "cond": {}}, keys=jax.random.split(jax.random.key(0), 4), step=0, cond={},
      noise=jnp.ones((4, 2)))
  exec(compile(block, "README.md", "exec"), names)
  assert names["grads"].shape == (3,) and float(names["metrics"]["loss"]) > 0 and names["x_0"].shape == (4, 2)


@pytest.mark.slow
def test_the_pages_student_follows_its_teacher():
  page = _run("def distil")
  exact = jnp.array([[1.0, -0.5]]), 0.4
  params = page["distil"](exact, 400)
  noise = jax.random.normal(jax.random.key(9), (500, 2))
  got = page["draw"](params, noise)
  # The exact flow of a Gaussian: mean + std noise. Unrelated ends would be 0.8 apart in the root mean square.
  error = jnp.sqrt(jnp.mean(jnp.sum((got - (exact[0] + 0.4 * noise)) ** 2, axis=1)))
  assert error < 0.2, error


MEAN, STD = jnp.array([1.0, -0.5]), 0.4


def _wide(t):
  return t[:, None, None, None]


def _exact_velocity(x, t):
  """Of x_0 ~ N(MEAN, STD^2): along the flow x keeps its distance from the mean in standard deviations."""
  t, mean = _wide(t), MEAN[None, None, None]

  def spread(s):
    return ((1 - s) ** 2 * STD**2 + s**2) ** 0.5

  def along(s):
    return (1 - s) * mean + spread(s) / spread(t) * (x - (1 - t) * mean)

  return jax.jvp(along, (t,), (jnp.ones_like(t),))[1]


def _posterior(x, alpha, sigma):
  """(E[x_0 | x], E[noise | x]) of x = alpha x_0 + sigma noise, by Gaussian regression on x."""
  alpha, sigma, mean = _wide(alpha), _wide(sigma), MEAN[None, None, None]
  away = (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
  return mean + alpha * STD**2 * away, sigma * away


def x_0_of(*args):
  return _posterior(*args)[0]


def noise_of(*args):
  return _posterior(*args)[1]


def _v_of(x, alpha, sigma):
  x_0, noise = _posterior(x, alpha, sigma)
  return _wide(alpha) * noise - _wide(sigma) * x_0


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
  got = _run("def from_noise")["vp_point"](x_vp / _wide(alpha + sigma), sigma / (alpha + sigma))
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
  clock = flow.Clock(shift=1.0, total_substeps=16, nfe=1, final_scale=1.0)
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))

  def student(params, base, x, t, cond):
    return policy_of(params + 0 * x)

  def teacher(params, x, t, cond):  # all data are 0.5
    return (x - 0.5) / _wide(jnp.maximum(t, 1e-4))

  segment = imitation.segment(student, teacher, lambda policy, keys: policy, clock, imitation.Matching(), num_states=2)
  objective = segments.data_free(segment, clock)
  batch, keys = {"x_0": x, "cond": {}}, jax.random.split(jax.random.key(1), 3)
  grads, metrics = jax.jit(objective)(jnp.array(0.5), None, batch, keys, 0)
  assert abs(float(metrics["loss"])) < 1e-9 and abs(float(grads)) < 1e-4
  grads, metrics = jax.jit(objective)(jnp.array(0.8), None, batch, keys, 0)
  assert float(metrics["loss"]) > 0 and float(grads) > 0
  flow_map = sampler.policy_flow_map(lambda x, t: student(0.8, None, x, t, None), clock)
  np.testing.assert_allclose(sampler.sample(flow_map, x, None, clock.replace(nfe=2)), jnp.full_like(x, 0.8), atol=1e-5)
