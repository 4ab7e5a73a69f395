"""8-bit AdamW against optax's float32 AdamW, and what it stores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from piflow_jax import adam8


@pytest.mark.parametrize("kind, levels", [(jnp.int8, 127), (jnp.uint8, 255)])
def test_values_come_back_within_half_a_level(kind, levels):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 8, 512)) * 10.0 ** rng.uniform(-4, 0, (3, 8, 512))
  x = jnp.asarray(np.abs(x) if kind == jnp.uint8 else x, jnp.float32)
  codes, scale = adam8.encode(x, kind, 256)
  assert codes.dtype == kind and codes.shape == x.shape and scale.shape == (3, 8, 2)
  back = adam8.decode(codes, scale)
  largest = np.abs(x).reshape(3, 8, 2, 256).max(-1, keepdims=True)
  root = np.cbrt(np.asarray(x).reshape(3, 8, 2, 256) / largest)
  error = np.abs(np.cbrt(np.asarray(back).reshape(3, 8, 2, 256) / largest) - root)
  assert error.max() <= 0.5 / levels + 1e-6
  np.testing.assert_array_equal(np.abs(back).reshape(3, 8, 2, 256).max(-1), largest[..., 0])  # the largest is exact


@pytest.mark.parametrize("shape, lead, size", [
    ((1152, 4608), (1152,), 256), ((28, 1152, 3, 16, 72), (28, 1152, 3, 16), 72), ((1152, 4, 32, 4), (1152, 4), 128),
    ((6912,), (), 256), ((1001, 1152), (1001,), 192), ((4, 16, 1031), (4, 16), 1)])
def test_blocks_lie_along_the_last_axes(shape, lead, size):
  assert adam8._blocks(shape, 256) == (lead, size)


def test_where_the_second_moment_vanishes_the_first_has_before():
  x = jnp.asarray(10.0 ** np.linspace(-12, 0, 4096), jnp.float32).reshape(1, 4096)
  m, _ = adam8.encode(x, jnp.int8, 4096)
  v, _ = adam8.encode(x, jnp.uint8, 4096)
  assert (m == 0).any() and not ((v == 0) & (m != 0)).any()


def _descend(optimizer, steps=200, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  target = {"big": rng.standard_normal((64, 256)), "small": rng.standard_normal(16)}
  scales = jax.tree.map(lambda t: 10.0 ** rng.uniform(-2, 1, t.shape), target)  # directions of all steepnesses
  params = jax.tree.map(lambda t: jnp.zeros(t.shape, dtype), target)
  loss = lambda p, noise: sum(jnp.mean(s * (a - b + 0.1 * n) ** 2) for a, b, s, n in zip(*map(jax.tree.leaves, (p, target, scales, noise))))
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, key):
    noise = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    updates, state = optimizer.update(jax.grad(loss)(params, noise), state, params)
    return optax.apply_updates(params, updates), state

  for i in range(steps):
    params, state = step(params, state, jax.random.key(i))
  return params, state, target


def test_it_goes_where_float32_adamw_goes():
  options = dict(b1=0.9, b2=0.95, weight_decay=1e-3)
  want, _, target = _descend(optax.adamw(2e-2, **options))
  got, state, _ = _descend(adam8.adamw8(2e-2, **options))
  np.testing.assert_allclose(got["small"], want["small"], atol=1e-5)  # kept in float32: the same but for rounding
  distance = lambda a, b: float(np.abs(np.asarray(a["big"]) - np.asarray(b["big"])).mean())
  # Both hover about the target; 8 bits of a moment are noise on a step of 0.02.
  assert distance(got, want) < 0.3 * distance(want, target) + 0.01
  assert distance(got, target) < 1.1 * distance(want, target)


def test_bytes_a_parameter():
  params = {"blocks": jnp.zeros((4, 384, 1536)), "qkv": jnp.zeros((4, 384, 3, 6, 64)), "bias": jnp.zeros(384)}
  state = jax.eval_shape(adam8.adamw8(1e-3).init, params)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  assert size / sum(p.size for p in jax.tree.leaves(params)) < 2.1
