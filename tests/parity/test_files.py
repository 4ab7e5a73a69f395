"""PyTorch's own files: read as weights alone, never as code."""

import argparse
import pickle

import ml_dtypes
import numpy as np
import pytest

from piflow_jax import errors
from piflow_jax.convert import files
from piflow_jax.convert import run
from tests import golden
from tests.convert.test_dit import _config, _equal, _state, _weights

torch = pytest.importorskip("torch")


def _other(state):
  return {k: v + 1 for k, v in state.items()}


@pytest.mark.parametrize("wrap, where", [
    (lambda state: state, ""),
    (lambda state: {"model": _other(state), "ema": state, "opt": {"state": {0: torch.zeros(2)}, "lr": 1.0},
                    "args": argparse.Namespace(seed=0)}, "under 'ema.'"),
    (lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, "under 'state_dict.module.'"),
    (lambda state: {"ema": {"step": 3}, "model": state}, "under 'model.'"),
    (lambda state: {"ema": {"decay": torch.tensor(0.9)}, "model": state}, "under 'model.'"),
    (lambda state: {"model": state, "step": torch.tensor(5)}, "under 'model.'"),
    (lambda state: {"step": torch.tensor(5), "train": {"net": _other(state), "net_ema": {"model": state}}},
     "under 'train.net_ema.model.'"),
])
@pytest.mark.parametrize("legacy", [False, True])
def test_pt_files_of_training_scripts(wrap, where, legacy, tmp_path, capsys):
  state = wrap({k: torch.tensor(v) for k, v in _state("dit_teacher").items()})
  torch.save(state, tmp_path / "last.pt", _use_new_zipfile_serialization=not legacy)
  config = _config("teacher")
  run.from_torch(tmp_path / "last.pt", tmp_path / "run", config)
  assert where in capsys.readouterr().out
  _equal(_weights(config, tmp_path / "run"), golden.dit_params(golden.load("dit_teacher"), 2, 2, golden.velocity_head))


def test_bfloat16_tensors(tmp_path):
  tensor = torch.randn(3, 4).to(torch.bfloat16)
  torch.save({"a": tensor}, tmp_path / "x.pth")
  with files.open_source(tmp_path / "x.pth") as source:
    assert source.read("a").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(source.read("a").astype(np.float32), tensor.float().numpy())


class _Harm:
  def __reduce__(self):
    return open, ("harm", "w")


@pytest.mark.parametrize("save", [torch.save, lambda tree, path: path.write_bytes(pickle.dumps(tree))])
def test_a_file_that_would_run_code_is_refused(save, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save({"a": torch.zeros(2), "b": _Harm()}, tmp_path / "x.pt")
  (tmp_path / "harm").unlink(missing_ok=True)
  with pytest.raises(errors.UserError, match="x.pt cannot be read as weights alone"):
    run.from_torch(tmp_path / "x.pt", tmp_path / "run", _config("teacher"))
  assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()


def test_what_holds_no_tensors_is_told(tmp_path):
  torch.save({"ema": {"step": 3}}, tmp_path / "x.pt")
  with pytest.raises(errors.UserError, match="holds no tensors by name"):
    run.from_torch(tmp_path / "x.pt", tmp_path / "run", _config("teacher"))
