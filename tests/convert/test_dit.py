"""DiT's namings against the authors' state dicts, and through files in both directions. No PyTorch needed."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from piflow_jax import build
from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax import weights as weights_lib
from piflow_jax.convert import __main__ as program
from piflow_jax.convert import dit
from piflow_jax.convert import files
from piflow_jax.convert import run
from piflow_jax.convert import trees
from tests import golden
from tests import tiny
from tests.convert import making
from tests.convert.making import FIELDS
from tests.convert.making import FILE


@pytest.mark.parametrize("name, head, convert_head", [
    ("dit_teacher", "teacher", golden.velocity_head), ("dit_gm", "gm", golden.gm_head),
    ("dit_dx", "dx", golden.dx_head)])
def test_the_authors_checkpoints_sample_here(name, head, convert_head, tmp_path, capsys):
  # As the release has them: bare, or under a training wrapper's prefixes with an average beside the weights.
  state, data, config = making.state(name), golden.load(name), making.config(head)
  wrapped = {f"diffusion.denoising.{k}": v + 1 for k, v in state.items()}
  save_file(wrapped | {f"diffusion_ema.denoising.{k}": v for k, v in state.items()}, tmp_path / "wrapped.safetensors")
  run.from_torch(tmp_path / "wrapped.safetensors", tmp_path / "run", config)
  out = capsys.readouterr().out
  assert "pi-Flow's release" in out and "under 'diffusion_ema.denoising.'" in out
  assert ("a teacher" if head == "teacher" else "a student") in out
  params = making.weights(config, tmp_path / "run")
  making.equal(params, golden.dit_params(data, 2, 2, convert_head))

  x, t, labels = golden.nhwc(data["x"]), jnp.asarray(data["t"]), jnp.asarray(data["labels"])
  if head == "teacher":
    np.testing.assert_allclose(making.velocity(config)(params, x, t, labels), golden.nhwc(data["out"]), atol=1e-4)
    return
  made, cond = build.run(config), {"label": labels}
  clock, policy_head = made.method.clock, made.student.head
  net = made.network.module(policy_head)
  policy = golden.mixture(data, "out_") if head == "gm" else jnp.moveaxis(jnp.asarray(data["out"]), 2, -1)
  # One short step of the flow map is the velocity of the stored output's policy.
  at, dst = jnp.full(4, 0.75), jnp.full(4, 0.75 - 1 / 128)
  out = net.apply({"params": params}, x, t, cond)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), out, policy)
  made_at = policy_head.to_policy(net.apply({"params": params}, x, at, cond), x, at, clock, eps=1e-4)
  want = x - made_at.velocity(x, at) / 128
  np.testing.assert_allclose(made.method.flow_map(params, None, cond, clock)(x, at, dst), want, atol=1e-5)


@pytest.mark.parametrize("stored, note", [("with_var", "8 channels"), ("gmdit_v1", "5 channels")])
def test_variances_and_the_log_weight_of_one_gaussian_are_left_out(stored, note, tmp_path, capsys):
  data = golden.load("dit_expand")
  wide = {f"proj_out_2.{k}": data[f"{stored}/proj_out_2.{k}"] for k in ("weight", "bias")}
  state = making.state("dit_teacher") | wide
  if stored == "gmdit_v1":
    state |= {"gm_out.logstd_layers.1.weight": np.zeros((16, 16), np.float32)}
  save_file(state, tmp_path / "model.safetensors")
  run.from_torch(tmp_path, tmp_path / "run", making.config("gm"))  # a student's config names its teacher's network too
  assert note in capsys.readouterr().out
  kept = {f"param/proj_out_2.{k}": data[f"{stored}_loaded/proj_out_2.{k}"] for k in ("weight", "bias")}
  want = golden.dit_params(golden.load("dit_teacher") | kept, 2, 2, golden.velocity_head)
  making.equal(making.weights(making.config("teacher"), tmp_path / "run"), want)


_ALL = [("teacher", naming) for naming in FIELDS] + [(head, "release") for head in ("gm", "dx", "parallel")]


@pytest.mark.parametrize("head, naming", _ALL)
def test_there_and_back_is_exact_in_every_naming(head, naming, tmp_path):
  config = making.config(head, **FIELDS[naming])
  tree = making.random(config)
  making.save(tmp_path / "run", tree)
  run.to_torch(tmp_path / "run", tmp_path / "out", config, naming=naming)
  run.from_torch(tmp_path / "out", tmp_path / "back", config,
                 naming=naming if naming in ("sit", "dit", "repa") else None)
  making.equal(making.weights(config, tmp_path / "back"), tree)
  run.to_torch(tmp_path / "back", tmp_path / "again", config, naming=naming)
  first, second = (load_file(tmp_path / f / FILE) for f in ("out", "again"))
  assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
  with safe_open(tmp_path / "out" / FILE, "numpy") as file:
    policy = file.metadata().get("policy_config")
  want = {"teacher": None, "gm": {"type": "GMFlow"}, "parallel": {"type": "ParallelDecoding", "shift": 1.0},
          "dx": {"type": "DX", "segment_size": 1.0, "shift": 1.0, "mode": "grid"}}[head]
  assert (json.loads(policy) if policy else None) == want
  about = json.loads((tmp_path / "out" / "config.json").read_text())
  assert about["piflow_jax"]["policy"] == want
  shipped = {path.name for path in (tmp_path / "out").glob("*.py")}
  assert shipped == ({"piflow_torch.py", "piflow_dit.py", "piflow_policy.py"} if naming == "release" else set())


def test_sit_runs_the_other_way_round():
  """SiT's v(x, s) is data - noise at s = 1 - t: the same weights, loaded as SiT's, say our u(x, t) = -v(x, 1 - t)."""
  as_stored, sit = making.config("teacher", mlp_norm_eps=1e-6), making.config("teacher", **FIELDS["sit"])
  tree = making.random(as_stored)
  x, labels, t = jnp.ones((3, 8, 8, 4)) * 0.1, jnp.arange(3), jnp.array([0.0, 0.3, 1.0])
  v = making.velocity(as_stored)(tree, x, 1 - t, labels)
  weights, _ = trees.weights_of(as_stored)
  there, here = ({row.here: row.transform for row in dit.NAMINGS[name].rows(weights)} for name in ("dit", "sit"))

  def load(name, leaf):
    return leaf if name.startswith("blocks") else here[name].here(there[name].there(leaf), leaf.shape)

  loaded = params_lib.map_with_path(load, tree)
  np.testing.assert_allclose(making.velocity(sit)(loaded, x, t, labels), -v, atol=1e-4 * float(jnp.abs(v).max()))


def test_a_sit_teacher_of_pi_flows_release_is_told_by_the_fields(tmp_path, capsys):
  """There the sign is turned already, and time is turned outside of the network: it is asked about 1 - t."""
  save_file(making.state("dit_teacher"), tmp_path / "model.safetensors")
  plain, sit = making.config("teacher"), making.config("teacher", time_scale=-1.0, time_offset=1.0)
  run.from_torch(tmp_path, tmp_path / "run", sit)
  assert "taken to embed 1.0 + -1.0 t" in capsys.readouterr().out
  params = making.weights(sit, tmp_path / "run")
  x, labels, t = jnp.ones((3, 8, 8, 4)) * 0.1, jnp.arange(3), jnp.array([0.0, 0.3, 1.0])
  want = making.velocity(plain)(params, x, 1 - t, labels)
  np.testing.assert_allclose(making.velocity(sit)(params, x, t, labels), want, atol=1e-5)
  assert np.abs(making.velocity(plain)(params, x, t, labels) - want).max() > 1e-2


def test_shards_bfloat16_and_dry_run(tmp_path, capsys):
  config = making.config()
  tree = making.random(config)
  making.save(tmp_path / "run", tree)
  run.to_torch(tmp_path / "run", tmp_path / "none", config, dry_run=True)
  assert not (tmp_path / "none").exists()
  mapping = "blocks/attention/qkv/kernel[1] (16, 3, 2, 8) -> transformer_blocks.1.attn1.to_q.weight"
  assert mapping in capsys.readouterr().out
  run.to_torch(tmp_path / "run", tmp_path / "half", config, dtype="bfloat16")
  half = load_file(tmp_path / "half" / FILE)
  assert {v.dtype for v in half.values()} == {np.dtype(ml_dtypes.bfloat16)}
  np.testing.assert_array_equal(half["proj_out_1.bias"], tree["adaln_out"]["bias"].astype(ml_dtypes.bfloat16))

  # Shards and an index, as large models come; what bfloat16 holds comes back as it is.
  run.to_torch(tmp_path / "run", tmp_path / "shards", config, dtype="bfloat16", max_bytes=20_000)
  shards = sorted((tmp_path / "shards").glob("*.safetensors"))
  assert len(shards) > 1
  run.from_torch(tmp_path / "shards", tmp_path / "back", config)
  making.equal(making.weights(config, tmp_path / "back"),
         jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), tree))
  run.from_torch(tmp_path / "shards", tmp_path / "dry", config, dry_run=True)
  assert not (tmp_path / "dry").exists()

  first, second = load_file(shards[0]), load_file(shards[1])
  key = sorted(first)[0]
  save_file(second | {key: first[key]}, shards[1])
  with pytest.raises(errors.UserError, match=f"twice: {key} .{shards[0].name} and {shards[1].name}"):
    run.from_torch(tmp_path / "shards", tmp_path / "twice", config)
  shards[0].unlink()
  with pytest.raises(errors.UserError, match=shards[0].name):
    run.from_torch(tmp_path / "shards", tmp_path / "lost", config)
  assert not (tmp_path / "twice").exists() and not (tmp_path / "lost").exists()


def test_averaged_weights_or_the_last_ones(tmp_path, tiny_teacher):
  run.to_torch(tiny_teacher, tmp_path / "ema")  # by the run's own config
  run.to_torch(tiny_teacher, tmp_path / "last", tiny.config("teacher"), ema=False)
  field = "--workdir"
  with (weights_lib.open_weights(tiny_teacher, "ema", field) as (_, ema),
        weights_lib.open_weights(tiny_teacher, "params", field) as (_, last)):
    assert not np.array_equal(ema("adaln_out/bias"), last("adaln_out/bias"))
    for folder, read in (("ema", ema), ("last", last)):
      stored = load_file(tmp_path / folder / FILE)
      np.testing.assert_array_equal(stored["proj_out_1.bias"], read("adaln_out/bias"))


def test_an_export_is_whole_or_not_there(tmp_path):
  def broken():
    yield "a", np.zeros(2, np.float32)
    raise RuntimeError("the disk went away")

  with pytest.raises(RuntimeError):
    files.write(tmp_path / "out", {"a": (2,), "b": (2,)}, broken(), dtype=np.float32, config={}, metadata={})
  assert not list(tmp_path.iterdir())
  many = ((f"k{i}", np.full(8, i, np.float32)) for i in range(5))
  written = files.write(tmp_path / "out", {f"k{i}": (8,) for i in range(5)}, many, dtype=np.float32, config={},
                        metadata={"a": "b"}, max_bytes=70)
  assert [name for name in written if name.endswith(".safetensors")] == [
      f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  with files.open_source(tmp_path / "out") as source:
    assert source.shapes == {f"k{i}": (8,) for i in range(5)} and source.metadata["a"] == "b"
    np.testing.assert_array_equal(source.read("k4"), np.full(8, 4))
  with pytest.raises(errors.UserError, match="--out: .* is there and not empty"):
    files.write(tmp_path / "out", {}, [], dtype=np.float32, config={}, metadata={})


def test_weights_do_not_go_over_a_run_that_is_there(tmp_path):
  config = making.config("teacher")
  save_file(making.state("dit_teacher"), tmp_path / "model.safetensors")
  run.from_torch(tmp_path / "model.safetensors", tmp_path / "run", config)
  with pytest.raises(errors.UserError, match="holds checkpoints already"):
    run.from_torch(tmp_path / "model.safetensors", tmp_path / "run", config)
  with pytest.raises(errors.UserError, match="holds averaged weights alone, no 'params'"):
    run.to_torch(tmp_path / "run", tmp_path / "out", config, ema=False)


@pytest.mark.parametrize("change, head, network, words", [
    ({"proj_out_1.bias": None, "odd": np.zeros(1, np.float32), "proj_out_2.bias": np.zeros(3, np.float32)},
     "teacher", {},
     ["missing: proj_out_1.bias", "unknown: odd", "misshaped: proj_out_2.bias (3,) instead of (16,)"]),
    ({}, "gm", dict(depth=3), ["missing: ", "transformer_blocks.2.norm1.linear.bias"]),
    ({}, "gm", dict(frequency_shift=1), ["config.network.frequency_shift is 1, set 0"]),
    ({"emb.timestep_embedder.linear_1.weight": None}, "gm", {}, ["of no naming that is known here"]),
    ({"proj_out_means.weight": np.zeros((64, 16), np.float32)}, "teacher", {},
     ["is a student; give a student's config"]),
])
def test_what_does_not_fit_is_told(change, head, network, words, tmp_path):
  state = {k: v for k, v in (making.state("dit_teacher") | change).items() if v is not None}
  save_file(state, tmp_path / "model.safetensors")
  with pytest.raises(errors.UserError) as e:
    run.from_torch(tmp_path / "model.safetensors", tmp_path / "run", making.config(head, **network))
  assert all(word in str(e.value) for word in words), str(e.value)
  assert not (tmp_path / "run").exists()


def test_what_shapes_do_not_tell_is_read_from_config_json(tmp_path):
  config = making.config("gm", mlp_norm_eps=1e-6)
  making.save(tmp_path / "run", making.random(config))
  run.to_torch(tmp_path / "run", tmp_path / "out", config)
  for field, value in (("heads", 4), ("mlp_norm_eps", 1e-5), ("time_scale", 1000.0)):
    with pytest.raises(errors.UserError, match=f"config.network.{field} is {value}, set {config.network[field]}"):
      run.from_torch(tmp_path / "out", tmp_path / "back", making.config("gm", **{"mlp_norm_eps": 1e-6, field: value}))


def test_copies_of_the_embedding_must_agree(tmp_path):
  config = making.config("teacher", frequency_shift=1)
  making.save(tmp_path / "run", making.random(config))
  run.to_torch(tmp_path / "run", tmp_path / "out", config, naming="diffusers")
  path = tmp_path / "out" / FILE
  state = load_file(path)
  state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
  save_file(state, path)
  with pytest.raises(errors.UserError, match="unlike the first .*: transformer_blocks.1.norm1.*linear_1.bias$"):
    run.from_torch(path, tmp_path / "back", config)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_names_shared_by_three_projects_ask_whose_they_are(tmp_path, capsys):
  sit, repa = making.config("teacher", **FIELDS["sit"]), making.config("teacher", **FIELDS["repa"])
  making.save(tmp_path / "run", making.random(sit))
  run.to_torch(tmp_path / "run", tmp_path / "out", sit, naming="sit")
  with pytest.raises(errors.UserError, match="--format: missing; .* are those of repa, sit, dit alike"):
    run.from_torch(tmp_path / "out", tmp_path / "back", sit)
  with pytest.raises(errors.UserError, match="--format: release, but the keys"):
    run.from_torch(tmp_path / "out", tmp_path / "back", sit, naming="release")
  with pytest.raises(errors.UserError, match="--format: repa is not what config.json .*: time_scale is -1.0 there"):
    run.from_torch(tmp_path / "out", tmp_path / "back", repa, naming="repa")
  (tmp_path / "out" / "config.json").unlink()
  with pytest.raises(errors.UserError, match="time_scale is -1.0, set 1.0"):
    run.from_torch(tmp_path / "out", tmp_path / "back", sit, naming="repa")
  # REPA's projectors tell it apart, and another position table is not taken for ours.
  path = tmp_path / "out" / FILE
  state = load_file(path) | {"projectors.0.0.weight": np.zeros((2, 2), np.float32)}
  save_file(state, path)
  run.from_torch(tmp_path / "out", tmp_path / "back", repa)
  assert "left out: pos_embed, projectors.0.0.weight" in capsys.readouterr().out
  save_file(state | {"pos_embed": state["pos_embed"] + 1}, path)
  with pytest.raises(errors.UserError, match="pos_embed: not the sine-cosine table"):
    run.from_torch(tmp_path / "out", tmp_path / "other", repa)
  assert not (tmp_path / "other").exists()


def test_what_is_no_checkpoint_is_told(tmp_path):
  (tmp_path / "model.safetensors").write_bytes(b"not one")
  for path, words in ((tmp_path, "cannot be read"), (tmp_path / "nowhere", "is not there"),
                      (tmp_path / "model.safetensors", "cannot be read")):
    with pytest.raises(errors.UserError, match=words):
      run.from_torch(path, tmp_path / "run", making.config())


@pytest.mark.parametrize("arguments, words", [
    (["from-torch", "--source=nowhere", "--config=configs/digits.py:student"], ["--source", "nowhere"]),
    (["from-torch"], ["--source", "missing"]),
    (["to-torch", "--out=x", "--config=configs/digits.py:student"], ["--workdir", "no checkpoint"]),
    (["to-torch", "--out=x"], ["--workdir", "no config.json"]),
    (["to-torch", "--no-ema", "--config=configs/digits.py:student"], ["--out", "missing"]),
    (["to-torch", "--out=x", "--max-shard-size=nan", "--config=configs/digits.py:student"], ["--max_shard_size"]),
    (["from-torch", "--source=x", "--no-ema"], ["--ema", "from-torch does not read it"]),
    (["to-torch", "--source=x", "--config=configs/digits.py:student"], ["--source", "to-torch does not read it"]),
    (["sideways"], ["from-torch, to-torch or adapters"]),
])
def test_bad_calls_are_told_in_one_line(arguments, words, tmp_path):
  status, line = program.invoke(["convert", *arguments, f"--workdir={tmp_path / 'run'}"])
  assert status == 2 and "\n" not in line and all(word in line for word in words), line


@pytest.mark.slow
def test_the_program_moves_weights_both_ways(tmp_path, tiny_teacher):
  """As a user starts it. Going out it needs the workdir alone, coming in a config."""
  command = [tiny.sys.executable, "-m", "piflow_jax.convert"]
  status, out, err = tiny.run(
      [*command, "to-torch", f"--workdir={tiny_teacher}", f"--out={tmp_path / 'out'}", "--max-shard-size=0.0001"])
  assert status == 0 and "wrote" in out, err
  assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
  back = tmp_path / "back"
  status, out, err = tiny.run(
      [*command, "from-torch", f"--source={tmp_path / 'out'}", *tiny.arguments("teacher", back)])
  assert status == 0 and "--config.teacher.checkpoint" in out, err
  field = "--workdir"
  with (weights_lib.open_weights(tiny_teacher, "ema", field) as (shapes, was),
        weights_lib.open_weights(back, "ema", field) as (_, read)):
    for path in shapes:
      np.testing.assert_array_equal(read(path), was(path), err_msg=path)
  status, out, err = tiny.run([*command, "sideways"])
  assert status == 2 and len(err.strip().splitlines()) == 1 and "from-torch, to-torch or adapters" in err
