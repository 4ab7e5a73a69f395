"""PyTorch checkpoints as files: read and written tensor by tensor. No file is ever unpickled into code."""

import argparse
import contextlib
import json
import math
import os
import pathlib
import shutil
from typing import Any, Callable, NamedTuple
import zipfile

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors import safe_open
import safetensors.numpy

from piflow_jax import errors

NAME = "diffusion_pytorch_model"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NO_FLOATS = "no dense array of 16, 32 or 64 bit floats"
_DEEPEST, _MOST = 64, 10**6  # levels and entries of a training state: real ones have less than ten, and some thousands


class Source(NamedTuple):
  """A checkpoint that is open: what it holds is known, no tensor is read yet."""

  shapes: dict  # {key: shape}
  read: Callable  # key -> array, bfloat16 as ml_dtypes has it
  metadata: dict  # of a safetensors file, texts
  config: dict  # config.json beside it, or {}
  where: str  # for messages
  faults: dict = {}  # {what is wrong with some keys: {key: the particulars}}; `table.check` adds them to its message


@contextlib.contextmanager
def open_source(path):
  """Open a safetensors file, a folder of such (with an index, or one file), or a .pt/.pth/.bin/.ckpt file.

  Raises:
    errors.UserError: what cannot be read, with the reason; shards that are missing.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise errors.UserError(f"--source: {str(path)!r} is not there; give a file or a folder")
  folder = path if path.is_dir() else path.parent
  if path.is_dir():
    path = _in_folder(path)
  config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
  with contextlib.ExitStack() as stack:
    if path.name.endswith(".safetensors.index.json"):
      index = read_json(path).get("weight_map")
      yield _safetensors(_shards_of(path, index), stack, path, config, index)
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


def parse(text):
  """The value of a JSON text. Raises ValueError, also for what json.loads overflows Python's stack by."""
  try:
    return json.loads(text)
  except RecursionError as e:
    raise ValueError("its brackets nest too deep") from e


def read_json(path):
  """The table in a JSON file. Raises errors.UserError: it cannot be read, or is none."""
  try:
    found = parse(path.read_text())
  except (OSError, ValueError) as e:
    raise errors.UserError(f"--source: {path} cannot be read: {e}") from e
  if not isinstance(found, dict):
    raise errors.UserError(f"--source: {path} is no table of names and values; mend it or take it away")
  return found


def _shards_of(path, index):
  """Paths of the files that an index names; they lie beside it."""
  if not index or not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
    raise errors.UserError(f"--source: {path} has no weight_map of keys and names of shards; give the index that "
                           "belongs to sharded safetensors")
  names = sorted(set(index.values()))
  # A downloaded index must not choose which of the user's files are read.
  if outside := [name for name in names if name != os.path.basename(name) or name in ("", ".", "..")]:
    raise errors.UserError(f"--source: {path} names {outside[0][:99]!r} as a shard, which is no name of a file beside "
                           "it; mend the index")
  beside = set(os.listdir(path.parent))
  if lost := [name[:99] for name in names if name not in beside]:
    raise errors.UserError(f"--source: {path} names shards that are not there: {', '.join(lost)}; fetch them")
  return [path.parent / name for name in names]


def _safetensors(paths, stack, where, config, index=None):
  shapes, holder, metadata, doubled, odd = {}, {}, {}, {}, {}
  for path in paths:
    try:
      file = stack.enter_context(safe_open(path, "numpy"))
    except (OSError, SafetensorError) as e:
      raise errors.UserError(f"--source: {path} cannot be read: {e}") from e
    metadata |= file.metadata() or {}
    for key in file.keys():
      if key in holder:
        doubled[key] = f"{holder[key][0]} and {path.name}"
      part = file.get_slice(key)
      if part.get_dtype() not in ("F16", "BF16", "F32", "F64"):
        odd[key] = part.get_dtype()
      shapes[key], holder[key] = tuple(part.get_shape()), (path.name, file)
  faults = {"twice": doubled, _NO_FLOATS: odd}
  if index is not None:
    faults["not in the shard that the index names"] = {
        key: name for key, name in index.items()
        if key not in doubled and (key not in holder or holder[key][0] != name)}
    faults["not in the index"] = {key: holder[key][0] for key in shapes if key not in index}

  def read(key):
    return holder[key][1].get_tensor(key)

  return Source(shapes, read, metadata, config, str(where), faults)


def _pickled(path, config):
  try:
    import torch
  except ImportError as e:
    raise errors.UserError(f"--source: reading {path.name} needs PyTorch: pip install -e '.[torch]', or convert it to "
                           "safetensors where you have PyTorch") from e
  is_zip = zipfile.is_zipfile(path)
  if is_zip:
    _check_sums(path)
  try:
    # Weights only: tensors and plain containers, nothing that could run. Training scripts leave their arguments beside
    # the weights, in a class that does nothing but hold them.
    with torch.serialization.safe_globals([argparse.Namespace]):
      tree = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
  except Exception as e:  # PyTorch's unpickler raises errors of many types at files that it refuses
    reason = f"{type(e).__name__} {str(e).strip().splitlines()[0] if str(e).strip() else ''}".strip()
    raise errors.UserError(f"--source: {path} cannot be read as weights alone ({reason}); save its state dict anew, "
                           "best as safetensors") from e
  tensors = _named_tensors(tree, torch.Tensor, path)
  if not tensors:
    raise errors.UserError(f"--source: {path} holds no tensors by name")
  floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
  odd = {k: f"{v.dtype} {v.layout} {v.device}" for k, v in tensors.items()
         if v.dtype not in floats or v.layout != torch.strided or v.device.type != "cpu"}

  def read(key):
    tensor = tensors[key].detach()
    if tensor.dtype == torch.bfloat16:
      return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return Source({k: tuple(v.shape) for k, v in tensors.items()}, read, {}, config, str(path), {_NO_FLOATS: odd})


def _check_sums(path):
  """Hold a zip file's members against the CRC-32 that it stores of each; PyTorch's own reader passes over them.

  Raises:
    errors.UserError: members that are not what was written.
  """
  broken = []
  try:
    with zipfile.ZipFile(path) as file:
      for member in file.infolist():
        # torch.save stores 0 of every member where set_crc32_options has switched the sums off.
        if member.CRC and not _whole(file, member):
          broken.append(member.filename)
  except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as e:
    raise errors.UserError(f"--source: {path} cannot be read: {e}; fetch it again") from e
  if broken:
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    raise errors.UserError(f"--source: {path} is damaged: the CRC-32 that it stores is not that of "
                           f"{', '.join(broken[:3])}{more}; fetch it again")


def _whole(file, member):
  try:
    with file.open(member) as stream:
      while stream.read(1 << 20):
        pass
  except zipfile.BadZipFile:  # at the end of the member, where its sum is known
    return False
  return True


def _named_tensors(tree, kind, path):
  """{"ema.blocks.0.weight": tensor} of a training state, in which `without_prefix` finds the weights."""
  found, left, seen = {}, [("", tree, 0)] if isinstance(tree, dict) else [], 0
  while left:
    prefix, node, depth = left.pop()
    seen += len(node)
    if depth > _DEEPEST or seen > _MOST:  # a dict that holds itself, or one dict many times over
      raise errors.UserError(f"--source: {path} holds dicts within dicts without end ({prefix[:40]}...); save the "
                             "state dict alone")
    inner = []
    for name, value in node.items():
      if isinstance(name, str) and isinstance(value, kind):
        found[prefix + name] = value
      elif isinstance(name, str) and isinstance(value, dict):
        inner.append((f"{prefix}{name}.", value, depth + 1))
    left += reversed(inner)
  return found


def without_prefix(source, recognised):
  """The source with a prefix of its keys taken off where that makes it recognisable; an "ema" goes before others.

  Args:
    recognised: {key: shape} -> bool.
  """
  if recognised(source.shapes):
    return source
  prefixes = {key[:i + 1] for key in source.shapes for i, c in enumerate(key) if c == "."}
  for prefix in sorted(prefixes, key=_ema_first):
    shapes = _under(prefix, source.shapes)
    if recognised(shapes):
      def read(key, prefix=prefix):
        return source.read(prefix + key)

      return source._replace(
          shapes=shapes, read=read, where=f"{source.where} under {prefix!r}",
          faults={what: _under(prefix, keys) for what, keys in source.faults.items()})
  return source


def _ema_first(prefix):
  return "ema" not in prefix, len(prefix), prefix


def _under(prefix, named):
  return {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}


def check_free(folder):
  """Raises errors.UserError: `write` could not write there."""
  if "://" in str(folder):
    raise errors.UserError(f"--out: {str(folder)!r}: only local folders; copy it from there")
  check_writable(folder, "--out")
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise errors.UserError(f"--out: {str(folder)!r} is there and not empty; choose another")


def check_writable(folder, flag):
  """Raises errors.UserError: a local folder cannot be made, or not be written to. Makes nothing."""
  if "://" in str(folder):
    return
  path = pathlib.Path(os.path.abspath(folder))
  for place in (path, *path.parents):
    try:
      os.stat(place)
    except FileNotFoundError:
      continue
    except OSError as e:
      raise _unwritable(flag, folder, e) from e
    break
  if place != path and not place.is_dir():
    raise _unwritable(flag, folder, f"{place} is no folder")
  if not os.access(place, os.W_OK):
    raise _unwritable(flag, folder, f"no permission in {place}")


def _unwritable(flag, folder, why):
  return errors.UserError(f"{flag}: cannot write to {str(folder)!r} ({why}); choose a folder that you may write")


def write(folder, shapes, tensors, *, dtype, config, metadata, beside=(), max_bytes=5 << 30):
  """Write tensors as safetensors (several with an index if they are many) and config.json; all of it, or nothing.

  Args:
    folder: that is made; it must not be there yet, or be empty.
    shapes: {key: shape} of all that there is to write.
    tensors: iterable of (key, array) in that order; one is in memory at a time. What it raises, also after the last,
      is raised, and nothing stays.
    dtype: of all arrays, float32 or bfloat16.
    config: for config.json.
    metadata: {name: text} for each file's header.
    beside: files to copy into the folder.
    max_bytes: of a file; a single tensor may be larger.
  Returns:
    Names of the files written.
  Raises:
    errors.UserError: the folder has something in it, or cannot be written.
  """
  check_free(folder)
  shards = _shards(shapes, np.dtype(dtype).itemsize, max_bytes)
  names = [f"{NAME}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
  names = [f"{NAME}.safetensors"] if len(shards) == 1 else names
  tensors = iter(tensors)
  with _made(folder) as partial:
    for name, keys in zip(names, shards):
      with open(partial / name, "wb") as file:
        file.write(_header({key: shapes[key] for key in keys}, np.dtype(dtype), metadata))
        for key in keys:
          found, array = next(tensors)
          if (found, array.shape, array.dtype) != (key, tuple(shapes[key]), dtype):
            raise ValueError(f"{found} {array.shape} {array.dtype} where {key} {shapes[key]} {dtype} was announced")
          file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    if next(tensors, None) is not None:  # `tensors` may also raise at its end
      raise ValueError("more tensors than were announced")
    if len(shards) > 1:
      total = sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize
      index: dict[str, Any] = {"metadata": {"total_size": total},
                               "weight_map": {key: name for name, keys in zip(names, shards) for key in keys}}
      (partial / f"{NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in beside:
      shutil.copy(path, partial / os.path.basename(path))
  return sorted(path.name for path in pathlib.Path(folder).iterdir())


@contextlib.contextmanager
def _made(folder):
  """A folder to write into, which becomes `folder` where the block ends well and leaves nothing where it does not."""
  folder = pathlib.Path(os.path.abspath(folder))
  partial = folder.with_name(f".{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  missing = [place for place in folder.parents if not place.exists()]
  try:
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
      folder.rmdir()
    partial.rename(folder)
  except BaseException as e:
    shutil.rmtree(partial, ignore_errors=True)
    for place in missing:
      with contextlib.suppress(OSError):
        place.rmdir()
    if not isinstance(e, OSError):
      raise
    raise _unwritable("--out", folder, e) from e


def write_adapters(folder, name, tensors, metadata, more):
  """Write tensors that fit into memory as one safetensors file, and JSON files beside it; all of it, or nothing.

  Args:
    folder: that is made.
    name: of the safetensors file.
    tensors: {key: array}.
    metadata: {name: text} for its header.
    more: {file's name: tree for JSON}.
  Raises:
    errors.UserError: the folder cannot be written.
  """
  with _made(folder) as partial:
    safetensors.numpy.save_file(tensors, partial / name, metadata)
    for file, tree in more.items():
      (partial / file).write_text(json.dumps(tree, indent=2) + "\n")


def _shards(shapes, itemsize, max_bytes):
  """Keys of each file: as many as fit, one at least."""
  shards, size = [[]], 0
  for key, shape in shapes.items():
    more = math.prod(shape) * itemsize
    if shards[-1] and size + more > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(key)
    size += more
  return shards


def _header(shapes, dtype, metadata):
  """What a safetensors file begins with. Its library would want all tensors in memory at once."""
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
  end = 0
  for key, shape in shapes.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    name = "F32" if dtype == np.float32 else "BF16"
    entries[key] = {"dtype": name, "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(entries).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text
