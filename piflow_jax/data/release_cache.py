"""pi-Flow's own caches of prompts: a zstd-packed pickle of PyTorch tensors for each prompt, read without PyTorch.

A file holds {"prompt", "prompt_embed_kwargs": {"encoder_hidden_states", "encoder_hidden_states_scale", and
"pooled_projections" or "encoder_hidden_states_mask"}}; states are float8 (e4m3) times their scale. Nothing that a
pickle asks for is run: of its types only tensors' storages are known. Latents beside the texts are not read.
"""

import io
import math
import pathlib
import pickle
import struct

import ml_dtypes
import numpy as np

from piflow_jax import errors
from piflow_jax.data import prompt_cache
from piflow_jax.data import text_encoders

_STORAGES = {"FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "LongStorage": "i8", "IntStorage": "i4",
             "ByteStorage": "u1", "BoolStorage": "?", "BFloat16Storage": ml_dtypes.bfloat16, "UntypedStorage": "u1"}
_DTYPES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
           "bfloat16": ml_dtypes.bfloat16, "float32": "f4", "float16": "f2", "int64": "i8"}
_LARGEST = 2**30  # bytes of an unpacked file: FLUX.1's have 2 million, Qwen-Image's less


class _Unpickler(pickle.Unpickler):
  """Plain containers, and what `_KNOWN` names; persistent_load gives a storage's type."""

  def find_class(self, module, name):
    if (module, name) in _KNOWN:
      return _KNOWN[module, name]
    if module in ("torch", "torch.storage") and name in _STORAGES:
      return np.dtype(_STORAGES[name])
    if module == "torch" and name in _DTYPES:
      return np.dtype(_DTYPES[name])
    raise pickle.UnpicklingError(f"{module}.{name} is none of a cache's types")

  def persistent_load(self, pid):
    return pid[1]


def _storage(data):
  """What torch.save writes of one storage in its older format: five pickles, a count, the bytes."""
  file = io.BytesIO(data)
  *_, dtype, keys = [_Unpickler(file).load() for _ in range(5)]
  count, = struct.unpack("<q", file.read(8))
  raw = file.read()
  if not isinstance(dtype, np.dtype) or len(keys) != 1 or count * dtype.itemsize != len(raw):
    raise pickle.UnpicklingError(f"{len(raw)} bytes for {count} numbers of a storage")
  return np.frombuffer(raw, dtype)


def _tensor(storage, offset, size, stride, *more):
  dtype = more[2] if len(more) > 2 else storage.dtype  # of _rebuild_tensor_v3
  values, count = storage.view(dtype), math.prod(size)
  if list(stride) != [math.prod(size[i + 1:]) for i in range(len(size))] or not 0 <= offset <= len(values) - count:
    raise pickle.UnpicklingError(f"a tensor {tuple(size)} with strides {tuple(stride)} of {len(values)} numbers")
  return values[offset:offset + count].reshape(size)


_KNOWN = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("torch._utils", "_rebuild_tensor_v3"): _tensor,
          ("torch.storage", "_load_from_bytes"): _storage, ("collections", "OrderedDict"): dict}


def read(path):
  """(prompt, {"text": [n, width], "pooled"}, whether the text comes with its padding) of a .zst file, or of a .pth.

  Raises:
    ValueError: "prompts: PATH ...": it is none of theirs.
  """
  try:
    import zstandard
  except ImportError as e:
    raise ValueError(f"prompts: {path} needs zstandard: pip install -e '.[text]'") from e
  try:
    found = _unpacked(zstandard, pathlib.Path(path))
    kept = found["prompt_embed_kwargs"]
    text = kept["encoder_hidden_states"]
    text = text.astype(np.float32) * np.float32(kept.get("encoder_hidden_states_scale", 1.0))
    mask = kept.get("encoder_hidden_states_mask")
    arrays = {"text": text if mask is None else text[:max(int(np.sum(mask)), 1)]}
    if (pooled := kept.get("pooled_projections")) is not None:
      arrays["pooled"] = pooled
    if text.ndim != 2 or not all(np.isfinite(x.astype(np.float32)).all() for x in arrays.values()):
      raise ValueError(f"its text is {text.shape}, or holds what is no number")
    return str(found["prompt"]), {k: x.astype(prompt_cache.BFLOAT16) for k, x in arrays.items()}, mask is None
  except Exception as e:  # pylint: disable=broad-exception-caught; a pickle raises whatever it pleases
    raise ValueError(f"prompts: {path} is no prompt of pi-Flow's caches ({type(e).__name__}: {str(e)[:200]})") from e


def _unpacked(zstandard, path):
  if path.suffix == ".pth":
    import torch
    kept = {k: v for k, v in torch.load(path, map_location="cpu", weights_only=True).items() if k != "prompt"}
    kept = {k.replace("prompt_embeds", "encoder_hidden_states"): v.float().numpy() for k, v in kept.items()}
    return {"prompt": "", "prompt_embed_kwargs": kept}
  data = zstandard.ZstdDecompressor().decompress(path.read_bytes(), max_output_size=_LARGEST)
  return _Unpickler(io.BytesIO(data)).load()


def names(folder):
  """The .zst files of a folder, in their order. Raises ValueError: there is none."""
  found = sorted(str(path) for path in pathlib.Path(folder).expanduser().rglob("*.zst"))
  if not found:
    raise ValueError(f"prompts: {folder} holds no .zst files; give the folder of a cache of pi-Flow's")
  return found


def encoder(folder, paths, tokens, negative):
  """A text_encoders.Encoder whose prompts are files, and which tells each one's own words.

  Args:
    folder: whose cache it is.
    paths: its files, of `names`.
    tokens: the longest text, where they come without padding.
    negative: file of the negative prompt; "" is a text of zeros, which is for students without guidance.
  Raises:
    ValueError: "prompts: ...": the first file is none of theirs.
    errors.UserError: texts without padding come without a negative prompt; or, of `encode`, a file is none of theirs.
  """
  _, first, padded = read(paths[0])
  width, pooled = first["text"].shape[1], len(first.get("pooled", ()))
  most = len(first["text"]) if padded else tokens
  if not padded and not negative:
    raise errors.UserError("--negative: missing; these are texts of a teacher whose guidance takes the negative "
                           "prompt's: give its file, .zst or qwen_empty_prompt_embeds.pth")

  def one(path):
    if not path:
      found = {"text": np.zeros((most, width), prompt_cache.BFLOAT16)}
      return found | ({"pooled": np.zeros(pooled, prompt_cache.BFLOAT16)} if pooled else {})
    with errors.flag("prompts"):
      prompt, found, _ = read(path)
    sizes = found["text"].shape[1], len(found.get("pooled", ()))
    if sizes != (width, pooled) or padded and len(found["text"]) != most:
      raise errors.UserError(f"--prompts: {path} has a text {found['text'].shape} and {sizes[1]} pooled; the first "
                             f"file {first['text'].shape} and {pooled}")
    return found | {"text": found["text"][:most], "prompt": np.frombuffer(prompt.encode(), np.uint8)}

  return text_encoders.Encoder(f"release:{folder}", width, pooled, padded, most, lambda paths: list(map(one, paths)))
