"""How each platform rolls out a mixture by position: in tiles that fit a CPU's cache, in a kernel, or all at once."""

import functools

import jax
import jax.numpy as jnp

from piflow_jax import sharding
from piflow_jax.policy import gmm_kernel
from piflow_jax.policy import gmm_posterior

TILE_LANES = 448  # with K = 32, C = 4 a tile takes a third of a megabyte, which fits a core's own cache


def by_position(f, per_position, per_sample):
  """f(*per_position, *per_sample, n_max=) as fast as the platform does it; [B, C, P].

  Args:
    f: differentiable; it is also called with mean_delta= (`gmm_posterior.mean_delta` in another form) or, in a kernel,
      with differentiable=False.
    per_position: arrays [B, ..., P], the last one [B, C, P].
    per_sample: arrays [B, 1, 1], the first one substeps n.
  """
  def loop(per_position, per_sample):
    # The maximum over the whole batch, computed once: a tile's lanes lie on all devices, so there it would be a
    # collective for each tile.
    n_max = per_sample[0].max()
    runs = {platform: functools.partial(run, f, n_max) for platform, run in LOOPS.items()}
    return jax.lax.platform_dependent(per_position, per_sample, **runs)

  kernel = kernel_for(len(per_position[0]))
  if kernel is None:
    return loop(per_position, per_sample)
  # A derivative comes from XLA's loop, which keeps what the derivative needs.
  rollout = jax.custom_vjp(functools.partial(kernel.integrate, functools.partial(f, differentiable=False)))
  rollout.defvjp(functools.partial(jax.vjp, loop), lambda vjp, g: vjp(g))
  return rollout(per_position, per_sample)


def kernel_for(batch):
  """The module of the hand-written kernel for a batch of this size under the mesh that is being traced, or None."""
  kernel = KERNELS.get(sharding.platform())
  return kernel if kernel and kernel.suits(batch) else None


def at_once(f, n_max, per_position, per_sample):
  """f of everything."""
  return f(*per_position, *per_sample, n_max=n_max)


def in_tiles(f, n_max, per_position, per_sample, *, lanes=TILE_LANES):
  """f of one tile of positions after the other, so that a tile stays in cache for all of its substeps; -> [B, C, P].

  A tile is [1, ..., L], its lanes L being p positions of all B samples: the batch may be split over devices and is
  not cut.
  """
  b, n = per_position[0].shape[0], per_position[0].shape[-1]
  p = min(max(lanes // b, 1), n)
  p -= p % 2 == 0  # rows an odd multiple of B apart do not all fall into the same few sets of the cache
  tiles = -(-n // p)

  def cut(a):
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, tiles * p - n)])
    a = jnp.moveaxis(a.reshape(*a.shape[:-1], tiles, p), (-2, 0), (0, -2))  # [tiles, ..., B, p]
    return a.reshape(tiles, 1, *a.shape[1:-2], b * p)

  per_lane = [jnp.broadcast_to(s, (b, 1, p)).reshape(1, 1, b * p) for s in per_sample]

  def of_tile(tile):
    return f(*tile, *per_lane, mean_delta=mean_delta, n_max=n_max)

  y = jax.lax.map(of_tile, [cut(a) for a in per_position])
  y = jnp.moveaxis(y.reshape(tiles, -1, b, p), (2, 1), (0, 1))
  return y.reshape(b, -1, tiles * p)[..., :n]


# platform -> XLA's loop, chosen when a program is lowered; "default" is every other platform's.
LOOPS = {"cpu": in_tiles, "default": at_once}
# platform -> kernel that replaces the loop where it suits and no derivative is taken, chosen while a program is traced.
KERNELS = {"tpu": gmm_kernel}


@jax.custom_vjp
def mean_delta(delta, half_square, logweights, residual, zeta, d):
  """`gmm_posterior.mean_delta` written out over components: loops over positions alone, which XLA:CPU vectorises."""
  weights, total = _weights(delta, half_square, logweights, residual, zeta, d)
  return _weighted_sum(weights, delta) / total


def _rows(x):
  """[B, K, P] as its K rows [B, 1, P]."""
  return [x[:, k:k + 1] for k in range(x.shape[1])]


def _sum(rows):
  return functools.reduce(jnp.add, rows)


def _weighted_sum(weights, delta):
  """Weights [B, K, P] and delta [B, C, K, P] -> [B, C, P]."""
  return _sum([w * delta[:, :, k] for k, w in enumerate(_rows(weights))])


def _weights(delta, half_square, logweights, residual, zeta, d):
  # XLA:CPU recomputes an operand that it broadcasts, once for each component, unless the last operation is a division.
  # So everything that components share ends in one; where nothing needs dividing we divide by sign(d) = 1: exact.
  logits = logweights - half_square * (zeta / d)
  for c in range(delta.shape[1]):
    logits += delta[:, c] * (residual[:, c:c + 1] / d)
  weights = gmm_posterior.exp_below(logits - functools.reduce(jnp.maximum, _rows(logits)) / jnp.sign(d))
  return weights, jnp.maximum(_sum(_rows(weights)), gmm_posterior.LEAST)


def _mean_delta_forward(*args):
  return mean_delta(*args), args


def _mean_delta_backward(args, g):
  # By hand: JAX's derivative of each component's slice would be a sum over all of the mixture.
  delta, half_square, _, residual, zeta, d = args
  weights, total = _weights(*args)
  mean = _weighted_sum(weights, delta) / total
  g = g / total
  centre = sum(g[:, c:c + 1] * mean[:, c:c + 1] for c in range(delta.shape[1])) / jnp.sign(d)
  pull, pull_zeta = residual / d, zeta / d
  d_logits = weights * (sum(g[:, c:c + 1] * delta[:, c] for c in range(delta.shape[1])) - centre)
  d_delta = weights[:, None] * g[:, :, None] + d_logits[:, None] * pull[:, :, None]
  d_pull = _weighted_sum(d_logits, delta) / d
  d_zeta = -_sum([a * b for a, b in zip(_rows(d_logits), _rows(half_square))]) / d
  d_d = -jnp.sum(d_pull * pull, axis=1, keepdims=True) - d_zeta * pull_zeta
  return d_delta, -pull_zeta * d_logits, d_logits, d_pull, d_zeta, d_d


mean_delta.defvjp(_mean_delta_forward, _mean_delta_backward)
