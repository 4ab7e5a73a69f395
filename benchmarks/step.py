"""Seconds of a training step on the devices at hand, and its share of their peak: repa-1nfe of configs/imagenet_dit.py.

  python -m benchmarks.step --size=XL --batch=32 --peak=989e12     one H100's peak in bfloat16

Random weights and synthetic latents: neither changes the time. Steps follow one another as in training; the time is of
`--steps` of them after two. FLOPs are those of matrix products (`plan.flops`), without what remat computes again.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import imagenet_dit
from piflow_jax import build
from piflow_jax import sharding
from piflow_jax import train_step
from piflow_jax.plan import flops


def main():
  """Prints a line for each recipe."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--size", default="XL")
  parser.add_argument("--recipes", default="repa-1nfe")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--microbatches", type=int, default=1)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--remat", default="")
  parser.add_argument("--attention", default="auto")
  parser.add_argument("--peak", type=float, default=0.0, help="FLOP/s of a device")
  given = parser.parse_args()
  for recipe in given.recipes.split(","):
    config = imagenet_dit.get_config(f"{given.size},{recipe}")
    config.update(batch_size=given.batch, microbatches=given.microbatches)
    config.network.update(attention=given.attention)
    if given.remat:
      config.network.update(remat=given.remat)
    print(f"DiT-{given.size}/2, {recipe}, batch {given.batch}, remat {config.network.remat}: "
          f"{_measure(config, given.steps, given.peak)}", flush=True)


def _measure(config, steps, peak):
  mesh, run = build.mesh(config), build.run(config)
  jitted = train_step.compile(config, mesh, run)
  teacher = jax.tree.map(lambda s: jax.device_put(_values(s.shape).astype(s.dtype), s.sharding), jitted.teacher)
  began = time.perf_counter()
  state = jax.block_until_ready(jitted.init(jax.random.key(0), teacher))
  rng = np.random.default_rng(0)
  batch = {"x_0": jnp.asarray(rng.standard_normal((config.batch_size, 32, 32, 4), np.float32)),
           "cond": {"label": jnp.asarray(rng.integers(0, 1000, config.batch_size), jnp.int32)}}
  batch = jax.device_put(batch, jax.NamedSharding(mesh, sharding.BATCH))
  key = jax.random.key(1)
  count = flops.count(jitted.step, state, teacher, batch, key)
  for _ in range(2):
    state, metrics = jitted.step(state, teacher, batch, key)
  jax.block_until_ready(metrics)
  ready = time.perf_counter() - began
  began = time.perf_counter()
  for _ in range(steps):
    state, metrics = jitted.step(state, teacher, batch, key)
  jax.block_until_ready(metrics)
  seconds = (time.perf_counter() - began) / steps
  rate = count / seconds / jax.device_count()
  share = f", {100 * rate / peak:.1f}% of the peak" if peak else ""
  memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
  return (f"{seconds:.4f} s a step, {config.batch_size / seconds:.0f} samples/s, {rate / 1e12:.1f} TFLOP/s a "
          f"device{share}, peak memory {memory:.1f} GiB, compiled in {ready:.0f} s, loss {float(metrics['loss']):.4g}")


def _values(shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)


if __name__ == "__main__":
  main()
