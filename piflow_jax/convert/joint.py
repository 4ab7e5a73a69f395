"""What the files of FLUX.1's and Qwen-Image's names share: tables of rows, heads on packed tokens, config.json."""

import re

from piflow_jax import config as config_lib
from piflow_jax import lora
from piflow_jax.convert import naming
from piflow_jax.convert import table
from piflow_jax.convert.table import Row

PACKED, PACKED_FLAT = table.Packed(), table.PackedFlat()


def layer(here, there, kernel=table.Linear(), bias=table.FLAT):
  """The rows of a linear layer and of its adapter."""
  return [Row(f"{here}/kernel", (f"{there}.weight",), kernel), Row(f"{here}/bias", (f"{there}.bias",), bias),
          Row(f"{here}/{lora.A}", (f"{there}.lora_A.weight",), table.Linear()),
          Row(f"{here}/{lora.B}", (f"{there}.lora_B.weight",), table.Linear())]


def norm(here, there):
  """The row of an RMSNorm."""
  return [Row(f"{here}/scale", (f"{there}.weight",), table.PLAIN)]


def stream(here, block, *, adaln, mlp, text):
  """The rows of one of the two streams of a double block."""
  q, k, v, out = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out") if text else ("to_q", "to_k", "to_v",
                                                                                      "to_out.0")
  added = "added_" if text else ""
  return [
      *layer(f"{here}/adaln", f"{block}.{adaln}"),
      *layer(f"{here}/q", f"{block}.attn.{q}"), *layer(f"{here}/k", f"{block}.attn.{k}"),
      *layer(f"{here}/v", f"{block}.attn.{v}"), *layer(f"{here}/out", f"{block}.attn.{out}"),
      *norm(f"{here}/q_norm", f"{block}.attn.norm_{added}q"), *norm(f"{here}/k_norm", f"{block}.attn.norm_{added}k"),
      *layer(f"{here}/mlp_in", f"{block}.{mlp}.net.0.proj"), *layer(f"{here}/mlp_out", f"{block}.{mlp}.net.2"),
  ]


def time_and_head():
  """The rows of the time's layers, the last norm's and all heads'."""
  return [
      *layer("time_in", "time_text_embed.timestep_embedder.linear_1"),
      *layer("time_out", "time_text_embed.timestep_embedder.linear_2"),
      *layer("adaln_out", "norm_out.linear"),
      # Rows are ordered component or point where there are some, then channel, then position in the patch.
      *layer("head/out", "proj_out", PACKED, PACKED_FLAT),
      *layer("head/means", "proj_out_means", PACKED, PACKED_FLAT),
      *layer("head/logweights", "proj_out_logweights", PACKED, PACKED_FLAT),
      *layer("head/logstd_in", "proj_out_logstds.1"),
      *layer("head/logstd_out", "proj_out_logstds.3"),
  ]


def has_adapters(keys, words):
  """Whether keys are those of an adapter of blocks that have one of the words in their names."""
  return any(re.match(rf"(single_)?transformer_blocks\.\d+\.({words})\..*lora_A\.weight$", key) for key in keys)


def about(weights, name, fields):
  """config.json: diffusers' own fields and, of a student, those of its head.

  Args:
    weights: `naming.Weights`.
    name: diffusers' class; a GM student's is the release's own.
    fields: of the network, as diffusers has them.
  """
  n, channels = weights.network, weights.spec.x_0[-1]
  found = dict(
      _class_name=name, patch_size=1, in_channels=n.patch**2 * channels, out_channels=n.patch**2 * channels,
      num_attention_heads=n.heads, attention_head_dim=sum(n.axes), axes_dims_rope=list(n.axes),
      joint_attention_dim=weights.spec.cond["text"].shape[1]) | fields
  if weights.policy and weights.policy["type"] == "GMFlow":
    head = weights.head
    found |= dict(
        _class_name=f"GM{name}", num_gaussians=head.components, constant_logstd=None,
        logstd_inner_dim=head.logstd_width, gm_num_logstd_layers=2, logweights_channels=n.patch**2)
    del found["patch_size"]
  elif weights.policy:
    count = getattr(weights.head, "points", None) or weights.head.intervals
    found["out_channels"] *= count
  ours = {name: n[name] for name in ("half_times", "patch", "guidance", "masked") if name in n}
  return found | {"piflow_jax": ours}


def stated(about_):
  """Fields of config.network that a config.json says. Raises ValueError: a value that is none."""
  found, ours = {}, about_.get("piflow_jax")
  if about_.get("num_attention_heads") is not None:
    config_lib.whole("num_attention_heads", about_["num_attention_heads"])
    found["heads"] = about_["num_attention_heads"]
  if (axes := about_.get("axes_dims_rope")) is not None:
    if not isinstance(axes, list):
      raise ValueError(f"axes_dims_rope: {axes!r} is no list")
    found["axes"] = axes
  if isinstance(ours, dict):
    found |= {name: ours[name] for name in ("half_times", "patch") if name in ours}
  return found


def sizes(weights, *depths):
  """Sizes that say a field is another; depths are (leaf, field)."""
  n = weights.network
  found = [table.Size(f"{leaf}/kernel", None, f"{weights.field}.{field}", n[field]) for leaf, field in depths]
  found.append(table.Size(f"{depths[0][0]}/kernel", 0, f"{weights.field}.heads", n.heads))
  for leaf, field in (("head/logweights/kernel", "components"), ("head/logstd_in/kernel", "logstd_width"),
                      ("head/out/kernel", "points"), ("head/out/kernel", "intervals")):
    if hasattr(weights.head, field):
      found.append(table.Size(leaf, 0, f"config.policy.{field}", getattr(weights.head, field)))
  adapters = [path for path in weights.leaves if path.endswith(f"/{lora.A}")]
  if adapters:
    found.append(table.Size(adapters[0], 0, "config.lora.rank", weights.config.lora.rank))
  return found


def of(says, recognised, rows, about_, classes, sizes_, **more):
  """The one naming that such a network has: diffusers', and pi-Flow's release for students."""
  def with_scale(weights):
    # The release's files know no alpha: there an adapter counts once.
    noun = weights.config.lora
    scale = lora.make(**config_lib.fields_of(noun)).scale if noun else 1.0
    return [row._replace(transform=table.Scaled(row.transform, scale))
            if scale != 1 and row.here.endswith(f"/{lora.B}") else row for row in rows(weights)]

  given = dict(students=True, alone=True, stated=stated, classes=classes, sizes=sizes_,
               beside=("piflow_text_to_image.py", "piflow_policy.py"))
  return {"release": naming.Naming(says, recognised, with_scale, about_, **given | more)}
