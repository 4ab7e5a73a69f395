"""8-bit AdamW against optax's float32 AdamW, and what it stores."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from configs import digits
from configs import imagenet_dit
from piflow_jax import adam8
from piflow_jax import build
from piflow_jax import sharding
from piflow_jax import train_step
from piflow_jax.data import digits as digits_data
from piflow_jax.data import loader
from tests import tiny


@pytest.mark.parametrize("kind, levels, power", [(jnp.int8, 127, 1), (jnp.uint8, 255, 2)])
def test_values_come_back_within_a_level_and_on_average(kind, levels, power):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 512, 16)) * 10.0 ** rng.uniform(-4, 0, (3, 512, 16))
  x = jnp.asarray(np.abs(x) if kind == jnp.uint8 else x, jnp.float32)
  largest = np.abs(x).reshape(3, 2, 256, 16).max(2, keepdims=True)

  def root(x):
    return np.cbrt(np.asarray(x).reshape(3, 2, 256, 16) / largest)

  n = 256
  total = 0
  for uniform in (np.arange(n) + 0.5) / n:
    codes, scale = adam8.encode(x, kind, 256, jnp.full(x.shape, uniform))
    assert codes.dtype == kind and codes.shape == x.shape and scale.shape == (3, 2, 16)
    back = adam8.decode(codes, scale)
    assert np.abs(root(back) - root(x)).max() <= 1 / levels + 1e-6
    np.testing.assert_array_equal(np.abs(back).reshape(3, 2, 256, 16).max(2), largest[:, :, 0])  # the largest is exact
    total += np.asarray(back, np.float64) ** power
  # A mean over n evenly spread draws is off by a level's width / n at most: at level 1 that is 2^(3 power) - 1 times
  # its value.
  above = np.abs(root(x)).reshape(x.shape) * levels > 1  # in the lowest, v is kept from vanishing
  np.testing.assert_allclose((total / n)[above], (np.asarray(x, np.float64) ** power)[above], rtol=2**(3 * power) / n)


@pytest.mark.parametrize("shape, axis, entries", [
    ((28, 1152, 4608), 2, 144), ((28, 4608, 1152), 1, 144), ((28, 16, 72, 1152), 2, 72), ((28, 1152, 3, 16, 72), 4, 72),
    ((1001, 1152), 0, 143), ((6912,), 0, 256), ((3, 96, 384), 2, 192), ((1024, 1), 0, 256)])
def test_blocks_lie_where_a_mesh_does_not_cut(shape, axis, entries):
  assert adam8.blocks(shape, 256) == (axis, entries)


@pytest.mark.parametrize("shape", [(4, 16, 1031), (1031, 61), (32, 32), (63, 63), (512,)])
def test_what_no_axis_cuts_into_blocks_stays_float32(shape):
  state = adam8.scale_by_adam8(0.9, 0.95, 1e-8, 256).init(jnp.zeros(shape))
  assert state.mu.dtype == state.nu.dtype == jnp.float32 and state.mu_scale.shape == ()


def test_the_second_moment_does_not_vanish():
  x = jnp.asarray(10.0 ** np.linspace(-12, 0, 8 * 251).reshape(8, 251).T, jnp.float32).at[0, 0].set(0)
  for uniform in (0.0, 0.5, 0.999):
    v, scale = adam8.encode(x.at[250].set(1), jnp.uint8, 256, jnp.full(x.shape, uniform))
    assert scale.shape == (1, 8) and v[0, 0] == 0 and (v[1:] > 0).all() and (v[:, 1:] > 0).all()


def _beside_float32(gradient, b2, steps):
  """(8 bits', float32's) root mean square [16, 256] of the last 100 updates of `steps` by gradient(normal draw, i)."""
  eight, full = adam8.scale_by_adam8(0.9, b2, 1e-8, 256), optax.scale_by_adam(0.9, b2, 1e-8)
  params = jnp.zeros((16, 256))

  def body(carry, i):
    s8, s32, total = carry
    g = gradient(jax.random.normal(jax.random.fold_in(jax.random.key(1), i), params.shape), i)
    (u8, s8), (u32, s32) = eight.update(g, s8), full.update(g, s32)
    return (s8, s32, total + (i >= steps - 100) * jnp.stack([u8, u32]) ** 2), None

  start = eight.init(params), full.init(params), jnp.zeros((2, *params.shape))
  return np.sqrt(jax.jit(lambda start: jax.lax.scan(body, start, jnp.arange(steps)))(start)[0][2] / 100)


@pytest.mark.parametrize("later", [1.0, 0.1], ids=["the same", "smaller from 1000 on"])
def test_a_slow_second_moment_falls(later):
  u8, u32 = _beside_float32(lambda g, i: g.at[:, 1:].multiply(jnp.where(i > 1000, later, 1.0)), 0.999, 6000)
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
  state = optimizer.init(params)

  def loss(params, noise):
    def one(p, t, scale, n):
      return jnp.mean(scale * (p - t + 0.1 * n) ** 2)

    return sum(jax.tree.leaves(jax.tree.map(one, params, target, scales, noise)))

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

  def distance(a, b):
    return float(np.abs(np.asarray(a["big"]) - np.asarray(b["big"])).mean())

  # Both hover about the target; 8 bits of a moment are noise on a step of 0.02.
  assert distance(got, want) < 0.3 * distance(want, target) + 0.01
  assert distance(got, target) < 1.1 * distance(want, target)


def _shapes(config):
  """(shapes of the parameters, of the state, rules) of a config's run with 8-bit moments."""
  run = build.run(config)
  params = jax.eval_shape(run.method.init, jax.random.key(0), run.teacher_shapes)
  return params, jax.eval_shape(adam8.adamw8(1e-3).init, params), run.rules


@pytest.mark.parametrize("config", [
    digits.get_config("student"), imagenet_dit.get_config("XL,repa-1nfe")], ids=["digits", "XL"])
def test_bytes_a_parameter(config):
  params, state, _ = _shapes(config)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  assert size / sum(p.size for p in jax.tree.leaves(params)) < 2.1  # scales, and small arrays in float32, are beyond 2


@pytest.mark.parametrize("sizes", [(1, 16, 1), (1, 64, 1), (2, 8, 4), (16, 16, 1)])
def test_bytes_a_parameter_of_a_device(sizes):
  """Where scales lay whole on every device they alone took 0.7 bytes at fsdp 16, 2.9 at 64."""
  params, state, rules = _shapes(imagenet_dit.get_config("XL,repa-1nfe"))
  mesh = jax.sharding.AbstractMesh((1, *sizes), sharding.AXES)

  def held(tree, count):
    def one(x, s):
      return count(x) * math.prod(s.shard_shape(x.shape))

    return sum(jax.tree.leaves(jax.tree.map(one, tree, sharding.shardings(tree, rules, mesh))))

  assert held(state, lambda x: x.dtype.itemsize) / held(params, lambda x: 1) < 2.1


def test_scales_lie_where_their_parameter_does_as_far_as_blocks_allow():
  tree = {f"mu{of}": {"blocks": {"mlp": {"out": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}}}
          for of, shape in (("", (28, 4608, 1152)), ("_scale", (28, 32, 1152)))}
  rules = build.run(imagenet_dit.get_config("XL,repa-1nfe")).rules

  def specs(**sizes):
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.AXES), sharding.AXES)
    return [s.spec for s in jax.tree.leaves(sharding.shardings(tree, rules, mesh))]

  assert specs(fsdp=16, tensor=4) == [P(None, "tensor", "fsdp")] * 2
  # 32 blocks cannot be cut into 9 parts.
  assert specs(fsdp=16, tensor=9) == [P(None, "tensor", "fsdp"), P(None, None, "fsdp")]


def _opened(x):
  """An array with noise on it: a fresh DiT's blocks are shut, and have no gradients."""
  return jax.device_put(x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape, np.float32), x.sharding)


@pytest.mark.slow
def test_one_step_on_eight_devices_is_that_of_one():
  found = {}
  for sizes in ((1, 1, 1), (1, 4, 2)):
    config = tiny.config("teacher", optimizer__moments="int8")
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:math.prod(sizes)])
    jitted = train_step.compile(config, mesh, build.run(config))
    state = jitted.init(jax.random.key(1), None)
    state = state.replace(params=jax.tree.map(_opened, state.params))
    data = digits_data.make()
    batch = next(loader.batches(data.records("train"), data.spec, batch_size=config.batch_size, seed=0))
    batch = sharding.place_batch(batch, mesh, config.batch_size)
    found[sizes] = jitted.step(state, None, batch, jax.random.key(0))[0]
  assert len(found[1, 4, 2].opt_state[1][0].mu_scale["blocks"]["mlp"]["out"]["kernel"].sharding.device_set) == 8
  eight, one = (jax.device_get((state.params, state.opt_state[1][0])) for state in (found[1, 4, 2], found[1, 1, 1]))
  codes = 0
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(eight), jax.tree.leaves(one), strict=True):
    if a.dtype in (np.int8, np.uint8):
      # Sums run in another order: a value next to where its draw falls is rounded the other way.
      codes += np.count_nonzero(a)
      off = np.abs(a.astype(int) - b)
      assert off.max() <= 1 and (off > 0).mean() < 1e-3, path
    else:
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max() + 1e-12, err_msg=str(path))
  assert codes > 2 * 30_000
