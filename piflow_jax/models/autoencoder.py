"""Stable Diffusion's autoencoder (Rombach et al., arXiv 2112.10752): images and their latents.

diffusers' AutoencoderKL, with 4 latent channels (SD) or 16 (FLUX, SD3). Statistics of norms, and softmax, in float32.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import errors

FILE = "autoencoder.json"  # in a converted one's workdir: {"settings": arguments of Autoencoder, "scales": of `to_latents`}


def to_latents(mean, *, scaling_factor, shift_factor=0.0):
  """What a flow model sees: (mean - shift) * scale. SD: scale 0.18215, shift 0; FLUX: 0.3611, 0.1159."""
  return (mean - shift_factor) * scaling_factor


def from_latents(latents, *, scaling_factor, shift_factor=0.0):
  """The inverse of `to_latents`: what is decoded."""
  return latents / scaling_factor + shift_factor


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
  # Two passes: in E[x^2] - E[x]^2 a group whose mean is large against its spread would lose the spread to rounding.
  return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


def _conv(features, dtype, name, kernel=3, **more):
  return nn.Conv(features, (kernel, kernel), dtype=dtype, name=name, **({"padding": kernel // 2} | more))


class Resnet(nn.Module):
  """Two convolutions beside a shortcut; [B, H, W, C] -> [B, H, W, features]."""

  features: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    y = _conv(self.features, self.dtype, "conv1")(nn.silu(_norm(self.groups, self.dtype, "norm1")(x)))
    y = _conv(self.features, self.dtype, "conv2")(nn.silu(_norm(self.groups, self.dtype, "norm2")(y)))
    if x.shape[-1] != self.features:
      x = _conv(self.features, self.dtype, "shortcut", kernel=1)(x)
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
    resnet = lambda i: Resnet(x.shape[-1], self.groups, self.dtype, name=f"resnet_{i}")
    x = resnet(0)(x)
    if self.attention:
      x = Attention(self.groups, self.dtype, name="attention")(x)
    return resnet(1)(x)


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
    x = _conv(self.widths[0], self.dtype, "conv_in")(x)
    for level, width in enumerate(self.widths):
      for i in range(self.layers_per_block):
        x = Resnet(width, self.groups, self.dtype, name=f"down_{level}_resnet_{i}")(x)
      if level < len(self.widths) - 1:
        # One row and column of zeros, at the end alone: the original's padding.
        x = _conv(width, self.dtype, f"down_{level}_sample", strides=2, padding=((0, 1), (0, 1)))(x)
    x = Middle(self.groups, self.mid_attention, self.dtype, name="middle")(x)
    x = nn.silu(_norm(self.groups, self.dtype, "norm_out")(x))
    return _conv(2 * self.latent_channels, self.dtype, "conv_out")(x)


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
    x = _conv(self.widths[-1], self.dtype, "conv_in")(x)
    x = Middle(self.groups, self.mid_attention, self.dtype, name="middle")(x)
    for level, width in enumerate(reversed(self.widths)):
      for i in range(self.layers_per_block + 1):
        x = Resnet(width, self.groups, self.dtype, name=f"up_{level}_resnet_{i}")(x)
      if level < len(self.widths) - 1:
        x = _conv(width, self.dtype, f"up_{level}_sample")(x.repeat(2, axis=1).repeat(2, axis=2))
    x = nn.silu(_norm(self.groups, self.dtype, "norm_out")(x))
    return _conv(self.channels, self.dtype, "conv_out")(x)


class Autoencoder(nn.Module):
  """Images [B, H, W, channels] in [-1, 1] <-> latents [B, H / f, W / f, latent_channels], f = 2^(levels - 1).

  Attributes:
    channels, latent_channels: of images and latents.
    widths: of the levels, finest first.
    layers_per_block: resnets at each level of the encoder; the decoder has one more.
    groups: of the norms.
    quant_conv, post_quant_conv: a last 1x1 convolution of the encoder, a first one of the decoder (SD; not FLUX).
    mid_attention: attention at the coarsest level.
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
  """The tree of an Autoencoder's parameters."""
  size = 2 ** (len(net.widths) - 1)
  return jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, size, size, net.channels))))["params"]


def settings_of(config):
  """(arguments of Autoencoder, arguments of `to_latents`) from diffusers' config.json. Raises errors.UserError."""
  levels = len(config.get("block_out_channels", (64,)))
  channels = config.get("in_channels", 3)
  for field, want in (
      ("_class_name", "AutoencoderKL"), ("out_channels", channels), ("act_fn", "silu"),
      ("down_block_types", ["DownEncoderBlock2D"] * levels), ("up_block_types", ["UpDecoderBlock2D"] * levels)):
    found = config.get(field, want)
    if (list(found) if isinstance(found, tuple) else found) != want:
      raise errors.UserError(f"--source: config.json: {field} is {found}; only {want} is built here")
  # Statistics of each channel: latents scaled by one number alone would be wrong, and no shape tells.
  for field in ("latents_mean", "latents_std"):
    if config.get(field) is not None:
      raise errors.UserError(f"--source: config.json: {field} is {config[field]}; only scaling_factor and "
                             "shift_factor are known here")
  if config.get("scaling_factor", 0.18215) is None:
    raise errors.UserError("--source: config.json: scaling_factor is null; set the one that the latents' model was trained with")
  return dict(
      channels=channels, latent_channels=config.get("latent_channels", 4),
      widths=tuple(config.get("block_out_channels", (64,))), layers_per_block=config.get("layers_per_block", 1),
      groups=config.get("norm_num_groups", 32), quant_conv=config.get("use_quant_conv", True),
      post_quant_conv=config.get("use_post_quant_conv", True),
      mid_attention=config.get("mid_block_add_attention", True),
  ), dict(scaling_factor=config.get("scaling_factor", 0.18215), shift_factor=config.get("shift_factor") or 0.0)
