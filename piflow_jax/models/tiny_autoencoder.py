"""Tiny autoencoders of the TAESD family (O. Bohan, github.com/madebyollin/taesd): quick pictures of latents.

diffusers' AutoencoderTiny: convolutions and ReLU, no norms, no attention. One is distilled for each large autoencoder
(SD's, SDXL's, SD3's, FLUX's) and takes latents as the flow model does.
"""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax.models import autoencoder

KIND = "tiny"  # in autoencoder.FILE


class Block(nn.Module):
  """Three convolutions beside x, ReLU on the sum; [B, H, W, C] -> the same."""

  dtype: Any

  @nn.compact
  def __call__(self, x):
    y = x
    for i in range(3):
      y = autoencoder.conv(x.shape[-1], self.dtype, f"conv{i}")(nn.relu(y) if i else y)
    return nn.relu(x + y)


class Encoder(nn.Module):
  """[B, H, W, channels] in [-1, 1] -> [B, H / f, W / f, latent channels], f = 2^(levels - 1)."""

  latent_channels: int
  width: int
  blocks: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = autoencoder.conv(self.width, self.dtype, "conv_in")((x + 1) / 2)
    for level, count in enumerate(self.blocks):
      if level:
        x = autoencoder.conv(self.width, self.dtype, f"down_{level}", strides=2, padding=1, use_bias=False)(x)
      for i in range(count):
        x = Block(self.dtype, name=f"level_{level}_{i}")(x)
    return autoencoder.conv(self.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
  """[B, h, w, latent channels] -> [B, h f, w f, channels]; latents are kept between -3 and 3."""

  channels: int
  width: int
  blocks: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = nn.relu(autoencoder.conv(self.width, self.dtype, "conv_in")(3 * jnp.tanh(x / 3)))
    for level, count in enumerate(self.blocks):
      for i in range(count):
        x = Block(self.dtype, name=f"level_{level}_{i}")(x)
      if level < len(self.blocks) - 1:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = autoencoder.conv(self.width, self.dtype, f"up_{level}", use_bias=False)(x)
    return 2 * autoencoder.conv(self.channels, self.dtype, "conv_out")(x) - 1


class TinyAutoencoder(nn.Module):
  """Images [B, H, W, channels] in [-1, 1] <-> latents [B, H / f, W / f, latent_channels], f = 2^(levels - 1).

  Attributes:
    channels, latent_channels: of images and latents.
    widths: of the levels, all alike.
    encoder_blocks, decoder_blocks: blocks at each level, in the order in which they are computed.
    dtype: of the computation; parameters are float32.
  Raises:
    ValueError: an attribute out of its range.
  """

  channels: int = 3
  latent_channels: int = 4
  widths: tuple[int, ...] = (64, 64, 64, 64)
  encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
  decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    for name in ("channels", "latent_channels"):
      config_lib.whole(name, getattr(self, name), most=1 << 12)
    autoencoder.check_widths(self.widths)
    if len(set(self.widths)) != 1:
      raise ValueError(f"widths: {self.widths!r} differ; only levels of one width are built here")
    for name in ("encoder_blocks", "decoder_blocks"):
      counts = getattr(self, name)
      if not isinstance(counts, (tuple, list)) or len(counts) != len(self.widths):
        raise ValueError(f"{name}: {counts!r} must be {len(self.widths)} whole numbers, one a level")
      for count in counts:
        config_lib.whole(name, count, most=64)

  def setup(self):
    self.encoder = Encoder(self.latent_channels, self.widths[0], tuple(self.encoder_blocks), self.dtype)
    self.decoder = Decoder(self.channels, self.widths[0], tuple(self.decoder_blocks), self.dtype)

  def encode(self, images):
    """(latents, -30, which is no spread to speak of), float32."""
    mean = self.encoder(images).astype(jnp.float32)
    return mean, jnp.full_like(mean, -30)

  def decode(self, latents):
    """Images, float32, not clipped."""
    return self.decoder(latents).astype(jnp.float32)

  def __call__(self, images):
    return self.decode(self.encode(images)[0])
