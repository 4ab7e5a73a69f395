"""Qwen-Image teachers under diffusers' names, and students of it under those of pi-Flow's release."""

from piflow_jax.convert import joint
from piflow_jax.convert import table


def _rows(weights):
  block = "transformer_blocks.{i}"
  return [
      *joint.layer("patch_embed", "img_in", table.PackedPatches(weights.network.patch)),
      *joint.norm("text_norm", "txt_norm"),
      *joint.layer("text_embed", "txt_in"),
      *joint.stream("blocks/image", block, adaln="img_mod.1", mlp="img_mlp", text=False),
      *joint.stream("blocks/text", block, adaln="txt_mod.1", mlp="txt_mlp", text=True),
      *joint.time_and_head(),
  ]


def _spare(weights):
  # The last block's text goes nowhere, and the release's students have no adapters there.
  last = f"transformer_blocks.{weights.network.depth - 1}.txt_mlp"
  return frozenset(f"{last}.{layer}.lora_{x}.weight" for layer in ("net.0.proj", "net.2") for x in "AB")


def _recognised(keys):
  return "txt_norm.weight" in keys or joint.has_adapters(keys, "img_mlp|txt_mlp|img_mod|txt_mod")


def _about(weights):
  n = weights.network
  found = joint.about(weights, "QwenImageTransformer2DModel", dict(num_layers=n.depth))
  return found | {"out_channels": found["out_channels"] // n.patch**2, "patch_size": n.patch} if (
      not weights.policy) else found


def _sizes(weights):
  return joint.sizes(weights, ("blocks/image/q", "depth"))


NAMINGS = joint.of(
    "Qwen-Image's names in diffusers, and in pi-Flow's release for students of it", _recognised, _rows, _about,
    {"QwenImageTransformer2DModel": None, "GMQwenImageTransformer2DModel": {"type": "GMFlow"}}, _sizes, spare=_spare)
