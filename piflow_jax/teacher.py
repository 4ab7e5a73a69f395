"""What the student imitates: the velocity of a many-step model, guided; or one that is known exactly."""

from typing import Callable, NamedTuple

import chex
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import flow

FREE = ("checkpoint",)  # a teacher may be moved; whether its weights are the same, the loaders compare

_EVERYWHERE = (0.0, 1.0)


class Teacher(NamedTuple):
  """A velocity to imitate.

  Attributes:
    velocity: (teacher_params, x [B, ...], t [B] noise level, cond) -> u [B, ...].
    passes: network calls of one velocity.
    params: () -> the parameters of an exact teacher; None: they are loaded from a checkpoint.
  """

  velocity: Callable
  passes: int
  params: Callable | None = None


def config(**fields):
  """A trained network as teacher, with classifier-free guidance."""
  return config_lib.noun(make, dict(
      checkpoint="",  # workdir of the teacher's run
      weights="ema",  # or "params"
      network=None,  # its fields; None: those of config.network
      guidance_scale=1.0,  # w; no guidance for w <= 1
      guidance_interval=_EVERYWHERE,  # noise levels, both included, where guidance is active
      orthogonal=0.0,  # share of guidance's projection on the x_0 estimate that is taken out
  ), fields)


def make(net, null, spec, *, network, checkpoint, weights, guidance_scale, guidance_interval, orthogonal):
  """The Teacher that a velocity network is, guided.

  Args:
    net: `distill.method.Net` of the velocity network.
    null: cond -> condition of the unconditional pass; None where the network has none.
    spec: of the data; not read.
    network, checkpoint: for build.py and the loaders, which read them themselves.
    weights, guidance_scale, guidance_interval, orthogonal: see `config`.
  Raises:
    ValueError: a field is out of its range, or has no effect.
  """
  del spec, network
  if not isinstance(checkpoint, str):
    raise ValueError(f"checkpoint: {checkpoint!r} is no folder's path")
  config_lib.one_of("weights", weights, ("ema", "params"))
  config_lib.number("guidance_scale", guidance_scale, least=0)
  config_lib.number("orthogonal", orthogonal, least=0, most=1)
  _check_interval(guidance_interval)
  if guidance_scale <= 1:
    for name, value, unset in (
        ("guidance_interval", tuple(guidance_interval), _EVERYWHERE), ("orthogonal", orthogonal, 0)):
      if value != unset:
        raise ValueError(f"{name}: {value} has no effect at guidance_scale={guidance_scale}, which guides nothing; "
                         f"set {unset}")
    return Teacher(net.apply, 1)
  if null is None:
    raise ValueError(f"guidance_scale: {guidance_scale}, but the network has no null condition for guidance; set 1")
  velocity = network_teacher(net.apply, null, guidance_scale=guidance_scale, guidance_interval=guidance_interval,
                             orthogonal=orthogonal)
  return Teacher(velocity, 2)


def _check_interval(interval):
  if not isinstance(interval, (tuple, list)) or len(interval) != 2:
    raise ValueError(f"guidance_interval: {interval!r} must be two noise levels, (lower, upper)")
  for end in interval:
    config_lib.number("guidance_interval", end, least=0, most=1)
  if interval[0] > interval[1]:
    raise ValueError(f"guidance_interval: {tuple(interval)} must be (lower, upper), the lower end first")


def exact_config(**fields):
  """A teacher without error and without training: the flow of the Gaussian mixture that the data come from."""
  return config_lib.noun(exact, dict(
      mixture=None,  # function of (x_0's shape, number of classes) -> (means, std, log weights), as data.gaussians'
  ), fields)


def exact(net, null, spec, *, mixture):
  """The exact Teacher of data with this spec.

  Args:
    net, null: not read: the teacher is no network.
    spec: `data.spec.Spec`; its label's classes choose the weights.
    mixture: (shape, classes) -> fields of GaussianMixture; classes is 1 where the data have no label.
  Raises:
    ValueError: mixture is no function.
  """
  del net, null
  if not callable(mixture):
    raise ValueError(f"mixture: {mixture!r} is no function of (shape, classes), like data.gaussians.mixture")
  label = spec.cond.get("label")

  def params():
    return GaussianMixture(*map(jnp.asarray, mixture(tuple(spec.x_0), 1 if label is None else label.classes)))

  def velocity(params, x, t, cond):
    # Without a label every sample is of the one class.
    return gaussian_mixture_teacher(params, x, t, cond.get("label", jnp.zeros(t.shape, jnp.int32)))

  return Teacher(velocity, 0, params)


def guided_velocity(u_cond, u_null, x, t, *, scale, interval=_EVERYWHERE, orthogonal=0.0):
  """Classifier-free guidance u_c + (w - 1)(u_c - u_n) inside an interval of noise levels (method.md, 10).

  Sources: arXiv 2207.12598 (guidance), 2404.07724 (interval).

  Args:
    u_cond, u_null: [B, ...] velocities with and without the condition.
    x, t: [B, ...] points and their noise levels [B].
    scale: w; no guidance for w <= 1.
    interval: noise levels, both ends included, at which guidance is active.
    orthogonal: share of the guidance term's projection onto the conditional x_0 estimate that is taken out of it.
  Returns:
    [B, ...].
  """
  chex.assert_equal_shape([u_cond, u_null, x])
  if scale <= 1:
    return u_cond
  term = u_cond - u_null
  if orthogonal:
    axes = tuple(range(1, x.ndim))
    x_0 = flow.velocity_to_x_0(x, u_cond, t)
    share = jnp.sum(term * x_0, axes, keepdims=True) / jnp.maximum(jnp.sum(x_0**2, axes, keepdims=True), 1e-6)
    term = term - orthogonal * share * x_0
  active = (t >= interval[0]) & (t <= interval[1])
  return u_cond + jnp.where(flow.broadcast_to(active, x), (scale - 1) * term, 0)


def network_teacher(network, null, *, guidance_scale=1.0, guidance_interval=_EVERYWHERE, orthogonal=0.0):
  """teacher(params, x, t, cond) -> u from a velocity network, both passes of guidance in one doubled batch.

  Args:
    network: (params, x [B, ...], t [B], cond) -> u.
    null: cond -> the condition of the unconditional pass, a tree like cond.
    guidance_scale, guidance_interval, orthogonal: of `guided_velocity`; the interval in noise level.
  """
  if guidance_scale <= 1:
    return network

  def twice(a, b):
    # Stacked sample by sample, not batch by batch: on a mesh both passes of a sample stay on its device.
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

  def teacher(params, x, t, cond):
    both = jax.tree.map(twice, null(cond), cond)
    u = network(params, twice(x, x), twice(t, t), both)
    u_null, u_cond = jnp.moveaxis(u.reshape(-1, 2, *u.shape[1:]), 1, 0)
    return guided_velocity(
        u_cond, u_null, x, t, scale=guidance_scale, interval=guidance_interval, orthogonal=orthogonal)

  return teacher


class GaussianMixture(NamedTuple):
  """Data whose flow is known: x_0 ~ sum_m w_m N(means_m, std^2 I), each component a whole latent."""
  means: jax.Array  # [M, ...]
  std: jax.Array  # scalar > 0
  logweights: jax.Array  # [M], or [classes, M] by condition; need not be normalised


def gaussian_mixture_teacher(mixture, x, t, label=None):
  """A velocity without error, its parameters the mixture: the marginal velocity u = E[noise - x_0 | x].

  Given its component mu, x is Gaussian together with noise and x_0: with v = (1 - t)^2 std^2 + t^2 and
  r = x - (1 - t) mu, log p(x) = -|r|^2 / 2v + const, E[noise | x] = t r / v, E[x_0 | x] = mu + (1 - t) std^2 r / v.
  Both are affine in mu, so that u needs only the posterior mean of mu. Finite at t = 0 and t = 1.

  Args:
    mixture: GaussianMixture.
    x, t: [B, ...] points and their noise levels [B].
    label: [B] classes, where the weights are by class.
  Returns:
    [B, ...].
  """
  t = flow.broadcast_to(t, x)
  v = (1 - t) ** 2 * mixture.std**2 + t**2
  # Square the residual as it is: expanded, its large terms would cancel where x is close to a component.
  squares = jnp.square(x[:, None] - (1 - t)[:, None] * mixture.means[None])
  squares = jnp.sum(squares, tuple(range(2, squares.ndim)))
  logweights = jnp.asarray(mixture.logweights)
  prior = jnp.broadcast_to(logweights, (len(x), *logweights.shape)) if logweights.ndim == 1 else logweights[label]
  weights = jax.nn.softmax(prior - squares / (2 * v.reshape(-1, 1)))
  mean = jnp.einsum("bm,m...->b...", weights, mixture.means, precision="highest")
  return (t - (1 - t) * mixture.std**2) / v * (x - (1 - t) * mean) - mean
