"""Encoded prompts against diffusers' own pipelines, on tiny models with random weights; and the program around them."""

import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from piflow_jax import config as config_lib
from piflow_jax.convert import adapters
from piflow_jax.data import prompt_cache
from piflow_jax.data import text_encoders
from piflow_jax.data import texts
from tests import text
from tests import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["a cat", "a green apple on a table", "", "sad"]
PROGRAM = "piflow_jax.data.prompts"


def _fast(tokenizer, **more):
  return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more)


def _flux_folder(folder):
  """A tiny FLUX.1 pipeline's encoders and tokenizers, as diffusers lays them out."""
  torch.manual_seed(0)
  clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(
      vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
      max_position_embeddings=77, eos_token_id=2, bos_token_id=1, pad_token_id=0)).eval()
  t5 = transformers.T5EncoderModel(transformers.T5Config(
      vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)).eval()
  letters = {c: i + 5 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
  word = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | letters, unk_token="<unk>"))
  word.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  word.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
  uni = tokenizers.Tokenizer(tokenizers.models.Unigram(
      [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((c, -2.0) for c in letters), ("▁", -1.0)], unk_id=2))
  uni.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  uni.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
  clip.save_pretrained(folder / "text_encoder")
  t5.save_pretrained(folder / "text_encoder_2")
  _fast(word, pad_token="<pad>", model_max_length=77).save_pretrained(folder / "tokenizer")
  _fast(uni, pad_token="<pad>", eos_token="</s>", model_max_length=512).save_pretrained(folder / "tokenizer_2")
  return clip, t5


def _qwen_folder(folder):
  torch.manual_seed(0)
  specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
      {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, []))
  bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
  bpe.add_special_tokens(specials)
  sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
  model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
      text_config=dict(vocab_size=300, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2],
                                                            rope_theta=1e4), **sizes),
      vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=4, out_hidden_size=32))).eval()
  model.save_pretrained(folder / "text_encoder")
  _fast(bpe, pad_token="<|endoftext|>").save_pretrained(folder / "tokenizer")
  return model


def _bf16(x):
  return torch.tensor(np.asarray(x, np.float32))


def test_flux_prompts_are_what_diffusers_pipeline_makes_of_them(tmp_path):
  clip, t5 = _flux_folder(tmp_path)
  pipeline = diffusers.FluxPipeline(
      scheduler=None, vae=None, transformer=None, text_encoder=clip, text_encoder_2=t5,
      tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
      tokenizer_2=transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer_2"))
  with torch.no_grad():
    text, pooled, _ = pipeline.encode_prompt(WORDS, None, device="cpu", max_sequence_length=40)
  encoder = text_encoders.open_encoder(f"flux:{tmp_path}", 40)
  assert (encoder.width, encoder.pooled, encoder.padded) == (32, 16, True)
  for i, arrays in enumerate(encoder.encode(WORDS)):
    # bfloat16 is what is kept.
    torch.testing.assert_close(_bf16(arrays["text"]), text[i].bfloat16().float())
    torch.testing.assert_close(_bf16(arrays["pooled"]), pooled[i].bfloat16().float())


def test_qwen_prompts_are_what_diffusers_pipeline_makes_of_them(tmp_path):
  model = _qwen_folder(tmp_path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
  pipeline = diffusers.QwenImagePipeline(scheduler=None, vae=None, transformer=None, text_encoder=model,
                                         tokenizer=tokenizer)
  before = pipeline.prompt_template_encode.partition("{}")[0]
  assert before == text_encoders._QWEN[0]
  pipeline.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)
  with torch.no_grad():
    text, mask = pipeline.encode_prompt(WORDS, device="cpu", max_sequence_length=200)
  encoder = text_encoders.open_encoder(f"qwen:{tmp_path}", 200)
  for i, arrays in enumerate(encoder.encode(WORDS)):
    length = int(mask[i].sum())
    assert len(arrays["text"]) == length
    # Batches are padded alike here and there; what is beyond a prompt's own tokens is not kept.
    torch.testing.assert_close(_bf16(arrays["text"]), text[i, :length].bfloat16().float(), atol=2e-2, rtol=2e-2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """(folder of a tiny encoder, a .jsonl list of prompts with pictures)."""
  folder = tmp_path_factory.mktemp("pairs")
  _flux_folder(folder)
  lines = []
  for i in range(7):
    Image.new("RGB", (20, 16), (30 * i, 200, 255 - 30 * i)).save(folder / f"{i}.png")
    lines.append({"prompt": f"colour {'abcdefg'[i]}", "image": f"{i}.png"})
  lines.append(lines[0])  # twice
  (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def _arguments(pairs, out, *more):
  return [f"--prompts={pairs / 'list.jsonl'}", f"--encoder=flux:{pairs}", "--tokens=12", "--shards=3", f"--out={out}",
          *more]


def test_the_program_makes_a_cache_that_trains(pairs, tmp_path, capsys):
  out = tmp_path / "cache"
  assert tiny.invoke(PROGRAM, _arguments(pairs, out, "--size=8", "--negative=none")) == (0, "")
  said = capsys.readouterr().out
  assert "7 prompts of 12 tokens: about" in said and "minutes" in said
  assert tiny.invoke(PROGRAM, [f"--out={out}", "--check"]) == (0, "")
  noun = texts.config(path=str(out), held_out=str(out))
  data = noun.make(**config_lib.fields_of(noun))
  records = data.records("train")
  assert len(records) == 7 and records.prompt(2) == "colour c"
  assert data.spec.x_0 == (8, 8, 3) and records[2]["x_0"].dtype == np.float32
  np.testing.assert_allclose(records[2]["x_0"][4, 4], np.array([60, 200, 195]) / 127.5 - 1, atol=1e-6)
  encoder = text_encoders.open_encoder(f"flux:{pairs}", 12)
  want = encoder.encode(["colour c", "none"])
  np.testing.assert_array_equal(records[2]["cond"]["text"], want[0]["text"])
  np.testing.assert_array_equal(data.null()["text"], want[1]["text"])
  assert "mask" not in records[2]["cond"] and data.found["encoder"] == f"flux:{pairs}"


def test_shards_that_are_there_are_not_encoded_again_and_the_bytes_are_the_same(pairs, tmp_path, monkeypatch):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert tiny.invoke(PROGRAM, _arguments(pairs, whole)) == (0, "")
  for process in (1, 0):
    assert tiny.invoke(PROGRAM, _arguments(pairs, parts, f"--process={process}", "--processes=2")) == (0, "")
  for name in sorted(p.name for p in whole.glob("*.array_record")):
    assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
  lost = sorted(parts.glob("*.array_record.json"))[1]
  lost.unlink()
  asked, opened = [], text_encoders.open_encoder

  def open_encoder(*args):
    encoder = opened(*args)

    def encode(given):
      asked.append(list(given))
      return encoder.encode(given)

    return encoder._replace(encode=encode)

  monkeypatch.setattr(text_encoders, "open_encoder", open_encoder)
  assert tiny.invoke(PROGRAM, _arguments(pairs, parts)) == (0, "")
  assert [p for p in asked[1:]] == [["colour c", "colour d"]]  # the first call measures
  tiny.refused(PROGRAM, _arguments(pairs, parts, "--negative=x"), "--out:", "was begun with another negative")


def test_prompts_without_pictures_may_all_be_of_one_of_several_sizes(pairs, tmp_path):
  rows = [{"prompt": f"colour {letter}", "width": 90, "height": 60} for letter in "abc"]
  (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  arguments = [f"--prompts={tmp_path / 'list.jsonl'}", f"--encoder=flux:{pairs}", "--tokens=12", "--shards=1"]
  assert tiny.invoke(PROGRAM, [*arguments, "--size=64,96x64", f"--out={tmp_path / 'one'}"]) == (0, "")
  manifest = prompt_cache.read_manifest(tmp_path / "one")
  assert (manifest.count, manifest.sizes, manifest.shape) == (3, (), ())
  tiny.refused(PROGRAM, [*arguments, "--size=64,96x60", f"--out={tmp_path / 'two'}"], "--size:",
               "96x60 is no multiple of 8")


def test_a_short_list_is_encoded_beside_the_run_that_needs_it(pairs, tmp_path, capfd):
  def data(**fields):
    noun = texts.config(**dict(path=str(tmp_path / "cache"), on_the_fly=str(pairs / "list.jsonl"), tokens=12,
                               encoder=f"flux:{pairs}", shape=(4, 4, 4)) | fields)
    return noun.make(**config_lib.fields_of(noun))

  records = data().records("train")
  assert len(records) == 6 and records.prompt(2) == "colour c" and "7 prompts of 12 tokens" in capfd.readouterr().out
  want, = text_encoders.open_encoder(f"flux:{pairs}", 12).encode(["colour c"])
  np.testing.assert_array_equal(records[2]["cond"]["text"], want["text"])
  data().records("train")
  assert capfd.readouterr() == ("", "")  # it is there now
  all_known = dict(path=str(tmp_path / "other"), width=records[0]["cond"]["text"].shape[1],
                   pooled=records[0]["cond"]["pooled"].shape[0], padded=True)
  known = data(**all_known)
  assert not (tmp_path / "other").exists()  # nothing is encoded where shapes alone are asked for
  assert len(known.records("held_out")) == 1 and (tmp_path / "other" / "manifest.json").exists()
  elsewhere = dict(path=str(tmp_path / "new"))
  with pytest.raises(ValueError, match="on_the_fly: .*was not encoded"):
    data(**elsewhere, encoder="flux:./no/where")
  assert "--encoder: flux:./no/where cannot be opened" in capfd.readouterr().err
  with pytest.raises(ValueError, match="on_the_fly: data.encoder is empty"):
    data(**elsewhere, encoder="")
  with pytest.raises(ValueError, match="on_the_fly: .*is not there; give"):
    data(**elsewhere, on_the_fly="none.txt")
  with pytest.raises(ValueError, match="path: is empty"):
    data(path="")
  long = tmp_path / "long.txt"
  long.write_text("\n".join(map(str, range(10_001))))
  with pytest.raises(ValueError, match="on_the_fly: .*lists 10,001 prompts"):
    data(**elsewhere, on_the_fly=str(long))


def test_what_is_wrong_with_a_list_or_a_cache_is_one_line(pairs, tmp_path):
  bad = tmp_path / "bad.jsonl"
  for content, words in (('{"prompt": 3}\n', "row 1 has no text 'prompt'"), ("{\n", "line 1 is no JSON"),
                         ("", "lists none")):
    bad.write_text(content)
    tiny.refused(PROGRAM, [f"--prompts={bad}", "--encoder=auto:x", f"--out={tmp_path / 'o'}"], "--prompts:", words)
  tiny.refused(PROGRAM, [f"--prompts={tmp_path / 'no.txt'}", "--encoder=auto:x", f"--out={tmp_path / 'o'}"],
               "--prompts:", "is not there")
  (tmp_path / "a.txt").write_text("a cat\n")
  for encoder, words in (("x", "give KIND:PLACE"), (f"auto:{tmp_path}", "cannot be opened")):
    tiny.refused(PROGRAM, [f"--prompts={tmp_path / 'a.txt'}", f"--encoder={encoder}", f"--out={tmp_path / 'o'}"],
                 "--encoder:", words)
  tiny.refused(PROGRAM, [f"--prompts={tmp_path / 'a.txt'}", f"--encoder=flux:{pairs}", "--size=8",
                         f"--out={tmp_path / 'o'}"], "--size:", "has no picture beside 'a cat'")
  out = tmp_path / "cache"
  assert tiny.invoke(PROGRAM, _arguments(pairs, out)) == (0, "")
  shard = pathlib.Path(out / prompt_cache.read_manifest(out).shards[1]["name"])
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
  tiny.refused(PROGRAM, [f"--out={out}", "--check"], "is not what was written: its CRC-32 differs")
  shard.write_bytes(data[:-9])
  tiny.refused(PROGRAM, [f"--out={out}", "--check"], "is it torn?")


def test_a_run_is_drawn_from_by_prompts_with_others_adapters_into_files_that_say_how(pairs, tmp_path, capsys):
  cache = tmp_path / "cache"
  assert tiny.invoke(PROGRAM, _arguments(pairs, cache, "--size=8")) == (0, "")
  run = text.teacher(tmp_path / "run", "flux", cache)

  def sample(out, *more):
    given = [f"--workdir={run}", f"--out={out}", "--config.sampling.nfe=2", "--num=2", *more]
    assert tiny.invoke("piflow_jax.sample", given) == (0, ""), more

  both, alone = tmp_path / "both.npz", tmp_path / "alone.npz"
  sample(both, "--prompt=a cat", "--prompt=colour b")
  sample(alone, "--prompt=colour b")
  # A prompt's noises are its own, whatever else is asked for; another batch rounds otherwise.
  np.testing.assert_allclose(np.load(both)["x_0"][2:], np.load(alone)["x_0"], atol=1e-4)
  assert np.abs(np.load(both)["x_0"][:2] - np.load(both)["x_0"][2:]).max() > 0.1

  a, b = (np.full(shape, 0.3, np.float32) for shape in ((2, 32), (32, 2)))
  adapters.write(tmp_path / "style", adapters.Loaded(
      {"transformer_blocks.0.attn.to_q": adapters.Adapter(a, b, 1.0)}, {}, {}, {}), "kohya")
  style = tmp_path / "style" / "adapters.safetensors"
  for strength, changes in ((0, False), (1, True)):
    sample(tmp_path / "styled.npz", "--prompt=colour b", f"--lora={style}:{strength}")
    changed = np.abs(np.load(tmp_path / "styled.npz")["x_0"] - np.load(alone)["x_0"]).max()
    assert (changed > 1e-4) == changes, changed

  folder = f"{tmp_path / 'pictures'}/"
  (tmp_path / "list.txt").write_text("a cat\n\ncolour b\n")
  sample(folder, f"--prompts={tmp_path / 'list.txt'}", "--size=12x8")
  names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
  assert names == ["000-00-a-cat.png", "000-01-a-cat.png", "001-00-colour-b.png", "001-01-colour-b.png", "grid.png"]
  picture = Image.open(tmp_path / "pictures" / names[2])
  assert picture.size == (12, 8) and picture.text["prompt"] == "colour b"
  assert json.loads(picture.text["piflow_jax"])["seed"] == 0
  for more, words in ((["--prompt=x", "--labels=1"], ("--labels:", "rows are prompts")),
                      (["--prompt=x", "--encoder=x"], ("--encoder:", "KIND:PLACE")),
                      (["--prompt=x", "--size=12"], ("--size:", "WIDTHxHEIGHT")),
                      (["--prompt=x", "--teacher-steps=3"], ("--teacher_steps:", "has no teacher")),
                      (["--prompt=x", f"--lora={tmp_path / 'no'}"], ("--lora:", "is not there"))):
    tiny.refused("piflow_jax.sample", [f"--workdir={run}", f"--out={alone}", *more], *words)
