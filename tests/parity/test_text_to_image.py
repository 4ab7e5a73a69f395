"""FLUX.1 and Qwen-Image against diffusers' with the same random weights, through the converters (float32)."""

import importlib
import inspect
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.torch import load_file
from safetensors.torch import save_file

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import flow
from piflow_jax import lora
from piflow_jax import params as params_lib
from piflow_jax import sampler
from piflow_jax import teacher
from piflow_jax import weights as weights_lib
from piflow_jax import workdir as workdir_lib
from piflow_jax.convert import adapters
from piflow_jax.convert import run
from piflow_jax.convert import trees
from piflow_jax.data import texts
from piflow_jax.distill import flow_matching
from piflow_jax.distill import imitation
from piflow_jax.models import flux
from piflow_jax.models import joint
from piflow_jax.models import qwen_image
from piflow_jax.policy import gmm
from tests.convert import making

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

AXES, WIDTH = (4, 6, 6), 32
# From 0.37 on diffusers' Qwen-Image leaves padding out of attention, and is not told how long the texts are.
_MASKED = "txt_seq_lens" not in inspect.signature(diffusers.QwenImageTransformer2DModel.forward).parameters
TARGETS = {"flux": ("double_blocks/(image|text)/(mlp_in|mlp_out)", "single_blocks/(mlp_in|out)", "time_(in|out)"),
           "qwen": ("blocks/(image|text)/(mlp_in|mlp_out)", "time_(in|out)")}


def _config(kind, role="teacher", shape=(4, 6, 4)):
  c = config_lib.base()
  c.data = texts.config(shape=shape, tokens=5, width=24, pooled=16 if kind == "flux" else 0, padded=kind == "flux",
                        encoder=f"{kind}:x")
  shared = dict(heads=2, axes=AXES, dtype="float32", remat="none")
  c.network = (flux.config(double_depth=2, single_depth=3, **shared) if kind == "flux" else
               qwen_image.config(depth=3, **shared))
  c.flow = flow.config(shift=3.2)
  if role == "teacher":
    c.method = flow_matching.config(label_dropout=0.0)
    return c
  c.teacher = teacher.config(guidance_scale=0.0 if kind == "flux" else 4.0)
  c.method = imitation.config(nfe=4, final_scale=0.5)
  c.policy = gmm.config(components=3, logstd_width=16, temperature=0.3)
  c.lora = lora.config(rank=4, alpha=8.0, targets=TARGETS[kind])
  c.trained = ("adaln_out/.*", "head/.*")
  c.sampling.nfe = 4
  return c


def theirs(kind):
  """diffusers' model of the same sizes, every tensor drawn anew."""
  shared = dict(patch_size=1, in_channels=16, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=24,
                axes_dims_rope=AXES)
  if kind == "flux":
    model = diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=3, pooled_projection_dim=16, guidance_embeds=True, **shared)
  else:
    model = diffusers.QwenImageTransformer2DModel(num_layers=3, out_channels=4, **shared | dict(patch_size=2))
  generator = torch.Generator().manual_seed(0)
  state = {name: torch.randn(w.shape, generator=generator) * (0.1 if w.ndim < 2 else w[0].numel() ** -0.5)
           + (1.0 if ".norm" in name and w.ndim == 1 and "linear" not in name or name == "txt_norm.weight" else 0.0)
           for name, w in model.state_dict().items()}
  model.load_state_dict(state)
  return model.eval()


def _packed(x):
  b, c, h, w = x.shape
  return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def _unpacked(y, shape):
  b, c, h, w = shape
  return y.reshape(b, h // 2, w // 2, -1, c, 2, 2).permute(0, 3, 4, 1, 5, 2, 6).reshape(b, -1, c, h, w)


def _their_tokens(kind, model, x, t, cond):
  """What diffusers' model says at each token, and the shape of x there."""
  x, text = torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(cond["text"])
  grid = x.shape[2] // 2, x.shape[3] // 2
  more = {}
  if kind == "flux":
    ids = torch.zeros(*grid, 3)
    ids[..., 1] += torch.arange(grid[0])[:, None]
    ids[..., 2] += torch.arange(grid[1])[None]
    more = dict(img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(text.shape[1], 3), guidance=torch.full((len(x),), 3.5),
                pooled_projections=torch.tensor(cond["pooled"]))
  else:
    more = dict(img_shapes=[[(1, *grid)]] * len(x), encoder_hidden_states_mask=torch.tensor(cond["mask"]))
    if not _MASKED:
      more["txt_seq_lens"] = [text.shape[1]] * len(x)
  with torch.no_grad():
    return model(hidden_states=_packed(x), timestep=torch.tensor(t), encoder_hidden_states=text, return_dict=False,
                 **more)[0], x.shape


def _their_velocity(*args):
  return _unpacked(*_their_tokens(*args))[:, 0].numpy().transpose(0, 2, 3, 1)


def _inputs(kind, shape, batch=2):
  rng = np.random.default_rng(1)
  cond = {"text": rng.standard_normal((batch, 5, 24), np.float32)}
  cond |= {"pooled": rng.standard_normal((batch, 16), np.float32)} if kind == "flux" else {
      "mask": np.ones((batch, 5), np.int32)}
  return rng.standard_normal((batch, *shape), np.float32), np.array([0.37, 1.0], np.float32)[:batch], cond


def _velocity(config, params, x, t, cond):
  run_ = build.run(config)
  return np.asarray(jax.jit(build.velocity_net(run_.network, run_.data.spec).apply)(params, x, t, cond))


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_diffusers_model_is_ours_and_ours_is_theirs(kind, tmp_path):
  model, config = theirs(kind), _config(kind)
  model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
  assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
  run.from_torch(tmp_path / "theirs", tmp_path / "run", config)
  params = making.weights(config, tmp_path / "run")
  for shape in ((4, 6, 4), (10, 4, 4)):  # two aspects
    x, t, cond = _inputs(kind, shape)
    want = _their_velocity(kind, model, x, t, cond)
    assert np.abs(want).max() > 0.5
    # Time features of 1000 t are float32's rounding of angles up to 1000.
    np.testing.assert_allclose(_velocity(_config(kind, shape=shape), params, x, t, cond), want,
                               atol=1e-4 * np.abs(want).max())
  run.to_torch(tmp_path / "run", tmp_path / "ours", config)
  loaded = type(model).from_pretrained(tmp_path / "ours")
  for (name, want), got in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
    assert torch.equal(want, got), name


def test_padding_counts_as_in_the_diffusers_that_is_installed(tmp_path):
  model, config = theirs("qwen"), _config("qwen")
  model.save_pretrained(tmp_path / "theirs")
  run.from_torch(tmp_path / "theirs", tmp_path / "run", config)
  x, t, cond = _inputs("qwen", (4, 6, 4))
  cond["mask"][1, 3:] = 0
  cond["text"][1, 3:] = 0
  want = _their_velocity("qwen", model, x, t, cond)
  config.network.masked = _MASKED
  got = _velocity(config, making.weights(config, tmp_path / "run"), x, t, cond)
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
  config.network.masked = not _MASKED
  other = _velocity(config, making.weights(config, tmp_path / "run"), x, t, cond)
  assert np.abs(other[1] - want[1]).max() > 0.01  # it does count


@pytest.mark.parametrize("kind, ours, at, blocks", [
    ("flux", "double_blocks", 1, "transformer_blocks"), ("flux", "single_blocks", 2, "single_transformer_blocks"),
    ("qwen", "blocks", 1, "transformer_blocks")])
def test_a_block_alone(kind, ours, at, blocks, tmp_path):
  model, config = theirs(kind), _config(kind)
  model.save_pretrained(tmp_path / "theirs")
  run.from_torch(tmp_path / "theirs", tmp_path / "run", config)
  block, seen = getattr(model, blocks)[at], {}
  block.register_forward_hook(lambda _, args, given, out: seen.update(given, args=args, out=out), with_kwargs=True)
  _their_tokens(kind, model, *_inputs(kind, (4, 6, 4)))
  given = [seen[name] if name in seen else seen["args"][i] for i, name in enumerate(
      ("hidden_states", "encoder_hidden_states"))]
  image, text = (x.numpy() for x in given)
  positions = {"flux": flux, "qwen": qwen_image}[kind].positions(2, 3, text.shape[1])
  single = ours.startswith("single")
  module = (joint.SingleBlock if single else joint.DoubleBlock)(WIDTH, 2, 4, "xla", jnp.float32)
  params = jax.tree.map(lambda leaf: leaf[at], making.weights(config, tmp_path / "run")[ours])
  got, _ = module.apply({"params": params}, np.concatenate([image, text], 1) if single else (image, text),
                        seen["temb"].numpy(), joint.rotary(positions, AXES), None)
  got = np.split(got, [image.shape[1]], 1) if single else got
  for mine, his in zip(got, reversed(seen["out"]), strict=True):  # theirs is (text, image)
    np.testing.assert_allclose(mine, his.numpy(), atol=1e-5 * his.abs().max())


def _trained_student(kind, tmp_path):
  """(config, workdir) of a student whose trained arrays are random."""
  config = _config(kind, "student")
  theirs(kind).save_pretrained(tmp_path / "theirs")
  run.from_torch(tmp_path / "theirs", tmp_path / "teacher", _config(kind))
  config.teacher.checkpoint = str(tmp_path / "teacher")
  run_ = build.run(config)
  rng = np.random.default_rng(2)
  trained = {path: rng.standard_normal(leaf.shape, np.float32) * 0.1
             for path, leaf in params_lib.named_leaves(run_.student.trained).items()}
  weights_lib.save_weights(tmp_path / "student", trained.items())
  workdir_lib.write(tmp_path / "student", config)
  return config, tmp_path / "student", run_


def _loaded(workdir, run_):
  local = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=local), run_.student.trained)
  return weights_lib.load(workdir, placed, "ema", "--workdir")


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_a_students_adapters_load_into_diffusers_and_say_the_same(kind, tmp_path):
  config, workdir, run_ = _trained_student(kind, tmp_path)
  run.to_torch(workdir, tmp_path / "out")
  about = json.loads((tmp_path / "out" / "config.json").read_text())
  assert about["_class_name"] == {"flux": "GMFluxTransformer2DModel", "qwen": "GMQwenImageTransformer2DModel"}[kind]
  state = load_file(tmp_path / "out" / making.FILE)
  # As the release's loader does it: what has "lora" in its name is an adapter, the rest stands in the base's place.
  model = theirs(kind)
  adapters = {k: v for k, v in state.items() if "lora" in k}
  others = {k: v for k, v in state.items() if "lora" not in k}
  assert set(others) == {"norm_out.linear.weight", "norm_out.linear.bias", *(
      f"proj_out_{n}.{w}" for n in ("means", "logweights", "logstds.1", "logstds.3") for w in ("weight", "bias"))}
  if kind == "qwen":
    assert not any(k.startswith("transformer_blocks.2.txt_mlp") for k in adapters)  # unused in the last block
  model.load_lora_adapter(adapters, prefix=None)
  model.eval()
  model.norm_out.linear.weight.data, model.norm_out.linear.bias.data = (
      others[f"norm_out.linear.{w}"] for w in ("weight", "bias"))
  means = torch.nn.Linear(WIDTH, 48)
  means.weight.data, means.bias.data = others["proj_out_means.weight"], others["proj_out_means.bias"]
  model.proj_out = means
  x, t, cond = _inputs(kind, (4, 6, 4))
  teacher_params = making.weights(_config(kind), tmp_path / "teacher")
  params = jax.tree.map(jax.numpy.asarray, _loaded(workdir, run_))
  apply = jax.jit(lambda p, b: run_.student.policy(p, b, x, t, cond, run_.method.clock))
  policy = apply(params, teacher_params)
  got = np.asarray(x.reshape(2, 24, 4).transpose(0, 2, 1)[:, :, None] - policy.means) / t[:, None, None, None]
  # Components first, then channels, then cells there.
  y, _ = _their_tokens(kind, model, x, t, cond)
  want = y.reshape(2, 2, 3, 3, 4, 2, 2).permute(0, 4, 3, 1, 5, 2, 6).reshape(2, 4, 3, 24).numpy()
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_a_students_file_comes_back_and_its_pipeline_config_says_its_policy(kind, tmp_path):
  config, workdir, run_ = _trained_student(kind, tmp_path)
  run.to_torch(workdir, tmp_path / "out")
  run.from_torch(tmp_path / "out", tmp_path / "back", config)
  back, was = (_loaded(folder, run_) for folder in (tmp_path / "back", workdir))
  for name, leaf in params_lib.named_leaves(was).items():
    again = params_lib.named_leaves(back)[name]
    if kind == "qwen" and name.startswith("blocks/text") and "lora" in name:
      leaf, again = leaf[:-1], again[:-1]  # of the last block nothing is written, and zeros come back
    np.testing.assert_array_equal(again, leaf, err_msg=name)  # its scale, 2, is in the file's numbers and out again


@pytest.mark.parametrize("fault", ["missing", "misshaped", "nan"])
def test_one_tensor_that_is_not_as_it_should_be_is_named(fault, tmp_path):
  theirs("flux").save_pretrained(tmp_path / "theirs")
  path = next((tmp_path / "theirs").glob("*.safetensors"))
  state, name = load_file(path), "transformer_blocks.1.attn.to_add_out.bias"
  words = {"missing": f"missing: {name}", "misshaped": rf"{name}.*\(31,\)", "nan": f"NaN or infinity, in {name}"}[fault]
  if fault == "missing":
    del state[name]
  elif fault == "misshaped":
    state[name] = state[name][1:]
  else:
    state[name][3] = torch.nan
  save_file(state, path)
  with pytest.raises(errors.UserError, match=words):
    run.from_torch(tmp_path / "theirs", tmp_path / "run", _config("flux"))
  assert not (tmp_path / "run").exists()


def _style(kind, rank=2, names=None):
  """A LoRA that PEFT itself made and changed: (model with it, its state dict)."""
  model = theirs(kind)
  peft = pytest.importorskip("peft")
  known = {"flux": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                    "ff.net.0.proj", "ff_context.net.2", "norm1.linear", "proj_mlp", "norm.linear"],
           "qwen": ["to_q", "add_v_proj", "to_add_out", "img_mlp.net.2", "txt_mod.1"]}[kind]
  model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names or known))
  model.eval()
  generator = torch.Generator().manual_seed(5)
  for name, w in model.named_parameters():
    if "lora_" in name:
      w.data = 0.3 * torch.randn(w.shape, generator=generator)
  return model


@pytest.mark.parametrize("naming", adapters.NAMINGS)
@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_adapters_of_others_merge_into_the_same_network_in_each_naming(kind, naming, tmp_path):
  model = _style(kind)
  model.save_lora_adapter(tmp_path / "peft")  # without a prefix, alpha in the header
  theirs(kind).save_pretrained(tmp_path / "base")
  run.from_torch(tmp_path / "base", tmp_path / "run", _config(kind))
  loaded = adapters.read(tmp_path / "peft")
  assert {a.scale for a in loaded.adapters.values()} == {2.0}
  adapters.write(tmp_path / "other", loaded, naming)
  again = adapters.read(tmp_path / "other")
  config = _config(kind)
  weights, _ = trees.weights_of(config)
  params = adapters.merged(making.weights(config, tmp_path / "run"), adapters.deltas(again, weights, 1.0, "x"))
  x, t, cond = _inputs(kind, (4, 6, 4))
  want = _their_velocity(kind, model, x, t, cond)
  plain = _their_velocity(kind, theirs(kind), x, t, cond)
  assert np.abs(want - plain).max() > 0.1
  np.testing.assert_allclose(_velocity(config, params, x, t, cond), want, atol=1e-4 * np.abs(want).max())
  half = adapters.merged(making.weights(config, tmp_path / "run"), adapters.deltas(again, weights, 0.5, "x"))
  model.set_adapters("default", 0.5)
  want = _their_velocity(kind, model, x, t, cond)
  np.testing.assert_allclose(_velocity(config, half, x, t, cond), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("naming", ["diffusers", "peft", "kohya"])
def test_adapters_from_here_load_into_diffusers_in_each_naming(naming, tmp_path):
  peft = pytest.importorskip("peft")
  from diffusers.loaders import lora_conversion_utils
  # Of what Kohya's single blocks have in one layer diffusers knows the sizes by heart: 3072 and 12288.
  double = r"transformer_blocks\.\d+\.(attn\.(to_.|to_out\.0|add_._proj)|ff\.net\.2|norm1\.linear)|.*\.proj_out"
  model = _style("flux", names=double if naming == "kohya" else None)
  model.save_lora_adapter(tmp_path / "peft")
  adapters.write(tmp_path / "other", adapters.read(tmp_path / "peft"), naming)
  fresh = theirs("flux")
  path = next((tmp_path / "other").glob("*.safetensors"))
  state = load_file(path)
  if naming == "peft":
    about = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    kept = peft.LoraConfig(**{k: v for k, v in about.items() if k != "peft_type"})
    fresh.add_adapter(kept)
    peft.set_peft_model_state_dict(fresh, state)
  elif naming == "kohya":
    # diffusers folds alpha into A and B.
    turned = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(state)
    fresh.load_lora_adapter({k.removeprefix("transformer."): v for k, v in turned.items()}, prefix=None)
  else:
    with safetensors.safe_open(path, "pt") as file:
      metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    fresh.load_lora_adapter(state, metadata=metadata)
  fresh.eval()
  x, t, cond = _inputs("flux", (4, 6, 4))
  want = _their_velocity("flux", model, x, t, cond)
  np.testing.assert_allclose(_their_velocity("flux", fresh, x, t, cond), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_a_students_export_is_sampled_by_pytorch_alone(kind, tmp_path, monkeypatch):
  config, workdir, run_ = _trained_student(kind, tmp_path)
  run.to_torch(workdir, tmp_path / "out")
  x, _, cond = _inputs(kind, (4, 6, 4))
  if kind == "qwen":  # prompts of several lengths
    cond["mask"][0, 3:] = 0
    cond["text"][0, 3:] = 0
  teacher_params = making.weights(_config(kind), tmp_path / "teacher")
  clock = build.sampling_clock(config, run_)

  @jax.jit
  def draw(params, base, noise):
    return sampler.sample(run_.method.flow_map(params, base, cond, clock), noise, None, clock)

  want = np.asarray(draw(_loaded(workdir, run_), teacher_params, x)).transpose(0, 3, 1, 2)
  for name in ("piflow_text_to_image", "piflow_policy"):
    monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.syspath_prepend(str(tmp_path / "out"))
  alone = importlib.import_module("piflow_text_to_image")
  assert alone.__file__.startswith(str(tmp_path / "out"))
  model = alone.load(tmp_path / "out", tmp_path / "theirs")
  got = alone.sample(model, torch.tensor(x.transpose(0, 3, 1, 2)), {k: torch.tensor(v) for k, v in cond.items()})
  assert np.abs(want).max() > 0.3
  np.testing.assert_allclose(got.numpy(), want, atol=2e-4 * np.abs(want).max())
