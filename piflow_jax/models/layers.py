"""Layers that several networks share. They compute in `dtype`; parameters, norms and softmax are float32."""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import config as config_lib
from piflow_jax import sharding
from piflow_jax.models import attention as attention_lib
from piflow_jax.models import network

PERMUTATION = "permutation"  # the scope of a product that only moves numbers: it is none of a model's FLOPs
DROPOUT = "lora"  # the stream of random keys that adapters drop their inputs by (lora.py)


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


def patches(shape, patch):
  """The Layout of `patchify`'s tokens: patch x patch positions of x_0 [H, W, C] each."""
  grid = (shape[0] // patch, shape[1] // patch)
  return network.Layout(patch**2, functools.partial(unpatchify, grid=grid, patch=patch), tuple(shape))


def tokens(shape, *, patch):
  """The number of patches of x_0 [H, W, C]."""
  return shape[0] * shape[1] // patch**2


def check_computing(spec, *, patch, remat, attention, dtype):
  """Raises ValueError: a field that networks on patches share is out of its range, or does not fit the data."""
  if remat != "none":
    remat_policy(remat)
  config_lib.one_of("attention", attention, attention_lib.KERNELS)
  config_lib.one_of("dtype", dtype, ("float32", "bfloat16"))
  if len(spec.x_0) != 3 or spec.x_0[0] % patch or spec.x_0[1] % patch:
    raise ValueError(f"patch: {patch} does not divide the data's shape {tuple(spec.x_0)} as height, width, channels")


def positions(shape):
  """The Layout of a token for each position of x_0 [..., C]: video [T, H, W, C], or a point [C], which is one token."""
  return network.Layout(1, functools.partial(jnp.squeeze, axis=2), tuple(shape))


def gathered(*spec):
  """A dot_general that first gathers its second operand from all of `fsdp`, as FSDP does (arXiv 2304.11277).

  By default XLA sends parts of the matrix round the ring and multiplies by one after the other: that suits large parts.
  """
  def dot_general(x, kernel, *args, **kwargs):
    return jax.lax.dot_general(x, sharding.constrain(kernel, *spec), *args, **kwargs)

  return dot_general


def remat_policy(name):
  """The policy of jax.checkpoint by name: one of jax.checkpoint_policies, or None, which saves nothing, for "full".

  Raises:
    ValueError: no such policy, or one that takes arguments.
  """
  named = [n for n in dir(jax.checkpoint_policies) if n.endswith("_saveable")]
  if name not in ("full", *named):
    raise ValueError(f'remat: {name!r} is none of "none", "full", {", ".join(named)}')
  return None if name == "full" else getattr(jax.checkpoint_policies, name)


def modulate(x, shift, scale):
  """(1 + scale) x + shift of x [B, N, D] by [B, D]."""
  return x * (1 + scale[:, None]) + shift[:, None]


def dense(features, dtype, *spec, **more):
  """A linear layer whose kernel is gathered from `fsdp`, and laid out as `spec` says, before it multiplies."""
  return nn.Dense(features, dtype=dtype, dot_general=gathered(*spec),
                  **({"kernel_init": nn.initializers.xavier_uniform()} | more))


class Heads(nn.Module):
  """A linear layer to vectors of several heads, [B, N, D] -> [B, N, heads, features / heads].

  Its kernel is the plain matrix [D, features]. The product has the heads as an axis of its own, so that a TPU lays them
  out as attention reads them; cut out of `dense`'s result they would be copied.
  """

  heads: int
  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
    kernel = sharding.constrain(kernel.astype(self.dtype), None, "tensor").reshape(x.shape[-1], self.heads, -1)
    return jnp.tensordot(x.astype(self.dtype), kernel, 1) + bias.astype(self.dtype).reshape(1, 1, self.heads, -1)


class Rows(nn.Module):
  """A linear layer of inputs that stand side by side: sum_i x_i K_i + bias, where K_i are rows of one plain matrix.

  Its argument is a tuple of [B, N, F] and [B, N, heads, D], which counts as [B, N, heads D]; nothing is concatenated.
  """

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, parts):
    rows = sum(math.prod(part.shape[2:]) for part in parts)
    kernel = self.param("kernel", nn.initializers.xavier_uniform(), (rows, self.features))
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
    kernel = sharding.constrain(kernel.astype(self.dtype), "tensor")
    return rows_product([part.astype(self.dtype) for part in parts], kernel) + bias.astype(self.dtype)[None, None]


def rows_product(parts, kernel):
  """The product of `Rows`: each of the parts [B, N, ...] with its own rows of a kernel [rows, features]."""
  total, first = 0, 0
  for part in parts:
    axes = part.shape[2:]
    rows = kernel[first:first + math.prod(axes)].reshape(*axes, -1)
    total, first = total + jnp.tensordot(part, rows, len(axes)), first + math.prod(axes)
  return total


def modulation(count, width, dtype, **more):
  """A linear layer to `count` vectors of the width, zero at first: adaLN-zero (arXiv 2212.09748, 3.2)."""
  return dense(count * width, dtype, kernel_init=nn.initializers.zeros_init(), **more)


def modulations(layer, embedding, count):
  """The vectors [B, D] that a layer of `modulation` makes of SiLU of the embedding [B, D]."""
  # Unconstrained, XLA gathers the modulations of all samples on each device for the gradient of this layer.
  out = layer(sharding.constrain(nn.silu(embedding), sharding.SAMPLES))
  return jnp.split(sharding.constrain(out, sharding.SAMPLES), count, axis=-1)


def embed(features, width, dtype, name, out_init=nn.initializers.normal(0.02)):
  """Linear, SiLU, linear; [B, F] -> [B, width]; inside a network's compact method."""
  normal = nn.initializers.normal(0.02)
  hidden = nn.silu(dense(width, dtype, kernel_init=normal, name=f"{name}_in")(features))
  return dense(width, dtype, kernel_init=out_init, name=f"{name}_out")(hidden)


def loop(block, length, *fields, remat, unroll, name, in_axes=nn.broadcast):
  """`length` blocks, one after the other, in a loop whose parameters carry the blocks as their first axis.

  Args:
    block: module class, called as (x, *others) -> (x, None).
    length: how many.
    *fields: of a block.
    remat: "none", or of `remat_policy`.
    unroll: blocks in one turn of the loop.
    name: of the loop's parameters.
    in_axes: of the others: what all blocks are given alike, or 0 where each has its own.
  """
  if remat != "none":
    block = nn.remat(block, prevent_cse=False, policy=remat_policy(remat))
  scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, DROPOUT: True},
                 in_axes=in_axes, length=length, unroll=unroll)
  return scan(*fields, name=name)


class Projection(nn.Module):
  """A linear layer with output axes of its own: [..., D] -> [..., *features], float32 out.

  The product is accumulated and returned in float32: a bfloat16 network must not round what a policy integrates.
  """

  features: tuple[int, ...]
  dtype: Any = jnp.float32
  kernel_init: Any = nn.initializers.xavier_uniform()
  bias_init: Any = nn.initializers.zeros_init()

  @nn.compact
  def __call__(self, x):
    def flat_init(key, shape):
      return self.kernel_init(key, (shape[0], int(np.prod(shape[1:])))).reshape(shape)

    kernel = self.param("kernel", flat_init, (x.shape[-1], *self.features))
    bias = self.param("bias", self.bias_init, self.features)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    y = gathered()(x.astype(self.dtype), kernel.astype(self.dtype), contract, preferred_element_type=jnp.float32)
    return y + jnp.expand_dims(bias, range(x.ndim - 1))


class VelocityHead(nn.Module):
  """The output layer of a plain flow model: tokens [B, N, D] -> u [B, *layout.shape]."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, embedding, layout):
    del embedding  # a policy's head reads it
    features = (layout.cells, layout.shape[-1])
    y = Projection(features, self.dtype, nn.initializers.zeros_init(), name="out")(tokens)
    return layout.place(y).reshape(-1, *layout.shape)


def project_velocities(tokens, layout, *, count, dtype):
  """Inside a head: `count` output layers of a flow model in one, tokens [B, N, D] -> [B, count, *layout.shape]."""
  features = (layout.cells, count, layout.shape[-1])
  y = Projection(features, dtype, nn.initializers.zeros_init(), name="out")(tokens)
  y = jnp.moveaxis(layout.place(y), 2, 1)
  return y.reshape(*y.shape[:2], *layout.shape)


def copy_output_layer(teacher_head, head):
  """Parameters shaped like `project_velocities`' in `head`, with the teacher's output layer at each of its places."""
  def copy(theirs, mine):
    return jnp.broadcast_to(jnp.expand_dims(theirs, -2), mine.shape)

  return {"out": jax.tree.map(copy, teacher_head["out"], head["out"])}


class Attention(nn.Module):
  """Multi-head self-attention, [B, N, D] -> [B, N, D]. One matrix [D, 3, heads, head_dim] for q, k and v.

  Attributes:
    heads: a divisor of D.
    kernel: of `attention.attention`.
  """

  heads: int
  dtype: Any = jnp.float32
  kernel: str = "auto"

  @nn.compact
  def __call__(self, x):
    dim = x.shape[-1]
    dense = functools.partial(nn.DenseGeneral, dtype=self.dtype)
    xavier = nn.initializers.xavier_uniform()

    def split_init(key, shape, dtype):
      # Xavier's bound comes from a matrix's shape, so q, k and v are drawn as three matrices, though stored as one.
      return jnp.stack([xavier(k, (dim, dim), dtype) for k in jax.random.split(key, 3)], 1).reshape(shape)

    qkv = dense((3, self.heads, dim // self.heads), kernel_init=split_init, dot_general=gathered(None, None, "tensor"),
                name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv, -3, 0)
    y = attention_lib.attention(q, k, v, self.kernel)
    return dense(dim, axis=(-2, -1), kernel_init=xavier, dot_general=gathered("tensor"), name="out")(y)


def gelu(x):
  """GELU by its tanh (arXiv 1606.08415), computed once: XLA for TPUs would do it anew for each tile of a product.

  By the compiler's cycles (v6e) a block of DiT-XL takes 11% less time forward, one of FLUX.1's double blocks 46%.
  """
  return jax.lax.optimization_barrier(nn.gelu(x, approximate=True))


class Mlp(nn.Module):
  """Linear, tanh-GELU, linear; [B, N, D] -> [B, N, D]."""

  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
    y = gelu(dense(self.hidden, dot_general=gathered(None, "tensor"), name="in")(x))
    return dense(x.shape[-1], dot_general=gathered("tensor"), name="out")(y)
