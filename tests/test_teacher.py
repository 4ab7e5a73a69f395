"""Guidance against the authors' vectors, the analytic teacher against the score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import config as config_lib
from piflow_jax import flow
from piflow_jax import sampler
from piflow_jax import teacher
from piflow_jax.data import gaussians
from piflow_jax.data import spec as spec_lib
from piflow_jax.distill import method
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
  def network(params, x, t, cond):
    return params * x + (cond["label"] + cond["text"].sum(1))[:, None] * t[:, None]

  def null(cond):
    return jax.tree.map(jnp.zeros_like, cond)

  x, t = jnp.arange(6.0).reshape(3, 2), jnp.array([0.1, 0.5, 0.9])
  cond = {"label": jnp.array([1, 2, 3]), "text": jnp.arange(6.0).reshape(3, 2)}
  got = teacher.network_teacher(network, null, guidance_scale=3.0, guidance_interval=(0.2, 0.7))(2.0, x, t, cond)
  u_cond, u_null = network(2.0, x, t, cond), network(2.0, x, t, null(cond))
  want = np.where(np.array([[False], [True], [False]]), u_cond + 2 * (u_cond - u_null), u_cond)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_network_teacher_takes_the_projection_out_of_guidance():
  """By hand, g = 0.5: term = u_c - u_n, less half of its projection on x - t u_c."""
  def network(params, x, t, cond):
    return params * x + cond["label"][:, None] * jnp.arange(1, 3.0)[None]

  def null(cond):
    return {"label": jnp.zeros_like(cond["label"])}

  x, t, cond = jnp.arange(1, 7.0).reshape(3, 2), jnp.array([0.1, 0.5, 0.9]), jnp.array([1, 2, 3])
  got = teacher.network_teacher(network, null, guidance_scale=3.0, orthogonal=0.5)(0.2, x, t, {"label": cond})
  for i in range(3):
    u_null = 0.2 * np.asarray(x[i])
    term = int(cond[i]) * np.array([1.0, 2.0])
    x_0 = np.asarray(x[i]) - float(t[i]) * (u_null + term)
    term_left = term - 0.5 * (term @ x_0) / (x_0 @ x_0) * x_0
    np.testing.assert_allclose(got[i], u_null + term + 2 * term_left, rtol=1e-5)


def _net(null):
  """(Net, null, spec) of a network that says its label, or 10 under the null condition."""
  def apply(params, x, t, cond):
    return params * x + flow.broadcast_to(cond["label"] + 0.0, x)

  spec = spec_lib.Spec((2,), {"label": spec_lib.Array(classes=4)})
  return method.Net(None, apply), null, spec


def _make(null=lambda cond: {"label": jnp.full_like(cond["label"], 10)}, **fields):
  noun = teacher.config(**fields)
  return noun.make(*_net(null), **config_lib.fields_of(noun))


def test_a_teacher_counts_the_passes_of_a_velocity():
  x, t, cond = jnp.ones((3, 2)), jnp.array([0.1, 0.5, 0.9]), {"label": jnp.array([1, 2, 3])}
  plain, guided = _make(), _make(guidance_scale=2.0, guidance_interval=(0.4, 0.6))
  assert (plain.passes, guided.passes) == (1, 2) and plain.params is guided.params is None
  np.testing.assert_allclose(plain.velocity(0.5, x, t, cond)[:, 0], [1.5, 2.5, 3.5])
  np.testing.assert_allclose(guided.velocity(0.5, x, t, cond)[:, 0], [1.5, 2.5 + (2 - 10), 3.5])


@pytest.mark.parametrize("name, values", {
    "guidance_scale": (-1, float("nan"), float("inf"), 1e30, "x"), "orthogonal": (-1, 2, float("nan"), "x"),
    "guidance_interval": ((0.6, 0.4), (0, 0.5, 1), (0, 2), (float("nan"), 1), "x", 0.5), "weights": ("x", 0),
    "checkpoint": (0, 1.0),
}.items())
def test_a_field_out_of_its_range_is_refused_by_name(name, values):
  for value in values:
    with pytest.raises(ValueError, match=f"^{name}: "):
      _make(**(dict(guidance_scale=2.0) | {name: value}))


def test_what_would_have_no_effect_is_refused_by_name():
  for fields in (dict(orthogonal=0.5), dict(guidance_interval=(0, 0.7)), dict(guidance_scale=0.5, orthogonal=1.0)):
    with pytest.raises(ValueError, match="^(orthogonal|guidance_interval): .* has no effect .*; set "):
      _make(**fields)
  assert _make(guidance_interval=(0, 1)).passes == 1
  with pytest.raises(ValueError, match="^guidance_scale: 2.0, but the network has no null condition"):
    _make(None, guidance_scale=2.0)
  assert _make(None).passes == 1


@pytest.mark.parametrize("classes", [3, 0])
def test_an_exact_teacher_brings_its_parameters(classes):
  noun = teacher.exact_config(mixture=gaussians.mixture)
  exact = noun.make(None, None, spec_lib.Spec((1, 1, 2), spec_lib.label(classes)), **config_lib.fields_of(noun))
  params, x, t = exact.params(), jnp.ones((4, 1, 1, 2)), jnp.linspace(0.1, 1, 4)
  label = jnp.arange(4) % max(classes, 1)
  assert exact.passes == 0 and params.logweights.shape[0] == max(classes, 1)
  np.testing.assert_array_equal(exact.velocity(params, x, t, {"label": label} if classes else {}),
                                teacher.gaussian_mixture_teacher(params, x, t, label))


def test_an_exact_teacher_without_a_mixture_is_refused():
  noun = teacher.exact_config()
  with pytest.raises(ValueError, match="^mixture: None is no function"):
    noun.make(None, None, spec_lib.Spec((2,), {}), **config_lib.fields_of(noun))


def _mixture(std=0.3):
  means = jax.random.normal(jax.random.key(0), (3, 2, 1, 2))
  logweights = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]))
  return teacher.GaussianMixture(means, std, logweights)


def _log_density(mixture, logweights, x, t):
  """log p_t(x), written out: each component of x = (1 - t) x_0 + t noise is N((1 - t) mu, (1 - t)^2 std^2 + t^2)."""
  std = jnp.sqrt(((1 - t) * mixture.std) ** 2 + t**2)
  each = [jnp.sum(jax.scipy.stats.norm.logpdf(x, (1 - t) * mean, std)) for mean in mixture.means]
  return jax.scipy.special.logsumexp(jnp.stack(each) + logweights)


def test_mixture_velocity_is_the_scores(x64):
  """Tweedie: E[noise | x] = -t score and E[x_0 | x] = (x + t^2 score) / (1 - t), the score by autodiff."""
  mixture, cond = _mixture(), jnp.array([0, 0, 0, 1, 1, 1, 1])
  t = jnp.array([0.02, 0.5, 0.99, 0.02, 0.3, 0.7, 0.99])
  x = jax.random.normal(jax.random.key(1), (7, 2, 1, 2))
  score = jax.vmap(jax.grad(lambda x, t, w: _log_density(mixture, w, x, t)))(x, t, mixture.logweights[cond])
  s = t.reshape(-1, 1, 1, 1)
  want = -s * score - (x + s**2 * score) / (1 - s)
  np.testing.assert_allclose(teacher.gaussian_mixture_teacher(mixture, x, t, cond), want, rtol=1e-9)
  # Weights need no condition, and no normalising.
  alone = mixture._replace(logweights=mixture.logweights[1] + 2)
  np.testing.assert_allclose(teacher.gaussian_mixture_teacher(alone, x[3:], t[3:]), want[3:], rtol=1e-9)


def test_one_components_velocity_is_its_mean_and_spread_in_motion(x64):
  """Its flow map is mean_t + spread_t z, with z fixed: u is the time derivative."""
  mixture = teacher.GaussianMixture(jnp.full((1, 2), 1.5), 0.3, jnp.zeros(1))
  t, z = jnp.array([0.0, 0.1, 0.6, 1.0]), jnp.array([[0.5, -1], [2, 0], [-1, 1], [0.3, 3]])

  def path(t, z):
    return (1 - t) * 1.5 + jnp.sqrt(((1 - t) * 0.3) ** 2 + t**2) * z

  x, u = jax.vmap(lambda t, z: jax.jvp(lambda t: path(t, z), (t,), (1.0,)))(t, z)
  np.testing.assert_allclose(teacher.gaussian_mixture_teacher(mixture, x, t), u, rtol=1e-12)


@pytest.mark.parametrize("std", [0.3, 1e-4])
def test_mixture_velocity_at_the_ends(std):
  """t = 1: x says nothing of x_0; t = 0: x says nothing of the noise."""
  mixture, cond = _mixture(std), jnp.array([1, 1])
  x = mixture.means[:2] + jnp.array([100 * std, std]).reshape(2, 1, 1, 1)  # off its component, and close
  ends = [teacher.gaussian_mixture_teacher(mixture, x, jnp.full(2, t), cond) for t in (0.0, 1.0)]
  # float32: x - mean is rounded to 1e-7
  np.testing.assert_allclose(ends[0], -x, rtol=1e-5, atol=1e-6)
  prior_mean = np.einsum("m,mhwc->hwc", np.exp(mixture.logweights[1]), mixture.means)
  np.testing.assert_allclose(ends[1], x - prior_mean[None], rtol=1e-5, atol=1e-6)


def _samples(mixture, keys, logweights):
  """x_0 [B, ...] from the mixture; keys [B], log weights [B, M]."""
  def draw(key, logweights):
    component_key, normal_key = jax.random.split(key)
    mean = mixture.means[jax.random.categorical(component_key, logweights)]
    return mean + mixture.std * jax.random.normal(normal_key, mean.shape, mean.dtype)

  return jax.vmap(draw)(keys, logweights)


def test_mixture_velocity_in_float32_tells_close_components_apart(x64):
  """Two components one std apart and 1,000 std from 0: their weights hang on small differences of large numbers."""
  mean, std = 1 + jax.random.normal(jax.random.key(0), (8, 8, 4), jnp.float32), 1e-3
  mixture = teacher.GaussianMixture(jnp.stack([mean, mean + std / 16]), std, jnp.zeros(2, jnp.float32))
  keys, t = jax.random.split(jax.random.key(1), 8), jnp.full(8, std / 2, jnp.float32)
  noise = jax.random.normal(keys[0], (8, 8, 8, 4), jnp.float32)
  x = flow.noise_data(_samples(mixture, keys, jnp.zeros((8, 2))), noise, t)
  got = teacher.gaussian_mixture_teacher(mixture, x, t)
  assert got.dtype == jnp.float32
  wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (mixture, x, t))
  # x - mean is of numbers up to 4, rounded to 2e-7 each, and is multiplied by t / v = 400
  np.testing.assert_allclose(got, teacher.gaussian_mixture_teacher(*wide), atol=3e-4)


def test_mixture_teacher_flows_from_noise_to_the_mixture():
  """1,000 noises along the exact velocity: components are hit by weight, with the right spread around them."""
  means = jnp.array([[-2.0], [2.0]])
  mixture = teacher.GaussianMixture(means, 0.2, jnp.log(jnp.array([0.3, 0.7])))
  # evenly spaced quantiles of the noise: no Monte Carlo error, only that of 1,000 points
  noise = jax.scipy.stats.norm.ppf((jnp.arange(1000) + 0.5) / 1000)[:, None]
  clock = flow.Clock.of_shift(1.0).replace(nfe=400)
  flow_map = sampler.velocity_flow_map(
      lambda x, t: teacher.gaussian_mixture_teacher(mixture, x, t), clock, method="midpoint")
  x = sampler.sample(flow_map, noise, None, clock)
  right = np.asarray(x[:, 0]) > 0
  assert abs(right.mean() - 0.7) <= 0.002
  np.testing.assert_allclose([x[right].mean(), x[right].std()], [2, 0.2], atol=0.01)
