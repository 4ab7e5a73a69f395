"""Prompts that pi-Flow's own tool encoded: files as PyTorch pickles them, read without it."""

import io
import pickle

import numpy as np
import pytest

from piflow_jax import config as config_lib
from piflow_jax.data import release_cache
from piflow_jax.data import texts
from tests import tiny

torch = pytest.importorskip("torch")
zstandard = pytest.importorskip("zstandard")

PROGRAM = "piflow_jax.data.prompts"


def _file(path, prompt, text, **more):
  """A file as their tool writes it; text float32, kept as float8 and its scale."""
  scale = (text.abs().max() / 448).clamp(min=1e-6)
  kept = {"encoder_hidden_states": (text / scale).to(torch.float8_e4m3fn), "encoder_hidden_states_scale": scale, **more}
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(zstandard.ZstdCompressor(level=3).compress(pickle.dumps(
      {"prompt": prompt, "prompt_embed_kwargs": kept})))
  return (kept["encoder_hidden_states"].float() * scale).bfloat16().float().numpy()


def _records(cache):
  noun = texts.config(path=str(cache), held_out=str(cache), shape=(8, 8, 4))
  data = noun.make(**config_lib.fields_of(noun))
  return data, data.records("train")


def test_flux_texts_with_their_padding_and_pooled_vectors(tmp_path):
  generator, want = torch.Generator().manual_seed(0), {}
  for i in (2, 0, 1):
    pooled = torch.randn(6, generator=generator).bfloat16()
    text = _file(tmp_path / "theirs" / f"{i:012d}.zst", f"a cat {i}", torch.randn(5, 8, generator=generator),
                 pooled_projections=pooled)
    want[i] = text, pooled.float().numpy()
  assert tiny.invoke(PROGRAM, [f"--prompts=release:{tmp_path / 'theirs'}", "--shards=2",
                               f"--out={tmp_path / 'cache'}"]) == (0, "")
  data, records = _records(tmp_path / "cache")
  assert len(records) == 3 and set(data.spec.cond) == {"text", "pooled"}
  for i in range(3):
    assert records.prompt(i) == f"a cat {i}"
    np.testing.assert_array_equal(records[i]["cond"]["text"].astype(np.float32), want[i][0])
    np.testing.assert_array_equal(records[i]["cond"]["pooled"], want[i][1])
  assert not data.null()["text"].any()


def test_qwen_texts_without_theirs_and_the_negative_prompts_own_file(tmp_path):
  theirs, empty = tmp_path / "theirs", tmp_path / "empty.pth"
  text = torch.randn(7, 8)
  text[4:] = 0
  want = _file(theirs / "0.zst", "a cat", text, encoder_hidden_states_mask=torch.tensor([1, 1, 1, 1, 0, 0, 0]))
  embeds = torch.randn(3, 8).bfloat16()
  torch.save({"prompt": "", "prompt_embeds": embeds, "prompt_embeds_mask": torch.ones(3, dtype=torch.int64)}, empty)
  given = [f"--prompts=release:{theirs}", "--tokens=6", "--shards=1", f"--out={tmp_path / 'cache'}"]
  tiny.refused(PROGRAM, given, "--negative:", "qwen_empty_prompt_embeds.pth")
  assert tiny.invoke(PROGRAM, [*given, f"--negative={empty}"]) == (0, "")
  data, records = _records(tmp_path / "cache")
  cond = records[0]["cond"]
  assert cond["mask"].tolist() == [1, 1, 1, 1, 0, 0]
  np.testing.assert_array_equal(cond["text"][:4].astype(np.float32), want[:4])
  null = data.null()
  assert null["mask"].sum() == 3
  np.testing.assert_array_equal(null["text"][:3].astype(np.float32), embeds.float().numpy())


class _Evil:

  def __reduce__(self):
    return print, ("run",)


def test_a_file_that_is_none_of_theirs_is_one_line_and_runs_nothing(tmp_path, capsys):
  path = tmp_path / "0.zst"
  pack = zstandard.ZstdCompressor().compress
  good = io.BytesIO()
  torch.save(_Evil(), good, _use_new_zipfile_serialization=False)
  for data in (b"no zstd", pack(b"no pickle"), pack(pickle.dumps(_Evil())), pack(pickle.dumps({"prompt": "x"})),
               pack(good.getvalue())):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"0\.zst is no prompt of pi-Flow's caches"):
      release_cache.read(path)
  assert "run" not in capsys.readouterr().out
  tiny.refused(PROGRAM, [f"--prompts=release:{tmp_path}", f"--out={tmp_path / 'o'}"], "--prompts:", "0.zst")
  tiny.refused(PROGRAM, [f"--prompts=release:{tmp_path / 'no'}", f"--out={tmp_path / 'o'}"], "holds no .zst files")
  text = torch.randn(5, 8)
  text[2, 3] = torch.nan
  _file(path, "x", text)
  with pytest.raises(ValueError, match="no number"):
    release_cache.read(path)
