"""Blocks in which text and image tokens attend to one another: what FLUX.1 and Qwen-Image share.

Kernels are plain matrices [in, out], one for each linear layer of the PyTorch originals, so that an adapter of one is
an adapter of the other (lora.py). Inside a joint sequence the image's tokens come first: attention does not ask in
which order they lie, and padding then lies at the end, where kernels can leave it out by a length.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax import config as config_lib
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
  # (-x1, x0) of each pair (x0, x1) as a product with a matrix of 0, 1 and -1, which is exact: TPUs and GPUs have units
  # for it, while rolls along the lanes, or pairs as an axis, each copy the whole array several times.
  swap = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])
  with jax.named_scope(layers.PERMUTATION):
    turned = jnp.matmul(x, jnp.asarray(swap, x.dtype), precision="highest", preferred_element_type=jnp.float32)
  return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def plain_norm(x):
  """LayerNorm without parameters (arXiv 1607.06450), eps 1e-6, computed in float32; x's own type out."""
  y = x.astype(jnp.float32)
  y -= y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


class Stream(nn.Module):
  """One of the two sides of a double block: its own norms, projections and MLP."""

  width: int
  heads: int
  mlp_ratio: int
  dtype: Any

  def setup(self):
    self.adaln = layers.modulation(6, self.width, self.dtype)
    self.q, self.k, self.v = (layers.Heads(self.heads, self.width, self.dtype) for _ in range(3))
    self.q_norm, self.k_norm = (nn.RMSNorm(epsilon=1e-6, dtype=self.dtype) for _ in range(2))
    self.out = layers.Rows(self.width, self.dtype)
    self.mlp_in = layers.dense(self.mlp_ratio * self.width, self.dtype, None, "tensor")
    self.mlp_out = layers.dense(self.width, self.dtype, "tensor")

  def before(self, x, embedding):
    """(q, k, v [B, N, heads, D / heads], the modulations that `after` takes)."""
    shift, scale, *rest = layers.modulations(self.adaln, embedding, 6)
    x = sharding.constrain(x, sharding.SAMPLES)
    y = layers.modulate(plain_norm(x), shift, scale)
    q, k, v = self.q(y), self.k(y), self.v(y)
    return self.q_norm(q), self.k_norm(k), v, rest

  def after(self, x, attended, rest):
    """x with what attention found, and the MLP behind it."""
    gate_a, shift, scale, gate_m = rest
    x = x + gate_a[:, None] * self.out((attended,))
    y = layers.modulate(plain_norm(x), shift, scale)
    return x + gate_m[:, None] * self.mlp_out(layers.gelu(self.mlp_in(y)))


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
    shift, scale, gate = layers.modulations(layers.modulation(3, self.width, self.dtype, name="adaln"), embedding, 3)
    x = sharding.constrain(x, sharding.SAMPLES)
    y = layers.modulate(plain_norm(x), shift, scale)
    q, k, v = (layers.Heads(self.heads, self.width, self.dtype, name=name)(y) for name in "qkv")
    q, k = (rotate(nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=f"{name}_norm")(z), turns)
            for name, z in (("q", q), ("k", k)))
    attended = attention_lib.attention(q, k, v, self.attention, lengths=lengths)
    mlp_in = layers.dense(self.mlp_ratio * self.width, self.dtype, None, "tensor", name="mlp_in")
    return x + gate[:, None] * layers.Rows(self.width, self.dtype, name="out")((attended, layers.gelu(mlp_in(y)))), None


def half(x):
  """x rounded to bfloat16's 8 bits; a pair of casts would be optimised away where XLA may keep excess precision."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def finish(head, tokens, embedding, *, width, dtype, layout):
  """The modulated last norm, and the head on it; inside a network's compact method."""
  scale, shift = layers.modulations(layers.modulation(2, width, dtype, name="adaln_out"), embedding, 2)
  return head(layers.modulate(plain_norm(tokens), shift, scale), embedding, layout)


def lengths_of(cond, image_tokens):
  """[B] tokens of the joint sequence that are no padding: the image's and those of the text's mask."""
  return image_tokens + jnp.sum(cond["mask"].astype(jnp.int32), axis=1)


def shared_fields(spec, *, heads, axes, patch, half_times, remat, attention, unroll, dtype):
  """The fields that text-to-image networks share, as their modules take them.

  Raises:
    ValueError: one of them is out of its range, or does not fit the spec.
  """
  for name, value in dict(heads=heads, patch=patch, unroll=unroll).items():
    config_lib.whole(name, value)
  if not isinstance(axes, (tuple, list)) or len(axes) != 3:
    raise ValueError(f"axes: {axes!r} must be three widths, as (16, 56, 56)")
  for width in axes:
    config_lib.whole("axes", width)
    if width % 2:
      raise ValueError(f"axes: {width} of {tuple(axes)} is odd; pairs are turned")
  config_lib.one_of("half_times", half_times, (False, True))
  layers.check_computing(spec, patch=patch, remat=remat, attention=attention, dtype=dtype)
  return dict(heads=heads, axes=tuple(axes), patch=patch, half_times=half_times, remat=remat, attention=attention,
              unroll=unroll, dtype=jnp.dtype(dtype))


def check_cond(spec, *names):
  """Raises ValueError: a condition that is no text, or has beside it what none of the names is."""
  text = spec.cond.get("text")
  if text is None or len(text.shape) != 2 or set(spec.cond) - {"text", *names}:
    raise ValueError(f"make: the condition is text [tokens, width]{''.join(f', or with it {n}' for n in names)}; the "
                     f"data have {dict(spec.cond)}")
  if (mask := spec.cond.get("mask")) is not None and mask.shape != text.shape[:1]:
    raise ValueError(f"make: the condition's mask is {mask.shape}, its text {text.shape}; a mask is one number a token")
  if (pooled := spec.cond.get("pooled")) is not None and len(pooled.shape) != 1:
    raise ValueError(f"make: the condition's pooled is {pooled.shape}; it is one vector")
