"""FLUX.1 (Black Forest Labs, 2024): a text-to-image transformer of double blocks and single blocks under any head.

After diffusers' FluxTransformer2DModel. Latents [B, H, W, C] are packed in patches of 2 x 2.
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
    (r"(time|guidance|pooled)_(in|out)/kernel", ("fsdp",)),
    (r"adaln_out/kernel", ("fsdp",)),
    (r"(patch_embed|text_embed)/kernel", (None, "fsdp")),
    (r".*/bias", ()),
)


class Flux(nn.Module):
  """Latents [B, H, W, C], noise level t [B] in [0, 1], condition -> what `head` makes of the image's tokens.

  The condition is {"text": [B, L, width]}, and with it "pooled" [B, width] (CLIP's vector of the prompt), "mask" [B, L]
  (0 where a token is padding, to which nothing attends then; FLUX.1 itself was trained without) and "guidance" [B] (in
  the place of the field's), as far as there are such.

  Attributes:
    head: module called as (tokens [B, N, D], embedding [B, D], network.Layout).
    double_depth, single_depth: blocks of each kind.
    axes: widths of a head that turn with (0, row, column) of an image's patch; text tokens do not turn.
    guidance: that is embedded beside the time, as its teacher's was distilled; 0: the network embeds none.
    half_times: t and guidance are rounded to bfloat16 before and after they are multiplied by 1,000, as the authors'
      students were trained: t = .88889 becomes 892.
    remat, attention, unroll: as of `dit.DiT`.
  """

  head: nn.Module
  double_depth: int
  single_depth: int
  heads: int
  axes: tuple
  patch: int = 2
  mlp_ratio: int = 4
  guidance: float = 3.5
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
    text = layers.dense(width, self.dtype, name="text_embed")(cond["text"])
    embedding = layers.embed(layers.time_features(self._thousandfold(t)), width, self.dtype, "time")
    if self.guidance:
      guidance = jnp.broadcast_to(cond.get("guidance", self.guidance), t.shape).astype(jnp.float32)
      embedding += layers.embed(layers.time_features(self._thousandfold(guidance)), width, self.dtype, "guidance")
    if "pooled" in cond:
      embedding += layers.embed(cond["pooled"], width, self.dtype, "pooled")
    lengths = joint.lengths_of(cond, image.shape[1]) if "mask" in cond else None
    turns = joint.rotary(positions(*grid, text.shape[1]), self.axes)

    sizes = width, self.heads, self.mlp_ratio, self.attention, self.dtype
    how = dict(remat=self.remat, unroll=self.unroll)
    (image, text), _ = layers.loop(joint.DoubleBlock, self.double_depth, *sizes, **how, name="double_blocks")(
        (image, text), embedding, turns, lengths)
    tokens = jnp.concatenate([image, text], axis=1)
    if self.single_depth:
      tokens, _ = layers.loop(joint.SingleBlock, self.single_depth, *sizes, **how, name="single_blocks")(
          tokens, embedding, turns, lengths)
    return joint.finish(self.head, tokens[:, :image.shape[1]], embedding, width=width, dtype=self.dtype,
                        layout=layers.patches(x.shape[1:], self.patch))

  def _thousandfold(self, t):
    if not self.half_times:
      return 1000 * t
    return joint.half(1000 * joint.half(t))


def positions(height, width, text):
  """[height width + text, 3] of image patches, then of text tokens: (0, row, column), and (0, 0, 0)."""
  rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
  image = np.stack([np.zeros(height * width), rows.ravel(), columns.ravel()], axis=1)
  return np.concatenate([image, np.zeros((text, 3))])


def config(**fields):
  """FLUX.1-dev."""
  return config_lib.noun(make, dict(
      double_depth=19,  # blocks in which text and image have weights of their own
      single_depth=38,  # blocks on both in one sequence
      heads=24,  # of attention
      axes=(16, 56, 56),  # widths of a head that turn with (0, row, column); their sum is the head's
      patch=2,  # latent positions along each side of a token
      guidance=3.5,  # that is embedded beside the time; 0: none is (FLUX.1-schnell)
      half_times=False,  # times and guidance rounded to bfloat16, as pi-Flow's own students were trained
      # What a block's backward pass computes again: "full", all; "none"; or all but what a policy of
      # jax.checkpoint_policies saves, e.g. "dots_with_no_batch_dims_saveable".
      remat="full",
      attention="auto",  # by platform; or "xla", "splash" and "flash" (TPU), "cudnn" (GPU)
      unroll=1,  # blocks in one turn of the loop over them
      dtype="bfloat16",  # of the computation, or "float32"; trained parameters are float32
  ), fields)


def make(spec, *, double_depth, single_depth, guidance, **shared):
  """The FLUX of data with this spec: latents [H, W, C] under a text.

  Args:
    spec: `data.spec.Spec`.
    double_depth, single_depth, guidance: see `config`.
    **shared: its other fields; see `joint.shared_fields`.
  Raises:
    ValueError: a field is out of its range, or does not fit the spec or another field.
  """
  config_lib.whole("double_depth", double_depth)
  config_lib.whole("single_depth", single_depth, least=0)
  config_lib.number("guidance", guidance, least=0, most=1000)
  shared = joint.shared_fields(spec, **shared)
  joint.check_cond(spec, "pooled", "mask", "guidance")
  module = functools.partial(Flux, double_depth=double_depth, single_depth=single_depth, guidance=guidance, **shared)
  return network.Network(module=module, null=None, sharding=SHARDING, dtype=shared["dtype"],
                         tokens=functools.partial(layers.tokens, patch=shared["patch"]))
