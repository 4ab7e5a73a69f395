"""Qwen-Image's autoencoder (arXiv 2508.02324; Wan's, arXiv 2503.20314) for single images: a network of two dimensions.

diffusers' AutoencoderKLQwenImage is causal in time and pads one image with zero frames in front, so that of each kernel
of three frames the last alone is ever multiplied by anything but zeros. Its other taps are not here.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax.models import autoencoder

KIND = "qwen_image"  # in autoencoder.FILE


class Norm(nn.Module):
  """x / |x| sqrt(C) gamma, |x| over channels."""

  dtype: Any

  @nn.compact
  def __call__(self, x):
    gamma, y = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],)), x.astype(jnp.float32)
    y /= jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
    return (y * (x.shape[-1] ** 0.5 * gamma)[None, None, None]).astype(self.dtype)


class Resnet(nn.Module):
  """Two convolutions beside a shortcut; [B, H, W, C] -> [B, H, W, features]."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    y = autoencoder.conv(self.features, self.dtype, "conv1")(nn.silu(Norm(self.dtype, name="norm1")(x)))
    y = autoencoder.conv(self.features, self.dtype, "conv2")(nn.silu(Norm(self.dtype, name="norm2")(y)))
    if x.shape[-1] != self.features:
      x = autoencoder.conv(self.features, self.dtype, "shortcut", kernel=1)(x)
    return x + y


class Middle(nn.Module):
  """Resnet, attention of one head over all positions, resnet."""

  dtype: Any

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    x = Resnet(c, self.dtype, name="resnet_0")(x)
    y = autoencoder.conv(3 * c, self.dtype, "qkv", kernel=1)(Norm(self.dtype, name="norm")(x))
    q, k, v = jnp.split(y.reshape(b, h * w, 1, 3 * c), 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c)
    x += autoencoder.conv(c, self.dtype, "out", kernel=1)(y)
    return Resnet(c, self.dtype, name="resnet_1")(x)


class Encoder(nn.Module):
  """[B, H, W, 3] -> [B, H / f, W / f, 2 latent channels], f = 2^(levels - 1)."""

  latent_channels: int
  widths: tuple[int, ...]
  layers_per_block: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = autoencoder.conv(self.widths[0], self.dtype, "conv_in")(x)
    for level, width in enumerate(self.widths):
      for i in range(self.layers_per_block):
        x = Resnet(width, self.dtype, name=f"down_{level}_resnet_{i}")(x)
      if level < len(self.widths) - 1:
        x = autoencoder.conv(width, self.dtype, f"down_{level}_sample", strides=2, padding=((0, 1), (0, 1)))(x)
    x = nn.silu(Norm(self.dtype, name="norm_out")(Middle(self.dtype, name="middle")(x)))
    return autoencoder.conv(2 * self.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
  """[B, h, w, latent channels] -> [B, h f, w f, 3]; each step up halves the width."""

  channels: int
  widths: tuple[int, ...]
  layers_per_block: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = Middle(self.dtype, name="middle")(autoencoder.conv(self.widths[-1], self.dtype, "conv_in")(x))
    for level, width in enumerate(reversed(self.widths)):
      for i in range(self.layers_per_block + 1):
        x = Resnet(width, self.dtype, name=f"up_{level}_resnet_{i}")(x)
      if level < len(self.widths) - 1:
        x = autoencoder.conv(width // 2, self.dtype, f"up_{level}_sample")(x.repeat(2, axis=1).repeat(2, axis=2))
    x = nn.silu(Norm(self.dtype, name="norm_out")(x))
    return autoencoder.conv(self.channels, self.dtype, "conv_out")(x)


class QwenAutoencoder(nn.Module):
  """Images [B, H, W, channels] in [-1, 1] <-> latents [B, H / f, W / f, latent_channels], f = 2^(levels - 1).

  Attributes:
    channels, latent_channels: of images and latents.
    widths: of the levels, finest first.
    layers_per_block: resnets at each level of the encoder; the decoder has one more.
    dtype: of the computation; parameters are float32.
  Raises:
    ValueError: an attribute out of its range.
  """

  channels: int = 3
  latent_channels: int = 16
  widths: tuple[int, ...] = (96, 192, 384, 384)
  layers_per_block: int = 2
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    for name in ("channels", "latent_channels", "layers_per_block"):
      config_lib.whole(name, getattr(self, name), most=1 << 12)
    autoencoder.check_widths(self.widths)

  def setup(self):
    same = dict(widths=tuple(self.widths), layers_per_block=self.layers_per_block, dtype=self.dtype)
    self.encoder, self.decoder = Encoder(self.latent_channels, **same), Decoder(self.channels, **same)
    self.quant = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
    self.post_quant = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

  def encode(self, images):
    """(mean, log variance) of the latents, the latter between -30 and 20, float32."""
    mean, logvar = jnp.split(self.quant(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30, 20)

  def decode(self, latents):
    """Images, float32, between -1 and 1."""
    return jnp.clip(self.decoder(self.post_quant(latents)).astype(jnp.float32), -1, 1)

  def __call__(self, images):
    return self.decode(self.encode(images)[0])
