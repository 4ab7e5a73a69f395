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
from tests.convert import making

torch = pytest.importorskip("torch")


def _other(state):
  return {k: v + 1 for k, v in state.items()}


def _all_of_it(state):
  """What a training script saves beside the weights."""
  return {"model": _other(state), "ema": state, "opt": {"state": {0: torch.zeros(2)}, "lr": 1.0},
          "args": argparse.Namespace(seed=0)}


@pytest.mark.parametrize("wrap, where", [
    (lambda state: state, ""),
    (_all_of_it, "under 'ema.'"),
    (lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
     "under 'state_dict.module.'"),
    (lambda state: {"ema": {"step": 3}, "model": state}, "under 'model.'"),
    (lambda state: {"ema": {"decay": torch.tensor(0.9)}, "model": state}, "under 'model.'"),
    (lambda state: {"model": state, "step": torch.tensor(5)}, "under 'model.'"),
    (lambda state: {"step": torch.tensor(5), "train": {"net": _other(state), "net_ema": {"model": state}}},
     "under 'train.net_ema.model.'"),
])
@pytest.mark.parametrize("legacy", [False, True])
def test_pt_files_of_training_scripts(wrap, where, legacy, tmp_path, capsys):
  state = wrap({k: torch.tensor(v) for k, v in making.state("dit_teacher").items()})
  torch.save(state, tmp_path / "last.pt", _use_new_zipfile_serialization=not legacy)
  config = making.config("teacher")
  run.from_torch(tmp_path / "last.pt", tmp_path / "run", config)
  assert where in capsys.readouterr().out
  want = golden.dit_params(golden.load("dit_teacher"), 2, 2, golden.velocity_head)
  making.equal(making.weights(config, tmp_path / "run"), want)


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
    run.from_torch(tmp_path / "x.pt", tmp_path / "run", making.config("teacher"))
  assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()


def test_what_holds_no_tensors_is_told(tmp_path):
  torch.save({"ema": {"step": 3}}, tmp_path / "x.pt")
  with pytest.raises(errors.UserError, match="holds no tensors by name"):
    run.from_torch(tmp_path / "x.pt", tmp_path / "run", making.config("teacher"))


@pytest.mark.parametrize("part", ["proj_out_1.weight", "class_embedder.embedding_table.weight"])
def test_a_flipped_bit_is_found_by_the_files_own_sums(part, tmp_path):
  state = making.state("dit_teacher")
  path = tmp_path / "x.pt"
  torch.save({k: torch.tensor(v) for k, v in state.items()}, path)
  data = bytearray(path.read_bytes())
  place = data.find(next(v for k, v in state.items() if k.endswith(part)).tobytes())
  data[place + 9] ^= 4
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match=r"x.pt is damaged: the CRC-32 .* x/data/\d+; fetch it again"):
    run.from_torch(path, tmp_path / "run", making.config("teacher"))
  assert not (tmp_path / "run").exists()
  data[place + 9] ^= 4
  path.write_bytes(data[:-30])
  with pytest.raises(errors.UserError, match="x.pt cannot be read"):
    run.from_torch(path, tmp_path / "run", making.config("teacher"))


def test_files_that_were_saved_without_sums_are_read(tmp_path):
  before = torch.serialization.get_crc32_options()
  torch.serialization.set_crc32_options(False)
  try:
    torch.save({k: torch.tensor(v) for k, v in making.state("dit_teacher").items()}, tmp_path / "x.pt")
  finally:
    torch.serialization.set_crc32_options(before)
  run.from_torch(tmp_path / "x.pt", tmp_path / "run", making.config("teacher"))


def _in_itself(state):
  tree = {"model": state, "step": 3}
  tree["again"] = tree
  return tree


def _deep(state):
  tree = state
  for _ in range(200):
    tree = {"a": tree}
  return tree


def _many_times(state):
  tree = {"x": torch.zeros(1)}
  for _ in range(30):
    tree = {"a": tree, "b": tree}
  return tree | {"model": state}


@pytest.mark.parametrize("wrap", [_in_itself, _deep, _many_times])
def test_dicts_without_end(wrap, tmp_path):
  torch.save(wrap({k: torch.tensor(v) for k, v in making.state("dit_teacher").items()}), tmp_path / "x.pt")
  with pytest.raises(errors.UserError, match="x.pt holds dicts within dicts without end"):
    run.from_torch(tmp_path / "x.pt", tmp_path / "run", making.config("teacher"))


def test_tensors_without_numbers_are_refused(tmp_path):
  state = {k: torch.tensor(v) for k, v in making.state("dit_teacher").items()}
  torch.save(state | {"proj_out_1.bias": torch.zeros(32, device="meta")}, tmp_path / "x.pt")
  with pytest.raises(errors.UserError, match="no dense array of 16, 32 or 64 bit floats: proj_out_1.bias .*meta"):
    run.from_torch(tmp_path / "x.pt", tmp_path / "run", making.config("teacher"))
