"""Each kernel against XLA's plain attention, on one device and split over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import sharding
from piflow_jax.models import attention
from piflow_jax.models import layers


def _qkv(n=128, heads=2, dim=72, dtype=jnp.float32):
  return [jax.random.normal(jax.random.key(i), (4, n, heads, dim)).astype(dtype) for i in range(3)]


def _with_gradients(kernel, qkv, **more):
  weight = jnp.cos(jnp.arange(qkv[0].size)).reshape(qkv[0].shape)

  def loss(*a):
    return jnp.sum(weight * attention.attention(*a, kernel, **more).astype(jnp.float32))

  return attention.attention(*qkv, kernel, **more), jax.grad(loss, argnums=(0, 1, 2))(*qkv)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_splash_is_plain_attention(sizes):
  qkv = _qkv()
  want = _with_gradients("xla", qkv)
  run = jax.jit(lambda *a: _with_gradients("splash", a, interpret=True))
  if sizes:
    mesh = sharding.make_mesh(*sizes)
    split = jax.sharding.NamedSharding(mesh, jax.P(sharding.SAMPLES, None, "tensor"))
    run = jax.jit(lambda *a: _with_gradients("splash", a, interpret=True), in_shardings=split)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      got = run(*qkv)
  else:
    got = run(*qkv)
  # Softmax by blocks sums in another order.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_keys_beyond_a_length_count_for_nothing_and_odd_numbers_of_tokens_are_filled_up(sizes):
  qkv, n = _qkv(150, dim=16), 150
  lengths = jnp.array([150, 1, 77, 128])
  within = (jnp.arange(n)[None] < lengths[:, None])[:, :, None, None]

  def masked(*a, kernel):
    # Each of its own rows alone: what tokens beyond the length get is not defined.
    return jnp.where(within, attention.attention(*a, kernel, lengths=lengths, interpret=kernel != "xla"), 0)

  def with_gradients(kernel, a):
    weight = jnp.cos(jnp.arange(a[0].size)).reshape(a[0].shape)
    grad = jax.grad(lambda *a: jnp.sum(weight * masked(*a, kernel=kernel)), argnums=(0, 1, 2))
    return masked(*a, kernel=kernel), grad(*a)

  # By its definition, a softmax over the keys that are there.
  q, k, v = qkv
  for b, length in enumerate(lengths):
    logits = jnp.einsum("nhd,mhd->hnm", q[b], k[b, :length]) / 4
    mine = jnp.einsum("hnm,mhd->nhd", jax.nn.softmax(logits), v[b, :length])
    np.testing.assert_allclose(masked(*qkv, kernel="xla")[b, :length], mine[:length], atol=1e-5)
  want = with_gradients("xla", qkv)
  run = jax.jit(functools.partial(with_gradients, "splash"))
  if sizes:
    mesh = sharding.make_mesh(*sizes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      got = run(jax.device_put(qkv, jax.NamedSharding(mesh, jax.P(sharding.SAMPLES, None, "tensor"))))
  else:
    got = run(qkv)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.slow
def test_half_precision_is_rounded_once():
  qkv = _qkv(dtype=jnp.bfloat16)
  got = attention.attention(*qkv, "splash", interpret=True)
  want = attention.attention(*(x.astype(jnp.float32) for x in qkv), "xla")
  assert got.dtype == jnp.bfloat16
  # bfloat16 has 8 bits: an output up to 1 is off by 2^-9, a logit up to 5 by as much of itself, before the softmax.
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02)


@pytest.mark.parametrize("kernel, n, words", [
    ("splash", 128, "splash needs a TPU, not cpu"), ("flash", 128, "flash needs a TPU"),
    ("cudnn", 128, "cudnn needs a GPU"), ("fast", 128, "'fast' is none of auto, xla")])
def test_a_kernel_of_another_platform_is_refused(kernel, n, words):
  with pytest.raises(ValueError, match=f"^attention: {words}"):
    attention.attention(*_qkv(n), kernel)


def test_cudnn_takes_half_precision_alone(monkeypatch):
  monkeypatch.setattr(attention.sharding, "platform", lambda: "gpu")
  with pytest.raises(ValueError, match="^attention: cudnn takes bfloat16 or float16, not float32; set auto"):
    attention.attention(*_qkv(128), "cudnn")


def test_sizes_that_a_kernel_does_not_take_are_refused():
  with pytest.raises(ValueError, match="128 tokens or more, not 16"):
    attention.attention(*_qkv(16), "splash", interpret=True)
  assert attention.attention(*_qkv(16)).shape == (4, 16, 2, 72)


def test_remat_policies_go_by_name():
  assert layers.remat_policy("full") is None
  assert layers.remat_policy("dots_saveable") is jax.checkpoint_policies.dots_saveable
  with pytest.raises(ValueError, match="^remat: 'some' is none of"):
    layers.remat_policy("some")
