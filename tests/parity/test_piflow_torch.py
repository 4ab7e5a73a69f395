"""The files that are shipped with an export: the same samples from the same noise as here."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import build
from piflow_jax import convert
from piflow_jax import sampler
from piflow_jax import teacher
from piflow_jax import train_loop
from piflow_jax.convert import run
from tests import tiny
from tests.convert import making

torch = pytest.importorskip("torch")

# As for a user whose folder of an export is on the path: the three files import one another by their bare names.
sys.path.append(str(pathlib.Path(convert.__path__[0])))
import piflow_dit  # noqa: E402
import piflow_policy  # noqa: E402
import piflow_torch  # noqa: E402

LABELS = np.array([0, 3, 9])


def _exported(head, tmp_path, fields=None):
  """(config, parameters, the module's model of them): a random network whose output is of the size of a velocity."""
  config = making.changed(making.config(head), **(fields or {}))
  tree = jax.tree.map(lambda a: 0.2 * a, making.random(config))
  making.save(tmp_path / "run", tree)
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
    ("gm", {"method.nfe": 2, "method.final_scale": 0.5, "flow.shift": 3.2, "policy.temperature": 0.3}),
    ("gm", {"network.time_scale": 1000.0, "network.mlp_norm_eps": 1e-6, "policy.components": 1}),
    ("dx", {"method.nfe": 2, "flow.shift": 2.0}),
    ("dx", {"policy.polynomial": True}),
    ("dx", {"policy.points": 1}),
    ("parallel", {"flow.shift": 2.0}),
    ("parallel", {"sampling.nfe": 3}),
    ("teacher", {"network.time_scale": -1.0, "network.time_offset": 1.0, "sampling.nfe": 4}),
])
def test_the_same_noise_gives_the_same_images(head, fields, tmp_path):
  config, tree, model = _exported(head, tmp_path, fields)
  noise, made = _noise(config), build.run(config)
  clock = made.method.clock if made.method.per_call else build.sampling_clock(config, made)
  flow_map = made.method.flow_map(tree, None, {"label": jnp.asarray(LABELS)}, clock)
  want = jax.jit(lambda x: sampler.sample(flow_map, x, None, clock))(noise)
  nfe = clock.nfe if head == "teacher" else None  # of a student it is in config.json
  got = _here(piflow_torch.sample(model, _there(noise), torch.tensor(LABELS), nfe=nfe))
  assert 0.5 < np.abs(want).max() < 100
  # Two networks and up to 128 substeps in float32.
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
  assert np.abs(got - noise).max() > 0.1


def test_a_teachers_guidance_is_ours(tmp_path):
  config, tree, model = _exported("teacher", tmp_path)
  noise, made = _noise(config), build.run(config)
  velocity = teacher.network_teacher(
      build.velocity_net(made.network, made.data.spec).apply, made.network.null, guidance_scale=2.5,
      guidance_interval=(0.2, 0.7))
  clock = build.teacher_clock(made, 6)
  flow_map = sampler.velocity_flow_map(lambda x, t: velocity(tree, x, t, {"label": jnp.asarray(LABELS)}), clock)
  want = jax.jit(lambda x: sampler.sample(flow_map, x, None, clock))(noise)
  draw = lambda **more: _here(piflow_torch.sample(model, _there(noise), torch.tensor(LABELS), nfe=6, **more))
  np.testing.assert_allclose(draw(guidance=2.5, guidance_interval=(0.2, 0.7)), want, atol=1e-4 * np.abs(want).max())
  assert np.abs(draw() - want).max() > 0.1
  assert np.abs(draw(guidance=2.5) - want).max() > 0.1
  with pytest.raises(ValueError, match="guidance 2.5: a student's was fixed"):
    student = _exported("gm", tmp_path / "student")[2]
    piflow_torch.sample(student, _there(noise), torch.tensor(LABELS), guidance=2.5)


@pytest.mark.parametrize("max_bytes", [5e9, 20_000])
def test_what_lies_beside_the_weights_is_not_loaded(max_bytes, tmp_path):
  from safetensors.torch import load_file
  from safetensors.torch import save_file

  config = making.config("gm")
  making.save(tmp_path / "run", making.random(config))
  run.to_torch(tmp_path / "run", tmp_path / "out", config, max_bytes=max_bytes)
  shards = sorted((tmp_path / "out").glob("*.safetensors"))
  assert (len(shards) > 1) == (max_bytes < 1e9)
  want = {k: v for shard in shards for k, v in load_file(shard).items()}
  save_file({k: v + 1 for k, v in want.items()}, tmp_path / "out" / "zz-old.safetensors")
  got = piflow_torch.load(tmp_path / "out").state_dict()
  assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_blocks_layer_is_summed_in_float32(tmp_path):
  """In bfloat16: the fused layer is the float32 sum of the stored layers rounded once."""
  config, tree, _ = _exported("parallel", tmp_path, {"policy.intervals": 128, "method.max_block": 128})
  half = piflow_torch.load(tmp_path / "out", dtype=torch.bfloat16)
  seen = []
  layer = torch.nn.functional.linear
  with pytest.MonkeyPatch.context() as patch, torch.no_grad():
    patch.setattr(piflow_dit.F, "linear", lambda x, w, b: (seen.append((w, b)), layer(x, w, b))[1])
    weights = piflow_policy.block_weights(half.settings, half.count, 1.0, 0.3)
    half.block_velocity(_there(_noise(config)), torch.ones(3), torch.tensor(LABELS), weights)
  rounded = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16).astype(jnp.float32), tree["head"])
  made = build.run(config)
  fused = made.student.head.fuse(rounded, *jnp.array([1.0, 0.3]), made.method.clock)["out"]
  for got, want in zip(seen[-1], (fused["kernel"].reshape(16, -1).T, fused["bias"].reshape(-1))):
    same = got.float().numpy() == np.asarray(want.astype(jnp.bfloat16), np.float32)
    # Two orders of a sum may fall on either side of a tie.
    assert got.dtype == torch.bfloat16 and same.mean() > 0.98


@pytest.mark.slow
def test_a_trained_students_export_draws_its_samples(tmp_path):
  """A student of real digits after some updates, exported by the command, sampled by the file beside it."""
  assert train_loop.train(tiny.config("teacher", steps=100, checkpoint_every=100), tmp_path / "teacher") == 0
  config = tiny.config("student", steps=50, checkpoint_every=50, teacher__checkpoint=str(tmp_path / "teacher"))
  assert train_loop.train(config, tmp_path / "run") == 0
  status, _, err = tiny.run([sys.executable, "-m", "piflow_jax.convert", "to-torch", f"--workdir={tmp_path / 'run'}",
                             f"--out={tmp_path / 'out'}"])
  assert status == 0, err
  noise = np.random.default_rng(1).standard_normal((32, 8, 8, 1)).astype(np.float32)
  labels = np.arange(32) % 10
  torch.save(_there(noise), tmp_path / "noise.pt")
  subprocess.run([sys.executable, "piflow_torch.py", f"--labels={','.join(map(str, labels))}",
                  f"--noise={tmp_path / 'noise.pt'}", f"--out={tmp_path / 'x.pt'}"], check=True, cwd=tmp_path / "out")
  made, params = build.run(config), making.weights(config, tmp_path / "run")
  flow_map = made.method.flow_map(params, None, {"label": jnp.asarray(labels)}, made.method.clock)
  want = np.asarray(jax.jit(lambda x: sampler.sample(flow_map, x, None, made.method.clock))(noise))
  got = _here(torch.load(tmp_path / "x.pt"))
  print(f"largest difference {np.abs(got - want).max():.1e} of samples up to {np.abs(want).max():.1f}")
  assert np.abs(want).max() > 0.5 and np.abs(got - noise).max() > 0.5
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("h", [0.5, np.inf])
def test_stochastic_steps_go_where_ours_go(h, tmp_path, monkeypatch):
  config, tree, model = _exported("gm", tmp_path, {"method.nfe": 3, "flow.shift": 2.0})
  noise, fresh = _noise(config), np.random.default_rng(2).standard_normal((3, 8, 8, 4)).astype(np.float32)
  monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: _there(fresh))
  got = _here(piflow_torch.sample(model, _there(noise), torch.tensor(LABELS), h=h))
  method = build.run(config).method
  flow_map = method.flow_map(tree, None, {"label": jnp.asarray(LABELS)}, method.clock)
  plan, x = sampler.step_plan(method.clock, h), noise
  for i in range(3):
    x = flow_map(x, *(jnp.full(3, plan[k][i]) for k in ("tau", "tau_dst")))
    x = sampler.renoise(x, fresh, plan["t_next"][i], plan["m"][i])
  np.testing.assert_allclose(got, x, atol=1e-4 * np.abs(x).max())


def test_the_folder_samples_on_its_own(tmp_path):
  """As a user of PyTorch runs it: by its own file, in a process that cannot import piflow_jax or jax."""
  config, _, model = _exported("gm", tmp_path)
  noise = _there(_noise(config))
  torch.save(noise, tmp_path / "noise.pt")
  blocked = ("import sys; sys.modules['jax'] = sys.modules['piflow_jax'] = None; sys.path[:0] = ['.']; "
             "import piflow_torch; piflow_torch.main()")
  command = [sys.executable, "-c", blocked, "--model=.", "--labels=0,3,9", f"--noise={tmp_path / 'noise.pt'}",
             f"--out={tmp_path / 'x.pt'}"]
  subprocess.run(command, check=True, cwd=tmp_path / "out")
  want = piflow_torch.sample(model, noise, torch.tensor(LABELS))
  torch.testing.assert_close(torch.load(tmp_path / "x.pt"), want)


def test_half_precision_is_near(tmp_path):
  config, _, model = _exported("gm", tmp_path)
  noise, labels = _there(_noise(config)), torch.tensor(LABELS)
  half = piflow_torch.load(tmp_path / "out", dtype=torch.bfloat16)
  want, got = piflow_torch.sample(model, noise, labels), piflow_torch.sample(half, noise, labels)
  assert got.dtype == torch.float32 and torch.isfinite(got).all()
  error = (got - want).abs().mean() / want.abs().mean()
  assert 1e-5 < error < 0.1, error  # 8 bits of mantissa; and not float32
