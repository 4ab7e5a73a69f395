"""What a file or a folder may be that the converter must not take for something else. No PyTorch needed."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax.convert import files
from piflow_jax.convert import run
from piflow_jax.models import autoencoder
from tests.convert.test_dit import FIELDS, _config, _equal, _random, _save, _state, _weights

_FILE = "diffusion_pytorch_model.safetensors"


def _exported(tmp_path, config, **more):
  _save(tmp_path / "run", _random(config))
  run.to_torch(tmp_path / "run", tmp_path / "out", config, **more)
  return tmp_path / "out"


def test_a_policy_that_is_not_the_files_is_refused(tmp_path):
  grid, shifted = _config("dx"), _config("dx")
  shifted.flow.shift = 3.0
  out = _exported(tmp_path, grid)
  with pytest.raises(errors.UserError, match="its policy is not the one of .*shift is 3.0, the file's 1.0"):
    run.from_torch(out, tmp_path / "back", shifted)
  # The same from the file's header alone, with no config.json beside it.
  (out / "config.json").unlink()
  with pytest.raises(errors.UserError, match="shift is 3.0, the file's 1.0"):
    run.from_torch(out, tmp_path / "back", shifted)
  assert not (tmp_path / "back").exists()


def test_a_students_two_points_are_not_taken_for_a_variance(tmp_path):
  config = _config("dx")
  config.policy.points = 2
  out = _exported(tmp_path, config)
  run.from_torch(out, tmp_path / "back", config)
  _equal(_weights(config, tmp_path / "back"), _random(config))
  # Without header and config.json the shapes alone cannot tell.
  save_file(load_file(out / _FILE), tmp_path / "alone.safetensors")
  with pytest.raises(errors.UserError, match="may be a teacher with a variance or a student of 2 points"):
    run.from_torch(tmp_path / "alone.safetensors", tmp_path / "other", config)


def test_half_precision_rounds_the_position_table_too(tmp_path):
  config = _config("teacher", **FIELDS["sit"])
  out = _exported(tmp_path, config, naming="sit", dtype="bfloat16")
  assert load_file(out / _FILE)["pos_embed"].dtype == ml_dtypes.bfloat16
  run.from_torch(out, tmp_path / "back", config, naming="sit")


def test_a_write_that_fails_takes_only_its_own_with_it(tmp_path):
  def broken():
    yield "a", np.zeros(2, np.float32)
    raise RuntimeError("the power went")

  (tmp_path / "old").mkdir()
  (tmp_path / "old" / "notes.txt").write_text("mine")
  for workdir in ("old", "new"):
    with pytest.raises(RuntimeError):
      checkpoint.save_weights(tmp_path / workdir, broken())
  assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["old", "old/notes.txt"]
  # What a kill left is written over.
  (tmp_path / "old" / "checkpoints" / "0.partial_save").mkdir(parents=True)
  checkpoint.save_weights(tmp_path / "old", [("a", np.ones(2, np.float32))])
  with checkpoint.open_weights(tmp_path / "old", "ema", "--workdir") as (shapes, read):
    assert shapes == {"a": (2,)} and (read("a") == 1).all()
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="--workdir: cannot write to"):
    checkpoint.save_weights(tmp_path / "file" / "run", [("a", np.ones(2, np.float32))])


@pytest.mark.parametrize("tensor", [np.zeros(3, np.int64), np.zeros(3, np.complex64), np.zeros(3, ml_dtypes.float8_e4m3fn)])
def test_numbers_that_are_no_floats_are_refused(tensor, tmp_path):
  save_file(_state("dit_teacher") | {"proj_out_1.bias": tensor}, tmp_path / _FILE)
  with pytest.raises(errors.UserError, match="no dense array of 16, 32 or 64 bit floats: proj_out_1.bias"):
    run.from_torch(tmp_path, tmp_path / "run", _config("teacher"))


@pytest.mark.parametrize("name, text, words", [
    ("config.json", "[1]", "config.json is no table"), ("config.json", "{", "config.json cannot be read"),
    ("a.safetensors.index.json", "{}", "has no weight_map"),
])
def test_tables_beside_the_weights_that_cannot_be_read(name, text, words, tmp_path):
  save_file(_state("dit_teacher"), tmp_path / _FILE)
  (tmp_path / name).write_text(text)
  with pytest.raises(errors.UserError, match=words):
    run.from_torch(tmp_path, tmp_path / "run", _config("teacher"))


@pytest.mark.parametrize("change, naming, words", [
    (lambda c: c.update(method=build.meanflow), None, "config.method is meanflow"),
    (lambda c: c.data.update(shape=(8, 4, 4)), "repa", "has square latents only, not 8 x 4"),
    (lambda c: c.network.update(time_offset=1.0), "diffusers", "config.network.time_offset is 1.0, set 0.0"),
])
def test_what_a_naming_cannot_say_is_refused(change, naming, words, tmp_path):
  config = _config("teacher", **FIELDS[naming or "release"])
  change(config)
  with pytest.raises(errors.UserError, match=words):
    _exported(tmp_path, config, naming=naming)
  assert not (tmp_path / "out").exists()


def test_pi_flows_release_is_said_not_to_know_a_time_offset(tmp_path, capsys):
  _exported(tmp_path, _config("gm", time_offset=1.0))
  assert "piflow_torch.py heeds it, pi-Flow's release does not" in capsys.readouterr().out


def test_where_an_export_may_go(tmp_path):
  (tmp_path / "file").write_text("")
  for out, words in (("gs://bucket/x", "only local folders"), (tmp_path / "file" / "x", "cannot write to"),
                     (tmp_path / "file", "is there and not empty")):
    with pytest.raises(errors.UserError, match=f"--out: .*{words}"):
      files.write(out, [("a", np.zeros(2, np.float32))], config={}, metadata={})


def test_a_dry_run_tells_where_nothing_could_be_written(tmp_path):
  config = _config("gm")
  out = _exported(tmp_path, config)
  with pytest.raises(errors.UserError, match="--out: .* is there and not empty"):
    run.to_torch(tmp_path / "run", out, config, dry_run=True)
  with pytest.raises(errors.UserError, match="--workdir: .* holds checkpoints already"):
    run.from_torch(out, tmp_path / "run", config, dry_run=True)


_HOLDING = """
import sys, threading, time
import numpy as np
from piflow_jax import checkpoint

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
checkpoint.save_weights(sys.argv[1], leaves())
done.set()
print((max(held) - before) / SIZE)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory by /proc")
def test_what_is_held_while_weights_are_written(tmp_path):
  process = subprocess.run([sys.executable, "-c", _HOLDING, tmp_path / "run"], capture_output=True, text=True, check=True)
  # The array and its copy on the way to the disk; 3.9 where Orbax compresses.
  assert float(process.stdout) < 2.7, process.stdout


@pytest.mark.parametrize("change, words", [
    (dict(_class_name="AutoencoderTiny"), "_class_name is AutoencoderTiny"), (dict(out_channels=6), "out_channels is 6"),
    (dict(scaling_factor=None), "scaling_factor is null"), (dict(latents_mean=[0.0] * 4), "latents_mean is"),
    (dict(act_fn="gelu"), "act_fn is gelu")])
def test_autoencoders_that_are_another_kind_are_refused(change, words):
  with pytest.raises(errors.UserError, match=words):
    autoencoder.settings_of({"in_channels": 3, "block_out_channels": [8], **change})


def test_keys_may_hold_braces(tmp_path):
  save_file(_state("dit_teacher") | {"odd.{i}.{name}": np.zeros(1, np.float32)}, tmp_path / _FILE)
  with pytest.raises(errors.UserError, match=r"unknown: odd.\{i\}.\{name\}"):
    run.from_torch(tmp_path, tmp_path / "run", _config("teacher"))


def test_a_config_json_of_another_program_does_not_hide_what_the_header_says(tmp_path):
  config = _config("gm")
  out = _exported(tmp_path, config)
  (out / "config.json").write_text(json.dumps({"_class_name": "GMDiTTransformer2DModelV2", "num_attention_heads": 2}))
  run.from_torch(out, tmp_path / "back", config)
  _equal(_weights(config, tmp_path / "back"), _random(config))
