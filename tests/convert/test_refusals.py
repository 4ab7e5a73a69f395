"""What a file or a folder may be that the converter must not take for something else. No PyTorch needed."""

import json
import subprocess
import sys
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from piflow_jax import errors
from piflow_jax import weights as weights_lib
from piflow_jax.convert import autoencoder as autoencoder_names
from piflow_jax.convert import dit
from piflow_jax.convert import files
from piflow_jax.convert import run
from piflow_jax.convert import trees
from piflow_jax.distill import meanflow
from piflow_jax.models import autoencoder
from piflow_jax.models import layers
from piflow_jax.params import named_leaves
from tests.convert import making
from tests.convert.making import FIELDS
from tests.convert.making import FILE


def _exported(tmp_path, config, **more):
  making.save(tmp_path / "run", making.random(config))
  run.to_torch(tmp_path / "run", tmp_path / "out", config, **more)
  return tmp_path / "out"


def test_a_policy_that_is_not_the_files_is_refused(tmp_path):
  grid = making.config("dx")
  shifted = making.changed(grid, flow__shift=3.0)
  out = _exported(tmp_path, grid)
  with pytest.raises(errors.UserError, match="its policy is not the one of .*shift is 3.0, the file's 1.0"):
    run.from_torch(out, tmp_path / "back", shifted)
  # The same from the file's header alone, with no config.json beside it.
  (out / "config.json").unlink()
  with pytest.raises(errors.UserError, match="shift is 3.0, the file's 1.0"):
    run.from_torch(out, tmp_path / "back", shifted)
  assert not (tmp_path / "back").exists()


def test_a_students_two_points_are_not_taken_for_a_variance(tmp_path):
  config = making.changed(making.config("dx"), policy__points=2)
  out = _exported(tmp_path, config)
  run.from_torch(out, tmp_path / "back", config)
  making.equal(making.weights(config, tmp_path / "back"), making.random(config))
  # Without header and config.json the shapes alone cannot tell.
  save_file(load_file(out / FILE), tmp_path / "alone.safetensors")
  with pytest.raises(errors.UserError, match="may be a teacher with a variance or a student of 2 points"):
    run.from_torch(tmp_path / "alone.safetensors", tmp_path / "other", config)


def test_half_precision_rounds_the_position_table_too(tmp_path):
  config = making.config("teacher", **FIELDS["sit"])
  out = _exported(tmp_path, config, naming="sit", dtype="bfloat16")
  assert load_file(out / FILE)["pos_embed"].dtype == ml_dtypes.bfloat16
  run.from_torch(out, tmp_path / "back", config, naming="sit")


def test_position_tables_of_averaged_weights_and_of_other_grids():
  config = making.config("teacher", shape=(32, 32, 4), width=1152, heads=16)  # 16 x 16 tokens
  table = dit.positions(trees.weights_of(config)[0])["pos_embed"]
  entries, places = np.unique(table, return_inverse=True)
  averaged = entries.copy()  # as facebookresearch/DiT, SiT and REPA average what they train, this table among it
  for _ in range(20_000):
    averaged = averaged * np.float32(0.9999) + entries * np.float32(1 - 0.9999)
  shrunk = averaged[places].reshape(table.shape)
  assert 1.5e-4 < np.abs(shrunk - table).max() < 2e-4
  dit.check_positions(shrunk, table, "a file")
  dit.check_positions(shrunk.astype(ml_dtypes.bfloat16), table, "a file")
  rows_first = np.concatenate(np.split(table, 2, axis=-1)[::-1], -1)
  for other in (rows_first, 0.95 * table, np.roll(table, 1, axis=1), layers.sincos_positions(32, 32, 1152)[None, :256]):
    with pytest.raises(errors.UserError, match="a file: not the sine-cosine table"):
      dit.check_positions(other, table, "a file")


def test_an_autoencoder_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
  about = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[8, 16], layers_per_block=1,
               norm_num_groups=4, scaling_factor=0.5)
  settings, scales = autoencoder_names.settings_of(about)
  net = autoencoder.Autoencoder(**settings)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), np.zeros((1, 2, 2, 3), np.float32)))["params"]
  weights_lib.save_weights(tmp_path / "run", ((k, np.ones(v.shape, v.dtype)) for k, v in named_leaves(shapes).items()))
  known = {"settings": settings, "scales": scales, "config": about}
  (tmp_path / "run" / "autoencoder.json").write_text(json.dumps(known))
  run.to_torch(tmp_path / "run", tmp_path / "out")

  def full(*args):
    raise OSError("no space left on device")

  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("")
  with monkeypatch.context() as patch:
    patch.setattr(weights_lib.partial, "finalize", full)  # after all that is written before it
    for workdir in ("new", "mine"):
      with pytest.raises(errors.UserError, match="--workdir: cannot write to .*no space left"):
        run.from_torch(tmp_path / "out", tmp_path / workdir)
  assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
  # What a kill left beside no weights does not speak for those that come after it.
  (tmp_path / "mine" / "autoencoder.json").write_text("{}")
  save_file(making.state("dit_teacher"), tmp_path / "dit.safetensors")
  run.from_torch(tmp_path / "dit.safetensors", tmp_path / "mine", making.config("teacher"))
  run.to_torch(tmp_path / "mine", tmp_path / "back", making.config("teacher"))
  run.from_torch(tmp_path / "out", tmp_path / "new")
  assert json.loads((tmp_path / "new" / "autoencoder.json").read_text())["settings"]["widths"] == [8, 16]


def test_all_that_is_wrong_with_sharded_weights_is_one_line(tmp_path):
  config = making.config("gm")
  out = _exported(tmp_path, config, max_bytes=20_000)
  a, b, *_ = sorted(out.glob("*.safetensors"))
  first, second = load_file(a), load_file(b)
  doubled, lost, odd, unlisted, *_ = sorted(first)
  index = json.loads((out / f"{FILE}.index.json").read_text())
  del index["weight_map"][unlisted]
  (out / f"{FILE}.index.json").write_text(json.dumps(index))
  save_file({k: v.astype(np.int32) if k == odd else v for k, v in first.items() if k != lost}, a)
  save_file(second | {doubled: first[doubled], "extra": np.zeros(1, np.float32)}, b)
  with pytest.raises(errors.UserError) as e:
    run.from_torch(out, tmp_path / "back", config)
  for words in (f"missing: {lost};", "unknown: extra;", f"twice: {doubled} ({a.name} and {b.name})",
                f"no dense array of 16, 32 or 64 bit floats: {odd} (I32)",
                f"not in the shard that the index names: {lost} ({a.name})",
                f"not in the index: extra ({b.name}), {unlisted} ({a.name})"):
    assert words in str(e.value), (words, str(e.value))
  assert not (tmp_path / "back").exists()
  a.unlink(), b.unlink()
  with pytest.raises(errors.UserError, match=f"names shards that are not there: {a.name}, {b.name}"):
    run.from_torch(out, tmp_path / "back", config)
  for broken in ({"weight_map": {"a": 3}}, {"weight_map": [1]}):
    (out / f"{FILE}.index.json").write_text(json.dumps(broken))
    with pytest.raises(errors.UserError, match="has no weight_map of keys and names of shards"):
      run.from_torch(out, tmp_path / "back", config)


@pytest.mark.parametrize("says", ["{", "[1]", '"DX"', "null", '{"segment_size": 1.0}', '{"type": ["DX"]}'])
def test_a_policy_that_cannot_be_read_is_told(says, tmp_path):
  save_file(making.state("dit_dx"), tmp_path / "x.safetensors", metadata={"policy_config": says})
  with pytest.raises(errors.UserError, match="policy_config in the header is .*, no table with a type"):
    run.from_torch(tmp_path / "x.safetensors", tmp_path / "run", making.config("dx"))
  if isinstance(policy := json.loads(says if says != "{" else "3"), (list, str, int)):
    save_file(making.state("dit_dx"), tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": ["x"], "piflow_jax": {"policy": policy}}))
    with pytest.raises(errors.UserError, match="piflow_jax.policy in config.json is .*, no table with a type"):
      run.from_torch(tmp_path / "x.safetensors", tmp_path / "run", making.config("dx"))


@pytest.mark.parametrize("field, value, words", [
    ("policy.polynomial", True, "mode is 'polynomial', the file's 'grid'"),
    ("policy.segment", 0.5, "segment_size is 0.5, the file's 1.0"),
    ("flow.shift", 3.0, "shift is 3.0, the file's 1.0")])
def test_what_a_dx_file_leaves_out_is_what_the_release_takes(field, value, words, tmp_path, capsys):
  save_file(making.state("dit_dx"), tmp_path / "x.safetensors", metadata={"policy_config": '{"type": "DX"}'})
  config = making.changed(making.config("dx"), **{field: value})
  with pytest.raises(errors.UserError, match=words):
    run.from_torch(tmp_path / "x.safetensors", tmp_path / "run", config)
  run.from_torch(tmp_path / "x.safetensors", tmp_path / "run", making.config("dx"))
  assert "by the config alone" not in capsys.readouterr().out


def test_what_no_file_tells_is_said(tmp_path, capsys):
  save_file(making.state("dit_dx"), tmp_path / "x.safetensors")
  run.from_torch(tmp_path / "x.safetensors", tmp_path / "run", making.config("dx", time_scale=1000.0))
  out = capsys.readouterr().out
  assert "taken to embed 0.0 + 1000.0 t" in out and "mlp_norm_eps 1e-05" in out and "flip_model_timesteps" in out
  assert "policy, by the config alone: type DX, segment_size 1.0, shift 1.0, mode grid" in out
  run.to_torch(tmp_path / "run", tmp_path / "out", making.config("dx", time_scale=1000.0))
  run.from_torch(tmp_path / "out", tmp_path / "back", making.config("dx", time_scale=1000.0))
  out = capsys.readouterr().out
  assert "taken to embed 0.0 + 1000.0 t" in out and "do not tell" not in out and "by the config alone" not in out


@pytest.mark.parametrize("scale, offset, told", [
    (1.0, 0.0, dict(num_timesteps=1, flip_model_timesteps=False)),
    (1000.0, 0.0, dict(num_timesteps=1000, flip_model_timesteps=False)),
    (-1.0, 1.0, dict(num_timesteps=1, flip_model_timesteps=True)), (1.0, 1.0, None), (-1.0, 0.0, None)])
def test_pi_flows_release_is_told_a_networks_time_by_its_diffusion(scale, offset, told, tmp_path, capsys):
  out = _exported(tmp_path, making.config("gm", time_scale=scale, time_offset=offset))
  assert json.loads((out / "config.json").read_text())["piflow_jax"]["release_diffusion"] == told
  says = capsys.readouterr().out
  if told:
    assert f"num_timesteps={told['num_timesteps']}, flip_model_timesteps={told['flip_model_timesteps']}" in says
  else:
    assert f"no setting of it embeds {offset} + {scale} t" in says


def test_a_norm_that_config_json_tells_goes_before_the_namings(tmp_path):
  config = making.config("teacher", frequency_shift=1, mlp_norm_eps=1e-6)
  out = _exported(tmp_path, config, naming="diffusers")
  assert json.loads((out / "config.json").read_text())["norm_eps"] == 1e-6
  with pytest.raises(errors.UserError, match="mlp_norm_eps is 1e-05, set 1e-06"):
    run.from_torch(out, tmp_path / "back", making.config("teacher", frequency_shift=1))
  run.from_torch(out, tmp_path / "back", config)
  (out / "config.json").unlink()
  with pytest.raises(errors.UserError, match="mlp_norm_eps is 1e-06, set 1e-05"):
    run.from_torch(out, tmp_path / "other", config)


def test_an_export_does_not_hold_what_it_has_written(tmp_path):
  made = []

  def tensors():
    for i in range(6):
      array = np.full(8, i, np.float32)
      made.append(weakref.ref(array))
      assert sum(ref() is not None for ref in made) <= 2  # this one, and the one before in the writer's hand
      yield f"k{i}", array
      del array

  files.write(tmp_path / "out", {f"k{i}": (8,) for i in range(6)}, tensors(), dtype=np.float32, config={}, metadata={})
  assert load_file(tmp_path / "out" / FILE)["k5"][0] == 5


def test_a_write_that_fails_takes_only_its_own_with_it(tmp_path):
  def broken():
    yield "a", np.zeros(2, np.float32)
    raise RuntimeError("the power went")

  (tmp_path / "old").mkdir()
  (tmp_path / "old" / "notes.txt").write_text("mine")
  for workdir in ("old", "new"):
    with pytest.raises(RuntimeError):
      weights_lib.save_weights(tmp_path / workdir, broken())
  assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["old", "old/notes.txt"]
  # What a kill left is written over.
  (tmp_path / "old" / "checkpoints" / "0.partial_save").mkdir(parents=True)
  weights_lib.save_weights(tmp_path / "old", [("a", np.ones(2, np.float32))])
  with weights_lib.open_weights(tmp_path / "old", "ema", "--workdir") as (shapes, read):
    assert shapes == {"a": (2,)} and (read("a") == 1).all()
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="--workdir: cannot write to"):
    weights_lib.save_weights(tmp_path / "file" / "run", [("a", np.ones(2, np.float32))])


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, ml_dtypes.float8_e4m3fn])
def test_numbers_that_are_no_floats_are_refused(dtype, tmp_path):
  save_file(making.state("dit_teacher") | {"proj_out_1.bias": np.zeros(3, dtype)}, tmp_path / FILE)
  with pytest.raises(errors.UserError, match="; .*no dense array of 16, 32 or 64 bit floats: proj_out_1.bias"):
    run.from_torch(tmp_path, tmp_path / "run", making.config("teacher"))


@pytest.mark.parametrize("name, text, words", [
    ("config.json", "[1]", "config.json is no table"), ("config.json", "{", "config.json cannot be read"),
    ("a.safetensors.index.json", "{}", "has no weight_map"),
])
def test_tables_beside_the_weights_that_cannot_be_read(name, text, words, tmp_path):
  save_file(making.state("dit_teacher"), tmp_path / FILE)
  (tmp_path / name).write_text(text)
  with pytest.raises(errors.UserError, match=words):
    run.from_torch(tmp_path, tmp_path / "run", making.config("teacher"))


@pytest.mark.parametrize("fields, naming, words", [
    (dict(method=meanflow.config()), None, "pi-Flow's release: .* has no name for span_in/bias.*; paths has"),
    (dict(data__shape=(8, 4, 4)), "repa", "has square latents only, not 8 x 4"),
    (dict(data__num_classes=0, method__label_dropout=0.0), "diffusers", "has no networks without a label"),
    (dict(network__time_offset=1.0), "diffusers", "config.network.time_offset is 1.0, set 0.0"),
    ({}, "flux", "--format: 'flux' is none of release, diffusers, repa, sit, dit, paths"),
])
def test_what_a_naming_cannot_say_is_refused(fields, naming, words, tmp_path):
  config = making.config("teacher", **FIELDS.get(naming, {}))
  if "method" in fields:
    with config.unlocked():
      config.method = fields["method"]
  else:
    config = making.changed(config, **fields)
  with pytest.raises(errors.UserError, match=words):
    _exported(tmp_path, config, naming=naming)
  assert not (tmp_path / "out").exists()


def test_where_an_export_may_go(tmp_path):
  (tmp_path / "file").write_text("")
  for out, words in (("gs://bucket/x", "only local folders"), (tmp_path / "file" / "x", "cannot write to"),
                     (tmp_path / "file", "is there and not empty")):
    with pytest.raises(errors.UserError, match=f"--out: .*{words}"):
      files.write(out, {"a": (2,)}, [("a", np.zeros(2, np.float32))], dtype=np.float32, config={}, metadata={})


def test_a_dry_run_tells_where_nothing_could_be_written(tmp_path):
  config = making.config("gm")
  out = _exported(tmp_path, config)
  with pytest.raises(errors.UserError, match="--out: .* is there and not empty"):
    run.to_torch(tmp_path / "run", out, config, dry_run=True)
  with pytest.raises(errors.UserError, match="--workdir: .* holds checkpoints already"):
    run.from_torch(out, tmp_path / "run", config, dry_run=True)


_HOLDING = """
import sys, threading, time
import numpy as np
from piflow_jax import weights as weights_lib

SIZE = 96 << 20
held, done = [], threading.Event()

def watch():
  while not done.is_set():
    held.append(int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) << 10)
    time.sleep(0.005)

def leaves():
  for i in range(3):
    leaf = np.random.default_rng(i).standard_normal(SIZE // 4, dtype=np.float32)
    yield f"a/{i}", leaf

threading.Thread(target=watch, daemon=True).start()
time.sleep(0.1)
before = held[-1]
weights_lib.save_weights(sys.argv[1], leaves())
done.set()
print((max(held) - before) / SIZE)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory by /proc")
def test_what_is_held_while_weights_are_written(tmp_path):
  command = [sys.executable, "-c", _HOLDING, tmp_path / "run"]
  process = subprocess.run(command, capture_output=True, text=True, check=True)
  # The array and its copy on the way to the disk; 3.9 where Orbax compresses.
  assert float(process.stdout) < 2.7, process.stdout


@pytest.mark.parametrize("change, words", [
    (dict(_class_name="AutoencoderTiny"), "_class_name is AutoencoderTiny"),
    (dict(out_channels=6), "out_channels is 6"),
    (dict(scaling_factor=None), "scaling_factor is null"), (dict(latents_mean=[0.0] * 4), "latents_mean is"),
    (dict(act_fn="gelu"), "act_fn is gelu")])
def test_autoencoders_that_are_another_kind_are_refused(change, words):
  with pytest.raises(errors.UserError, match=words):
    autoencoder_names.settings_of({"in_channels": 3, "block_out_channels": [8], **change})


def test_keys_may_hold_braces(tmp_path):
  save_file(making.state("dit_teacher") | {"odd.{i}.{name}": np.zeros(1, np.float32)}, tmp_path / FILE)
  with pytest.raises(errors.UserError, match=r"unknown: odd.\{i\}.\{name\}"):
    run.from_torch(tmp_path, tmp_path / "run", making.config("teacher"))


def test_a_config_json_of_another_program_does_not_hide_what_the_header_says(tmp_path):
  config = making.config("gm")
  out = _exported(tmp_path, config)
  (out / "config.json").write_text(json.dumps({"_class_name": "GMDiTTransformer2DModelV2", "num_attention_heads": 2}))
  run.from_torch(out, tmp_path / "back", config)
  making.equal(making.weights(config, tmp_path / "back"), making.random(config))
