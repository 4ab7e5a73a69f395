"""Weights of FID's InceptionV3 from where people have them: pytorch-fid's, torch-fidelity's, or jax-fid's file.

  python -m piflow_jax.convert.inception --source=pt_inception-2015-12-05-6726825d.pth --out=inception.safetensors

writes them as safetensors under the same keys, which can be read where there is no PyTorch. Nothing is fetched: the
two .pth files are of the releases of mseitzer/pytorch-fid and toshas/torch-fidelity on GitHub.
"""

import contextlib
import hashlib
import pathlib
import sys

from absl import flags
from etils import epath
import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax import pickles
from piflow_jax import program
from piflow_jax.convert import files
from piflow_jax.models import inception

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Axes of kernels [H, W, in, out] as PyTorch has them, and back.
_THERE, _HERE = {4: (3, 2, 0, 1), 2: (1, 0)}, {4: (2, 3, 1, 0), 2: (1, 0)}
_PICKLES = (".pkl", ".pickle")


def keys():
  """{path in the tree: key in a .pth} of all 472 tensors."""
  found = {}
  for path in params_lib.named_leaves(inception.shapes()):
    *place, last = path.split("/")
    if place[-1] == "bn":
      last = _NORM[last]
    found[path] = ".".join((*place, "weight" if last == "kernel" else last))
  return found


def load(path, flag="--inception"):
  """(parameters, sha256 of the file) from a .pth, .safetensors or jax-fid's .pkl, none of which is run.

  Raises:
    errors.UserError: no such file, another network's, tensors that are missing, misshaped or not finite.
  """
  path = epath.Path(path).expanduser()
  if not path.is_file():
    raise errors.UserError(f"{flag}: {str(path)!r} is no file; give FID's Inception weights: docs/evaluation.md says "
                           "whose")
  try:
    named = _of_pickle(path) if path.suffix in _PICKLES else _of_state(path)
  except errors.UserError as e:
    raise errors.UserError(str(e).replace("--source", flag, 1)) from e
  except ValueError as e:
    raise errors.UserError(f"{flag}: {str(e).partition(': ')[2] or e}") from e
  return _tree(named), hashlib.sha256(path.read_bytes()).hexdigest()


def _tree(named):
  tree = {}
  for path, array in named.items():
    *place, last = path.split("/")
    node = tree
    for part in place:
      node = node.setdefault(part, {})
    node[last] = array
  return tree


def _of_state(path):
  table, wanted = keys(), params_lib.named_leaves(inception.shapes())
  with files.open_source(path) as source:
    known = {key: shape for key, shape in source.shapes.items() if not key.endswith("num_batches_tracked")}
    if "AuxLogits.fc.weight" in known or known.get("fc.weight", (0,))[0] == 1000:
      raise ValueError(f"path: {path} is torchvision's classifier of 1000 classes, another network; FID's is "
                       "pt_inception-2015-12-05")
    _check(path, {table[p]: _turned(leaf.shape) for p, leaf in wanted.items()}, known)
    return {p: _checked(path, key, _back(np.asarray(source.read(key), np.float32))) for p, key in table.items()}


def _turned(shape):
  """Shape in PyTorch of a leaf's shape here."""
  return tuple(shape[axis] for axis in _THERE.get(len(shape), (0,)))


def _back(array):
  return np.ascontiguousarray(array.transpose(_HERE.get(array.ndim, (0,))))


def _of_pickle(path):
  tree = pickles.load(path)
  try:
    named = {p: np.asarray(x) for p, x in params_lib.named_leaves(tree).items()}
  except (TypeError, ValueError) as e:
    raise ValueError(f"path: {path} holds no tree of arrays") from e
  wanted = {p: leaf.shape for p, leaf in params_lib.named_leaves(inception.shapes()).items()}
  _check(path, wanted, {p: x.shape for p, x in named.items()})
  return {p: _checked(path, p, named[p]) for p in wanted}


def _check(path, wanted, found):
  """Raises ValueError where the shapes found are not those wanted."""
  for words, names in (("lacks", wanted.keys() - found.keys()), ("also holds", found.keys() - wanted.keys())):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise ValueError(f"path: {path} {words} {min(names)}{more}; it is not FID's Inception of 2015-12-05")
  for name, shape in wanted.items():
    if tuple(found[name]) != tuple(shape):
      raise ValueError(f"path: {path}: {name} is {tuple(found[name])}, not {tuple(shape)}; it is not FID's Inception")


def _checked(path, name, array):
  array = np.asarray(array, np.float32)
  if not np.isfinite(array).all() or (name.endswith(("running_var", "/var")) and (array < 0).any()):
    raise ValueError(f"path: {path}: {name} holds values that are no weights (not finite, or a negative variance); "
                     "fetch the file again")
  return array


def write(params, path):
  """Write parameters as safetensors under PyTorch's keys; all of the file, or nothing."""
  table = keys()
  tensors = {}
  for name, x in params_lib.named_leaves(params).items():
    tensors[table[name]] = np.ascontiguousarray(np.transpose(x, _THERE.get(np.ndim(x), (0,))))
  path = pathlib.Path(path)
  partial = path.with_name(f".{path.name}.partial")
  try:
    safetensors_numpy.save_file(tensors, partial)
    partial.replace(path)
  except OSError as e:
    raise errors.UserError(f"--out: {str(path)!r} cannot be written ({e})") from e
  finally:
    with contextlib.suppress(OSError):
      partial.unlink()


def _define(values):
  flags.DEFINE_string("source", None, "pytorch-fid's or torch-fidelity's .pth, or jax-fid's .pkl.", flag_values=values)
  flags.DEFINE_string("out", None, "The .safetensors file to write.", flag_values=values)


def _main(given):
  params, digest = load(given.flags.source, "--source")
  write(params, pathlib.Path(given.flags.out).expanduser())
  print(f"{given.flags.source} (sha256 {digest[:12]}): {len(keys())} tensors of FID's Inception -> {given.flags.out}")


PROGRAM = program.Program(_main, _define, __doc__, needs=("source", "out"), config="optional")

if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")  # a conversion needs no accelerator, and must not take one
  program.run(PROGRAM, sys.argv)
