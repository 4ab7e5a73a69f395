"""The module that is shipped with an export: the same samples from the same noise as here."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import sampler
from piflow_jax import train_loop
from piflow_jax.convert import run
from tests import tiny
from tests.convert.test_dit import _config, _random, _save

torch = pytest.importorskip("torch")

LABELS = np.array([0, 3, 9])


def _exported(head, tmp_path, **fields):
  """(config, parameters, the module's model of them): a random network whose output is of the size of a velocity."""
  from piflow_jax.convert import piflow_torch

  config = _config(head)
  config.update_from_flattened_dict(fields)
  tree = jax.tree.map(lambda a: 0.2 * a, _random(config))
  _save(tmp_path / "run", tree)
  run.to_torch(tmp_path / "run", tmp_path / "out", config)
  return config, tree, piflow_torch.load(tmp_path / "out")


def _noise(config):
  return np.random.default_rng(1).standard_normal((3, *config.data.shape)).astype(np.float32)


def _there(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def _here(x):
  return x.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("head, fields", [
    ("gm", {}),
    ("gm", {"flow.nfe": 2, "flow.final_scale": 0.5, "flow.shift": 3.2, "sampling.temperature": 0.3}),
    ("gm", {"network.time_scale": 1000.0, "network.mlp_norm_eps": 1e-6, "policy.components": 1}),
    ("dx", {"flow.nfe": 2, "flow.shift": 2.0}),
    ("dx", {"policy.polynomial": True}),
    ("dx", {"policy.points": 1}),
    ("parallel", {"flow.shift": 2.0}),
    ("parallel", {"flow.nfe": 3}),
    ("teacher", {"network.time_scale": -1.0, "network.time_offset": 1.0, "flow.nfe": 4}),
])
def test_the_same_noise_gives_the_same_images(head, fields, tmp_path):
  from piflow_jax.convert import piflow_torch

  config, tree, model = _exported(head, tmp_path, **fields)
  noise, nfe = _noise(config), config.flow.nfe
  flow_map = build.run(config).flow_map(tree, None, jnp.asarray(LABELS), nfe)
  shift = dict(shift=build.shift(config), final_scale=config.flow.final_scale)
  want = jax.jit(lambda x: sampler.sample(flow_map, x, jax.random.key(0), nfe=nfe, **shift))(noise)
  got = _here(piflow_torch.sample(model, _there(noise), torch.tensor(LABELS), nfe=nfe if head in ("parallel", "teacher") else None))
  assert 0.5 < np.abs(want).max() < 100
  # Two networks and up to 128 substeps in float32.
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
  assert np.abs(got - noise).max() > 0.1


def test_a_teachers_guidance_is_ours(tmp_path):
  from piflow_jax.convert import piflow_torch

  fields = {"teacher.guidance_scale": 2.5, "teacher.guidance_interval": (0.2, 0.7)}
  config, tree, model = _exported("teacher", tmp_path, **fields)
  noise = _noise(config)
  flow_map = build.teacher_flow_map(config, tree, jnp.asarray(LABELS))
  want = jax.jit(lambda x: sampler.sample(flow_map, x, jax.random.key(0), nfe=6))(noise)
  draw = lambda **more: _here(piflow_torch.sample(model, _there(noise), torch.tensor(LABELS), nfe=6, **more))
  np.testing.assert_allclose(draw(guidance=2.5, guidance_interval=(0.2, 0.7)), want, atol=1e-4 * np.abs(want).max())
  assert np.abs(draw() - want).max() > 0.1
  assert np.abs(draw(guidance=2.5) - want).max() > 0.1
  with pytest.raises(ValueError, match="guidance 2.5: a student's was fixed"):
    student = _exported("gm", tmp_path / "student")[2]
    piflow_torch.sample(student, _there(noise), torch.tensor(LABELS), guidance=2.5)


@pytest.mark.parametrize("max_bytes", [5e9, 20_000])
def test_what_lies_beside_the_weights_is_not_loaded(max_bytes, tmp_path):
  from piflow_jax.convert import piflow_torch
  from safetensors.torch import load_file, save_file

  config = _config("gm")
  _save(tmp_path / "run", _random(config))
  run.to_torch(tmp_path / "run", tmp_path / "out", config, max_bytes=max_bytes)
  shards = sorted((tmp_path / "out").glob("*.safetensors"))
  assert (len(shards) > 1) == (max_bytes < 1e9)
  want = {k: v for shard in shards for k, v in load_file(shard).items()}
  save_file({k: v + 1 for k, v in want.items()}, tmp_path / "out" / "zz-old.safetensors")
  got = piflow_torch.load(tmp_path / "out").state_dict()
  assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_blocks_layer_is_summed_in_float32(tmp_path):
  """In bfloat16: the fused layer is the float32 sum of the stored layers rounded once."""
  from piflow_jax.convert import piflow_torch

  config, tree, _ = _exported("parallel", tmp_path, **{"policy.intervals": 128, "parallel_decoding.max_block": 128})
  half = piflow_torch.load(tmp_path / "out", dtype=torch.bfloat16)
  seen = []
  layer = torch.nn.functional.linear
  with pytest.MonkeyPatch.context() as patch, torch.no_grad():
    patch.setattr(piflow_torch.F, "linear", lambda x, w, b: (seen.append((w, b)), layer(x, w, b))[1])
    half.block_velocity(_there(_noise(config)), torch.ones(3), torch.tensor(LABELS), 1.0, 0.3)
  rounded = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), tree["head"])
  fused = build.policy_head(config).fuse(rounded, *jnp.array([1.0, 0.3]))["out"]
  for got, want in zip(seen[-1], (fused["kernel"].reshape(16, -1).T, fused["bias"].reshape(-1))):
    same = got.float().numpy() == np.asarray(want.astype(jnp.bfloat16), np.float32)
    assert got.dtype == torch.bfloat16 and same.mean() > 0.98  # but where two orders of a sum fall on either side of a tie


@pytest.mark.slow
def test_a_trained_students_export_draws_its_samples(tmp_path):
  """A student of real digits after some updates, exported by the command, sampled by the file beside it."""
  assert train_loop.train(tiny.config("teacher", steps=100, checkpoint_every=100), tmp_path / "teacher") == 0
  config = tiny.config("student", steps=50, checkpoint_every=50, teacher__checkpoint=str(tmp_path / "teacher"))
  assert train_loop.train(config, tmp_path / "run") == 0
  fields = [f"--config.{k}={v}" for k, v in tiny.FIELDS.items()]
  status, _, err = tiny.run([sys.executable, "-m", "piflow_jax.convert", "to-torch", "--config=configs/digits.py:student",
                             f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", *fields])
  assert status == 0, err
  noise = np.random.default_rng(1).standard_normal((32, *config.data.shape)).astype(np.float32)
  labels = np.arange(32) % 10
  torch.save(_there(noise), tmp_path / "noise.pt")
  subprocess.run([sys.executable, "piflow_torch.py", f"--labels={','.join(map(str, labels))}",
                  f"--noise={tmp_path / 'noise.pt'}", f"--out={tmp_path / 'x.pt'}"], check=True, cwd=tmp_path / "out")
  local = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  made = build.run(config)
  shapes = jax.eval_shape(made.init, jax.random.key(0), made.teacher_shapes)
  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=local), shapes)
  params = checkpoint.load_weights(tmp_path / "run", shapes, "ema", "--workdir")
  flow_map = made.flow_map(params, None, jnp.asarray(labels), 1)
  want = np.asarray(jax.jit(lambda x: sampler.sample(flow_map, x, jax.random.key(0), nfe=1))(noise))
  got = _here(torch.load(tmp_path / "x.pt"))
  print(f"largest difference {np.abs(got - want).max():.1e} of samples up to {np.abs(want).max():.1f}")
  assert np.abs(want).max() > 0.5 and np.abs(got - noise).max() > 0.5
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("h", [0.5, np.inf])
def test_stochastic_steps_go_where_ours_go(h, tmp_path, monkeypatch):
  from piflow_jax.convert import piflow_torch

  config, tree, model = _exported("gm", tmp_path, **{"flow.nfe": 3, "flow.shift": 2.0})
  noise, fresh = _noise(config), np.random.default_rng(2).standard_normal((3, 8, 8, 4)).astype(np.float32)
  monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: _there(fresh))
  got = _here(piflow_torch.sample(model, _there(noise), torch.tensor(LABELS), h=h))
  flow_map = build.run(config).flow_map(tree, None, jnp.asarray(LABELS), 3)
  plan, x = sampler.step_plan(nfe=3, shift=2.0, h=h), noise
  for i in range(3):
    x = flow_map(x, *(jnp.full(3, plan[k][i]) for k in ("tau", "tau_dst")), None)
    x = sampler.renoise(x, fresh, plan["t_next"][i], plan["m"][i])
  np.testing.assert_allclose(got, x, atol=1e-4 * np.abs(x).max())


def test_the_folder_samples_on_its_own(tmp_path):
  """As a user of PyTorch runs it: by its own file, in a process that cannot import piflow_jax or jax."""
  config, _, model = _exported("gm", tmp_path)
  noise = _there(_noise(config))
  torch.save(noise, tmp_path / "noise.pt")
  blocked = "import sys; sys.modules['jax'] = sys.modules['piflow_jax'] = None; sys.path[:0] = ['.']; import piflow_torch; piflow_torch.main()"
  command = [sys.executable, "-c", blocked, "--model=.", "--labels=0,3,9", f"--noise={tmp_path / 'noise.pt'}",
             f"--out={tmp_path / 'x.pt'}"]
  subprocess.run(command, check=True, cwd=tmp_path / "out")
  from piflow_jax.convert import piflow_torch
  want = piflow_torch.sample(model, noise, torch.tensor(LABELS))
  torch.testing.assert_close(torch.load(tmp_path / "x.pt"), want)


def test_half_precision_is_near(tmp_path):
  from piflow_jax.convert import piflow_torch

  config, _, model = _exported("gm", tmp_path)
  noise, labels = _there(_noise(config)), torch.tensor(LABELS)
  half = piflow_torch.load(tmp_path / "out", dtype=torch.bfloat16)
  want, got = piflow_torch.sample(model, noise, labels), piflow_torch.sample(half, noise, labels)
  assert got.dtype == torch.float32 and torch.isfinite(got).all()
  error = (got - want).abs().mean() / want.abs().mean()
  assert 1e-5 < error < 0.1, error  # 8 bits of mantissa; and not float32
