"""Qwen-Image (arXiv 2508.02324): a text-to-image transformer of double blocks under any head.

After diffusers' QwenImageTransformer2DModel. Latents [B, H, W, C] are packed in patches of 2 x 2.
"""

import functools
from typing import Any

import chex
from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from piflow_jax import config as config_lib
from piflow_jax.models import joint
from piflow_jax.models import layers
from piflow_jax.models import network

FREE = ("remat", "attention", "unroll")  # how it is computed, not what: may change on a restart

SHARDING = (
    (r"head/(out|means|logweights|logstd_in|logstd_out)/kernel", ("fsdp",)),
    *joint.STREAM_SHARDING,
    (r"(time_in|time_out|adaln_out)/kernel", ("fsdp",)),
    (r"(patch_embed|text_embed)/kernel", (None, "fsdp")),
    (r"text_norm/scale", ()),
    (r".*/bias", ()),
)


class QwenImage(nn.Module):
  """Latents [B, H, W, C], noise level t [B] in [0, 1], condition -> what `head` makes of the image's tokens.

  The condition is {"text": [B, L, width]}, and with it "mask" [B, L], 0 where a token is padding.

  Attributes:
    head, axes, remat, attention, unroll: as of `flux.Flux`.
    depth: blocks.
    masked: nothing attends to padding. False: all tokens that there are take part, as in diffusers 0.36, by which the
      authors' students were trained; what is padding then attends as a zero text does.
    half_times: t is rounded to bfloat16 before it is multiplied by 1,000, as the authors' students were trained.
  """

  head: nn.Module
  depth: int
  heads: int
  axes: tuple
  patch: int = 2
  mlp_ratio: int = 4
  masked: bool = True
  half_times: bool = False
  remat: str = "full"
  attention: str = "auto"
  unroll: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, t, cond):
    chex.assert_rank([x, t], [4, 1])
    width, grid = self.heads * sum(self.axes), (x.shape[1] // self.patch, x.shape[2] // self.patch)
    image = layers.dense(width, self.dtype, name="patch_embed")(layers.patchify(x, self.patch))
    text = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="text_norm")(cond["text"])
    text = layers.dense(width, self.dtype, name="text_embed")(text)
    t = joint.half(t) if self.half_times else t
    embedding = layers.embed(layers.time_features(1000 * t), width, self.dtype, "time")
    lengths = joint.lengths_of(cond, image.shape[1]) if self.masked and "mask" in cond else None
    turns = joint.rotary(positions(*grid, text.shape[1]), self.axes)
    loop = layers.loop(joint.DoubleBlock, self.depth, width, self.heads, self.mlp_ratio, self.attention, self.dtype,
                        remat=self.remat, unroll=self.unroll, name="blocks")
    (image, _), _ = loop((image, text), embedding, turns, lengths)
    return joint.finish(self.head, image, embedding, width=width, dtype=self.dtype,
                        layout=layers.patches(x.shape[1:], self.patch))


def positions(height, width, text):
  """[height width + text, 3] of image patches, then of text tokens.

  Patches are counted from the image's middle; text goes on behind it, along the diagonal of all three axes, whatever
  the image's size.
  """
  rows, columns = (np.arange(n) - (n - n // 2) for n in (height, width))
  rows, columns = np.meshgrid(rows, columns, indexing="ij")
  image = np.stack([np.zeros(height * width), rows.ravel(), columns.ravel()], axis=1)
  first = max(height // 2, width // 2)
  return np.concatenate([image, np.repeat(np.arange(first, first + text)[:, None], 3, axis=1)])


def config(**fields):
  """Qwen-Image."""
  return config_lib.noun(make, dict(
      depth=60,  # blocks
      heads=24,  # of attention
      axes=(16, 56, 56),  # widths of a head that turn with (frame, row, column); their sum is the head's
      patch=2,  # latent positions along each side of a token
      masked=True,  # nothing attends to the text's padding; False: as pi-Flow's own students were trained
      half_times=False,  # times rounded to bfloat16, as pi-Flow's own students were trained
      # What a block's backward pass computes again: "full", all; "none"; or all but what a policy of
      # jax.checkpoint_policies saves, e.g. "dots_with_no_batch_dims_saveable".
      remat="full",
      attention="auto",  # by platform; or "xla", "splash" and "flash" (TPU), "cudnn" (GPU)
      unroll=1,  # blocks in one turn of the loop over them
      dtype="bfloat16",  # of the computation, or "float32"; trained parameters are float32
  ), fields)


def make(spec, *, depth, masked, **shared):
  """The Qwen-Image of data with this spec: latents [H, W, C] under a text.

  Args:
    spec: `data.spec.Spec`.
    depth, masked: see `config`.
    **shared: its other fields; see `joint.shared_fields`.
  Raises:
    ValueError: a field is out of its range, or does not fit the spec or another field.
  """
  config_lib.whole("depth", depth)
  config_lib.one_of("masked", masked, (False, True))
  shared = joint.shared_fields(spec, **shared)
  joint.check_cond(spec, "mask")
  module = functools.partial(QwenImage, depth=depth, masked=masked, **shared)
  return network.Network(module=module, null=None, sharding=SHARDING, dtype=shared["dtype"],
                         tokens=functools.partial(layers.tokens, patch=shared["patch"]))
