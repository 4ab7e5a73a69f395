"""Stable Diffusion's autoencoder under diffusers' names, today's and those from before 2023."""

from piflow_jax.convert import table
from piflow_jax.convert.table import Row

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "out": "proj_attn"}


def recognised(keys):
  """{key: shape} -> whether this is an AutoencoderKL."""
  return "encoder.conv_in.weight" in keys and "decoder.conv_in.weight" in keys


def rows(settings, keys=None):
  """The table of an autoencoder with `settings` (arguments of models.autoencoder.Autoencoder).

  Args:
    settings: see above.
    keys: {key: shape} of the file that is to be read, which tell the names of the attention; None: today's.
  """
  old = keys is not None and "encoder.mid_block.attentions.0.query.weight" in keys
  # Some of the old ones hold the attention's layers as convolutions of one pixel.
  pixel = old and len(keys["encoder.mid_block.attentions.0.query.weight"]) == 4
  linear = _PIXEL if pixel else table.linear()
  names, levels, count = (_OLD_ATTENTION if old else _ATTENTION), len(settings["widths"]), settings["layers_per_block"]
  found = []

  def layer(here, there, weight="kernel", kernel=table.CONVOLUTION):
    found.append(Row(f"{here}/{weight}", (f"{there}.weight",), kernel))
    found.append(Row(f"{here}/bias", (f"{there}.bias",), table.PLAIN))

  norm = lambda here, there: layer(here, there, "scale", table.PLAIN)

  def resnet(here, there):
    for i in (1, 2):
      norm(f"{here}/norm{i}", f"{there}.norm{i}")
      layer(f"{here}/conv{i}", f"{there}.conv{i}")
    layer(f"{here}/shortcut", f"{there}.conv_shortcut")

  for part, side, resnets in (("encoder", "down", count), ("decoder", "up", count + 1)):
    sampler = f"{side}samplers.0.conv"
    layer(f"{part}/conv_in", f"{part}.conv_in")
    for level in range(levels):
      for i in range(resnets):
        resnet(f"{part}/{side}_{level}_resnet_{i}", f"{part}.{side}_blocks.{level}.resnets.{i}")
      layer(f"{part}/{side}_{level}_sample", f"{part}.{side}_blocks.{level}.{sampler}")
    for i in (0, 1):
      resnet(f"{part}/middle/resnet_{i}", f"{part}.mid_block.resnets.{i}")
    attention = f"{part}.mid_block.attentions.0"
    norm(f"{part}/middle/attention/norm", f"{attention}.{names['norm']}")
    for name in ("q", "k", "v", "out"):
      layer(f"{part}/middle/attention/{name}", f"{attention}.{names[name]}", kernel=linear)
    norm(f"{part}/norm_out", f"{part}.conv_norm_out")
    layer(f"{part}/conv_out", f"{part}.conv_out")
  layer("quant", "quant_conv")
  layer("post_quant", "post_quant_conv")
  return found


# A linear layer [in, out] <-> a convolution of one pixel (out, in, 1, 1).
_PIXEL = table.Transform(
    lambda s: (s[1], s[0], 1, 1), lambda x, shape: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])


def diffusers_config(settings, scales):
  """config.json that diffusers' AutoencoderKL is made from."""
  levels = len(settings["widths"])
  return dict(
      _class_name="AutoencoderKL", act_fn="silu", in_channels=settings["channels"], out_channels=settings["channels"],
      latent_channels=settings["latent_channels"], block_out_channels=list(settings["widths"]),
      down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
      layers_per_block=settings["layers_per_block"], norm_num_groups=settings["groups"],
      use_quant_conv=settings["quant_conv"], use_post_quant_conv=settings["post_quant_conv"],
      mid_block_add_attention=settings["mid_attention"], **scales)
