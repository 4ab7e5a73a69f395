"""FID's Inception here against torch-fidelity's, with the same random weights, from bytes to every tap."""

import jax
import numpy as np
import pytest
import torch

from piflow_jax import params as params_lib
from piflow_jax.convert import inception as convert
from piflow_jax.models import inception
from tests import random_inception
from tests.parity import inception_oracle

TAPS = {"64": "64", "192": "192", "768": "768", "2048": "pool", "logits": "biased_logits", "logits_unbiased": "logits"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """(parameters, .pth with the counters that some files have)."""
  params, folder = random_inception.params(), tmp_path_factory.mktemp("inception")
  convert.write(params, folder / "own.safetensors")
  table, leaves = convert.keys(), params_lib.named_leaves(params)
  state = {}
  for path, key in table.items():
    x = np.asarray(leaves[path])
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(x.ndim, (0,))
    state[key] = torch.from_numpy(x.transpose(axes).copy())
    if key.endswith("running_mean"):
      state[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
  torch.save({k: v for k, v in state.items() if "tracked" not in k}, folder / "plain.pth")
  torch.save(state, folder / "counted.pth")
  return params, folder


def test_every_tap_of_pictures_of_any_size(weights):
  params, folder = weights
  extract = inception_oracle.extractor(folder / "plain.pth", TAPS)
  run = jax.jit(lambda images: inception.apply(params, images, (*TAPS.values(), "spatial")))
  for height, width in ((256, 256), (75, 310)):
    images = np.random.default_rng(height).integers(0, 256, (2, height, width, 3), np.uint8)
    want, got = extract(images), run(images)
    for theirs, ours in (*TAPS.items(), ("spatial", "spatial")):
      scale = np.abs(want[theirs]).max()
      # Float32 sums of up to 18,432 products in another order, through 94 layers: 1e-6 measured.
      np.testing.assert_allclose(got[ours], want[theirs], rtol=0, atol=1e-5 * scale, err_msg=ours)


def test_a_file_is_read_as_it_was_written(weights):
  params, folder = weights
  for name in ("plain.pth", "counted.pth", "own.safetensors"):
    jax.tree.map(np.testing.assert_array_equal, convert.load(folder / name)[0], params)
