"""Text encoders of transformers, in PyTorch, as text-to-image models were trained with them.

KIND:PLACE names one. PLACE is a folder, or what transformers finds on its hub where there is a network.
  flux   a diffusers folder of FLUX.1: T5's last states of a prompt filled up to a fixed length, CLIP's pooled vector
  qwen   a diffusers folder of Qwen-Image: Qwen2.5-VL's last states, behind its template
  auto   any encoder that AutoModel knows: its last states, and their mean as the pooled vector
"""

import os
import pathlib
from typing import Callable, NamedTuple
import zlib

import ml_dtypes
import numpy as np

from piflow_jax.data import prompt_cache

KINDS = ("flux", "qwen", "auto")
# Qwen-Image's own template (arXiv 2508.02324, section 2.2); its tokens are taken off again.
_QWEN = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
         "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
         "<|im_end|>\n<|im_start|>assistant\n")
_CLIP_TOKENS = 77


class Encoder(NamedTuple):
  """A text encoder.

  Attributes:
    name: KIND:PLACE.
    width, pooled: of a token, of the pooled vector (0: there is none).
    padded: texts come with all their padding, which the model is to attend to.
    tokens: at most, of a text.
    encode: prompts -> [{"text": [n, width] bfloat16, "pooled": [pooled] bfloat16}].
  """

  name: str
  width: int
  pooled: int
  padded: bool
  tokens: int
  encode: Callable


def open_encoder(name, tokens, device="cpu"):
  """The Encoder that KIND:PLACE names.

  Args:
    name: see above.
    tokens: longest text.
    device: of PyTorch.
  Raises:
    ValueError: "encoder: ...": no such kind, PyTorch or transformers are not there, or the place holds none.
  """
  kind, colon, place = name.partition(":")
  if kind not in KINDS or not colon or not place:
    raise ValueError(f"encoder: {name!r}; give KIND:PLACE, of {', '.join(KINDS)}")
  place = os.path.expanduser(place)
  try:
    import torch
    import transformers
  except ImportError as e:
    raise ValueError(f"encoder: {name} needs PyTorch and transformers ({e}): pip install -e '.[text]'") from e
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  make = {"flux": _flux, "qwen": _qwen, "auto": _auto}[kind]
  try:
    width, pooled, padded, run = make(transformers, place, tokens, torch.device(device))
  except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as e:
    raise ValueError(f"encoder: {name} cannot be opened ({' '.join(str(e).split())[:300]}); give a folder that holds "
                     "it") from e

  def encode(prompts):
    with torch.inference_mode():
      return [{k: _bfloat16(torch, x) for k, x in one.items()} for one in run(list(prompts))]

  return Encoder(name, width, pooled, padded, tokens, encode)


def _bfloat16(torch, x):
  return x.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _loaded(kind, place, device, **more):
  model = kind.from_pretrained(place, dtype="auto" if device.type != "cpu" else "float32", **more)
  return model.to(device).eval()


def _part(place, name):
  """A folder in a pipeline's, or the arguments by which the hub finds it."""
  return (str(pathlib.Path(place) / name), {}) if os.path.isdir(place) else (place, {"subfolder": name})


def _flux(transformers, place, tokens, device):
  (clip_place, clip), (t5_place, t5) = _part(place, "text_encoder"), _part(place, "text_encoder_2")
  (first_place, first), (second_place, second) = _part(place, "tokenizer"), _part(place, "tokenizer_2")
  clip_tokenizer = transformers.AutoTokenizer.from_pretrained(first_place, **first)
  t5_tokenizer = transformers.AutoTokenizer.from_pretrained(second_place, **second)
  clip_model = _loaded(transformers.CLIPTextModel, clip_place, device, **clip)
  t5_model = _loaded(transformers.T5EncoderModel, t5_place, device, **t5)

  def run(prompts):
    def ids(tokenizer, length):
      return tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                       return_tensors="pt").input_ids.to(device)

    # Neither is given a mask: FLUX.1 was trained so, and T5's padding takes part in what its tokens say.
    text = t5_model(ids(t5_tokenizer, tokens))[0]
    most = min(_CLIP_TOKENS, clip_model.config.max_position_embeddings)
    pooled = clip_model(ids(clip_tokenizer, most)).pooler_output
    return [{"text": a, "pooled": b} for a, b in zip(text, pooled)]

  return t5_model.config.d_model, clip_model.config.hidden_size, True, run


def _qwen(transformers, place, tokens, device):
  (model_place, more), (tokenizer_place, its) = _part(place, "text_encoder"), _part(place, "tokenizer")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_place, **its)
  model = _loaded(transformers.Qwen2_5_VLForConditionalGeneration, model_place, device, **more)
  before, after = _QWEN
  skipped = len(tokenizer(before).input_ids)

  def run(prompts):
    given = tokenizer([before + prompt + after for prompt in prompts], padding=True, padding_side="right",
                      truncation=True, max_length=1024 + skipped, return_tensors="pt").to(device)
    states = model(**given, output_hidden_states=True).hidden_states[-1]
    return [{"text": x[:n][skipped:][:tokens]} for x, n in zip(states, given.attention_mask.sum(1).tolist())]

  return model.config.get_text_config().hidden_size, 0, False, run


def _auto(transformers, place, tokens, device):
  tokenizer = transformers.AutoTokenizer.from_pretrained(place)
  model = _loaded(transformers.AutoModel, place, device)
  limit = min(tokens, getattr(model.config, "max_position_embeddings", None) or tokens)
  if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

  def run(prompts):
    given = tokenizer(prompts, padding=True, padding_side="right", truncation=True, max_length=limit,
                      return_tensors="pt").to(device)
    states = model(**given).last_hidden_state
    return [{"text": x[:n], "pooled": x[:n].mean(0)} for x, n in zip(states, given.attention_mask.sum(1).tolist())]

  return model.config.hidden_size, model.config.hidden_size, False, run


def conditions(encoder, spec, prompts, num):
  """Conditions to draw by, `num` of each prompt, as `data.spec.conditions` gives them.

  Args:
    encoder: Encoder.
    spec: `data.spec.Spec` of a run on `data.texts`.
    prompts: texts.
    num: samples of each.
  Returns:
    (cond tree [n, ...], ids [n] int32, prompts); an id is of a prompt's letters, so that its noises do not depend on
    what else is asked for.
  Raises:
    ValueError: "encoder: ...": its texts are not such as the run was trained with.
  """
  tokens, width = spec.cond["text"].shape
  pooled = spec.cond["pooled"].shape[0] if "pooled" in spec.cond else 0
  if (encoder.width, encoder.pooled, encoder.padded) != (width, pooled, "mask" not in spec.cond):
    raise ValueError(f"encoder: {encoder.name} gives tokens of {encoder.width} and a vector of {encoder.pooled}, the "
                     f"run was trained with {width} and {pooled}; give its own")
  rows = [prompt_cache.condition(arrays, encoder, tokens) for arrays in encoder.encode(prompts)]
  cond = {name: np.stack([np.asarray(row[name], array.dtype) for row in rows]) for name, array in spec.cond.items()}
  ids = np.array([zlib.crc32(prompt.encode()) & 0x3FFFFFFF for prompt in prompts], np.int32)
  return {name: np.repeat(x, num, axis=0) for name, x in cond.items()}, np.repeat(ids, num), list(prompts)
