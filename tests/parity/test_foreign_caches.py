"""Caches that PyTorch wrote: LakonLab's, MeanFlow's, LightningDiT's."""

import numpy as np
import pytest
from safetensors.torch import save_file
import torch

from piflow_jax.data import foreign_caches
from tests.data import foreign

LABELS = [0, 0, 1, 2]


def test_lakonlabs_draws_are_scaled_already(tmp_path):
  mean, _ = foreign.moments(4)
  for i, x in enumerate(mean):
    torch.save({"x": torch.from_numpy(x * np.float32(0.18215)), "y": LABELS[i]}, tmp_path / f"{i}.pth")
  (tmp_path / "train.txt").write_text("".join(f"{i}.pth {label}\n" for i, label in enumerate(LABELS)))
  found = foreign_caches.open_cache("lakonlab", str(tmp_path / "train.txt"))
  assert (found.shape, found.views, found.moments) == ((6, 5, 4), 1, False) and found.labels.tolist() == LABELS
  for i in range(4):
    np.testing.assert_allclose(found.read(i)[0], foreign.last(mean)[i], rtol=1e-6)
  (tmp_path / "train.txt").write_text("0.pth 1\n")
  with pytest.raises(ValueError, match="^source: .*0.pth has the label 0, train.txt says 1"):
    foreign_caches.open_cache("lakonlab", str(tmp_path / "train.txt"))
  (tmp_path / "train.txt").write_text("9.pth 0\n")
  with pytest.raises(ValueError, match="^source: .*9.pth, which train.txt names, is not there"):
    foreign_caches.open_cache("lakonlab", str(tmp_path / "train.txt"))
  (tmp_path / "train.txt").write_text("0.pth zero\n")
  with pytest.raises(ValueError, match="^source: .*line 1 is '0.pth zero'"):
    foreign_caches.open_cache("lakonlab", str(tmp_path / "train.txt"))


def test_meanflows_deviations(tmp_path):
  mean, logvar = foreign.moments(4)
  for i in range(4):
    both = torch.from_numpy(np.concatenate([mean[i], np.exp(logvar[i] / 2)]))
    torch.save({"image": both, "label": torch.tensor(LABELS[i])}, tmp_path / f"{i:08}.pt")
  found = foreign_caches.open_cache("meanflow", str(tmp_path))
  assert (found.shape, found.views, found.moments) == ((6, 5, 4), 1, True) and found.labels.tolist() == LABELS
  want = np.concatenate([foreign.last(mean), foreign.last(logvar)], -1)
  for i in range(4):
    np.testing.assert_allclose(found.read(i)[0], want[i], rtol=1e-5, atol=1e-5)

  class Runs:

    def __reduce__(self):
      return exec, ("raise SystemExit('it ran')",)

  torch.save({"image": Runs(), "label": 0}, tmp_path / "00000000.pt")
  with pytest.raises(ValueError, match="^source: .*00000000.pt cannot be read as tensors alone"):
    foreign_caches.open_cache("meanflow", str(tmp_path))


def test_lightningdits_draws_are_normalised_when_they_are_read(tmp_path):
  x, _ = foreign.moments(4)
  flip = x[..., ::-1].copy() * 3
  for part in range(2):
    rows = slice(2 * part, 2 * part + 2)
    save_file({"latents": torch.from_numpy(x[rows]), "latents_flip": torch.from_numpy(flip[rows]),
               "labels": torch.tensor(LABELS[rows])}, tmp_path / f"latents_rank00_shard{part:03}.safetensors")
  mean, std = np.arange(4, dtype=np.float32), np.arange(1, 5, dtype=np.float32)
  torch.save({"mean": torch.from_numpy(mean).view(1, 4, 1, 1), "std": torch.from_numpy(std).view(1, 4, 1, 1)},
             tmp_path / "latents_stats.pt")
  found = foreign_caches.open_cache("lightningdit", str(tmp_path))
  assert (found.shape, found.views, found.moments) == ((6, 5, 4), 2, False) and found.labels.tolist() == LABELS
  for i in range(4):
    np.testing.assert_array_equal(found.read(i), np.stack([foreign.last(x)[i], foreign.last(flip)[i]]))
    normal = (found.read(i)[0] - found.offset) * found.scale
    np.testing.assert_allclose(normal, (foreign.last(x)[i] - mean) / std, rtol=1e-6)
