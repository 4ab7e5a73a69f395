"""The GM rollout against a plain scan of the published formula, in one run, and the floor of either.

  python -m benchmarks.rollout                              one device
  JAX_NUM_CPU_DEVICES=2 python -m benchmarks.rollout        both cores of a 2-core machine, side by side

Batch 64, latents 32x32x4, K = 32, 128 substeps, float32; agreement in float64 on a smaller batch. Runs alternate; times
are medians.
"""

import functools
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import flow
from piflow_jax import sharding
from piflow_jax.policy import gmm
from piflow_jax.policy import rollout

SUBSTEPS = 128


class Published(NamedTuple):
  """A mixture as it is published."""

  means: jax.Array  # [B, H, W, K, C]
  logweights: jax.Array  # [B, H, W, K]
  logstd: jax.Array  # [B]


def as_published(mixture, shape):
  """gmm.Mixture -> Published, for points of `shape` [B, H, W, C]."""
  b, h, w, c = shape
  return Published(mixture.means.reshape(b, c, -1, h, w).transpose(0, 3, 4, 2, 1),
                   mixture.logweights.reshape(b, -1, h, w).transpose(0, 2, 3, 1), mixture.logstd)


def plain_rollout(mixture, x_src, t_src, *, substeps=SUBSTEPS, eps=1e-6):
  """GMFlow's posterior as published (method.md, 3.1): mixtures [B, H, W, K, C], no substep shares work; t = 1 to 0."""
  def column(s):
    return s[:, None, None, None]

  mu = x_src[..., None, :] - column(t_src)[..., None] * mixture.means
  v = column((t_src * jnp.exp(mixture.logstd)) ** 2)
  s_src = column(jnp.maximum(t_src, eps))
  a_src = (1 - s_src) / s_src

  def substep(x, i):
    t = jnp.maximum(t_src * (1 - i / substeps), eps)
    s = column(t)
    a = (1 - s) / s
    zeta, nu = a**2 - a_src**2, a * x / s - a_src * x_src / s_src
    d = jnp.maximum(v * zeta + 1, eps)
    logits = mixture.logweights + jnp.sum(mu * (nu[..., None, :] - zeta[..., None] * mu / 2), axis=-1) / d
    mean_k = ((v * nu)[..., None, :] + mu) / d[..., None]
    u = (x - jnp.sum(jax.nn.softmax(logits, axis=-1)[..., None] * mean_k, axis=-2)) / s
    return x - column(t_src) / substeps * u, None

  # Remat keeps only x for each substep, as in the package.
  substep = jax.checkpoint(substep, prevent_cse=False)
  return jax.lax.scan(substep, x_src, jnp.arange(substeps, dtype=x_src.dtype))[0]


def plain(mixture, x_src, t_src):
  """`plain_rollout` of the package's mixture."""
  return plain_rollout(as_published(mixture, x_src.shape), x_src, t_src)


def fast_rollout(mixture, x_src, t_src, *, substeps=SUBSTEPS):
  policy = gmm.to_policy(mixture, x_src, t_src)
  return rollout.rollout(policy, x_src, t_src, jnp.zeros_like(t_src), flow.Clock(1.0, substeps, 1, 1.0))


def case(batch, height, width, channels, components):
  """A mixture, noise and t = 1, split over all devices."""
  key = jax.random.split(jax.random.key(0), 3)
  n = height * width
  mixture = gmm.Mixture(
      jax.random.normal(key[0], (batch, channels, components, n)),
      jax.nn.log_softmax(jax.random.normal(key[1], (batch, components, n)), axis=1), jnp.full(batch, jnp.log(0.1)))
  x = jax.random.normal(key[2], (batch, height, width, channels))
  return jax.device_put((mixture, x, jnp.ones(batch)), jax.NamedSharding(sharding.make_mesh(), sharding.BATCH))


def alternate(functions, repeats=5):
  """Median seconds of each of {name: function}; they run in turn, so that a slow spell of the machine slows all."""
  for f in functions.values():
    jax.block_until_ready(f())
  seconds = {name: [] for name in functions}
  for _ in range(repeats):
    for name, f in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(f())
      seconds[name].append(time.perf_counter() - began)
  return {name: statistics.median(s) for name, s in seconds.items()}


def report(title, arguments):
  mixture, x, _ = arguments
  b, c, k, n = mixture.means.shape
  numbers = jnp.linspace(-20, 0, b * k * n)
  exp, add = jax.jit(jnp.exp), jax.jit(lambda a: a + 1)
  took = alternate({
      "plain": functools.partial(jax.jit(plain), *arguments),
      "fast": functools.partial(jax.jit(fast_rollout), *arguments),
      "exp": functools.partial(exp, numbers), "copy": functools.partial(add, mixture.means)})
  print(f"{title}: batch {b}, {n} positions, C = {c}, K = {k}, {SUBSTEPS} substeps, {jax.device_count()} device(s)")
  print(f"  plain scan of the published formula   {took['plain']:8.3f} s")
  print(f"  this package                          {took['fast']:8.3f} s   "
        f"{took['plain'] / took['fast']:.1f} times faster")
  print(f"  floor, its exponentials alone         {took['exp'] * SUBSTEPS:8.3f} s   "
        f"(one pass over K logits a position, {SUBSTEPS} times)")
  print(f"  floor, mixture from memory each time  {took['copy'] / 2 * SUBSTEPS:8.3f} s   "
        f"(what tiles in cache do not pay)\n", flush=True)


def main():
  report("ImageNet latents", case(64, 32, 32, 4, 32))
  report("digits", case(128, 8, 8, 1, 8))
  with jax.enable_x64(True):
    mixture, x, t = jax.tree.map(lambda a: a.astype(jnp.float64), case(8, 8, 8, 4, 32))
    difference = np.abs(jax.jit(plain)(mixture, x, t) - jax.jit(fast_rollout)(mixture, x, t)).max()
    print(f"largest difference in float64: {difference:.1e} (samples of order 1)")


if __name__ == "__main__":
  main()
