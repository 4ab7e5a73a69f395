"""Qwen-Image's autoencoder from diffusers' AutoencoderKLQwenImage: of its causal kernels the last frame's taps."""

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax.convert import autoencoder as names
from piflow_jax.convert import table
from piflow_jax.convert.table import Row
from piflow_jax.models import qwen_autoencoder

_SAYS = "diffusers' AutoencoderKLQwenImage, for single images,"
KIND = qwen_autoencoder.KIND
_IGNORED = (r".*\.time_conv\.(weight|bias)",)  # between frames; one image never reaches them


class LastFrame:
  """A convolution's kernel [h, w, in, out] <- the last tap in time of (out, in, t, h, w)."""

  def shape_there(self, shape):
    height, width, inputs, outputs = shape
    return outputs, inputs, 3 if height > 1 else 1, height, width

  def here(self, x, shape):
    del shape
    return x[:, :, -1].transpose(2, 3, 1, 0)


class Gamma:
  """A norm's scale [C] <- (C, 1, 1, 1), or (C, 1, 1) in two dimensions."""

  def __init__(self, axes):
    self._axes = axes

  def shape_there(self, shape):
    return (*shape, *(1,) * self._axes)

  def here(self, x, shape):
    return x.reshape(shape)


def recognised(keys):
  """{key: shape} -> whether this is such an autoencoder."""
  return "encoder.down_blocks.0.norm1.gamma" in keys and "decoder.up_blocks.0.resnets.0.norm1.gamma" in keys


def rows(settings, keys=None):
  """The table of an autoencoder with `settings`, arguments of models.qwen_autoencoder.QwenAutoencoder.

  All files have the same `keys`.
  """
  del keys
  levels, count, found = len(settings["widths"]), settings["layers_per_block"], []

  def conv(here, there, kernel=None):
    found.append(Row(f"{here}/kernel", (f"{there}.weight",), kernel or LastFrame()))
    found.append(Row(f"{here}/bias", (f"{there}.bias",), table.PLAIN))

  def norm(here, there, axes=3):
    found.append(Row(f"{here}/scale", (f"{there}.gamma",), Gamma(axes)))

  def resnet(here, there):
    for i in (1, 2):
      norm(f"{here}/norm{i}", f"{there}.norm{i}")
      conv(f"{here}/conv{i}", f"{there}.conv{i}")
    conv(f"{here}/shortcut", f"{there}.conv_shortcut")

  place = 0  # the encoder's resnets and steps down are numbered in one row
  for level in range(levels):
    for i in range(count):
      resnet(f"encoder/down_{level}_resnet_{i}", f"encoder.down_blocks.{place}")
      place += 1
    conv(f"encoder/down_{level}_sample", f"encoder.down_blocks.{place}.resample.1", table.CONVOLUTION)
    place += level < levels - 1
    for i in range(count + 1):
      resnet(f"decoder/up_{level}_resnet_{i}", f"decoder.up_blocks.{level}.resnets.{i}")
    conv(f"decoder/up_{level}_sample", f"decoder.up_blocks.{level}.upsamplers.0.resample.1", table.CONVOLUTION)
  for part in ("encoder", "decoder"):
    conv(f"{part}/conv_in", f"{part}.conv_in")
    for i in (0, 1):
      resnet(f"{part}/middle/resnet_{i}", f"{part}.mid_block.resnets.{i}")
    attention = f"{part}.mid_block.attentions.0"
    norm(f"{part}/middle/norm", f"{attention}.norm", 2)
    conv(f"{part}/middle/qkv", f"{attention}.to_qkv", table.CONVOLUTION)
    conv(f"{part}/middle/out", f"{attention}.proj", table.CONVOLUTION)
    norm(f"{part}/norm_out", f"{part}.norm_out")
    conv(f"{part}/conv_out", f"{part}.conv_out")
  conv("quant", "quant_conv")
  conv("post_quant", "post_quant_conv")
  return found


def settings_of(config):
  """(arguments of QwenAutoencoder, arguments of `autoencoder.to_latents`) from diffusers' config.json.

  Raises:
    errors.UserError: values that are none, or what is not built here.
  """
  try:
    base, mult = config.get("base_dim", 96), config.get("dim_mult", (1, 2, 4, 4))
    if not isinstance(mult, (list, tuple)) or config.get("attn_scales"):
      raise ValueError(f"dim_mult {mult!r} and attn_scales {config.get('attn_scales')!r} are not built here")
    config_lib.whole("base_dim", base)
    settings = dict(latent_channels=config.get("z_dim", 16), widths=tuple(base * m for m in mult),
                    layers_per_block=config.get("num_res_blocks", 2))
    qwen_autoencoder.QwenAutoencoder(**settings)
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    for name, values in (("latents_mean", mean), ("latents_std", deviation)):
      if not isinstance(values, list) or len(values) != settings["latent_channels"]:
        raise ValueError(f"{name}: must be {settings['latent_channels']} numbers, one a channel")
      for value in values:
        config_lib.number(name, value, **({"above": 0} if name == "latents_std" else {}))
  except (ValueError, OverflowError, TypeError) as e:
    raise errors.UserError(f"--source: config.json: {str(e)[:300]}") from e
  return settings, dict(scaling_factor=[1 / x for x in deviation], shift_factor=list(mean))


def read_plan(source):
  """`autoencoder.plan_of` such a file."""
  return names.plan_of(source, settings_of, qwen_autoencoder.QwenAutoencoder, rows, _SAYS, kind=KIND, ignored=_IGNORED)
