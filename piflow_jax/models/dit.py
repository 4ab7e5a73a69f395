"""DiT (Peebles & Xie, arXiv 2212.09748): a class-conditional transformer trunk under a head that the caller chooses."""

import functools
from typing import Any

import chex
from flax import linen as nn
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import sharding
from piflow_jax.models import layers
from piflow_jax.models import network

SIZES = {
    "tiny": dict(depth=2, width=32, heads=2),
    "B": dict(depth=12, width=768, heads=12),
    "L": dict(depth=24, width=1024, heads=16),
    "XL": dict(depth=28, width=1152, heads=16),
}

FREE = ("remat", "attention", "unroll")  # how it is computed, not what: may change on a restart

# (path pattern, axes of the mesh for each axis of the leaf), first match wins; `blocks` carry the layer axis first.
# Matrices are stored split over `fsdp` along the trunk's width, which it divides at every size, and over `tensor` along
# heads and hidden units, so that each device reads in the next matrix what it made in this one.
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
    adaln = layers.modulation(6, dim, self.dtype, name="adaln")
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = layers.modulations(adaln, embedding, 6)
    # Between layers a sample's tokens stay on the devices that hold the sample.
    x = sharding.constrain(x, sharding.SAMPLES)
    y = layers.modulate(norm(epsilon=1e-6)(x), shift_a, scale_a)
    x = x + gate_a[:, None] * layers.Attention(self.heads, self.dtype, self.attention, name="attention")(y)
    y = layers.modulate(norm(epsilon=self.mlp_norm_eps)(x), shift_m, scale_m)
    x = x + gate_m[:, None] * layers.Mlp(self.mlp_ratio * dim, self.dtype, name="mlp")(y)
    return x, None


class DiT(nn.Module):
  """Latents [B, H, W, C], noise level t [B] in [0, 1], condition {"label": int32 [B]} -> what `head` makes of tokens.

  Labels [depth + 1, B] are one for each block and one for the output layer: in training pi-Flow's release drops the
  label for each of them independently.

  Attributes:
    head: module called as (tokens [B, N, D], embedding [B, D], network.Layout).
    num_classes: number of labels; one more, label num_classes, is the null class of guidance. 0: the network is
      unconditional, has no table and reads no label.
    time_scale, time_offset: the network embeds time_offset + time_scale t: scale 1 and offset 0 (REPA), 1000 and 0
      (FM-DiT), -1 and 1 (SiT, whose time is 1 at the data).
    frequency_shift: of `layers.time_features`: 1 where the lowest frequency is 1 / 10000 (diffusers' DiT), 0 where it
      is one step above that (facebookresearch/DiT and all that follow it).
    unroll: blocks in one turn of the loop over them: more compile slower, and on a CPU run up to twice as fast.
    two_times: the network has a second embedding, of the span t - t_dst to the time that it is to reach (MeanFlow).
    remat: "full": the backward pass computes all of a block again; "none": nothing; the name of one of
      jax.checkpoint_policies, e.g. "dots_with_no_batch_dims_saveable": all that this policy does not save.
    attention: of `attention.attention`.
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
  def __call__(self, x, t, cond, t_dst=None):
    chex.assert_rank([x, t], [4, 1])
    grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
    tokens = layers.dense(self.width, self.dtype, name="patch_embed")(layers.patchify(x, self.patch))
    tokens += layers.sincos_positions(*grid, self.width).astype(self.dtype)[None]

    def embed_time(t, name, **more):
      return layers.embed(layers.time_features(t, shift=self.frequency_shift), self.width, self.dtype, name, **more)

    embedding = embed_time(self.time_offset + t * self.time_scale, "time")
    if self.two_times:
      # Zero at first, so that a network that starts from a teacher returns the teacher's velocity for every span.
      embedding += embed_time((t - t_dst) * self.time_scale, "span", out_init=nn.initializers.zeros_init())
    by_block = False
    if self.num_classes:
      labels = cond["label"]
      table = nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype,
                       embedding_init=nn.initializers.normal(0.02), name="class_embed")
      by_block = labels.ndim == 2
      embedding = (embedding[None] if by_block else embedding) + table(labels)  # [B, D], or [depth + 1, B, D]
    of_blocks, embedding = (embedding[:-1], embedding[-1]) if by_block else (embedding, embedding)

    loop = layers.loop(
        Block, self.depth, self.heads, self.mlp_ratio, self.mlp_norm_eps, self.attention, self.dtype, remat=self.remat,
        unroll=self.unroll, name="blocks", in_axes=0 if by_block else nn.broadcast)
    tokens, _ = loop(tokens, of_blocks)

    modulation = layers.modulation(2, self.width, self.dtype, name="adaln_out")(nn.silu(embedding))
    shift, scale = jnp.split(modulation, 2, axis=-1)
    tokens = layers.modulate(
        nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=self.dtype)(tokens), shift, scale)
    return self.head(tokens, embedding, layers.patches(x.shape[1:], self.patch))


def config(**fields):
  """DiT-B as in pi-Flow's ImageNet runs."""
  return config_lib.noun(make, dict(
      depth=12,  # blocks
      width=768,  # features of a token; a multiple of 4 and of heads
      heads=12,  # of attention
      patch=2,  # latent positions along each side of a token
      # Embedded is time_offset + time_scale * noise level. Scale 1 (REPA), 1000 (FM-DiT), -1 with offset 1 (SiT).
      time_scale=1000.0,
      time_offset=0.0,  # see time_scale
      frequency_shift=0,  # of the time features; 1 for diffusers' own DiT
      mlp_norm_eps=1e-5,  # 1e-6 in facebookresearch/DiT, SiT and REPA
      # What a block's backward pass computes again: "full", all; "none"; or all but what a policy of
      # jax.checkpoint_policies saves, e.g. "dots_with_no_batch_dims_saveable".
      remat="full",
      attention="auto",  # by platform; or "xla", "splash" and "flash" (TPU), "cudnn" (GPU)
      unroll=1,  # blocks in one turn of the loop over them; all of them is faster on a CPU, slower to compile
      dtype="bfloat16",  # of the computation, or "float32"; parameters are float32
  ), fields)


def make(spec, *, patch, remat, attention, dtype, **sizes):
  """The DiT of data with this spec: pictures [H, W, C], under a label or under none.

  Args:
    spec: `data.spec.Spec`.
    patch, remat, attention, dtype: see `config`.
    **sizes: the other fields of `config`.
  Raises:
    ValueError: a field is out of its range, or does not fit the spec or another field.
  """
  _check(patch=patch, **sizes)
  layers.check_computing(spec, patch=patch, remat=remat, attention=attention, dtype=dtype)
  classes = _classes(spec)
  fields = dict(sizes, patch=patch, num_classes=classes, remat=remat, dtype=jnp.dtype(dtype))
  # The Pallas kernels have no forward-mode derivative, which MeanFlow takes.
  two_times = attention in ("auto", "xla") and functools.partial(DiT, two_times=True, attention="xla", **fields)
  return network.Network(
      module=functools.partial(DiT, attention=attention, **fields),
      null=functools.partial(null_label, num_classes=classes) if classes else None,
      sharding=SHARDING, dtype=jnp.dtype(dtype), two_times=two_times or None,
      tokens=functools.partial(layers.tokens, patch=patch))


def _check(*, depth, width, heads, patch, time_scale, time_offset, frequency_shift, mlp_norm_eps, unroll):
  for name, value in dict(depth=depth, width=width, heads=heads, patch=patch, unroll=unroll).items():
    config_lib.whole(name, value)
  if width % heads:
    raise ValueError(f"heads: {heads} does not divide width={width}")
  if width % 4:
    raise ValueError(f"width: {width} is no multiple of 4; the table of positions has sines and cosines of x and of y")
  config_lib.number("time_scale", time_scale)
  if time_scale == 0:
    raise ValueError("time_scale: 0 embeds the same time at every noise level; set 1, or 1000")
  config_lib.number("time_offset", time_offset)
  config_lib.whole("frequency_shift", frequency_shift, least=0, most=1)
  config_lib.number("mlp_norm_eps", mlp_norm_eps, above=0, below=1)


def _classes(spec):
  """Size of the label's table, 0 where the data have no condition."""
  if not spec.cond:
    return 0
  label = spec.cond.get("label")
  if set(spec.cond) != {"label"} or label.shape or label.classes < 1:
    raise ValueError(f"make: DiT's condition is one label of so many classes, or none; the data have {dict(spec.cond)}")
  return label.classes


def null_label(cond, num_classes):
  """The condition of the unconditional pass (method.md, 10): the null class for every sample."""
  return {"label": jnp.full_like(cond["label"], num_classes)}
