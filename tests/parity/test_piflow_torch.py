"""The module that is shipped with an export: the same samples from the same noise as here."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import build
from piflow_jax import sampler
from piflow_jax.convert import run
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
