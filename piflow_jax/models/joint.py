"""Blocks in which text and image tokens attend to one another: what FLUX.1 and Qwen-Image share.

Kernels are plain matrices [in, out], one for each linear layer of the PyTorch originals, so that an adapter of one is
an adapter of the other (lora.py). Inside a joint sequence the image's tokens come first: attention does not ask in
which order they lie, and padding then lies at the end, where kernels can leave it out by a length.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import sharding
from piflow_jax.models import attention as attention_lib
from piflow_jax.models import layers

# Of one stream's layers, under the layer axis; see `dit.SHARDING` for the idea.
STREAM_SHARDING = (
    (r"(q|k|v|mlp_in)/kernel", (None, "fsdp", "tensor")),
    (r"(q|k|v|mlp_in)/bias", (None, "tensor")),
    (r"(out|mlp_out)/kernel", (None, "tensor", "fsdp")),
    (r"adaln/kernel", (None, "fsdp")),
    (r"(q_norm|k_norm)/scale", ()),
)


def rotary(positions, axes, theta=10000.0):
  """Cosines and sines of rotary embeddings (RoFormer, arXiv 2104.09864, eq. 15), each axis with a share of the head.

  Args:
    positions: [N, len(axes)] of the tokens, NumPy.
    axes: widths whose sum is the head's: the pairs 2 i, 2 i + 1 of an axis turn by position * theta^(-2 i / width).
    theta: slowest wavelength / 2 pi.
  Returns:
    (cos, sin), [N, sum(axes)] float32, each value twice; the angles are float64.
  """
  parts = []
  for position, width in zip(positions.T, axes, strict=True):
    parts.append(np.outer(position, theta ** (-np.arange(0, width, 2) / width)))
  angles = np.repeat(np.concatenate(parts, axis=1), 2, axis=1)
  return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotate(x, turns):
  """Each pair of neighbours of x [B, N, heads, D] turned by its angle, in float32; turns as of `rotary`."""
  cos, sin = (table[None, :, None] for table in turns)
  y = x.astype(jnp.float32)
  # Rolls along the lanes, not a reshape to pairs: a TPU would spread pairs over tiles of 128 lanes.
  even = (jnp.arange(x.shape[-1]) % 2 == 0)[None, None, None]
  turned = jnp.where(even, -jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1))
  return (y * cos + turned * sin).astype(x.dtype)


def modulate(x, shift, scale):
  """(1 + scale) x + shift of x [B, N, D] by [B, D]."""
  return x * (1 + scale[:, None]) + shift[:, None]


def plain_norm(x):
  """LayerNorm without parameters (arXiv 1607.06450), eps 1e-6, computed in float32; x's own type out."""
  y = x.astype(jnp.float32)
  y -= y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def dense(features, dtype, *spec, **more):
  """A linear layer whose kernel is gathered from `fsdp`, and laid out as `spec` says, before it multiplies."""
  return nn.Dense(features, dtype=dtype, dot_general=layers.gathered(*spec),
                  **({"kernel_init": nn.initializers.xavier_uniform()} | more))


def modulation(count, width, dtype, **more):
  """A linear layer to `count` vectors of the width, zero at first: adaLN-zero (arXiv 2212.09748, 3.2)."""
  return dense(count * width, dtype, kernel_init=nn.initializers.zeros_init(), **more)


def _modulations(layer, embedding, count):
  # Unconstrained, XLA gathers the modulations of all samples on each device for the gradient of this layer.
  out = layer(sharding.constrain(nn.silu(embedding), sharding.SAMPLES))
  return jnp.split(sharding.constrain(out, sharding.SAMPLES), count, axis=-1)


class Stream(nn.Module):
  """One of the two sides of a double block: its own norms, projections and MLP."""

  width: int
  heads: int
  mlp_ratio: int
  dtype: Any

  def setup(self):
    column = functools.partial(dense, self.width, self.dtype, None, "tensor")
    self.adaln = modulation(6, self.width, self.dtype)
    self.q, self.k, self.v = column(), column(), column()
    self.q_norm, self.k_norm = (nn.RMSNorm(epsilon=1e-6, dtype=self.dtype) for _ in range(2))
    self.out = dense(self.width, self.dtype, "tensor")
    self.mlp_in = dense(self.mlp_ratio * self.width, self.dtype, None, "tensor")
    self.mlp_out = dense(self.width, self.dtype, "tensor")

  def before(self, x, embedding):
    """(q, k, v [B, N, heads, D / heads], the modulations that `after` takes)."""
    shift, scale, *rest = _modulations(self.adaln, embedding, 6)
    x = sharding.constrain(x, sharding.SAMPLES)
    y = modulate(plain_norm(x), shift, scale)
    q, k, v = (layer(y).reshape(*y.shape[:2], self.heads, -1) for layer in (self.q, self.k, self.v))
    return self.q_norm(q), self.k_norm(k), v, rest

  def after(self, x, attended, rest):
    """x with what attention found, and the MLP behind it."""
    gate_a, shift, scale, gate_m = rest
    x = x + gate_a[:, None] * self.out(attended.reshape(*x.shape))
    y = modulate(plain_norm(x), shift, scale)
    return x + gate_m[:, None] * self.mlp_out(nn.gelu(self.mlp_in(y), approximate=True))


class DoubleBlock(nn.Module):
  """Text and image tokens with weights of their own, joined in attention (MM-DiT, arXiv 2403.03206, section 4)."""

  width: int
  heads: int
  mlp_ratio: int
  attention: str
  dtype: Any

  @nn.compact
  def __call__(self, carry, embedding, turns, lengths):
    image, text = carry
    streams = [Stream(self.width, self.heads, self.mlp_ratio, self.dtype, name=name) for name in ("image", "text")]
    (*image_qkv, image_rest), (*text_qkv, text_rest) = (
        stream.before(x, embedding) for stream, x in zip(streams, (image, text)))
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(image_qkv, text_qkv))
    y = attention_lib.attention(rotate(q, turns), rotate(k, turns), v, self.attention, lengths=lengths)
    of_image, of_text = jnp.split(y, [image.shape[1]], axis=1)
    return (streams[0].after(image, of_image, image_rest), streams[1].after(text, of_text, text_rest)), None


class SingleBlock(nn.Module):
  """Attention and MLP side by side on the joint sequence (arXiv 2302.05442, section 2), one output layer for both."""

  width: int
  heads: int
  mlp_ratio: int
  attention: str
  dtype: Any

  @nn.compact
  def __call__(self, x, embedding, turns, lengths):
    column = functools.partial(dense, self.width, self.dtype, None, "tensor")
    shift, scale, gate = _modulations(modulation(3, self.width, self.dtype, name="adaln"), embedding, 3)
    x = sharding.constrain(x, sharding.SAMPLES)
    y = modulate(plain_norm(x), shift, scale)
    q, k, v = (column(name=name)(y).reshape(*y.shape[:2], self.heads, -1) for name in "qkv")
    q, k = (rotate(nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=f"{name}_norm")(z), turns)
            for name, z in (("q", q), ("k", k)))
    attended = attention_lib.attention(q, k, v, self.attention, lengths=lengths).reshape(*y.shape)
    hidden = nn.gelu(dense(self.mlp_ratio * self.width, self.dtype, None, "tensor", name="mlp_in")(y), approximate=True)
    both = jnp.concatenate([attended, hidden], axis=-1)
    return x + gate[:, None] * dense(self.width, self.dtype, "tensor", name="out")(both), None


def blocks(block, length, *fields, remat, unroll, name):
  """`length` blocks in one loop, called as (x, embedding, turns, lengths)."""
  if remat != "none":
    block = nn.remat(block, prevent_cse=False, policy=layers.remat_policy(remat))
  scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, layers.DROPOUT: True},
                 in_axes=nn.broadcast, length=length, unroll=unroll)
  return scan(*fields, name=name)


def half(x):
  """x rounded to bfloat16's 8 bits; a pair of casts would be optimised away where XLA may keep excess precision."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def embed(features, width, dtype, name):
  """Linear, SiLU, linear; [B, F] -> [B, width]; inside a network's compact method."""
  normal = nn.initializers.normal(0.02)
  hidden = nn.silu(dense(width, dtype, kernel_init=normal, name=f"{name}_in")(features))
  return dense(width, dtype, kernel_init=normal, name=f"{name}_out")(hidden)


def finish(head, tokens, embedding, *, width, dtype, layout):
  """The modulated last norm, and the head on it; inside a network's compact method."""
  scale, shift = _modulations(modulation(2, width, dtype, name="adaln_out"), embedding, 2)
  return head(modulate(plain_norm(tokens), shift, scale), embedding, layout)


def lengths_of(cond, image_tokens):
  """[B] tokens of the joint sequence that are no padding: the image's and those of the text's mask."""
  return image_tokens + jnp.sum(cond["mask"].astype(jnp.int32), axis=1)


def text_cond(spec, *names):
  """(tokens, width) of the condition's text. Raises ValueError: a condition that the network would not read."""
  text = spec.cond.get("text")
  if text is None or len(text.shape) != 2 or set(spec.cond) - {"text", *names}:
    raise ValueError(f"make: the condition is text [tokens, width]{''.join(f', or with it {n}' for n in names)}; the "
                     f"data have {dict(spec.cond)}")
  if (mask := spec.cond.get("mask")) is not None and mask.shape != text.shape[:1]:
    raise ValueError(f"make: the condition's mask is {mask.shape}, its text {text.shape}; a mask is one number a token")
  if (pooled := spec.cond.get("pooled")) is not None and len(pooled.shape) != 1:
    raise ValueError(f"make: the condition's pooled is {pooled.shape}; it is one vector")
  return text.shape
