"""8-bit AdamW against optax's float32 AdamW, and what it stores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from configs import imagenet_dit
from piflow_jax import adam8
from piflow_jax import build


@pytest.mark.parametrize("kind, levels, power", [(jnp.int8, 127, 1), (jnp.uint8, 255, 2)])
def test_values_come_back_within_a_level_and_on_average(kind, levels, power):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 8, 512)) * 10.0 ** rng.uniform(-4, 0, (3, 8, 512))
  x = jnp.asarray(np.abs(x) if kind == jnp.uint8 else x, jnp.float32)
  largest = np.abs(x).reshape(3, 8, 2, 256).max(-1, keepdims=True)
  root = lambda x: np.cbrt(np.asarray(x).reshape(3, 8, 2, 256) / largest)
  n = 256
  total = 0
  for uniform in (np.arange(n) + 0.5) / n:
    codes, scale = adam8.encode(x, kind, 256, jnp.full(x.shape, uniform))
    assert codes.dtype == kind and codes.shape == x.shape and scale.shape == (3, 8, 2)
    back = adam8.decode(codes, scale)
    assert np.abs(root(back) - root(x)).max() <= 1 / levels + 1e-6
    np.testing.assert_array_equal(np.abs(back).reshape(3, 8, 2, 256).max(-1), largest[..., 0])  # the largest is exact
    total += np.asarray(back, np.float64) ** power
  # A mean over n evenly spread draws is off by a level's width / n at most: by level 1, 2^(3 power) - 1 times its value.
  above = np.abs(root(x)).reshape(x.shape) * levels > 1  # in the lowest, v is kept from vanishing
  np.testing.assert_allclose((total / n)[above], (np.asarray(x, np.float64) ** power)[above], rtol=2**(3 * power) / n)


@pytest.mark.parametrize("shape, lead, size", [
    ((1152, 4608), (1152,), 256), ((28, 1152, 3, 16, 72), (28, 1152, 3, 16), 72), ((1152, 4, 32, 4), (1152, 4), 128),
    ((6912,), (), 256), ((1001, 1152), (1001,), 192), ((4, 16, 1031), (4, 16), 1)])
def test_blocks_lie_along_the_last_axes(shape, lead, size):
  assert adam8._blocks(shape, 256) == (lead, size)


def test_the_second_moment_does_not_vanish():
  x = jnp.asarray(10.0 ** np.linspace(-12, 0, 4096), jnp.float32).reshape(1, 4096).at[0, 0].set(0)
  for uniform in (0.0, 0.5, 0.999):
    v, _ = adam8.encode(x, jnp.uint8, 4096, jnp.full(x.shape, uniform))
    assert v[0, 0] == 0 and (v[0, 1:] > 0).all()


def _beside_float32(gradient, b2, steps):
  """Updates [16, 256] by 8 bits and by float32 after so many gradients(normal draw, step), each as rms of their last 100."""
  eight, full = adam8.scale_by_adam8(0.9, b2, 1e-8, 256), optax.scale_by_adam(0.9, b2, 1e-8)
  params = jnp.zeros((16, 256))

  def body(carry, i):
    s8, s32, total = carry
    g = gradient(jax.random.normal(jax.random.fold_in(jax.random.key(1), i), params.shape), i)
    (u8, s8), (u32, s32) = eight.update(g, s8), full.update(g, s32)
    return (s8, s32, total + (i >= steps - 100) * jnp.stack([u8, u32]) ** 2), None

  start = eight.init(params), full.init(params), jnp.zeros((2, *params.shape))
  return np.sqrt(jax.jit(lambda start: jax.lax.scan(body, start, jnp.arange(steps)))(start)[0][2] / 100)


@pytest.mark.parametrize("gradient", [
    lambda g, i: g, lambda g, i: g.at[:, 1:].multiply(jnp.where(i > 1000, 0.1, 1.0))], ids=["the same", "smaller from 1000 on"])
def test_a_slow_second_moment_falls(gradient):
  u8, u32 = _beside_float32(gradient, 0.999, 6000)
  # Rounded to the nearest level updates come out at 0.8 and 0.2 of float32's; by chance within the noise of 8 bits.
  assert np.median(u8 / u32) == pytest.approx(1, abs=0.05)


def test_where_gradients_end_updates_end():
  u8, u32 = _beside_float32(lambda g, i: g.at[:, 128:].multiply(i < 500), 0.95, 1500)
  assert u8[:, 128:].max() == 0 and np.median(u8[:, :128] / u32[:, :128]) == pytest.approx(1, abs=0.05)


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


@pytest.mark.parametrize("config", [digits.get_config("student"), imagenet_dit.get_config("XL,repa-1nfe")], ids=["digits", "XL"])
def test_bytes_a_parameter(config):
  run = build.run(config)
  params = jax.eval_shape(run.init, jax.random.key(0), run.teacher_shapes)
  state = jax.eval_shape(adam8.adamw8(1e-3).init, params)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  assert size / sum(p.size for p in jax.tree.leaves(params)) < 2.1  # scales, and small arrays in float32, are beyond 2
