"""FLUX.1 teachers under diffusers' names, and students of it under those of pi-Flow's release."""

from piflow_jax.convert import joint
from piflow_jax.convert import table


def _rows(weights):
  double, single = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
  found = [
      *joint.layer("patch_embed", "x_embedder", table.PackedPatches(weights.network.patch)),
      *joint.layer("text_embed", "context_embedder"),
      *joint.stream("double_blocks/image", double, adaln="norm1.linear", mlp="ff", text=False),
      *joint.stream("double_blocks/text", double, adaln="norm1_context.linear", mlp="ff_context", text=True),
      *joint.layer("single_blocks/adaln", f"{single}.norm.linear"),
      *joint.layer("single_blocks/mlp_in", f"{single}.proj_mlp"),
      *joint.layer("single_blocks/out", f"{single}.proj_out"),
  ]
  for name in "qkv":
    found += joint.layer(f"single_blocks/{name}", f"{single}.attn.to_{name}")
  for name in "qk":
    found += joint.norm(f"single_blocks/{name}_norm", f"{single}.attn.norm_{name}")
  for here, there in (("guidance", "guidance_embedder"), ("pooled", "text_embedder")):
    found += joint.layer(f"{here}_in", f"time_text_embed.{there}.linear_1")
    found += joint.layer(f"{here}_out", f"time_text_embed.{there}.linear_2")
  return found + joint.time_and_head()


def _recognised(keys):
  return "context_embedder.weight" in keys or joint.has_adapters(keys, "attn|ff|ff_context|proj_mlp|proj_out|norm1?")


def _about(weights):
  n, pooled = weights.network, weights.spec.cond.get("pooled")
  return joint.about(weights, "FluxTransformer2DModel", dict(
      num_layers=n.double_depth, num_single_layers=n.single_depth, guidance_embeds=bool(n.guidance),
      pooled_projection_dim=pooled.shape[0] if pooled else 0))


def _stated(about):
  return joint.stated(about) | ({"guidance": 0.0} if about.get("guidance_embeds") is False else {})


def _sizes(weights):
  return joint.sizes(weights, ("double_blocks/image/q", "double_depth"), ("single_blocks/q", "single_depth"))


def _refuse(weights):
  return "" if "pooled" in weights.spec.cond else "it has no networks without a pooled text"


NAMINGS = joint.of(
    "FLUX.1's names in diffusers, and in pi-Flow's release for students of it", _recognised, _rows, _about,
    {"FluxTransformer2DModel": None, "GMFluxTransformer2DModel": {"type": "GMFlow"}}, _sizes, stated=_stated,
    refuse=_refuse)
