"""From prompts to PyTorch's samples by the programs and files of the real path, with a kill; tiny, random weights."""

import json

import jax
import numpy as np
from PIL import Image
import pytest

from piflow_jax.data import text_encoders
from tests import text
from tests import tiny
from tests.parity import test_text_encoders as encoders
from tests.parity import test_torch_features as features

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIDE, PROMPT = 8, "colour c"


def _teacher(folder, kind):
  """diffusers' folder of a random transformer on 8 x 8 pixels, sized as text.FIELDS says."""
  torch.manual_seed(0)
  shared = dict(in_channels=12, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
                axes_dims_rope=text.AXES)
  if kind == "flux":
    model = diffusers.FluxTransformer2DModel(patch_size=1, num_layers=1, num_single_layers=2,
                                             pooled_projection_dim=16, guidance_embeds=True, **shared)
  else:
    model = diffusers.QwenImageTransformer2DModel(patch_size=2, out_channels=3, num_layers=2, **shared)
  model.save_pretrained(folder)


def _prompts(folder):
  folder.mkdir()
  lines = []
  for i in range(40):
    Image.new("RGB", (20, 16), (6 * i, 200, 255 - 6 * i)).save(folder / f"{i}.png")
    letter = "abcdefghijklmnopqrstuvwxyz"[i % 26]
    lines.append({"prompt": f"colour {letter * (1 + i // 26)}", "image": f"{i}.png"})
  (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder / "list.jsonl"


def _fields(*args):
  shape = f"--config.data.shape=({SIDE},{SIDE},3)"
  return [shape if field.startswith("--config.data.shape=") else field for field in text.arguments(*args)
          if not field.startswith("--config.steps=")] + ["--config.steps=6"]


@pytest.mark.parametrize("kind, recipe", [("flux", "gm-4nfe"), ("qwen", "gm-4nfe-free")])
def test_from_prompts_to_pytorchs_samples_with_a_kill(kind, recipe, tmp_path):
  {"flux": encoders._flux_folder, "qwen": encoders._qwen_folder}[kind](tmp_path / "encoder")
  place, cache = f"{kind}:{tmp_path / 'encoder'}", tmp_path / "cache"
  pictures = ["--size=8"] if not recipe.endswith("free") else []
  tiny.done("-m", "piflow_jax.data.prompts", f"--prompts={_prompts(tmp_path / 'pairs')}", f"--encoder={place}",
       "--tokens=12", "--shards=2", f"--out={cache}", *pictures)
  _teacher(tmp_path / "transformer", kind)
  tiny.done("-m", "piflow_jax.convert", "from-torch", f"--source={tmp_path / 'transformer'}",
       f"--workdir={tmp_path / 'teacher'}", *_fields(kind, "teacher", cache))

  student = tmp_path / "student"
  train = ("-m", "piflow_jax.main", *_fields(kind, recipe, cache), f"--workdir={student}",
           f"--config.teacher.checkpoint={tmp_path / 'teacher'}", "--config.eval_every=0", "--config.image_every=0")
  tiny.kill(lambda: (student / "checkpoints" / "2").exists(), *train)
  tiny.done(*train)
  assert [line["step"] for line in tiny.metrics(student) if "loss" in line] == [1, 2, 3, 4, 5, 6]

  tiny.done("-m", "piflow_jax.sample", f"--workdir={student}", f"--prompt={PROMPT}", "--num=2",
            f"--out={tmp_path / 'x.npz'}")
  drawn = np.load(tmp_path / "x.npz")
  want = drawn["x_0"]
  if pictures:
    tiny.done("-m", "piflow_jax.evaluate", f"--workdir={student}", f"--config.data.held_out={cache}",
              "--config.evaluation.samples=8", "--config.evaluation.batch_size=8",
              f"--config.evaluation.features.model={features.clip_folder(tmp_path / 'clip')}")
    report, = student.glob("report*/report.json")
    rows = json.loads(report.read_text())["rows"]
    assert [(row["model"], row["calls"]) for row in rows][-1] == ("student", 4) and len(rows) == 5
    for row in rows:
      assert min(row["clip_score"], row["diversity"], row["frechet_to_teacher"]) > 0 and row["agreement"] is not None
  tiny.done("-m", "piflow_jax.convert", "to-torch", f"--workdir={student}", f"--out={tmp_path / 'export'}")

  # The same prompt and noises for PyTorch.
  arrays, = text_encoders.open_encoder(place, 12).encode([PROMPT])
  cond = {k: torch.tensor(np.stack([v.astype(np.float32)] * 2)) for k, v in arrays.items()}
  if kind == "qwen":
    cond["mask"] = torch.ones(cond["text"].shape[:2], dtype=torch.int32)
  safetensors_torch.save_file(cond, tmp_path / "cond.safetensors")
  row = jax.random.fold_in(jax.random.key(0), drawn["labels"][0])  # a prompt's number, of its words
  noise = np.stack([jax.random.normal(jax.random.fold_in(row, j), (SIDE, SIDE, 3)) for j in range(2)])
  torch.save(torch.tensor(noise.transpose(0, 3, 1, 2)), tmp_path / "noise.pt")
  tiny.done(tmp_path / "export" / "piflow_text_to_image.py", f"--base={tmp_path / 'transformer'}",
       f"--cond={tmp_path / 'cond.safetensors'}", f"--noise={tmp_path / 'noise.pt'}", f"--out={tmp_path / 'x.pt'}")
  got = torch.load(tmp_path / "x.pt").numpy().transpose(0, 2, 3, 1)
  assert np.abs(want).max() > 0.3
  np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
