"""DiT teachers and students under the names that PyTorch projects gave them."""

import json
from typing import Callable, NamedTuple

import numpy as np

from piflow_jax import errors
from piflow_jax.convert import table
from piflow_jax.convert.table import Row
from piflow_jax.models import layers
from piflow_jax.policy import dx
from piflow_jax.policy import gmm


class Naming(NamedTuple):
  """One project's names.

  Attributes:
    says: what it is, for people.
    recognised: {key: shape} -> whether a file is of this naming; more than one may be, see `namings_of`.
    rows: (depth, patch) -> table.
    network: fields of config.network without which the weights mean something else.
    output: key of the weight of the output layer of a teacher.
    ignored: patterns of keys that are not needed.
    constants: keys of the fixed position table.
    unless_told: fields of config.network that hold where no config.json says otherwise.
  """

  says: str
  recognised: Callable
  rows: Callable
  network: dict
  output: str
  ignored: tuple[str, ...] = ()
  constants: tuple[str, ...] = ()
  unless_told: dict = {}


def _layer(here, *there, kernel=table.linear(), bias=table.FLAT, copies=0):
  """The two rows of a linear layer."""
  return [Row(f"{here}/kernel", tuple(f"{name}.weight" for name in there), kernel, copies),
          Row(f"{here}/bias", tuple(f"{name}.bias" for name in there), bias, copies)]


def _diffusers_blocks(patch):
  block = "transformer_blocks.{i}"
  return [
      *_layer("patch_embed", "pos_embed.proj", kernel=table.patches(patch)),
      *_layer("blocks/adaln", f"{block}.norm1.linear"),
      *_layer("blocks/attention/qkv", *(f"{block}.attn1.to_{c}" for c in "qkv")),
      *_layer("blocks/attention/out", f"{block}.attn1.to_out.0", kernel=table.linear(inputs=2)),
      *_layer("blocks/mlp/in", f"{block}.ff.net.0.proj"),
      *_layer("blocks/mlp/out", f"{block}.ff.net.2"),
      *_layer("adaln_out", "proj_out_1"),
      # Rows are ordered patch position, then component or point where there are some, then channel.
      *_layer("head/out", "proj_out_2"),
  ]


def _release(depth, patch):
  del depth  # "{i}" runs over the leaf's own layers
  return [
      *_diffusers_blocks(patch),
      *_layer("time_in", "emb.timestep_embedder.linear_1"),
      *_layer("time_out", "emb.timestep_embedder.linear_2"),
      Row("class_embed/embedding", ("emb.class_embedder.embedding_table.weight",), table.PLAIN),
      *_layer("head/means", "proj_out_means"),
      *_layer("head/logweights", "proj_out_logweights"),
      *_layer("head/logstd_in", "proj_out_logstds.1"),
      *_layer("head/logstd_out", "proj_out_logstds.3"),
  ]


def _diffusers(depth, patch):
  block = "transformer_blocks.{i}.norm1.emb"
  return [
      *_diffusers_blocks(patch),
      *_layer("time_in", f"{block}.timestep_embedder.linear_1", copies=depth),
      *_layer("time_out", f"{block}.timestep_embedder.linear_2", copies=depth),
      Row("class_embed/embedding", (f"{block}.class_embedder.embedding_table.weight",), table.PLAIN, depth),
  ]


def _facebook(depth, patch, sign=lambda transform: transform):
  del depth
  block = "blocks.{i}"
  return [
      *_layer("patch_embed", "x_embedder.proj", kernel=table.patches(patch)),
      *_layer("time_in", "t_embedder.mlp.0"),
      *_layer("time_out", "t_embedder.mlp.2"),
      Row("class_embed/embedding", ("y_embedder.embedding_table.weight",), table.PLAIN),
      *_layer("blocks/adaln", f"{block}.adaLN_modulation.1"),
      *_layer("blocks/attention/qkv", f"{block}.attn.qkv"),
      *_layer("blocks/attention/out", f"{block}.attn.proj", kernel=table.linear(inputs=2)),
      *_layer("blocks/mlp/in", f"{block}.mlp.fc1"),
      *_layer("blocks/mlp/out", f"{block}.mlp.fc2"),
      *_layer("adaln_out", "final_layer.adaLN_modulation.1"),
      *_layer("head/out", "final_layer.linear", kernel=sign(table.linear()), bias=sign(table.FLAT)),
  ]


def _sit(depth, patch):
  # Its velocity is data - noise, ours noise - data.
  return _facebook(depth, patch, sign=table.negated)


_IS_FACEBOOK = lambda keys: "x_embedder.proj.weight" in keys and "blocks.0.attn.qkv.weight" in keys
_HAS_PROJECTORS = lambda keys: any(key.startswith("projectors.") for key in keys)
_POSITIONS = dict(constants=("pos_embed",))

NAMINGS = {
    "release": Naming(
        "pi-Flow's release: FM-DiT teachers, GM-DiT V2, DX and parallel-decoding students",
        lambda keys: "emb.timestep_embedder.linear_1.weight" in keys, _release, dict(frequency_shift=0), "proj_out_2.weight",
        # The one Gaussian of a GM-DiT V1 teacher has a log standard deviation, which a velocity has no use for.
        ignored=(r"gm_out\..*", r"pos_embed\.pos_embed")),
    "diffusers": Naming(
        "diffusers' DiTTransformer2DModel",
        lambda keys: "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in keys, _diffusers,
        dict(frequency_shift=1, time_offset=0.0), "proj_out_2.weight", ignored=(r"pos_embed\.pos_embed",),
        unless_told=dict(mlp_norm_eps=1e-5)),
    "repa": Naming(
        "REPA, SiT's names with time 1 at the noise", lambda keys: _IS_FACEBOOK(keys), _facebook,
        dict(time_scale=1.0, time_offset=0.0, mlp_norm_eps=1e-6, frequency_shift=0), "final_layer.linear.weight",
        ignored=(r"projectors\..*",), **_POSITIONS),
    "sit": Naming(
        "SiT as first released, time 1 at the data, velocity data - noise",
        lambda keys: _IS_FACEBOOK(keys) and not _HAS_PROJECTORS(keys), _sit,
        dict(time_scale=-1.0, time_offset=1.0, mlp_norm_eps=1e-6, frequency_shift=0), "final_layer.linear.weight",
        **_POSITIONS),
    "dit": Naming(
        "facebookresearch/DiT's names", lambda keys: _IS_FACEBOOK(keys) and not _HAS_PROJECTORS(keys), _facebook,
        dict(mlp_norm_eps=1e-6, frequency_shift=0, time_offset=0.0), "final_layer.linear.weight", **_POSITIONS),
}


def namings_of(keys):
  """The namings that a file's keys {key: shape} may be of. DiT, SiT and REPA share theirs but for REPA's projectors."""
  found = [name for name, naming in NAMINGS.items() if naming.recognised(keys)]
  return ["repa"] if "repa" in found and _HAS_PROJECTORS(keys) else found


def first_channels(shape, channels, patch):
  """How many channels an output layer of `shape` (rows, D) has a position, if more than a velocity needs, else None.

  DiT and SiT learned a variance beside (2 C), GM-DiT V1 with one Gaussian a log-weight (C + 1): what comes first counts.
  """
  count = shape[0] // patch**2
  return count if shape[0] % patch**2 == 0 and count in (2 * channels, channels + 1) else None


def cut_channels(array, stored, channels):
  """Rows (p p stored, ...) of an output layer -> (p p channels, ...): the first channels of each position."""
  return array.reshape(-1, stored, *array.shape[1:])[:, :channels].reshape(-1, *array.shape[1:])


def positions(config):
  """The fixed position table [1, tokens, D] that these projects store among the weights."""
  height, width, _ = config.data.shape
  patch = config.network.patch
  return layers.sincos_positions(height // patch, width // patch, config.network.width)[None]


def model_config(config, naming, policy, shift):
  """config.json of an export: what diffusers and pi-Flow's release read, and under "piflow_jax" what sampling needs.

  Args:
    config: of the run.
    naming: name in NAMINGS.
    policy: `policy_config` of the student, or None for a teacher.
    shift: of the noise schedule.
  """
  n, flow = config.network, config.flow
  height, width, channels = config.data.shape
  if naming in ("release", "diffusers"):
    kind = policy["type"] if policy else None
    classes = {
        "GMFlow": "GMDiTTransformer2DModelV2", "DX": "DXDiTTransformer2DModel",
        "ParallelDecoding": "ParallelDiTTransformer2DModel",
        None: "DiTTransformer2DModelMod" if naming == "release" else "DiTTransformer2DModel"}
    of_class = dict(
        _class_name=classes[kind], num_attention_heads=n.heads, attention_head_dim=n.width // n.heads, in_channels=channels,
        num_layers=n.depth, sample_size=height if height == width else [height, width], patch_size=n.patch,
        num_embeds_ada_norm=config.data.num_classes, norm_type="ada_norm_zero", activation_fn="gelu-approximate",
        norm_elementwise_affine=False, norm_eps=n.mlp_norm_eps, attention_bias=True)
    if kind == "GMFlow":
      of_class |= dict(num_gaussians=config.policy.components, logstd_inner_dim=config.policy.logstd_width,
                       gm_num_logstd_layers=2)
    elif kind:
      of_class |= dict(n_grid=config.policy.points if kind == "DX" else config.policy.intervals)
    else:
      of_class |= dict(out_channels=channels)
  else:
    of_class = dict(depth=n.depth, hidden_size=n.width, num_heads=n.heads, patch_size=n.patch, in_channels=channels,
                    input_size=height, num_classes=config.data.num_classes, learn_sigma=False)
  ours = dict(
      naming=naming, policy=policy, latent_shape=[height, width, channels], time_scale=n.time_scale,
      time_offset=n.time_offset, frequency_shift=n.frequency_shift, nfe=flow.nfe, total_substeps=flow.total_substeps,
      final_scale=flow.final_scale, shift=shift, temperature=config.sampling.temperature)
  if naming == "release":
    ours |= dict(release_diffusion=release_diffusion(n))
  return of_class | {"piflow_jax": ours}


def release_diffusion(network):
  """How pi-Flow's release has to be told a network's time, beside its weights; None where it has no words for it.

  The release embeds T t, or T - T t if it is told to flip; both are arguments of its diffusion, not of its network.
  """
  scale, offset = network.time_scale, network.time_offset
  if (scale > 0 and offset == 0) or (scale < 0 and offset == -scale):
    steps = abs(scale)
    return dict(num_timesteps=int(steps) if steps == int(steps) else steps, flip_model_timesteps=scale < 0)
  return None


def network_of(about):
  """Fields of config.network that a config.json tells, of those that the shapes of the weights do not."""
  ours = about.get("piflow_jax")
  ours = ours if isinstance(ours, dict) else {}
  known = {"heads": about.get("num_attention_heads", about.get("num_heads")), "mlp_norm_eps": about.get("norm_eps")}
  known |= {name: ours.get(name) for name in ("time_scale", "time_offset", "frequency_shift")}
  return {name: value for name, value in known.items() if value is not None}


def policy_config(head):
  """The policy of a head, as pi-Flow's release names it and its arguments."""
  if isinstance(head, gmm.GMHead):
    return dict(type="GMFlow")
  if isinstance(head, dx.DXHead):
    return dict(type="DX", segment_size=head.segment, shift=head.shift, mode="polynomial" if head.polynomial else "grid")
  return dict(type="ParallelDecoding", shift=head.shift)


def stored_policy(metadata, about, where):
  """What a file says of its policy: `policy_config` of a student, {} of a teacher, None where it says nothing.

  Raises errors.UserError: what it says is no such thing.
  """
  known = {"GMDiTTransformer2DModelV2": {"type": "GMFlow"}, "DXDiTTransformer2DModel": {"type": "DX"},
           "DiTTransformer2DModel": {}, "DiTTransformer2DModelMod": {}, "GMDiTTransformer2DModel": {}}
  if "policy_config" in metadata:
    said, found = "policy_config in the header", metadata["policy_config"]
    try:
      found = json.loads(found)
    except ValueError:
      pass  # told below, as all that is no table
  elif isinstance(about.get("piflow_jax"), dict):
    said, found = "piflow_jax.policy in config.json", about["piflow_jax"].get("policy") or {}
  else:
    name = about.get("_class_name")
    return known.get(name) if isinstance(name, str) else None
  if not isinstance(found, dict) or (found and not isinstance(found.get("type"), str)):
    raise errors.UserError(f"--source: {where}: {said} is {str(found)[:99]!r}, no table with a type; mend it or take it away")
  # What the release's class takes where nothing else is said.
  return (dict(segment_size=1.0, shift=1.0, mode="grid") if found.get("type") == "DX" else {}) | found


def check_positions(array, config, where):
  """Whether a stored position table is the one that is computed here. Raises errors.UserError."""
  want = positions(config)
  # The training scripts average the table along with the weights, and in float32 0.9999 + 0.0001 is less than 1: it shrinks
  # by up to 2e-4. Another grid or patch is off by more than 1, half precision by 0.004.
  tolerance = 1e-2
  if array.shape != want.shape or np.abs(array.astype(np.float32) - want).max() > tolerance:
    raise errors.UserError(f"{where}: not the sine-cosine table of {want.shape}, which is all that is built here; check "
                           "config.data.shape and config.network.patch")
