"""Files that are broken, or made to harm: one line, and nothing left. No PyTorch needed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from piflow_jax import errors
from piflow_jax import lock
from piflow_jax import weights as weights_lib
from piflow_jax import workdir as workdir_lib
from piflow_jax.convert import __main__ as program
from piflow_jax.convert import autoencoder
from piflow_jax.convert import files
from piflow_jax.convert import run
from piflow_jax.convert import table
from piflow_jax.models import autoencoder as autoencoder_lib
from piflow_jax.params import named_leaves
from tests.convert import making
from tests.convert.making import FILE


def _refused(words, source, workdir, config=None, **more):
  """Holds that a file is refused in one line of some length, and leaves nothing."""
  with pytest.raises(errors.UserError, match=words) as e:
    run.from_torch(source, workdir, config, **more)
  assert len(str(e.value)) < 3000 and not workdir.exists()


@pytest.mark.parametrize("value, dtype", [(np.nan, np.float32), (np.inf, np.float16), (-np.inf, np.float32),
                                          (1e300, np.float64)])  # more than float32 holds
def test_weights_that_are_not_finite_are_refused(value, dtype, tmp_path):
  state = {key: array.astype(dtype) for key, array in making.state("dit_teacher").items()}
  for key in ("proj_out_1.bias", "transformer_blocks.0.ff.net.2.bias", "transformer_blocks.1.ff.net.2.bias"):
    state[key].flat[3] = value
  save_file(state, tmp_path / FILE)
  _refused("holds NaN or infinity, in .*transformer_blocks.0-1.ff.net.2.bias", tmp_path / FILE, tmp_path / "run",
           making.config("teacher"))
  with pytest.raises(errors.UserError, match="proj_out_1.bias"):
    run.from_torch(tmp_path / FILE, tmp_path / "run", making.config("teacher"))


def test_a_workdir_keeps_what_it_had_where_a_file_is_refused(tmp_path):
  state = making.state("dit_teacher")
  state["proj_out_1.bias"][0] = np.nan
  save_file(state, tmp_path / FILE)
  workdir_lib.write(tmp_path / "run", making.config("gm"))  # of a run that has saved nothing
  (tmp_path / "run" / "notes.txt").write_text("mine")
  before = (tmp_path / "run" / "config.json").read_text()
  with pytest.raises(errors.UserError, match="NaN"):
    run.from_torch(tmp_path / FILE, tmp_path / "run", making.config("teacher"))
  assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "notes.txt"]
  assert (tmp_path / "run" / "config.json").read_text() == before


def test_an_export_of_weights_that_are_not_finite_is_refused(tmp_path):
  config = making.config("gm")
  tree = making.random(config)
  tree["head"]["means"]["bias"][0, 0, 0] = np.inf
  making.save(tmp_path / "run", tree)
  with pytest.raises(errors.UserError, match="--workdir: .*run' holds NaN or infinity, in proj_out_means.bias"):
    run.to_torch(tmp_path / "run", tmp_path / "new" / "out", config)
  assert not (tmp_path / "new").exists()


_DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["config.json", "a.safetensors.index.json"])
def test_json_that_nests_too_deep(name, tmp_path):
  save_file(making.state("dit_teacher"), tmp_path / FILE)
  (tmp_path / name).write_text(_DEEP)
  _refused(f"{name} cannot be read: its brackets nest too deep", tmp_path, tmp_path / "run", making.config("teacher"))


def test_a_policy_that_nests_too_deep(tmp_path):
  save_file(making.state("dit_dx"), tmp_path / FILE, metadata={"policy_config": _DEEP})
  _refused("policy_config in the header is .*, no table", tmp_path / FILE, tmp_path / "run", making.config("dx"))


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../up.safetensors", "sub/x.safetensors", "", ".", "..", "a" * 5000, "a\0b"])
def test_an_index_names_files_beside_it_alone(shard, tmp_path):
  state = making.state("dit_teacher")
  (tmp_path / "in" / "sub").mkdir(parents=True)
  for place in ("in/sub/x.safetensors", "up.safetensors", f"in/{FILE}"):
    save_file(state, tmp_path / place)
  (tmp_path / "in" / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {key: shard for key in state}}))
  _refused("as a shard, which is no name of a file beside it|names shards that are not there", tmp_path / "in",
           tmp_path / "run", making.config("teacher"))


@pytest.mark.parametrize("about, words", [
    ({"num_attention_heads": "two"}, "config.json beside .*: num_attention_heads: 'two' must be a number"),
    ({"num_heads": [2]}, r"num_heads: \[2\] must be a number"), ({"norm_eps": {}}, "norm_eps: {} must be a number"),
    ('{"piflow_jax": {"time_scale": 1e999}}', "time_scale: inf must be a number"),
    ('{"piflow_jax": {"time_offset": NaN}}', "time_offset: nan must be a number"),
    ('{"num_heads": %s}' % ("9" * 4000), "num_heads: 9+; mend it|too large"),
    ('{"num_heads": %s}' % ("9" * 5000), "cannot be read"),
    ({"num_heads": 4}, "config.network.heads is 2, set 4"),
    ({"piflow_jax": {"latent_shape": "x"}}, r"x_0 of config.data is \(8, 8, 4\), the file's x"),
    ({"sample_size": 16, "in_channels": 4}, r"x_0 of config.data is \(8, 8, 4\), the file's \[16, 16, 4\]"),
    ({"sample_size": {}, "in_channels": 4}, "x_0 of config.data is"), (b"\xff\xfe{}", "cannot be read"),
])
def test_a_config_json_of_wrong_types(about, words, tmp_path):
  save_file(making.state("dit_teacher"), tmp_path / FILE)
  text = about if isinstance(about, bytes) else (about if isinstance(about, str) else json.dumps(about)).encode()
  (tmp_path / "config.json").write_bytes(text)
  _refused(words, tmp_path, tmp_path / "run", making.config("teacher"))


@pytest.mark.parametrize(
    "says", [{"type": 3}, {"type": "DX", "shift": [1]}, {"type": "DX", "segment_size": "9" * 4000}])
def test_a_policy_of_wrong_types(says, tmp_path):
  save_file(making.state("dit_dx"), tmp_path / FILE, metadata={"policy_config": json.dumps(says)})
  _refused("no table with a type|its policy is not the one of", tmp_path / FILE, tmp_path / "run", making.config("dx"))


@pytest.mark.parametrize("keys", [["a." + "9" * 5000 + ".b"], ["a.3.b", "a.{}.b"], ["a.{}.b", "a.3.b"],
                                  [f"k{i}" for i in range(3000)]])
def test_keys_that_are_odd(keys, tmp_path):
  save_file(making.state("dit_teacher") | {key: np.zeros(1, np.float32) for key in keys}, tmp_path / FILE)
  _refused(f"unknown: {keys[0][:2]}", tmp_path / FILE, tmp_path / "run", making.config("teacher"))


@pytest.mark.parametrize("key", [
    "proj_out_2.weight", "proj_out_2.bias", "pos_embed.proj.weight", "emb.class_embedder.embedding_table.weight",
    "transformer_blocks.1.attn1.to_q.weight"])
def test_tensors_of_odd_shapes(key, tmp_path):
  state, config = making.state("dit_teacher"), making.config("teacher")
  for shape in ((), (0,), (0, 16), (32,), (32, 16), (3, 16), (1, 1, 1, 1, 1)):
    save_file(state | {key: np.zeros(shape, np.float32)}, tmp_path / FILE)
    _refused(f"misshaped: {key}", tmp_path / FILE, tmp_path / "run", config)


def test_a_position_table_without_numbers(tmp_path):
  config = making.config("teacher", **making.FIELDS["sit"])
  making.save(tmp_path / "of", making.random(config))
  run.to_torch(tmp_path / "of", tmp_path / "out", config, naming="sit")
  state = load_file(tmp_path / "out" / FILE)
  save_file(state | {"pos_embed": state["pos_embed"].astype(np.int32)}, tmp_path / "out" / FILE)
  words = "no dense array of 16, 32 or 64 bit floats: pos_embed"
  _refused(words, tmp_path / "out", tmp_path / "run", config, naming="sit")
  save_file(state | {"pos_embed": np.full_like(state["pos_embed"], np.nan)}, tmp_path / "out" / FILE)
  _refused("pos_embed: not the sine-cosine table", tmp_path / "out", tmp_path / "run", config, naming="sit")


_ABOUT = dict(
    _class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[8],
    norm_num_groups=4, down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], scaling_factor=0.5)


@pytest.mark.parametrize("change, words", [
    (dict(block_out_channels="x"), "block_out_channels: 'x' must be a list"),
    (dict(block_out_channels=5), "block_out_channels: 5 must be a list"),
    (dict(block_out_channels=[], down_block_types=[], up_block_types=[]), "block_out_channels: "),
    (dict(block_out_channels=[0]), "block_out_channels: 0 must be"),
    (dict(block_out_channels=["a"]), "block_out_channels: 'a' must be"),
    (dict(block_out_channels=[2**70]), "block_out_channels: 1180591620717411303424 must be"),
    (dict(norm_num_groups=0), "norm_num_groups: 0 must be"),
    (dict(norm_num_groups=3), "norm_num_groups: 3 does not divide"),
    (dict(layers_per_block=-1), "layers_per_block: -1 must be"),
    (dict(layers_per_block=10**9), "layers_per_block: 10+ must"),
    (dict(latent_channels=None), "latent_channels: None must be"),
    (dict(in_channels="3", out_channels="3"), "in_channels: '3'"),
    (dict(scaling_factor="x"), "scaling_factor: 'x'"), (dict(scaling_factor=0), "scaling_factor: 0 must"),
    (dict(scaling_factor=float("nan")), "scaling_factor: nan"),
    (dict(scaling_factor=10**400), "scaling_factor: 10+|int too large"),
    (dict(shift_factor=[1]), r"shift_factor: \[1\]"),
    (dict(use_quant_conv="no"), "use_quant_conv: 'no' must be true or false"),
    (dict(mid_block_add_attention=2), "mid_block_add_attention: 2 must be true or false"),
    (dict(_class_name=["x"]), "_class_name is"), (dict(down_block_types=3), "down_block_types is 3"),
])
def test_an_autoencoders_config_json_of_wrong_types(change, words, tmp_path):
  zeros = np.zeros((8, 4, 3, 3), np.float32)
  save_file({"encoder.conv_in.weight": zeros, "decoder.conv_in.weight": zeros}, tmp_path / FILE)
  (tmp_path / "config.json").write_text(json.dumps(_ABOUT | change))
  _refused(f"--source: config.json: {words}", tmp_path, tmp_path / "run")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 3}', '{"settings": {"widths": 3}}', _DEEP, json.dumps(
    {"settings": {"widths": [0]}, "scales": {}, "config": {}}), '{"settings": {"widths": [8], "no": 1}}'])
def test_a_converted_autoencoders_settings_that_are_broken(text, tmp_path):
  weights_lib.save_weights(tmp_path / "run", [("a", np.zeros(1, np.float32))])
  (tmp_path / "run" / autoencoder_lib.FILE).write_text(text)
  words = "--workdir: .*autoencoder.json is not of this program .*; convert it again"
  with pytest.raises(errors.UserError, match=words):
    run.to_torch(tmp_path / "run", tmp_path / "out")


def test_an_autoencoder_by_the_program_needs_no_config(tmp_path):
  settings, scales = autoencoder.settings_of(_ABOUT)
  leaves = named_leaves(autoencoder_lib.shapes(autoencoder_lib.Autoencoder(**settings)))
  weights_lib.save_weights(tmp_path / "run", ((k, np.ones(v.shape, v.dtype)) for k, v in leaves.items()))
  known = {"settings": settings, "scales": scales, "config": _ABOUT}
  (tmp_path / "run" / autoencoder_lib.FILE).write_text(json.dumps(known))
  call = ["convert", "to-torch", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
  assert program.invoke(call) == (0, "")
  assert program.invoke(
      ["convert", "from-torch", f"--source={tmp_path / 'out'}", f"--workdir={tmp_path / 'back'}"]) == (0, "")
  assert json.loads((tmp_path / "back" / autoencoder_lib.FILE).read_text())["scales"]["scaling_factor"] == 0.5
  state = load_file(tmp_path / "out" / FILE)
  state["decoder.conv_in.bias"][1] = np.nan
  save_file(state, tmp_path / "out" / FILE)
  _refused("NaN or infinity, in decoder.conv_in.bias", tmp_path / "out", tmp_path / "none")
  weights_lib.save_weights(tmp_path / "other", [("a", np.zeros(1, np.float32))])
  (tmp_path / "other" / autoencoder_lib.FILE).write_text(json.dumps(known))
  with pytest.raises(errors.UserError, match="autoencoder.json is not of the weights beside it .missing.*unknown: a"):
    run.to_torch(tmp_path / "other", tmp_path / "none")


def test_a_dry_run_tells_where_it_could_not_write(tmp_path):
  config = making.config("teacher")
  save_file(making.state("dit_teacher"), tmp_path / FILE)
  (tmp_path / "file").write_text("")
  for place in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y", tmp_path / ("a" * 300)):
    with pytest.raises(errors.UserError, match="--workdir: cannot write to"):
      run.from_torch(tmp_path / FILE, place, config, dry_run=True)
  run.from_torch(tmp_path / FILE, tmp_path / "run", config)
  for place in (tmp_path / "file" / "x", tmp_path / ("a" * 300)):
    with pytest.raises(errors.UserError, match="--out: cannot write to"):
      run.to_torch(tmp_path / "run", place, config, dry_run=True)
  with pytest.raises(errors.UserError, match="--out: .* is there and not empty"):
    run.to_torch(tmp_path / "run", tmp_path / "file", config, dry_run=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FILE, "file", "run"])


def test_a_folder_without_permission_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)
  with pytest.raises(errors.UserError, match=f"--out: cannot write to .* .no permission in {tmp_path}"):
    files.check_writable(tmp_path / "a" / "b", "--out")
  files.check_writable("gs://bucket/x", "--workdir")


def test_whether_numbers_are_finite():
  largest = np.full(1000, np.finfo(np.float32).max)
  assert table.is_finite(largest) and table.is_finite(np.zeros((0, 3), np.float32))
  for bad in (np.nan, np.inf, -np.inf):
    largest[500] = bad
    assert not table.is_finite(largest) and not table.is_finite(largest.reshape(10, 100))
  assert not table.is_finite(np.array([np.inf, -np.inf], np.float32))


def test_a_workdir_in_use_is_left_alone(tmp_path):
  save_file(making.state("dit_teacher"), tmp_path / FILE)
  workdir_lib.write(tmp_path / "run", making.config("gm"))
  before = (tmp_path / "run" / "config.json").read_text()
  with lock.hold(tmp_path / "run"):
    with pytest.raises(errors.UserError, match="--workdir: .*run' is in use by process"):
      run.from_torch(tmp_path / FILE, tmp_path / "run", making.config("teacher"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "lock"]
  assert (tmp_path / "run" / "config.json").read_text() == before
