"""What the student imitates: the velocity of a many-step model, guided; or one that is known exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from piflow_jax import flow


def guided_velocity(u_cond, u_null, x, t, *, scale, interval=(0.0, 1.0), orthogonal=0.0):
  """Classifier-free guidance u_c + (w - 1)(u_c - u_n) inside an interval of noise levels (arXiv 2207.12598, 2404.07724).

  Args:
    u_cond, u_null: [B, ...] velocities with and without the condition.
    x, t: [B, ...] points and their noise levels [B].
    scale: w; no guidance for w <= 1.
    interval: noise levels, both ends included, at which guidance is active.
    orthogonal: share of the guidance term's projection onto the conditional x_0 estimate that is taken out of it.
  Returns:
    [B, ...].
  """
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


def network_teacher(network, null_condition, *, guidance_scale=1.0, guidance_interval=(0.0, 1.0), orthogonal=0.0):
  """teacher(params, x, t, cond) -> u from a velocity network, both passes of guidance in one doubled batch.

  Args:
    network: (params, x [B, ...], t [B], cond) -> u.
    null_condition: cond -> the condition of the unconditional pass.
    guidance_scale, guidance_interval, orthogonal: of `guided_velocity`; the interval in noise level.
  """
  if guidance_scale <= 1:
    return network

  def teacher(params, x, t, cond):
    # Stacked sample by sample, not batch by batch: on a mesh both passes of a sample stay on its device.
    twice = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
    both = jax.tree.map(twice, null_condition(cond), cond)
    u = network(params, twice(x, x), twice(t, t), both)
    u_null, u_cond = jnp.moveaxis(u.reshape(-1, 2, *u.shape[1:]), 1, 0)
    return guided_velocity(
        u_cond, u_null, x, t, scale=guidance_scale, interval=guidance_interval, orthogonal=orthogonal)

  return teacher


def embedded_guidance_teacher(network, guidance_scale):
  """teacher(params, x, t, cond) -> u from a network that takes the guidance scale as an input (FLUX): one pass, no CFG.

  Args:
    network: (params, x [B, ...], t [B], cond, guidance [B]) -> u.
    guidance_scale: the same for all samples.
  """
  return lambda params, x, t, cond: network(params, x, t, cond, jnp.full_like(t, guidance_scale))


class GaussianMixture(NamedTuple):
  """Data whose flow is known: x_0 ~ sum_m w_m N(means_m, std^2 I), each component a whole latent."""
  means: jax.Array  # [M, ...]
  std: jax.Array  # scalar > 0
  logweights: jax.Array  # [M], or [classes, M] by condition; need not be normalised


def gaussian_mixture_teacher(mixture, x, t, cond=None):
  """A teacher without error, its parameters the mixture: the marginal velocity u = E[noise - x_0 | x].

  Given its component mu, x is Gaussian together with noise and x_0: with v = (1 - t)^2 std^2 + t^2 and
  r = x - (1 - t) mu, log p(x) = -|r|^2 / 2v + const, E[noise | x] = t r / v, E[x_0 | x] = mu + (1 - t) std^2 r / v.
  All of it is affine in mu, so that u takes no more than the posterior mean of mu. Finite at t = 0 and t = 1.

  Args:
    mixture: GaussianMixture.
    x, t: [B, ...] points and their noise levels [B].
    cond: [B] classes, where the weights are by class.
  Returns:
    [B, ...].
  """
  t = flow.broadcast_to(t, x)
  v = (1 - t) ** 2 * mixture.std**2 + t**2
  # The residual is squared as it is: expanded, its large terms would cancel just where components are close to x.
  squares = jnp.square(x[:, None] - (1 - t)[:, None] * mixture.means[None])
  squares = jnp.sum(squares, tuple(range(2, squares.ndim)))
  weights = jax.nn.softmax(_prior(mixture, cond, x.shape[0]) - squares / (2 * v.reshape(-1, 1)))
  mean = jnp.einsum("bm,m...->b...", weights, mixture.means, precision="highest")
  return (t - (1 - t) * mixture.std**2) / v * (x - (1 - t) * mean) - mean


def sample_gaussian_mixture(mixture, keys, cond=None):
  """x_0 [B, ...] from the mixture; keys [B], one a sample; cond as in `gaussian_mixture_teacher`."""
  def draw(key, logweights):
    component_key, normal_key = jax.random.split(key)
    mean = mixture.means[jax.random.categorical(component_key, logweights)]
    return mean + mixture.std * jax.random.normal(normal_key, mean.shape, mean.dtype)

  return jax.vmap(draw)(keys, _prior(mixture, cond, keys.shape[0]))


def _prior(mixture, cond, samples):
  """Log weights of each sample's components, [B, M]."""
  logweights = jnp.asarray(mixture.logweights)
  return jnp.broadcast_to(logweights, (samples, *logweights.shape)) if logweights.ndim == 1 else logweights[cond]
