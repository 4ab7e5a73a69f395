"""Records a second that one host reads, beside what a training step eats of each host.

  python -m benchmarks.loader [--records=8192] [--need=539]

A cache of random moments, 32x32x4 with both views in float16 (32 KB a record), in the page cache; and pictures of
256x256 as uint8 from one .npz, decoded and kept. Batches of 256 by data.loader, as training reads them. --need: 539 is
DiT-XL's of a v6e-256, 64 hosts, at the 0.119 s a step of 4096 that the plan says.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from piflow_jax.data import images
from piflow_jax.data import latent_cache
from piflow_jax.data import latents
from piflow_jax.data import loader
from piflow_jax.data import shards
from piflow_jax.data import spec as spec_lib

_BATCH = 256


def main():
  """Prints a line for each kind of data."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--records", type=int, default=8192)
  parser.add_argument("--need", type=float, default=539.0)
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)
    _write_cache(place / "cache", given.records)
    data = latents.config(path=str(place / "cache"))
    stored = spec_lib.stored(data.make(path=str(place / "cache"), held_out="", shape=(), classes=()))
    _report("latents", stored.records("train"), stored.spec, given)
    rng = np.random.default_rng(0)
    np.savez(place / "pictures.npz", images=rng.integers(0, 256, (512, 256, 256, 3)).astype(np.uint8),
             labels=np.arange(512) % 10)
    noun = images.config(path=str(place / "pictures.npz"), size=256, channels=3)
    pictures = noun.make(**{name: noun[name] for name in noun if name != "make"})
    _report("pictures", pictures.records("train"), pictures.spec, given)


def _write_cache(folder, count):
  folder.mkdir()
  rng = np.random.default_rng(0)
  arrays = rng.standard_normal((64, 2, 32, 32, 8)).astype(np.float16)
  name = "latents-00000-of-00001.array_record"
  shards.write_records(folder / name, (latent_cache.encode(i % 10, arrays[i % 64]) for i in range(count)))
  counts = np.bincount(np.arange(count) % 10, minlength=10).tolist()
  latent_cache.write_manifest(folder, latent_cache.Manifest(
      count=count, views=2, shape=(32, 32, 4), moments=True, offset=(0.0,) * 4, scale=(0.18215,) * 4,
      classes=tuple(map(str, range(10))), counts=tuple(counts), source="random", settings={}, skipped=(),
      shards=({"name": name, "records": count, "bytes": (folder / name).stat().st_size, "crc32": 0},), mean=(0.0,) * 4,
      deviation=(1.0,) * 4))


def _report(name, records, spec, given):
  batches = loader.batches(records, spec, batch_size=_BATCH, seed=0)
  for _ in range(8):
    next(batches)
  count, began = 0, time.perf_counter()
  while time.perf_counter() - began < 10:
    next(batches)
    count += _BATCH
  rate = count / (time.perf_counter() - began)
  print(f"{name}: {rate:,.0f} records/s; a step that eats {given.need:,.0f}/s of each host takes "
        f"{100 * given.need / rate:.0f}% of it", flush=True)


if __name__ == "__main__":
  main()
