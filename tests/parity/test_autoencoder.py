"""The autoencoder against diffusers' AutoencoderKL with the same random weights (float32)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax import weights as weights_lib
from piflow_jax.convert import autoencoder as names
from piflow_jax.convert import run
from piflow_jax.convert import table
from piflow_jax.convert import tiny_autoencoder as tiny_names
from piflow_jax.models import autoencoder
from piflow_jax.models import tiny_autoencoder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD = dict(latent_channels=4, scaling_factor=0.18215)
FLUX = dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False)


def _theirs(widths=(32, 64), **fields):
  """Their model, every tensor re-drawn: fresh, its norms have scale 1 and no bias."""
  levels = len(widths)
  model = diffusers.AutoencoderKL(
      block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * levels,
      up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=2, norm_num_groups=8, **fields).eval()
  generator = torch.Generator().manual_seed(0)
  draw = lambda w: torch.randn(w.shape, generator=generator) * (0.3 if w.ndim < 2 else w[0].numel() ** -0.5)
  model.load_state_dict({name: draw(w) + ("norm" in name and name.endswith("weight"))
                         for name, w in model.state_dict().items()})
  return model


def _converted(folder, tmp_path):
  """(our model, its weights, scales) of a folder, through the converter."""
  run.from_torch(folder, tmp_path / "run")
  return weights_lib.load_autoencoder(tmp_path / "run", jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def _close(got, want, rtol):
  """Of the largest value: two orders of summing in float32, 1e-5 for a layer and 1e-4 for some twenty in a row."""
  want = want.detach().numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(got, want, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("fields", [SD, FLUX, SD | dict(mid_block_add_attention=False)])
def test_encodes_and_decodes_like_the_original(fields, tmp_path):
  model = _theirs(**fields)
  model.save_pretrained(tmp_path / "theirs")
  net, params, scales = _converted(tmp_path / "theirs", tmp_path)
  assert scales == dict(scaling_factor=fields["scaling_factor"], shift_factor=fields.get("shift_factor", 0.0))
  images = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)  # not square
  with torch.no_grad():
    theirs = model.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
    mean, logvar = jax.jit(lambda p: net.apply({"params": p}, images, method="encode"))(params)
    _close(mean, theirs.mean, 1e-4)
    _close(logvar, theirs.logvar, 1e-4)
    assert mean.shape == (2, 12, 8, fields["latent_channels"])
    decoded = jax.jit(lambda p: net.apply({"params": p}, mean, method="decode"))(params)
    _close(decoded, model.decode(theirs.mean).sample, 1e-4)
  scaled = autoencoder.to_latents(mean, **scales)
  np.testing.assert_allclose(scaled, (mean - scales["shift_factor"]) * fields["scaling_factor"], rtol=1e-6)
  np.testing.assert_allclose(autoencoder.from_latents(scaled, **scales), mean, atol=1e-5)

  # And back: the same tensors, a folder that diffusers loads.
  run.to_torch(tmp_path / "run", tmp_path / "ours")
  loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
  for (name, want), got in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
    assert torch.equal(want, got), name
  assert loaded.config.scaling_factor == fields["scaling_factor"]


def test_log_variance_is_clamped_and_bfloat16_computes_near_float32(tmp_path):
  model = _theirs(**FLUX)
  with torch.no_grad():
    model.encoder.conv_out.bias[16:18] = torch.tensor([50.0, -50.0])
  model.save_pretrained(tmp_path / "theirs")
  net, params, _ = _converted(tmp_path / "theirs", tmp_path)
  images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
  mean, logvar = net.apply({"params": params}, images, method="encode")
  with torch.no_grad():
    _close(logvar, model.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist.logvar, 1e-4)
  assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all()
  half = net.clone(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(lambda: half.init(jax.random.key(0), images))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  rough = half.apply({"params": params}, images, method="encode")[0]
  decoded, near = (n.apply({"params": params}, mean, method="decode") for n in (net, half))
  for got, want in ((rough, mean), (near, decoded)):
    assert got.dtype == jnp.float32
    error = float(jnp.abs(got - want).max())
    assert 1e-4 < error < 0.15 * float(jnp.abs(want).max())  # 8 bits of mantissa; and not float32


def test_parts_to_a_layers_tolerance():
  model = _theirs(**SD)
  state = {name: w.numpy() for name, w in model.state_dict().items()}
  # So small that the norms' epsilon counts.
  x = 3e-3 * np.random.default_rng(1).standard_normal((2, 6, 4, 64)).astype(np.float32)
  there = torch.tensor(x.transpose(0, 3, 1, 2))
  rows = {row.here: row for row in names.rows(dict(widths=(32, 64), layers_per_block=2))}

  def part(module, prefix):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))["params"]

    def read(path, leaf):
      row = rows[f"{prefix}/{path}"]
      return row.transform.here(state[row.there[0]], leaf.shape)

    params = params_lib.map_with_path(read, shapes)
    return module.apply({"params": params}, x)

  middle = model.decoder.mid_block
  _close(part(autoencoder.Resnet(64, 8, jnp.float32), "decoder/middle/resnet_0"), middle.resnets[0](there, None), 1e-5)
  _close(part(autoencoder.Attention(8, jnp.float32), "decoder/middle/attention"), middle.attentions[0](there), 1e-5)


@pytest.mark.parametrize("pixel", [False, True])
def test_names_from_before_2023(pixel, tmp_path):
  model = _theirs(**SD)
  model.save_pretrained(tmp_path / "theirs")
  path = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
  _, want, _ = _converted(tmp_path / "theirs", tmp_path / "new")
  old = {}
  for name, w in load_file(path).items():
    for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
      if f".{new}." in name:
        name = name.replace(new, before)
        w = w[..., None, None] if pixel and w.ndim == 2 else w
    old[name] = w
  assert "encoder.mid_block.attentions.0.query.weight" in old
  save_file(old, path)
  _, params, _ = _converted(tmp_path / "theirs", tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, want)


@pytest.mark.parametrize("fields", [SD, FLUX])
def test_every_tensor_of_the_published_models_has_its_place(fields):
  widths = (128, 256, 512, 512)
  with torch.device("meta"):
    model = diffusers.AutoencoderKL(
        block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2, norm_num_groups=32, **fields)
  settings, _ = names.settings_of(dict(model.config))
  net = autoencoder.Autoencoder(**settings)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))["params"]
  entries = table.entries(names.rows(settings), {k: v.shape for k, v in params_lib.named_leaves(shapes).items()}, "SD")
  assert table.check(entries, {k: tuple(v.shape) for k, v in model.state_dict().items()}, "SD") == []


def test_what_does_not_fit_is_told(tmp_path):
  model = _theirs(**SD)
  model.save_pretrained(tmp_path / "theirs")
  path, about = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors", tmp_path / "theirs" / "config.json"
  state = load_file(path)
  save_file({k: v for k, v in state.items() if k != "quant_conv.bias"} | {"odd": np.zeros(1)}, path)
  with pytest.raises(errors.UserError, match="missing: quant_conv.bias; unknown: odd"):
    run.from_torch(tmp_path / "theirs", tmp_path / "run")
  config = json.loads(about.read_text())
  for field, value in (("act_fn", "gelu"), ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
                       ("up_block_types", ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]), ("latents_std", [2.0] * 4)):
    about.write_text(json.dumps(config | {field: value}))
    with pytest.raises(errors.UserError, match=f"{field} is .*; only "):
      run.from_torch(tmp_path / "theirs", tmp_path / "run")
  about.unlink()
  with pytest.raises(errors.UserError, match="no config.json beside"):
    run.from_torch(tmp_path / "theirs", tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_qwens_autoencoder_of_one_image_is_the_original(tmp_path):
  model = diffusers.AutoencoderKLQwenImage(
      base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True], attn_scales=[],
      latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0]).eval()
  generator = torch.Generator().manual_seed(0)
  model.load_state_dict({
      name: torch.randn(w.shape, generator=generator) * (0.3 if w.ndim < 2 or "gamma" in name else w[0].numel() ** -0.5)
      + ("gamma" in name) for name, w in model.state_dict().items()})
  model.save_pretrained(tmp_path / "theirs")
  net, params, scales = _converted(tmp_path / "theirs", tmp_path)
  images = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)  # not square
  with torch.no_grad():
    theirs = model.encode(torch.tensor(images.transpose(0, 3, 1, 2))[:, :, None]).latent_dist
    back = model.decode(theirs.mean).sample
  mean, logvar = jax.jit(lambda p, x: net.apply({"params": p}, x, method="encode"))(params, images)
  _close(mean, theirs.mean[:, :, 0], 1e-4)
  _close(logvar, theirs.logvar[:, :, 0], 1e-4)
  got = jax.jit(lambda p, x: net.apply({"params": p}, x, method="decode"))(params, mean)
  _close(got, back[:, :, 0], 1e-4)
  assert back.abs().max() <= 1 and back.std() > 0.1
  # As the pipeline scales: (z - mean) / deviation.
  mean_, std = (torch.tensor(model.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
  latents = autoencoder.to_latents(mean, **scales)
  _close(latents, (theirs.mean[:, :, 0] - mean_) / std, 1e-4)
  np.testing.assert_allclose(autoencoder.from_latents(latents, **scales), mean, atol=1e-6)
  with pytest.raises(errors.UserError, match="are not written for PyTorch"):
    run.to_torch(tmp_path / "run", tmp_path / "out")


def test_a_tiny_autoencoder_is_the_original_both_ways(tmp_path):
  model = diffusers.AutoencoderTiny(
      latent_channels=6, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
      num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(2, 1, 1)).eval()
  generator = torch.Generator().manual_seed(0)
  model.load_state_dict({name: torch.randn(w.shape, generator=generator) * (0.3 if w.ndim < 2 else w[0].numel() ** -0.5)
                         for name, w in model.state_dict().items()})
  model.save_pretrained(tmp_path / "theirs")
  net, params, scales = _converted(tmp_path / "theirs", tmp_path)
  assert scales == {"scaling_factor": 1.0, "shift_factor": 0.0}
  images = np.random.default_rng(0).uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latents
    back = model.decode(3 * theirs).sample  # beyond 3, where latents are bent
  mean, _ = jax.jit(lambda p, x: net.apply({"params": p}, x, method="encode"))(params, images)
  _close(mean, theirs, 1e-5)
  assert theirs.std() > 0.1 and back.std() > 0.1 and (3 * theirs).abs().max() > 3
  _close(jax.jit(lambda p, x: net.apply({"params": p}, 3 * x, method="decode"))(params, mean), back, 1e-5)
  with pytest.raises(errors.UserError, match="are not written for PyTorch"):
    run.to_torch(tmp_path / "run", tmp_path / "out")
  about = json.loads((tmp_path / "theirs" / "config.json").read_text()) | {"upsampling_scaling_factor": 3}
  (tmp_path / "theirs" / "config.json").write_text(json.dumps(about))
  with pytest.raises(errors.UserError, match="upsampling_scaling_factor is 3"):
    run.from_torch(tmp_path / "theirs", tmp_path / "again")
  # TAEF1's sizes: what it says it is made of there is a place for here.
  full = tiny_names.settings_of({"latent_channels": 16})[0]
  entries = table.entries(tiny_names.rows(full), {path: leaf.shape for path, leaf in params_lib.named_leaves(
      autoencoder.shapes(tiny_autoencoder.TinyAutoencoder(**full))).items()}, "x")
  with torch.device("meta"):
    published = diffusers.AutoencoderTiny(latent_channels=16).state_dict()
  table.check(entries, {name: tuple(w.shape) for name, w in published.items()}, "x")
