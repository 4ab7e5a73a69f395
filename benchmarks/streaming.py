"""Peak memory of converting a large checkpoint: FLUX.1's tensors in bfloat16, fewer blocks of them, in several shards.

  python -m benchmarks.streaming [--double=4] [--single=10] [--shards=12] [--folder=/tmp]

Writes the checkpoint (about 6 GB) and the workdir into the folder, and takes both away again.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from configs import flux
from piflow_jax.convert import flux as names
from piflow_jax.convert import table
from piflow_jax.convert import trees

_EVERY = 0.02  # seconds between two looks at the program's memory


def main():
  """Makes the checkpoint, converts it in a process of its own, prints the peak of its memory."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--double", type=int, default=4)
  parser.add_argument("--single", type=int, default=10)
  parser.add_argument("--shards", type=int, default=12)
  parser.add_argument("--folder", default=None)
  given = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory(dir=given.folder) as place:
    place = pathlib.Path(place)
    size, largest = _write(place / "source", given)
    began = time.monotonic()
    process = subprocess.Popen([
        sys.executable, "-m", "piflow_jax.convert", "from-torch", f"--source={place / 'source'}",
        f"--workdir={place / 'run'}", "--config=configs/flux.py:teacher",
        f"--config.network.double_depth={given.double}", f"--config.network.single_depth={given.single}"])
    peak = 0
    while process.poll() is None:
      peak = max(peak, _own_memory(process.pid))
      time.sleep(_EVERY)
    seconds, status = time.monotonic() - began, process.returncode
    written = sum(path.stat().st_size for path in (place / "run").rglob("*") if path.is_file())
    print(f"{size / 1e9:.2f} GB in {given.shards} shards, largest leaf {largest / 1e9:.2f} GB: status {status}, peak "
          f"{peak / 1e9:.2f} GB, {seconds:.0f} s, {written / 1e9:.2f} GB written")
    shutil.rmtree(place / "run", ignore_errors=True)


def _own_memory(pid):
  """Bytes that a process holds beside the pages of files that it has mapped, which the system takes back at need."""
  try:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  except OSError:  # it has just ended
    return 0
  return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _write(folder, given):
  """(bytes in all, bytes of the largest leaf) of the checkpoint that it writes."""
  config = flux.get_config("teacher").copy_and_resolve_references()
  config.network.update(double_depth=given.double, single_depth=given.single)
  weights, _ = trees.weights_of(config)
  entries = table.entries(names.NAMINGS["release"].rows(weights), weights.shapes, "")
  shapes = {key: entry.shape_there for entry in entries for key in entry.keys}
  folder.mkdir()
  keys, shard_of = sorted(shapes), {}
  noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(ml_dtypes.bfloat16)
  for i in range(given.shards):
    name = f"diffusion_pytorch_model-{i + 1:05}-of-{given.shards:05}.safetensors"
    part = keys[i * len(keys) // given.shards:(i + 1) * len(keys) // given.shards]
    safetensors.numpy.save_file({key: np.resize(noise, shapes[key]) for key in part}, folder / name)
    shard_of |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": shard_of}
  (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
  return (2 * sum(int(np.prod(shape)) for shape in shapes.values()),
          2 * max(int(np.prod(shape)) for shape in weights.shapes.values()))


if __name__ == "__main__":
  main()
