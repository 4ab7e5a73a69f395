"""Layers that several networks share. Compute in `dtype`, parameters in float32, norms and softmax in float32."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import errors
from piflow_jax import sharding
from piflow_jax.models import attention


def sincos_positions(height, width, dim):
  """Fixed 2-D sine-cosine table of DiT (arXiv 2212.09748): [height * width, dim], x first, then y."""
  def table(positions, dim):
    omega = 1 / 10000 ** (np.arange(dim // 2) / (dim / 2))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
  return np.concatenate([table(x.ravel(), dim // 2), table(y.ravel(), dim // 2)], axis=1).astype(np.float32)


def time_features(t, dim=256, *, shift=0):
  """Sinusoidal features of a time [B] -> [B, dim], cosine half first (DiT), at 10000^(-i / (dim / 2 - shift))."""
  half = dim // 2
  frequencies = jnp.exp(-np.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
  angles = jnp.outer(t.astype(jnp.float32), frequencies)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(x, patch):
  """[B, H, W, C] -> [B, (H/p) (W/p), p p C], rows of the grid first."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(y, grid, patch):
  """[B, N, p p, ...] -> [B, H W, ...] in raster order, for a grid of (h, w) patches."""
  b, rest = y.shape[0], y.shape[3:]
  h, w = grid
  y = y.reshape(b, h, w, patch, patch, *rest)
  return jnp.swapaxes(y, 2, 3).reshape(b, h * patch * w * patch, *rest)


def gathered(*spec):
  """A dot_general whose second operand is first brought together from all of `fsdp`, as FSDP (arXiv 2304.11277) has it.

  Left to itself XLA multiplies by one part of a matrix after the other while they go round, which suits large parts.
  """
  def dot_general(x, kernel, *args, **kwargs):
    return jax.lax.dot_general(x, sharding.constrain(kernel, *spec), *args, **kwargs)

  return dot_general


def remat_policy(name):
  """What the backward pass need not compute again: by a name of jax.checkpoint_policies, or nothing at all for "full".

  Raises:
    errors.UserError: no such policy, or one that wants arguments.
  """
  named = [n for n in dir(jax.checkpoint_policies) if n.endswith("_saveable")]
  if name not in ("full", *named):
    raise errors.UserError(f'config.network.remat: {name!r} is none of "none", "full", {", ".join(named)}')
  return None if name == "full" else getattr(jax.checkpoint_policies, name)


class Projection(nn.Module):
  """A linear layer with output axes of its own: [..., D] -> [..., *features], float32 out.

  The product accumulates and leaves in float32, so that bfloat16 networks do not round what a policy integrates.
  """

  features: tuple[int, ...]
  dtype: Any = jnp.float32
  kernel_init: Any = nn.initializers.xavier_uniform()
  bias_init: Any = nn.initializers.zeros_init()

  @nn.compact
  def __call__(self, x):
    flat_init = lambda key, shape: self.kernel_init(key, (shape[0], int(np.prod(shape[1:])))).reshape(shape)
    kernel = self.param("kernel", flat_init, (x.shape[-1], *self.features))
    bias = self.param("bias", self.bias_init, self.features)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    y = gathered()(x.astype(self.dtype), kernel.astype(self.dtype), contract, preferred_element_type=jnp.float32)
    return y + jnp.expand_dims(bias, range(x.ndim - 1))


class VelocityHead(nn.Module):
  """The output layer of a plain flow model: tokens [B, N, D] -> u [B, H, W, C]."""

  channels: int
  patch: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, embedding, grid):
    del embedding  # a policy's head reads it
    y = Projection((self.patch**2, self.channels), self.dtype, nn.initializers.zeros_init(), name="out")(tokens)
    h, w = grid
    return unpatchify(y, grid, self.patch).reshape(-1, h * self.patch, w * self.patch, self.channels)


def project_velocities(tokens, grid, *, count, channels, patch, dtype):
  """Inside a head: `count` output layers of a flow model side by side, tokens [B, N, D] -> [B, count, H, W, C]."""
  y = Projection((patch**2, count, channels), dtype, nn.initializers.zeros_init(), name="out")(tokens)
  y = jnp.moveaxis(unpatchify(y, grid, patch), 2, 1)
  return y.reshape(*y.shape[:2], grid[0] * patch, grid[1] * patch, channels)


def copy_output_layer(teacher_head, head):
  """Parameters of `project_velocities`, shaped like head's, with the teacher's output layer in each of its places."""
  copy = lambda theirs, mine: jnp.broadcast_to(jnp.expand_dims(theirs, -2), mine.shape)
  return {"out": jax.tree.map(copy, teacher_head["out"], head["out"])}


class Attention(nn.Module):
  """Multi-head self-attention, [B, N, D] -> [B, N, D]. One matrix [D, 3, heads, head_dim] for q, k and v.

  Attributes:
    heads: that D divides into.
    kernel: see `attention.attention`.
  """

  heads: int
  dtype: Any = jnp.float32
  kernel: str = "auto"

  @nn.compact
  def __call__(self, x):
    dim = x.shape[-1]
    dense = functools.partial(nn.DenseGeneral, dtype=self.dtype)
    # The three projections are drawn as three matrices: Xavier's bound knows nothing of their being stored as one.
    split_init = lambda key, shape, dtype: jnp.stack(
        [nn.initializers.xavier_uniform()(k, (dim, dim), dtype) for k in jax.random.split(key, 3)], 1).reshape(shape)
    qkv = dense((3, self.heads, dim // self.heads), kernel_init=split_init, dot_general=gathered(None, None, "tensor"),
                name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv, -3, 0)
    y = attention.attention(q, k, v, self.kernel)
    return dense(dim, axis=(-2, -1), kernel_init=nn.initializers.xavier_uniform(), dot_general=gathered("tensor"),
                 name="out")(y)


class Mlp(nn.Module):
  """Linear, tanh-GELU, linear; [B, N, D] -> [B, N, D]."""

  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
    y = nn.gelu(dense(self.hidden, dot_general=gathered(None, "tensor"), name="in")(x), approximate=True)
    return dense(x.shape[-1], dot_general=gathered("tensor"), name="out")(y)
