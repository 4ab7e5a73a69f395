"""DiT teachers and students under the names that PyTorch projects gave them."""

import functools

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax.convert import naming
from piflow_jax.convert import table
from piflow_jax.convert.table import Row
from piflow_jax.models import layers

_SHIPPED = ("piflow_torch.py", "piflow_dit.py", "piflow_policy.py")

# Of the policies that pi-Flow's release has: its network's class, and {field of config.json: field of the head}.
_CLASSES = {
    "GMFlow": ("GMDiTTransformer2DModelV2", dict(num_gaussians="components", logstd_inner_dim="logstd_width")),
    "DX": ("DXDiTTransformer2DModel", dict(n_grid="points")),
    "ParallelDecoding": ("ParallelDiTTransformer2DModel", dict(n_grid="intervals")),
}


def _layer(here, *there, kernel=table.Linear(), bias=table.FLAT, copies=0):
  """The two rows of a linear layer."""
  return [Row(f"{here}/kernel", tuple(f"{name}.weight" for name in there), kernel, copies),
          Row(f"{here}/bias", tuple(f"{name}.bias" for name in there), bias, copies)]


def _diffusers_blocks(patch):
  block = "transformer_blocks.{i}"
  return [
      *_layer("patch_embed", "pos_embed.proj", kernel=table.Patches(patch)),
      *_layer("blocks/adaln", f"{block}.norm1.linear"),
      *_layer("blocks/attention/qkv", *(f"{block}.attn1.to_{c}" for c in "qkv")),
      *_layer("blocks/attention/out", f"{block}.attn1.to_out.0", kernel=table.Linear(inputs=2)),
      *_layer("blocks/mlp/in", f"{block}.ff.net.0.proj"),
      *_layer("blocks/mlp/out", f"{block}.ff.net.2"),
      *_layer("adaln_out", "proj_out_1"),
      # Rows are ordered patch position, then component or point where there are some, then channel.
      *_layer("head/out", "proj_out_2"),
  ]


def _release(weights):
  return [
      *_diffusers_blocks(weights.network.patch),
      *_layer("time_in", "emb.timestep_embedder.linear_1"),
      *_layer("time_out", "emb.timestep_embedder.linear_2"),
      Row("class_embed/embedding", ("emb.class_embedder.embedding_table.weight",), table.PLAIN),
      *_layer("head/means", "proj_out_means"),
      *_layer("head/logweights", "proj_out_logweights"),
      *_layer("head/logstd_in", "proj_out_logstds.1"),
      *_layer("head/logstd_out", "proj_out_logstds.3"),
  ]


def _diffusers(weights):
  block, depth = "transformer_blocks.{i}.norm1.emb", weights.network.depth
  return [
      *_diffusers_blocks(weights.network.patch),
      *_layer("time_in", f"{block}.timestep_embedder.linear_1", copies=depth),
      *_layer("time_out", f"{block}.timestep_embedder.linear_2", copies=depth),
      Row("class_embed/embedding", (f"{block}.class_embedder.embedding_table.weight",), table.PLAIN, depth),
  ]


def _facebook(weights, kernel=table.Linear(), bias=table.FLAT):
  block = "blocks.{i}"
  return [
      *_layer("patch_embed", "x_embedder.proj", kernel=table.Patches(weights.network.patch)),
      *_layer("time_in", "t_embedder.mlp.0"),
      *_layer("time_out", "t_embedder.mlp.2"),
      Row("class_embed/embedding", ("y_embedder.embedding_table.weight",), table.PLAIN),
      *_layer("blocks/adaln", f"{block}.adaLN_modulation.1"),
      *_layer("blocks/attention/qkv", f"{block}.attn.qkv"),
      *_layer("blocks/attention/out", f"{block}.attn.proj", kernel=table.Linear(inputs=2)),
      *_layer("blocks/mlp/in", f"{block}.mlp.fc1"),
      *_layer("blocks/mlp/out", f"{block}.mlp.fc2"),
      *_layer("adaln_out", "final_layer.adaLN_modulation.1"),
      *_layer("head/out", "final_layer.linear", kernel=kernel, bias=bias),
  ]


def _sit(weights):
  # Its velocity is data - noise, ours noise - data.
  return _facebook(weights, table.Negated(table.Linear()), table.Negated(table.FLAT))


def _is_release(keys):
  return "emb.timestep_embedder.linear_1.weight" in keys


def _is_diffusers(keys):
  return "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in keys


def _is_facebook(keys):
  return "x_embedder.proj.weight" in keys and "blocks.0.attn.qkv.weight" in keys


def _is_facebook_alone(keys):
  # Projectors are what tells REPA from the two projects whose names it has.
  return _is_facebook(keys) and not any(key.startswith("projectors.") for key in keys)


def _classes(spec):
  """Size of the label's table, less the null class; 0: there is none."""
  return spec.cond["label"].classes if spec.cond else 0


def _sizes(weights):
  n, classes, channels = weights.network, _classes(weights.spec), weights.spec.x_0[-1]
  found = [
      table.Size("blocks/adaln/kernel", None, f"{weights.field}.depth", n.depth),
      table.Size("blocks/adaln/kernel", 1, f"{weights.field}.width", n.width),
      table.Size("patch_embed/kernel", 1, "the number of channels of config.data", channels),
      table.Size("patch_embed/kernel", 2, f"{weights.field}.patch", n.patch),
      table.Size("class_embed/embedding", 0, "the number of classes of config.data", classes, more=1)]
  for leaf, field in (("head/logweights/kernel", "components"), ("head/logstd_in/kernel", "logstd_width"),
                      ("head/out/kernel", "points"), ("head/out/kernel", "intervals")):
    if hasattr(weights.head, field):
      found.append(table.Size(leaf, 0, f"config.policy.{field}", getattr(weights.head, field)))
  return found


def _prepared(source, teacher, own, stored, *, output):
  """The source without the rows of its output layer that no velocity needs."""
  keys, patch = (output, output.replace("weight", "bias")), teacher.network.patch
  channels, (shape, of_bias) = teacher.spec.x_0[-1], (source.shapes.get(key, ()) for key in keys)
  found = first_channels(shape, channels, patch) if len(shape) == 2 and of_bias == shape[:1] else None
  if not found or stored is not None:
    return source
  points = getattr(own.head, "points", None) or getattr(own.head, "intervals", None)
  if points and points * channels == found and not source.config:
    raise errors.UserError(f"--config: {source.where} may be a teacher with a variance or a student of {points} "
                           "points; give a config of other config.policy.points to read it as a teacher")
  print(f"{output}: {found} channels a position, of which the first {channels} are the velocity", flush=True)

  def read(key):
    return cut_channels(source.read(key), found, channels) if key in keys else source.read(key)

  cut = {key: (patch**2 * channels, *source.shapes[key][1:]) for key in keys}
  return source._replace(shapes=source.shapes | cut, read=read)


def first_channels(shape, channels, patch):
  """How many channels an output layer of `shape` (rows, D) has a position, if more than a velocity needs, else None.

  DiT and SiT learned a variance beside (2 C), GM-DiT V1 with one Gaussian a log-weight (C + 1): the first ones count.
  """
  count = shape[0] // patch**2
  return count if shape[0] % patch**2 == 0 and count in (2 * channels, channels + 1) else None


def cut_channels(array, stored, channels):
  """Rows (p p stored, ...) of an output layer -> (p p channels, ...): the first channels of each position."""
  return array.reshape(-1, stored, *array.shape[1:])[:, :channels].reshape(-1, *array.shape[1:])


def positions(weights):
  """{key: the fixed position table [1, tokens, D]} that these projects store among the weights."""
  height, width, _ = weights.spec.x_0
  patch = weights.network.patch
  return {"pos_embed": layers.sincos_positions(height // patch, width // patch, weights.network.width)[None]}


def check_positions(array, want, where):
  """Hold a stored position table against the one that is computed here. Raises errors.UserError."""
  # The training scripts average the table along with the weights, and in float32 0.9999 + 0.0001 is less than 1: it
  # shrinks by up to 2e-4. Another grid or patch is off by more than 1, half precision by 0.004.
  tolerance = 1e-2
  if array.shape != want.shape or not np.abs(array.astype(np.float32) - want).max() <= tolerance:
    raise errors.UserError(f"{where}: not the sine-cosine table of {want.shape}, which is all that is built here; "
                           "check the data's shape and config.network.patch")


def _refuse_release(weights):
  if weights.head is None:
    return ""
  if weights.policy is None:
    return f"{type(weights.head).__name__} cannot be exported under these names: it has no export_config"
  if weights.policy["type"] not in _CLASSES:
    known = ", ".join(_CLASSES)
    return f"a policy {weights.policy['type']!r} cannot be exported under these names, which have {known}"
  return ""


def _refuse_others(weights):
  height, width, _ = weights.spec.x_0
  if height != width:
    return f"it has square latents only, not {height} x {width}"
  return "" if weights.spec.cond else "it has no networks without a label"


def _about_release(weights):
  kind = weights.policy["type"] if weights.policy else None
  name, fields = _CLASSES.get(kind, ("DiTTransformer2DModelMod", {}))
  about = _about_diffusers(weights, name)
  about |= {field: getattr(weights.head, attribute) for field, attribute in fields.items()}
  if kind == "GMFlow":
    about |= dict(gm_num_logstd_layers=2)
  if kind:
    del about["out_channels"]
  return about | {"piflow_jax": about["piflow_jax"] | dict(release_diffusion=release_diffusion(weights.network))}


def _about_diffusers(weights, name="DiTTransformer2DModel"):
  n, (height, width, channels) = weights.network, weights.spec.x_0
  return dict(
      _class_name=name, num_attention_heads=n.heads, attention_head_dim=n.width // n.heads, in_channels=channels,
      out_channels=channels, num_layers=n.depth, sample_size=height if height == width else [height, width],
      patch_size=n.patch, num_embeds_ada_norm=_classes(weights.spec), norm_type="ada_norm_zero",
      activation_fn="gelu-approximate", norm_elementwise_affine=False, norm_eps=n.mlp_norm_eps, attention_bias=True,
      piflow_jax=_time(n))


def _about_facebook(weights):
  n, (height, _, channels) = weights.network, weights.spec.x_0
  return dict(depth=n.depth, hidden_size=n.width, num_heads=n.heads, patch_size=n.patch, in_channels=channels,
              input_size=height, num_classes=_classes(weights.spec), learn_sigma=False, piflow_jax=_time(n))


def _time(network):
  return {field: network[field] for field in ("time_scale", "time_offset", "frequency_shift")}


def release_diffusion(network):
  """Settings of pi-Flow's release that embed this network's time, beside its weights; None where it has none.

  The release embeds T t, or T - T t if it is set to flip; both are arguments of its diffusion, not of its network.
  """
  scale, offset = network.time_scale, network.time_offset
  if (scale > 0 and offset == 0) or (scale < 0 and offset == -scale):
    steps = abs(scale)
    return dict(num_timesteps=int(steps) if steps == int(steps) else steps, flip_model_timesteps=scale < 0)
  return None


def network_of(about):
  """Fields of config.network that a config.json says, of those that the shapes of the weights do not.

  Raises:
    ValueError: a value that is no number.
  """
  ours = about.get("piflow_jax")
  ours = ours if isinstance(ours, dict) else {}
  found = {}
  for table_, name, field in (
      (about, "num_heads", "heads"), (about, "num_attention_heads", "heads"), (about, "norm_eps", "mlp_norm_eps"),
      *((ours, name, name) for name in ("time_scale", "time_offset", "frequency_shift"))):
    if table_.get(name) is not None:
      config_lib.number(name, table_[name])
      found[field] = table_[name]
  return found


def _latents(about):
  """The shape of x_0 that a config.json says: this program's, diffusers' or facebookresearch/DiT's."""
  side, channels = about.get("sample_size", about.get("input_size")), about.get("in_channels")
  found = naming.latent_shape(about)
  if found is not None or side is None or channels is None:
    return found
  return [*(side if isinstance(side, list) else [side, side]), channels]


def _remark(weights, stated):
  n = weights.network
  return (f"taken to embed {n.time_offset} + {n.time_scale} t (config.network.time_offset, time_scale) and to have "
          f"mlp_norm_eps {n.mlp_norm_eps}") if stated is not None else ""


def _remark_release(weights, stated):
  n = weights.network
  if stated is None:
    if fields := release_diffusion(n):
      fields = ", ".join(f"{k}={v}" for k, v in fields.items())
      return f"pi-Flow's release: set {fields} in the diffusion that it runs this network in"
    return (f"pi-Flow's release: no setting of it embeds {n.time_offset} + {n.time_scale} t, as this network wants; "
            "piflow_torch.py does")
  if "time_scale" in stated:
    return _remark(weights, stated)
  return _remark(weights, stated) + (
      "; these files do not say: the time_scale is num_timesteps of the release's own config (1 for REPA, 1000 for "
      "FM-DiT); with flip_model_timesteps there (SiT) it is -num_timesteps, and time_offset is num_timesteps")


def _naming(says, recognised, rows, about, output, **more):
  given = dict(
      stated=network_of, latents=_latents, classes=_POLICY_OF, sizes=_sizes, remark=_remark, refuse=_refuse_others,
      prepared=functools.partial(_prepared, output=output))
  return naming.Naming(says, recognised, rows, about, **given | more)


# Of config.json's _class_name; {} is a teacher.
_POLICY_OF = {
    "GMDiTTransformer2DModelV2": {"type": "GMFlow"}, "DXDiTTransformer2DModel": {"type": "DX"},
    "DiTTransformer2DModel": {}, "DiTTransformer2DModelMod": {}, "GMDiTTransformer2DModel": {}}
_FACEBOOK = dict(about=_about_facebook, output="final_layer.linear.weight", constants=positions,
                 check_constant=check_positions)

NAMINGS = {
    "release": _naming(
        "pi-Flow's release: FM-DiT teachers, GM-DiT V2, DX and parallel-decoding students", _is_release, _release,
        _about_release, "proj_out_2.weight", students=True, network=dict(frequency_shift=0), refuse=_refuse_release,
        # The one Gaussian of a GM-DiT V1 teacher has a log standard deviation, which a velocity has no use for.
        ignored=(r"gm_out\..*", r"pos_embed\.pos_embed"), remark=_remark_release, beside=_SHIPPED),
    "diffusers": _naming(
        "diffusers' DiTTransformer2DModel", _is_diffusers, _diffusers, _about_diffusers, "proj_out_2.weight",
        network=dict(frequency_shift=1, time_offset=0.0), ignored=(r"pos_embed\.pos_embed",),
        unless_stated=dict(mlp_norm_eps=1e-5)),
    "repa": _naming(
        "REPA, SiT's names with time 1 at the noise", _is_facebook, _facebook, **_FACEBOOK,
        network=dict(time_scale=1.0, time_offset=0.0, mlp_norm_eps=1e-6, frequency_shift=0),
        ignored=(r"projectors\..*",)),
    "sit": _naming(
        "SiT as first released, time 1 at the data, velocity data - noise", _is_facebook_alone, _sit, **_FACEBOOK,
        network=dict(time_scale=-1.0, time_offset=1.0, mlp_norm_eps=1e-6, frequency_shift=0)),
    "dit": _naming(
        "facebookresearch/DiT's names", _is_facebook_alone, _facebook, **_FACEBOOK,
        network=dict(mlp_norm_eps=1e-6, frequency_shift=0, time_offset=0.0)),
}
