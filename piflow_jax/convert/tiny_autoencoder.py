"""Tiny autoencoders from diffusers' AutoencoderTiny: its layers are numbered in one row."""

from piflow_jax import errors
from piflow_jax.convert import autoencoder as names
from piflow_jax.convert import table
from piflow_jax.convert.table import Row
from piflow_jax.models import tiny_autoencoder

_SAYS = "diffusers' AutoencoderTiny"


def recognised(keys):
  """{key: shape} -> whether this is such an autoencoder."""
  return "encoder.layers.0.weight" in keys and "decoder.layers.0.weight" in keys


def rows(settings, keys=None):
  """The table of an autoencoder with `settings`, arguments of models.tiny_autoencoder.TinyAutoencoder.

  All files have the same `keys`.
  """
  del keys
  found = []

  def conv(here, there, bias=True):
    found.append(Row(f"{here}/kernel", (f"{there}.weight",), table.CONVOLUTION))
    found.extend([Row(f"{here}/bias", (f"{there}.bias",), table.PLAIN)] if bias else [])

  def block(here, there):
    for i in range(3):  # an activation follows each of the first two
      conv(f"{here}/conv{i}", f"{there}.conv.{2 * i}")

  place = 0
  for level, count in enumerate(settings["encoder_blocks"]):
    conv(f"encoder/down_{level}" if level else "encoder/conv_in", f"encoder.layers.{place}", bias=not level)
    for i in range(count):
      block(f"encoder/level_{level}_{i}", f"encoder.layers.{place + 1 + i}")
    place += 1 + count
  conv("encoder/conv_out", f"encoder.layers.{place}")
  conv("decoder/conv_in", "decoder.layers.0")
  place, last = 2, len(settings["decoder_blocks"]) - 1  # an activation, then blocks, upsampling and convolution
  for level, count in enumerate(settings["decoder_blocks"]):
    for i in range(count):
      block(f"decoder/level_{level}_{i}", f"decoder.layers.{place + i}")
    place += count + (level < last)
    conv("decoder/conv_out" if level == last else f"decoder/up_{level}", f"decoder.layers.{place}", bias=level == last)
    place += 1
  return found


def settings_of(config):
  """(arguments of TinyAutoencoder, arguments of `autoencoder.to_latents`) from diffusers' config.json.

  Raises:
    errors.UserError: values that are none, or what is not built here.
  """
  try:
    names.check_built(config, act_fn="relu", upsampling_scaling_factor=2, latent_magnitude=3, upsample_fn="nearest",
                      out_channels=config.get("in_channels", 3))
    widths = tuple(config.get("encoder_block_out_channels", (64,) * 4))
    if tuple(config.get("decoder_block_out_channels", widths)) != widths:
      raise ValueError("decoder_block_out_channels: differ from the encoder's; not built here")
    settings = dict(channels=config.get("in_channels", 3), latent_channels=config.get("latent_channels", 4),
                    widths=widths, encoder_blocks=tuple(config.get("num_encoder_blocks", (1, 3, 3, 3))),
                    decoder_blocks=tuple(config.get("num_decoder_blocks", (3, 3, 3, 1))))
    tiny_autoencoder.TinyAutoencoder(**settings)
    scales = names.scales_of(config, 1.0)
  except (ValueError, OverflowError, TypeError) as e:
    raise errors.UserError(f"--source: config.json: {str(e)[:300]}") from e
  return settings, scales


def read_plan(source):
  """`autoencoder.plan_of` such a file."""
  return names.plan_of(source, settings_of, tiny_autoencoder.TinyAutoencoder, rows, _SAYS, kind=tiny_autoencoder.KIND)
