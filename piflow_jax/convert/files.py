"""PyTorch checkpoints as files: read and written tensor by tensor. No file is ever unpickled into code."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
from typing import Any, Callable, NamedTuple
import zipfile

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.numpy import save_file

from piflow_jax import errors

NAME = "diffusion_pytorch_model"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


class Source(NamedTuple):
  """A checkpoint that is open; what is in it is known, nothing of it is read yet."""

  shapes: dict  # {key: shape}
  read: Callable  # key -> array, bfloat16 as ml_dtypes has it
  metadata: dict  # of a safetensors file, texts
  config: dict  # config.json beside it, or {}
  where: str  # for messages


@contextlib.contextmanager
def open_source(path):
  """Open a safetensors file, a folder of such (with an index, or one file), or a .pt/.pth/.bin/.ckpt file.

  Raises:
    errors.UserError: what cannot be read, with the reason; a key that is in two shards; a shard that is missing.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise errors.UserError(f"--source: {str(path)!r} is not there; give a file or a folder")
  folder = path if path.is_dir() else path.parent
  if path.is_dir():
    path = _in_folder(path)
  config = _json(folder / "config.json") if (folder / "config.json").exists() else {}
  with contextlib.ExitStack() as stack:
    if path.name.endswith(".safetensors.index.json"):
      index = _json(path).get("weight_map")
      if not index or not isinstance(index, dict):
        raise errors.UserError(f"--source: {path} has no weight_map; give the index that belongs to sharded safetensors")
      yield _safetensors([path.parent / name for name in sorted(set(index.values()))], stack, path, config, index)
    elif path.suffix == ".safetensors":
      yield _safetensors([path], stack, path, config)
    elif path.suffix in _PICKLED:
      yield _pickled(path, config)
    else:
      raise errors.UserError(f"--source: {path} is none of .safetensors, {', '.join(_PICKLED)}")


def _in_folder(folder):
  for pattern in ("*.safetensors.index.json", "*.safetensors", *(f"*{suffix}" for suffix in _PICKLED)):
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
      return found[0]
    if found:
      raise errors.UserError(f"--source: {folder} holds {', '.join(p.name for p in found)}; name one of them")
  raise errors.UserError(f"--source: no checkpoint in {folder}; give a file, or a folder with one")


def _json(path):
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise errors.UserError(f"--source: {path} cannot be read: {e}") from e
  if not isinstance(found, dict):
    raise errors.UserError(f"--source: {path} is no table of names and values; mend it or take it away")
  return found


def _safetensors(paths, stack, where, config, index=None):
  shapes, holder, metadata, doubled, odd = {}, {}, {}, [], []
  for path in paths:
    try:
      file = stack.enter_context(safe_open(path, "numpy"))
    except (OSError, SafetensorError) as e:
      raise errors.UserError(f"--source: {path} cannot be read: {e}") from e
    metadata |= file.metadata() or {}
    for key in file.keys():
      doubled += [f"{key} ({holder[key][0]} and {path.name})"] if key in holder else []
      part = file.get_slice(key)
      if part.get_dtype() not in ("F16", "BF16", "F32", "F64"):
        odd.append(f"{key} ({part.get_dtype()})")
      shapes[key], holder[key] = tuple(part.get_shape()), (path.name, file)
  _refuse_odd(odd, where)
  if doubled:
    raise errors.UserError(f"--source: {where} has keys twice: {', '.join(doubled)}")
  lost = sorted(key for key in index or () if key not in holder)
  if lost:
    raise errors.UserError(f"--source: {where} names what its shards do not hold: {', '.join(lost)}")
  return Source(shapes, lambda key: holder[key][1].get_tensor(key), metadata, config, str(where))


def _refuse_odd(odd, where):
  if odd:
    raise errors.UserError(f"--source: {where} holds what is no dense array of 16, 32 or 64 bit floats: {', '.join(odd)}; "
                           "take it out, or turn it into one")


def _pickled(path, config):
  try:
    import torch
  except ImportError as e:
    raise errors.UserError(f"--source: reading {path.name} needs PyTorch: pip install -e '.[torch]', or convert it to "
                           "safetensors where you have PyTorch") from e
  try:
    # Weights only: tensors and plain containers, nothing that could run. Training scripts leave their arguments beside
    # the weights, in a class that does nothing but hold them.
    with torch.serialization.safe_globals([argparse.Namespace]):
      tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
  except Exception as e:  # whatever its unpickler refuses
    reason = f"{type(e).__name__} {str(e).strip().splitlines()[0] if str(e).strip() else ''}".strip()
    raise errors.UserError(f"--source: {path} cannot be read as weights alone ({reason}); save its state dict anew, best as "
                           "safetensors") from e
  where = str(path)
  # A training state: the average is what samples are drawn with, whatever its script calls it.
  tensors_of = lambda found: {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
  while isinstance(tree, dict) and not tensors_of(tree):
    inner = sorted((name for name, value in tree.items() if isinstance(name, str) and isinstance(value, dict) and (
        tensors_of(value) or name in ("ema", "state_dict", "model"))),
        key=lambda name: ("ema" not in name, not tensors_of(tree[name]), name not in ("state_dict", "model"), name))
    if not inner:
      break
    tree, where = tree[inner[0]], f"{where}[{inner[0]!r}]"
  tensors = tensors_of(tree) if isinstance(tree, dict) else {}
  if not tensors:
    raise errors.UserError(f"--source: {where} holds no tensors by name")
  float_ = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
  _refuse_odd([f"{k} ({v.layout if v.layout != torch.strided else v.dtype})" for k, v in tensors.items()
               if v.dtype not in float_ or v.layout != torch.strided], where)

  def read(key):
    tensor = tensors[key].detach()
    if tensor.dtype == torch.bfloat16:
      return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return Source({k: tuple(v.shape) for k, v in tensors.items()}, read, {}, config, where)


def without_prefix(source, recognised):
  """The source with a prefix of its keys taken off where that makes it recognisable; an "ema" goes before others.

  Args:
    recognised: {key: shape} -> bool.
  """
  if recognised(source.shapes):
    return source
  prefixes = {key[:i + 1] for key in source.shapes for i, c in enumerate(key) if c == "."}
  for prefix in sorted(prefixes, key=lambda p: ("ema" not in p, len(p), p)):
    shapes = {key.removeprefix(prefix): shape for key, shape in source.shapes.items() if key.startswith(prefix)}
    if recognised(shapes):
      return source._replace(
          shapes=shapes, read=lambda key: source.read(prefix + key), where=f"{source.where} under {prefix!r}")
  return source


def check_free(folder):
  """Raises errors.UserError: `write` would not write there."""
  if "://" in str(folder):
    raise errors.UserError(f"--out: {str(folder)!r}: only local folders; copy it from there")
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise errors.UserError(f"--out: {str(folder)!r} is there and not empty; choose another")


def write(folder, tensors, *, config, metadata, beside=(), max_bytes=5 << 30):
  """Write tensors as safetensors (several with an index if they are many) and config.json; all of it, or nothing.

  Args:
    folder: that is made; it must not be there yet, or be empty.
    tensors: iterable of (key, array); as much as one file holds is kept in memory.
    config: for config.json.
    metadata: {name: text} for each file's header.
    beside: files to copy into the folder.
    max_bytes: of a file.
  Returns:
    Names of the files written.
  Raises:
    errors.UserError: the folder has something in it.
  """
  check_free(folder)
  folder = pathlib.Path(os.path.abspath(folder))
  partial = folder.with_name(f".{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
    shards, shard, size, total = [], {}, 0, 0

    def flush():
      name = f"shard-{len(shards)}"
      save_file(shard, partial / name, metadata={"format": "pt"} | metadata)
      (partial / name).chmod(0o644)  # the library makes it for its owner alone
      shards.append((name, list(shard)))
      shard.clear()

    for key, array in tensors:
      if shard and size + array.nbytes > max_bytes:
        flush()
        size = 0
      shard[key] = np.ascontiguousarray(array)
      size, total = size + array.nbytes, total + array.nbytes
    flush()
    weights = {}
    for i, (name, keys) in enumerate(shards):
      final = f"{NAME}.safetensors" if len(shards) == 1 else f"{NAME}-{i + 1:05}-of-{len(shards):05}.safetensors"
      (partial / name).rename(partial / final)
      weights |= dict.fromkeys(keys, final)
    if len(shards) > 1:
      index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weights}
      (partial / f"{NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in beside:
      shutil.copy(path, partial / os.path.basename(path))
    if folder.exists():
      folder.rmdir()
    partial.rename(folder)
  except OSError as e:
    shutil.rmtree(partial, ignore_errors=True)
    raise errors.UserError(f"--out: cannot write to {str(folder)!r} ({e}); choose a folder that you may write") from e
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return sorted(path.name for path in folder.iterdir())
