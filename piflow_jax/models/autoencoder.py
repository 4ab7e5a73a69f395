"""Stable Diffusion's autoencoder (Rombach et al., arXiv 2112.10752): images and their latents.

diffusers' AutoencoderKL, with 4 latent channels (SD) or 16 (FLUX, SD3). Statistics of norms, and softmax, in float32.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib

FILE = "autoencoder.json"  # in a workdir: {"settings": fields of Autoencoder, "scales": arguments of `to_latents`}


def to_latents(mean, *, scaling_factor, shift_factor=0.0):
  """Latents as a flow model takes them: (mean - shift) * scale. SD: scale 0.18215, shift 0; FLUX: 0.3611, 0.1159.

  Either is a number, or a list of one a channel (Qwen-Image: 1 / deviation, mean).
  """
  return (mean - _by_channel(shift_factor, mean)) * _by_channel(scaling_factor, mean)


def from_latents(latents, *, scaling_factor, shift_factor=0.0):
  """The inverse of `to_latents`: latents as `Autoencoder.decode` takes them."""
  return latents / _by_channel(scaling_factor, latents) + _by_channel(shift_factor, latents)


def _by_channel(value, like):
  return value if isinstance(value, (int, float)) else jnp.asarray(value, jnp.float32).reshape(
      (1,) * (like.ndim - 1) + (-1,))


def sample(mean, logvar, key):
  """A draw from the posterior q(z | image) = N(mean, exp(logvar)) of `encode` (arXiv 1312.6114, section 2.4).

  z = mean + exp(logvar / 2) eps, eps ~ N(0, I): latents of images, still to be scaled by `to_latents`.

  Args:
    mean, logvar: [..., C].
    key: random key, one for all of them.
  Returns:
    Like mean.
  """
  return mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape, mean.dtype)


def _norm(groups, dtype, name):
  # Flax's fast variance, E[x^2] - E[x]^2, loses the spread of a group to rounding where its mean is large against it.
  return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def conv(features, dtype, name, kernel=3, **more):
  """A convolution whose output is as large as its input unless told otherwise."""
  return nn.Conv(features, (kernel, kernel), dtype=dtype, name=name, **({"padding": kernel // 2} | more))


def check_widths(widths):
  """Raises ValueError: what is no list of levels' widths."""
  if not isinstance(widths, (tuple, list)) or not 1 <= len(widths) <= 12:
    raise ValueError(f"widths: {widths!r} must be one to twelve whole numbers")
  for width in widths:
    config_lib.whole("widths", width, most=1 << 16)


class Resnet(nn.Module):
  """Two convolutions beside a shortcut; [B, H, W, C] -> [B, H, W, features]."""

  features: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    y = conv(self.features, self.dtype, "conv1")(nn.silu(_norm(self.groups, self.dtype, "norm1")(x)))
    y = conv(self.features, self.dtype, "conv2")(nn.silu(_norm(self.groups, self.dtype, "norm2")(y)))
    if x.shape[-1] != self.features:
      x = conv(self.features, self.dtype, "shortcut", kernel=1)(x)
    return x + y


class Attention(nn.Module):
  """One head over all positions; [B, H, W, C] -> the same."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    y = _norm(self.groups, self.dtype, "norm")(x).reshape(b, h * w, c)
    q, k, v = (nn.Dense(c, dtype=self.dtype, name=name)(y)[:, :, None] for name in "qkv")
    y = jax.nn.dot_product_attention(q, k, v)[:, :, 0]
    return x + nn.Dense(c, dtype=self.dtype, name="out")(y).reshape(x.shape)


class Middle(nn.Module):
  """Resnet, attention, resnet."""

  groups: int
  attention: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    features = x.shape[-1]
    x = Resnet(features, self.groups, self.dtype, name="resnet_0")(x)
    if self.attention:
      x = Attention(self.groups, self.dtype, name="attention")(x)
    return Resnet(features, self.groups, self.dtype, name="resnet_1")(x)


class Encoder(nn.Module):
  """[B, H, W, 3] -> [B, H / f, W / f, 2 latent channels], f = 2^(levels - 1)."""

  latent_channels: int
  widths: tuple[int, ...]
  layers_per_block: int
  groups: int
  mid_attention: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = conv(self.widths[0], self.dtype, "conv_in")(x)
    for level, width in enumerate(self.widths):
      for i in range(self.layers_per_block):
        x = Resnet(width, self.groups, self.dtype, name=f"down_{level}_resnet_{i}")(x)
      if level < len(self.widths) - 1:
        # The original pads one row and column of zeros, at the end alone.
        x = conv(width, self.dtype, f"down_{level}_sample", strides=2, padding=((0, 1), (0, 1)))(x)
    x = Middle(self.groups, self.mid_attention, self.dtype, name="middle")(x)
    x = nn.silu(_norm(self.groups, self.dtype, "norm_out")(x))
    return conv(2 * self.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
  """[B, h, w, latent channels] -> [B, h f, w f, channels]."""

  channels: int
  widths: tuple[int, ...]
  layers_per_block: int
  groups: int
  mid_attention: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = conv(self.widths[-1], self.dtype, "conv_in")(x)
    x = Middle(self.groups, self.mid_attention, self.dtype, name="middle")(x)
    for level, width in enumerate(reversed(self.widths)):
      for i in range(self.layers_per_block + 1):
        x = Resnet(width, self.groups, self.dtype, name=f"up_{level}_resnet_{i}")(x)
      if level < len(self.widths) - 1:
        x = conv(width, self.dtype, f"up_{level}_sample")(x.repeat(2, axis=1).repeat(2, axis=2))
    x = nn.silu(_norm(self.groups, self.dtype, "norm_out")(x))
    return conv(self.channels, self.dtype, "conv_out")(x)


class Autoencoder(nn.Module):
  """Images [B, H, W, channels] in [-1, 1] <-> latents [B, H / f, W / f, latent_channels], f = 2^(levels - 1).

  Attributes:
    channels, latent_channels: of images and latents.
    widths: of the levels, finest first.
    layers_per_block: resnets at each level of the encoder; the decoder has one more.
    groups: of the norms.
    quant_conv, post_quant_conv: a last 1x1 convolution of the encoder, a first one of the decoder (SD; not FLUX).
    mid_attention: attention at the coarsest level.
    dtype: of the computation; parameters are float32.
  Raises:
    ValueError: an attribute out of its range, or groups that do not divide a width.
  """

  channels: int = 3
  latent_channels: int = 4
  widths: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  groups: int = 32
  quant_conv: bool = True
  post_quant_conv: bool = True
  mid_attention: bool = True
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    most = dict(channels=1 << 12, latent_channels=1 << 12, layers_per_block=64, groups=1 << 16)
    for name, bound in most.items():
      config_lib.whole(name, getattr(self, name), most=bound)
    check_widths(self.widths)
    for width in self.widths:
      if width % self.groups:
        raise ValueError(f"groups: {self.groups} does not divide width {width}")
    for name in ("quant_conv", "post_quant_conv", "mid_attention"):
      if not isinstance(getattr(self, name), bool):
        raise ValueError(f"{name}: {getattr(self, name)!r} must be true or false")

  def setup(self):
    same = dict(widths=tuple(self.widths), layers_per_block=self.layers_per_block, groups=self.groups,
                mid_attention=self.mid_attention, dtype=self.dtype)
    self.encoder, self.decoder = Encoder(self.latent_channels, **same), Decoder(self.channels, **same)
    if self.quant_conv:
      self.quant = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
    if self.post_quant_conv:
      self.post_quant = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

  def encode(self, images):
    """(mean, log variance) of the latents, the latter between -30 and 20, float32."""
    moments = self.encoder(images)
    if self.quant_conv:
      moments = self.quant(moments)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30, 20)

  def decode(self, latents):
    """Images, float32, not clipped."""
    if self.post_quant_conv:
      latents = self.post_quant(latents)
    return self.decoder(latents).astype(jnp.float32)

  def __call__(self, images):
    return self.decode(self.encode(images)[0])


def shapes(net):
  """The tree of the parameters of an Autoencoder, or of a network like one."""
  size = 2 ** (len(net.widths) - 1)
  return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, size, size, net.channels))))["params"]
