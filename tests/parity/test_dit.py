"""DiT against diffusers' DiTTransformer2DModel with the same random weights (float32; a model to 1e-4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piflow_jax import params as params_lib
from piflow_jax.convert import dit
from piflow_jax.convert import run
from piflow_jax.convert import table
from piflow_jax.convert import trees
from tests.convert import making

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def _theirs(config, seed=0):
  """Their model with every tensor re-drawn: fresh, its blocks are the identity and its output is 0."""
  n, (height, _, channels) = config.network, config.data.shape
  model = diffusers.DiTTransformer2DModel(
      num_attention_heads=n.heads, attention_head_dim=n.width // n.heads, in_channels=channels, out_channels=channels,
      num_layers=n.depth, sample_size=height, patch_size=n.patch, num_embeds_ada_norm=config.data.num_classes).eval()
  generator = torch.Generator().manual_seed(seed)
  state = {name: torch.randn(w.shape, generator=generator) * (0.02 if w.ndim < 2 else w[0].numel() ** -0.5)
           for name, w in model.state_dict().items()}
  # What the blocks hold of time and class is one embedding, copied.
  for name in state:
    state[name] = state.get(name.replace(f"blocks.{name.split('.')[1]}.norm1.emb", "blocks.0.norm1.emb"), state[name])
  model.load_state_dict(state)
  return model


def _compare(config, model, params, atol):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, *config.data.shape)).astype(np.float32)
  t, labels = np.array([0.0, 0.37, 1.0], np.float32), np.array([0, 3, config.data.num_classes])
  with torch.no_grad():
    want = model(torch.tensor(x.transpose(0, 3, 1, 2)), timestep=torch.tensor(t * config.network.time_scale),
                 class_labels=torch.tensor(labels)).sample.numpy().transpose(0, 2, 3, 1)
  got = np.asarray(jax.jit(making.velocity(config))(params, x, t, labels))
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(got, want, atol=atol * np.abs(want).max())


def test_diffusers_model_is_ours_and_ours_is_theirs(tmp_path):
  config = making.config("teacher", frequency_shift=1, time_scale=1000.0)
  model = _theirs(config)
  model.save_pretrained(tmp_path / "theirs")
  run.from_torch(tmp_path / "theirs", tmp_path / "run", config)
  params = making.weights(config, tmp_path / "run")
  # Time features of 1000 t are float32's rounding of angles up to 1000.
  _compare(config, model, params, 1e-4)
  run.to_torch(tmp_path / "run", tmp_path / "ours", config, naming="diffusers")
  loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
  for (name, want), got in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
    assert torch.equal(want, got), name
  assert dict(loaded.config)["num_layers"] == 2 and loaded.config.norm_eps == 1e-5


def test_a_layer_at_the_width_of_xl():
  """One block, 1152 wide: the same to 1e-5 of the largest entry."""
  config = making.config("teacher", depth=1, width=1152, heads=16, frequency_shift=1)
  model = _theirs(config)
  weights, _ = trees.weights_of(config)
  entries = table.entries(dit.NAMINGS["diffusers"].rows(weights), weights.shapes, "diffusers")
  state = {name: w.numpy() for name, w in model.state_dict().items()}
  leaves = {e.path: e.to_here(state.__getitem__)[(None,) * (e.layer is not None)] for e in entries}
  params = params_lib.map_with_path(lambda name, _: jnp.asarray(leaves[name]), making.shapes(config))
  _compare(config, model, params, 1e-5)
