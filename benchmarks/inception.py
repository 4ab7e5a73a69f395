"""Pictures a second through FID's Inception on the devices at hand, from uint8 256x256 to every tap.

  python -m benchmarks.inception [--batch=8] [--pictures=64]

Weights are constants: they do not change the time. Beside it the FLOPs of matrix products and convolutions.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from piflow_jax.evaluation import inception_features
from piflow_jax.models import inception
from piflow_jax.plan import flops


def main():
  """Prints one line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--pictures", type=int, default=64)
  given = parser.parse_args()
  params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), inception.shapes())
  one = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.uint8)
  count = flops.count(functools.partial(inception.apply, params), one)
  extract = inception_features.extractor(params, given.batch)
  pictures = np.random.default_rng(0).integers(0, 256, (given.pictures, 256, 256, 3)).astype(np.uint8)
  extract(pictures[:given.batch])
  began = time.perf_counter()
  extract(pictures)
  rate = given.pictures / (time.perf_counter() - began)
  device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  print(f"{device}: {rate:.1f} pictures/s, 50,000 in {50_000 / rate / 60:.1f} minutes; {count / 1e9:.2f} GFLOP each")


if __name__ == "__main__":
  main()
