"""Files of adapters between four namings, and what is wrong with them in a line. Against diffusers: tests/parity."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from piflow_jax import errors
from piflow_jax.convert import __main__ as convert
from piflow_jax.convert import adapters

MODULES = {  # (in, out) of FLUX.1's layers at a width of 8
    "transformer_blocks.0.attn.to_q": (8, 8), "transformer_blocks.0.attn.to_v": (8, 8),
    "transformer_blocks.3.ff_context.net.0.proj": (8, 32), "single_transformer_blocks.12.proj_mlp": (8, 32),
    "single_transformer_blocks.12.proj_out": (40, 8), "norm_out.linear": (8, 16),
    "time_text_embed.guidance_embedder.linear_2": (8, 8)}


def _loaded(scale=0.5):
  rng = np.random.default_rng(0)
  found = {name: adapters.Adapter(rng.standard_normal((2, i), np.float32),
                                  rng.standard_normal((o, 2), np.float32), scale) for name, (i, o) in MODULES.items()}
  return adapters.Loaded(found, {"proj_out.bias": np.ones(3, np.float32)}, {"policy_config": '{"type": "DX"}'}, {})


def _invoke(*args):
  return convert.invoke(["convert", "adapters", *map(str, args)])


@pytest.mark.parametrize("naming", adapters.NAMINGS)
def test_every_naming_says_the_same_deltas(naming, tmp_path, capsys):
  loaded = _loaded()
  adapters.write(tmp_path / "first", loaded, "release")
  assert _invoke(f"--source={tmp_path / 'first'}", f"--out={tmp_path / 'out'}", f"--format={naming}") == (0, "")
  back = adapters.read(tmp_path / "out")
  want = {name: one.delta for name, one in loaded.adapters.items()}
  if naming == "kohya":  # q, k and v are one layer there, and so are the four of a single block
    zero = {"transformer_blocks.0.attn.to_k": (8, 8)} | {
        f"single_transformer_blocks.12.attn.to_{c}": (8, 8) for c in "qkv"}
    want |= {name: np.zeros(shape, np.float32) for name, shape in zero.items()}
  assert back.adapters.keys() == want.keys()
  for name, delta in want.items():
    np.testing.assert_allclose(back.adapters[name].delta, delta, atol=1e-6, err_msg=name)
  assert set(back.others) == ({"proj_out.bias"} if naming == "release" else set())
  said = capsys.readouterr().out
  assert f"as {naming} has them" in said and ("left out: proj_out.bias" in said) == (naming != "release")


def test_alpha_counts_as_each_naming_says_it(tmp_path):
  a, b = np.ones((4, 8), np.float32), np.ones((8, 4), np.float32)
  keys = {"base_model.model.x.to_q.lora_A.weight": a, "base_model.model.x.to_q.lora_B.weight": b}
  for settings, scale in (({}, 1.0), (dict(lora_alpha=8), 2.0), (dict(lora_alpha=8, use_rslora=True), 4.0),
                          (dict(lora_alpha=8, alpha_pattern={"to_q": 2}), 0.5)):
    folder = tmp_path / f"{scale}"
    folder.mkdir()
    save_file(keys, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert adapters.read(folder).adapters["x.to_q"].scale == scale
  save_file({"lora_unet_double_blocks_1_img_mlp_2.lora_down.weight": a, "lora_te1_x.lora_down.weight": a,
             "lora_unet_double_blocks_1_img_mlp_2.lora_up.weight": b,
             "lora_unet_double_blocks_1_img_mlp_2.alpha": np.array(1, np.float32)}, tmp_path / "kohya.safetensors")
  assert {k: v.scale for k, v in adapters.read(tmp_path / "kohya.safetensors").adapters.items()} == {
      "transformer_blocks.1.ff.net.2": 0.25}
  adapters.write(tmp_path / "peft", _loaded(scale=3.0), "peft")
  about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
  assert (about["r"], about["lora_alpha"], about["peft_type"]) == (2, 6.0, "LORA")
  assert all(key.startswith("base_model.model.") for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))


def test_what_is_wrong_with_a_file_is_one_line(tmp_path):
  a, b, path = np.ones((4, 8), np.float32), np.ones((8, 4), np.float32), tmp_path / "x.safetensors"
  for tensors, words in (
      ({"x.lora_A.weight": a}, "the adapter of x is"), ({"x.lora_A.weight": a, "x.lora_B.weight": a}, "make one"),
      ({"x.weight": a}, "holds no adapters"),
      ({"x.lora_A.weight": a, "x.lora_B.weight": b * np.nan}, "holds NaN or infinity, in its b"),
      ({"lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight": a,
        "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight": b}, "which are not those of three layers of 8")):
    save_file(tensors, path)
    with pytest.raises(errors.UserError, match="^--lora: ") as e:
      adapters.read(path, "--lora")
    assert words in str(e.value) and "\n" not in str(e.value)
  status, line = _invoke(f"--source={path}", f"--out={tmp_path / 'o'}", "--format=x")
  assert status == 2 and "--format: 'x' is none of release, diffusers, peft, kohya" in line
  status, line = _invoke(f"--source={path}", "--format=peft")
  assert status == 2 and line.startswith("--out: missing")
  status, line = _invoke(f"--source={path}", f"--out={tmp_path / 'o'}", "--format=peft", "--dtype=bfloat16")
  assert status == 2 and "--dtype: adapters does not read it" in line
  assert not (tmp_path / "o").exists()
