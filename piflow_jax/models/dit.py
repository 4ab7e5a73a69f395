"""DiT (Peebles & Xie, arXiv 2212.09748): a class-conditional transformer trunk under a head that the caller chooses."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import sharding
from piflow_jax.models import layers

SIZES = {
    "tiny": dict(depth=2, width=32, heads=2),
    "B": dict(depth=12, width=768, heads=12),
    "L": dict(depth=24, width=1024, heads=16),
    "XL": dict(depth=28, width=1152, heads=16),
}

# (path pattern, axes of the mesh for each axis of the leaf), first match wins; `blocks` carry the layer axis first.
# Matrices are stored split over `fsdp` along the trunk's width, which every size divides, and over `tensor` along heads
# and hidden units: what one part of them makes, the same part of the next matrix reads.
SHARDING = (
    (r"blocks/attention/qkv/kernel", (None, "fsdp", None, "tensor")),
    (r"blocks/attention/qkv/bias", (None, None, "tensor")),
    (r"blocks/attention/out/kernel", (None, "tensor", None, "fsdp")),
    (r"blocks/mlp/in/kernel", (None, "fsdp", "tensor")),
    (r"blocks/mlp/in/bias", (None, "tensor")),
    (r"blocks/mlp/out/kernel", (None, "tensor", "fsdp")),
    (r"blocks/adaln/kernel", (None, "fsdp")),
    (r"(adaln_out|time_in|time_out|span_in|span_out|logstd_in|logstd_out)/kernel", ("fsdp",)),
    (r"patch_embed/kernel", (None, "fsdp")),
    (r"class_embed/embedding", (None, "fsdp")),
    (r"head/(out|means|logweights)/kernel", ("fsdp",)),
    (r".*/bias", ()),
)


def _modulate(x, shift, scale):
  return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
  """Attention and MLP, each modulated and gated by the conditioning (adaLN-zero)."""

  heads: int
  mlp_ratio: int
  mlp_norm_eps: float
  attention: str
  dtype: Any

  @nn.compact
  def __call__(self, x, embedding):
    dim = x.shape[-1]
    norm = functools.partial(nn.LayerNorm, use_bias=False, use_scale=False, dtype=self.dtype)
    zeros = nn.initializers.zeros_init()
    adaln = nn.Dense(6 * dim, dtype=self.dtype, kernel_init=zeros, dot_general=layers.gathered(), name="adaln")
    # Left to itself XLA brings the modulations of all samples to each device, for this layer's gradient.
    modulation = adaln(sharding.constrain(nn.silu(embedding), sharding.SAMPLES))
    modulation = sharding.constrain(modulation, sharding.SAMPLES)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    # Between layers a sample's tokens are where the sample is.
    x = sharding.constrain(x, sharding.SAMPLES)
    y = _modulate(norm(epsilon=1e-6)(x), shift_a, scale_a)
    x = x + gate_a[:, None] * layers.Attention(self.heads, self.dtype, self.attention, name="attention")(y)
    y = _modulate(norm(epsilon=self.mlp_norm_eps)(x), shift_m, scale_m)
    x = x + gate_m[:, None] * layers.Mlp(self.mlp_ratio * dim, self.dtype, name="mlp")(y)
    return x, None


class DiT(nn.Module):
  """Latents [B, H, W, C], noise level t [B] in [0, 1], class labels [B] -> whatever `head` makes of the tokens.

  Labels [depth + 1, B] are one for each block and one for the output layer: label dropout of pi-Flow's release draws each
  anew.

  Attributes:
    head: module called with (tokens [B, N, D], embedding [B, D], grid (h, w)).
    num_classes: label `num_classes` is the null class of guidance.
    time_scale, time_offset: the time that is embedded is time_offset + time_scale t: 1 and 0 (REPA), 1000 and 0 (FM-DiT),
      -1 and 1 (SiT, whose time is 1 at the data).
    frequency_shift: 1 where the lowest frequency of the time features is 1 / 10000 (diffusers' DiT), 0 where that would be
      the next one (facebookresearch/DiT and all that follow it).
    unroll: blocks in one turn of the loop over them: more compile slower, and on a CPU run up to twice as fast.
    two_times: the network is also told where it goes, t_dst [B], by a second embedding of the span t - t_dst (MeanFlow).
    remat: what a block's backward pass computes again: "full", all of it; "none"; or what a policy of
      jax.checkpoint_policies leaves over, "dots_with_no_batch_dims_saveable" say.
    attention: see `attention.attention`.
    mlp_norm_eps: 1e-6 (facebookresearch/DiT, SiT, REPA) or 1e-5 (the authors' diffusers-based models).
  """

  head: nn.Module
  depth: int
  width: int
  heads: int
  patch: int = 2
  mlp_ratio: int = 4
  num_classes: int = 1000
  time_scale: float = 1000.0
  time_offset: float = 0.0
  frequency_shift: int = 0
  mlp_norm_eps: float = 1e-5
  remat: str = "full"
  attention: str = "auto"
  unroll: int = 1
  two_times: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, t, labels, t_dst=None):
    grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
    dense = functools.partial(nn.Dense, dtype=self.dtype, dot_general=layers.gathered())
    normal, xavier = nn.initializers.normal(0.02), nn.initializers.xavier_uniform()

    tokens = dense(self.width, kernel_init=xavier, name="patch_embed")(layers.patchify(x, self.patch))
    tokens += layers.sincos_positions(*grid, self.width).astype(self.dtype)[None]

    def embed_time(t, name, out_init):
      features = layers.time_features(t, shift=self.frequency_shift)
      hidden = nn.silu(dense(self.width, kernel_init=normal, name=f"{name}_in")(features))
      return dense(self.width, kernel_init=out_init, name=f"{name}_out")(hidden)

    embedding = embed_time(self.time_offset + t * self.time_scale, "time", normal)
    if self.two_times:
      # Zero at first: a network that starts from a teacher says the teacher's velocity for every span.
      embedding += embed_time((t - t_dst) * self.time_scale, "span", nn.initializers.zeros_init())
    table = nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype, embedding_init=normal, name="class_embed")
    by_block = labels.ndim == 2
    embedding = (embedding[None] if by_block else embedding) + table(labels)  # [B, D], or [depth + 1, B, D]
    of_blocks, embedding = (embedding[:-1], embedding[-1]) if by_block else (embedding, embedding)

    block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=layers.remat_policy(self.remat))
    scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                   in_axes=0 if by_block else nn.broadcast, length=self.depth, unroll=self.unroll)
    tokens, _ = scan(
        self.heads, self.mlp_ratio, self.mlp_norm_eps, self.attention, self.dtype, name="blocks")(tokens, of_blocks)

    zeros = nn.initializers.zeros_init()
    modulation = dense(2 * self.width, kernel_init=zeros, name="adaln_out")(nn.silu(embedding))
    shift, scale = jnp.split(modulation, 2, axis=-1)
    tokens = _modulate(
        nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=self.dtype)(tokens), shift, scale)
    return self.head(tokens, embedding, grid)


def null_label(labels, num_classes):
  """The labels of the unconditional pass: the null class for every sample."""
  return jnp.full_like(labels, num_classes)


def drop_labels(labels, uniform, *, rate, num_classes):
  """Labels [B] with the null class where uniform < rate: what lets one network learn both passes of guidance.

  Uniforms [B], or [depth + 1, B] for labels of each block; see `DiT`.
  """
  return jnp.where(uniform < rate, num_classes, labels)
