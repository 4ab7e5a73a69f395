"""Stable Diffusion's autoencoder as diffusers keeps it: names of today and from before 2023, and config.json."""

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax.convert import files
from piflow_jax.convert import table
from piflow_jax.convert.table import Row
from piflow_jax.models import autoencoder

_SAYS = "diffusers' AutoencoderKL"
# Of models.autoencoder.Autoencoder, as diffusers' config.json has them.
_FIELDS = dict(
    channels="in_channels", widths="block_out_channels", groups="norm_num_groups", quant_conv="use_quant_conv",
    post_quant_conv="use_post_quant_conv", mid_attention="mid_block_add_attention")

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "out": "proj_attn"}


def recognised(keys):
  """{key: shape} -> whether this is an AutoencoderKL."""
  return "encoder.conv_in.weight" in keys and "decoder.conv_in.weight" in keys


def rows(settings, keys=None):
  """The table of an autoencoder with `settings` (arguments of models.autoencoder.Autoencoder).

  Args:
    settings: see above.
    keys: {key: shape} of the file to read, by which the names of the attention are recognised; None: today's names.
  """
  old = keys is not None and "encoder.mid_block.attentions.0.query.weight" in keys
  # Some of the old ones hold the attention's layers as convolutions of one pixel.
  pixel = old and len(keys["encoder.mid_block.attentions.0.query.weight"]) == 4
  linear = table.Pixel() if pixel else table.Linear()
  names, levels, count = (_OLD_ATTENTION if old else _ATTENTION), len(settings["widths"]), settings["layers_per_block"]
  found = []

  def layer(here, there, weight="kernel", kernel=table.CONVOLUTION):
    found.append(Row(f"{here}/{weight}", (f"{there}.weight",), kernel))
    found.append(Row(f"{here}/bias", (f"{there}.bias",), table.PLAIN))

  def norm(here, there):
    layer(here, there, "scale", table.PLAIN)

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


def settings_of(config):
  """(arguments of models.autoencoder.Autoencoder, arguments of its `to_latents`) from diffusers' config.json.

  Raises:
    errors.UserError: another kind of autoencoder, or values that are none.
  """
  try:
    widths = config.get("block_out_channels", (64,))
    if not isinstance(widths, (list, tuple)):
      raise ValueError(f"block_out_channels: {widths!r} must be a list of widths")
    channels = config.get("in_channels", 3)
    _check_kind(config, channels, len(widths))
    settings = dict(
        channels=channels, latent_channels=config.get("latent_channels", 4), widths=tuple(widths),
        layers_per_block=config.get("layers_per_block", 1), groups=config.get("norm_num_groups", 32),
        quant_conv=config.get("use_quant_conv", True), post_quant_conv=config.get("use_post_quant_conv", True),
        mid_attention=config.get("mid_block_add_attention", True))
    autoencoder.Autoencoder(**settings)
    scales = scales_of(config, 0.18215)
  except (ValueError, OverflowError) as e:
    field, colon, why = str(e)[:300].partition(":")
    raise errors.UserError(f"--source: config.json: {_FIELDS.get(field, field)}{colon}{why}") from e
  return settings, scales


def scales_of(config, factor):
  """Arguments of `to_latents` by one number each, `factor` where none is said. Raises ValueError: it is no number."""
  scales = dict(scaling_factor=config.get("scaling_factor", factor), shift_factor=config.get("shift_factor") or 0.0)
  config_lib.number("scaling_factor", scales["scaling_factor"], above=0)
  config_lib.number("shift_factor", scales["shift_factor"])
  return scales


def check_built(config, **wanted):
  """Raises ValueError: a field of config.json that has another value than the one that is built here."""
  for field, want in wanted.items():
    found = config.get(field, want)
    if (list(found) if isinstance(found, tuple) else found) != want:
      raise ValueError(f"{field} is {found}; only {want} is built here")


def _check_kind(config, channels, levels):
  check_built(config, _class_name="AutoencoderKL", out_channels=channels, act_fn="silu",
              down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
  # Statistics of each channel: latents scaled by one number alone would be wrong, and no shape shows that.
  for field in ("latents_mean", "latents_std"):
    if config.get(field) is not None:
      raise ValueError(f"{field} is {config[field]}; only scaling_factor and shift_factor are known here")
  if config.get("scaling_factor", 0.18215) is None:
    raise ValueError("scaling_factor is null; set the one that the latents' model was trained with")


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


def read_plan(source):
  """`plan_of` an AutoencoderKL's file."""
  return plan_of(source, settings_of, autoencoder.Autoencoder, rows, _SAYS)


def plan_of(source, settings_of_, make, rows_, says, *, kind=None, ignored=()):
  """(table entries, {path: ShapeDtypeStruct}, what FILE is to hold) of a file; prints what it is.

  Args:
    source: files.Source.
    settings_of_: config.json -> (arguments of `make`, arguments of `to_latents`).
    make: of the network.
    rows_: (settings, {key: shape} of the file) -> table.
    says: what such files are called.
    kind: as `weights.load_autoencoder` knows it; None: an AutoencoderKL.
    ignored: patterns of keys that are not read.
  Raises:
    errors.UserError: no config.json, one of another kind, or tensors that do not fit it.
  """
  if not source.config:
    raise errors.UserError(f"--source: no config.json beside {source.where}; an autoencoder's settings are read from "
                           "it")
  settings, scales = settings_of_(source.config)
  leaves = params_lib.named_leaves(autoencoder.shapes(make(**settings)))
  entries = table.entries(rows_(settings, source.shapes), {path: leaf.shape for path, leaf in leaves.items()}, says)
  table.check(entries, source.shapes, source.where, ignored, faults=source.faults)
  print(f"{source.where}: {says} of {len(source.shapes)} tensors", flush=True)
  about = {"settings": settings, "scales": scales, "config": source.config}
  return entries, leaves, about | ({"kind": kind} if kind else {})


def write_plan(path, shapes):
  """(table entries, config.json) of a converted autoencoder.

  Args:
    path: FILE in its workdir.
    shapes: {path: shape} of its weights.
  Raises:
    errors.UserError: the file is not of this program, or not of these weights.
  """
  try:
    known = files.parse(path.read_text())
    if known.get("kind"):
      raise errors.UserError(f"--workdir: {path}: Qwen-Image's autoencoder and tiny ones are not written for PyTorch; "
                             "give its users the original")
    settings = known["settings"] | {"widths": tuple(known["settings"]["widths"])}
    wanted = params_lib.named_leaves(autoencoder.shapes(autoencoder.Autoencoder(**settings)))
    about = known["config"] | diffusers_config(settings, known["scales"])
  except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
    raise errors.UserError(f"--workdir: {path} is not of this program ({type(e).__name__}: {str(e)[:200]}); convert it "
                           "again") from e
  if wrong := table.difference({name: leaf.shape for name, leaf in wanted.items()}, shapes):
    raise errors.UserError(f"--workdir: {path} is not of the weights beside it ({wrong}); convert them again")
  return table.entries(rows(settings), shapes, _SAYS), about
