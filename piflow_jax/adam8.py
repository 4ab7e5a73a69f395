"""AdamW with one-byte moments in blocks (after Dettmers et al., arXiv 2110.02861), as an optax transformation."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Codes and scales lie where their parameter does; scales only along axes whose number of blocks the mesh divides.
SHARDING = ((r"(mu|nu)_scale/.*", None),)
LEAST = 1024  # entries; a smaller array keeps its moments in float32 (the paper: 4096, too many where arrays are small)
LEAST_BLOCK = 64  # entries, for two scales of four bytes; an array that no axis cuts into such blocks stays float32 too


class Adam8State(NamedTuple):
  """Moments by parameter; scales are the largest entry of each block; arrays in float32 have none."""

  count: jax.Array  # [] int32
  mu: Any  # int8, shaped like the parameter
  nu: Any  # uint8
  mu_scale: Any  # float32, shaped like the parameter but for one axis, which counts blocks; [] where there is none
  nu_scale: Any


def adamw8(learning_rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, mask=None, block=256):
  """optax.adamw with 8-bit moments: about 2.06 bytes a parameter instead of 8.

  A moment m is stored as the whole number 127 cbrt(m / max |m|), with the maximum over a block, and sqrt(v) likewise
  in 255 levels: relative steps are alike over six decades. (The paper has a table of 256 values; powers are
  elementwise, which TPUs are better at.) Rounding is stochastic, so m and v are right on average: with rounding to the
  nearest level, a v that falls by less than half a level a step, as it does with b2 = 0.999, would never fall. The
  draws come from (count, leaf) and not from the run's seed: runs of several seeds share them. A v above 0 stays above
  0, so no quotient m / sqrt(v) explodes.

  Args:
    learning_rate, b1, b2, eps, weight_decay, mask: as of optax.adamw.
    block: entries that share a scale, at most; they lie along one axis, see `blocks`.
  """
  return optax.chain(
      scale_by_adam8(b1, b2, eps, block), optax.add_decayed_weights(weight_decay, mask),
      optax.scale_by_learning_rate(learning_rate))


def scale_by_adam8(b1, b2, eps, block):
  """The m / sqrt(v) of `adamw8`."""
  def init(params):
    leaves, tree = jax.tree.flatten(params)

    def zeros(kind):
      pairs = [_zeros(p, kind, block) for p in leaves]
      return [jax.tree.unflatten(tree, [pair[i] for pair in pairs]) for i in range(2)]

    mu, mu_scale = zeros(jnp.int8)
    nu, nu_scale = zeros(jnp.uint8)
    return Adam8State(jnp.zeros((), jnp.int32), mu, nu, mu_scale, nu_scale)

  def update(grads, state, params=None):
    del params
    count = optax.safe_increment(state.count)

    def one(i, g, mu, nu, mu_scale, nu_scale):
      g = g.astype(jnp.float32)
      m = b1 * decode(mu, mu_scale) + (1 - b1) * g
      v = b2 * decode(nu, nu_scale) ** 2 + (1 - b2) * g * g
      u = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
      if mu.dtype == jnp.float32:
        return u, m, jnp.sqrt(v), mu_scale, nu_scale
      bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), count), i), g.shape)
      mu, mu_scale = encode(m, jnp.int8, block, (bits >> 16) / 2**16)
      nu, nu_scale = encode(jnp.sqrt(v), jnp.uint8, block, (bits & 0xFFFF) / 2**16)
      return u, mu, nu, mu_scale, nu_scale

    leaves = jax.tree.unflatten(jax.tree.structure(grads), range(len(jax.tree.leaves(grads))))
    found = jax.tree.map(one, leaves, grads, state.mu, state.nu, state.mu_scale, state.nu_scale)
    u, *rest = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0,) * 5), found)
    return u, Adam8State(count, *rest)

  return optax.GradientTransformation(init, update)


def encode(x, kind, block, uniform):
  """(codes shaped like x, scales) of values x, rounded by uniform draws in [0, 1).

  Kind int8: decode gives x on average. Kind uint8, for values >= 0: decode^2 gives x^2 on average, except in the
  lowest level, which keeps a value above 0 from becoming 0.
  """
  axis, entries = blocks(x.shape, block)
  scale = jnp.max(jnp.abs(x).reshape(*x.shape[:axis], -1, entries, *x.shape[axis + 1:]), axis=axis + 1)
  root = jnp.cbrt(x / jnp.repeat(jnp.where(scale > 0, scale, 1), entries, axis)) * jnp.iinfo(kind).max
  size, power = jnp.abs(root), 3 if kind == jnp.int8 else 6
  low = jnp.floor(size)
  up = uniform < (size**power - low**power) / ((low + 1)**power - low**power)
  if kind == jnp.uint8:
    up |= (low == 0) & (size > 0)
  return (jnp.sign(root) * jnp.minimum(low + up, jnp.iinfo(kind).max)).astype(kind), scale


def decode(codes, scale):
  """The float32 values that `encode` was given; codes in float32 are the values themselves."""
  if codes.dtype == jnp.float32:
    return codes
  axis, = (i for i, (n, blocks) in enumerate(zip(codes.shape, scale.shape)) if n != blocks)
  root = codes.astype(jnp.float32) / jnp.iinfo(codes.dtype).max
  return root**3 * jnp.repeat(scale, codes.shape[axis] // scale.shape[axis], axis)


def blocks(shape, block):
  """(axis that is cut into blocks, entries in one) for an array of a shape, or None where 8 bits are not worth it.

  A mesh cuts arrays too, and a block that lies on two devices costs sending. To keep the mesh's cuts on other axes, or
  between blocks, `blocks` picks the axis that leaves another with the most factors of two (blocks along the heads' 72
  leave the width's 1152 whole); then, on that axis, the block length whose number of blocks has the most factors of
  two; then the longest. A small array takes the longest.
  """
  parts = 128 if math.prod(shape) >= 2**20 else 1

  def divides(n, most):
    """The largest power of two, up to `most`, that divides n."""
    return math.gcd(n, min(most, parts))

  found = []
  for axis, n in enumerate(shape):
    others = max((divides(m, 128) for m in shape[:axis] + shape[axis + 1:]), default=1)
    found += [(others, divides(n // entries, 16), entries, axis) for entries in range(LEAST_BLOCK, min(block, n) + 1)
              if n % entries == 0]
  if not found or math.prod(shape) < LEAST:
    return None
  *_, entries, axis = max(found)
  return axis, entries


def _zeros(p, kind, block):
  found = blocks(p.shape, block)
  if found is None:
    return jnp.zeros(p.shape, jnp.float32), jnp.zeros(())
  axis, entries = found
  scales = (*p.shape[:axis], p.shape[axis] // entries, *p.shape[axis + 1:])
  return jnp.zeros(p.shape, kind), jnp.zeros(scales, jnp.float32)
