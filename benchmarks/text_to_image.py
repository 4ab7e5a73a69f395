"""FLUX.1 or Qwen-Image at full size on the devices at hand: a step of gm-4nfe, four calls, the teacher's steps.

  python -m benchmarks.text_to_image --model=flux --batch=2 --peak=989e12     one H100's peak in bfloat16
  python -m benchmarks.text_to_image --model=qwen --draw=1 --teacher=0        without the teacher's pictures

Random weights, made on the devices, and random latents and texts: neither changes the time. Steps follow one another as
in training; the time is of `--steps` of them after two. MFU is of matrix products and attention, without what remat
computes again. --depth=1 leaves a block of each kind: a trial on a laptop.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from configs import flux
from configs import qwen_image
from piflow_jax import build
from piflow_jax import params as params_lib
from piflow_jax import sharding
from piflow_jax import train_step
from piflow_jax.evaluation import draws
from piflow_jax.plan import flops

_CONFIGS = {"flux": flux, "qwen": qwen_image}


def main():
  """Prints a line for the training step and one for each way to draw."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", choices=_CONFIGS, default="flux")
  parser.add_argument("--size", default="1024x1024", help="HEIGHTxWIDTH in pixels")
  parser.add_argument("--tokens", type=int, default=512, help="of a text")
  parser.add_argument("--batch", type=int, default=2)
  parser.add_argument("--steps", type=int, default=8, help="of training; 0: none")
  parser.add_argument("--draw", type=int, default=1, help="pictures at once, in four calls; 0: none")
  parser.add_argument("--teacher", type=int, default=50, help="Euler steps of the teacher's pictures; 0: none")
  parser.add_argument("--depth", type=int, default=0, help="blocks of each kind; 0: all")
  parser.add_argument("--attention", default="auto")
  parser.add_argument("--peak", type=float, default=0.0, help="FLOP/s of a device")
  given = parser.parse_args()
  config = _config(given)
  mesh, run = build.mesh(config), build.run(config, planned=True)
  jitted = train_step.compile(config, mesh, run)
  teacher = _made(jitted.teacher)
  state = jitted.init(jax.random.key(0), teacher)
  name = f"{given.model}, {given.size}, text of {given.tokens}"
  if given.steps:
    line, state = _trained(given, config, mesh, run, jitted, state, teacher)
    print(f"{name}, gm-4nfe, batch {given.batch}: {line}", flush=True)
  if given.draw:
    base = params_lib.select(teacher, params_lib.named_leaves(jitted.base).__contains__)
    draw = draws.model_drawer(mesh, config, run, 4)
    print(f"{name}, four calls, {given.draw} at once: {_drawn(draw, (state.ema, base), given.draw, run, mesh)}",
          flush=True)
  if given.draw and given.teacher:
    draw = draws.teacher_drawer(mesh, run, given.teacher)
    print(f"{name}, the teacher's {given.teacher} steps, {given.draw} at once: "
          f"{_drawn(draw, teacher, given.draw, run, mesh)}", flush=True)


def _config(given):
  config = _CONFIGS[given.model].get_config(f"gm-4nfe,{given.size}")
  with config.unlocked():
    config.update(batch_size=given.batch)
    config.data.tokens = given.tokens
    config.network.attention = given.attention
    if given.depth:
      for field in ("depth", "double_depth", "single_depth"):
        if field in config.network:
          config.network[field] = given.depth
  return config


def _made(shapes):
  """Random numbers of given shapes, made where they are to lie, one array after another."""
  leaves, structure = jax.tree.flatten(shapes)
  made = []
  for i, leaf in enumerate(leaves):
    size = 0.5 * leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.02
    draw = jax.jit(lambda key, leaf=leaf, size=size: size * jax.random.normal(key, leaf.shape, leaf.dtype),
                   out_shardings=leaf.sharding)
    made.append(draw(jax.random.key(i)))
  return jax.tree.unflatten(structure, made)


def _batch(n, run, mesh):
  split = jax.NamedSharding(mesh, sharding.BATCH)

  def array(i, shape, dtype):
    if jnp.issubdtype(dtype, jnp.integer):  # a mask
      return jax.device_put(jnp.ones((n, *shape), dtype), split)
    return jax.device_put(jax.random.normal(jax.random.key(i), (n, *shape), dtype), split)

  spec = run.data.spec
  return {"x_0": array(0, spec.x_0, jnp.float32),
          "cond": {k: array(i, a.shape, jnp.dtype(a.dtype)) for i, (k, a) in enumerate(spec.cond.items(), 1)}}


def _drawn(draw, weights, n, run, mesh):
  batch = _batch(n, run, mesh)
  given = {"noise": batch["x_0"], "cond": batch["cond"], "index": jnp.arange(n)}
  began = time.perf_counter()
  jax.block_until_ready(draw(weights, given, 0))
  ready = time.perf_counter() - began
  began = time.perf_counter()
  for _ in range(2):
    jax.block_until_ready(draw(weights, given, 0))
  seconds = (time.perf_counter() - began) / 2
  return f"{seconds / n:.3f} s a picture's latent, compiled in {ready - seconds:.0f} s"


def _trained(given, config, mesh, run, jitted, state, teacher):
  batch, key = _batch(config.batch_size, run, mesh), jax.random.key(1)
  count = _flops(config, mesh, state, teacher, batch, key)
  began = time.perf_counter()
  for _ in range(2):
    state, metrics = jitted.step(state, teacher, batch, key)
  jax.block_until_ready(metrics)
  ready = time.perf_counter() - began
  began = time.perf_counter()
  for _ in range(given.steps):
    state, metrics = jitted.step(state, teacher, batch, key)
  jax.block_until_ready(metrics)
  seconds = (time.perf_counter() - began) / given.steps
  rate = count / seconds / jax.device_count()
  share = f", MFU {rate / given.peak:.1%}" if given.peak else ""
  memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
  return (f"{seconds:.3f} s a step, {config.batch_size / seconds:.3g} samples/s, {rate / 1e12:.1f} TFLOP/s a device"
          f"{share}, peak memory {memory:.1f} GiB, compiled in {ready - 2 * seconds:.0f} s, "
          f"loss {float(metrics['loss']):.4g}"), state


def _flops(config, mesh, *arguments):
  """Of a step, by XLA's attention, whose products can be counted, and without remat."""
  config = config.copy_and_resolve_references()
  config.network.update(attention="xla", remat="none")
  return flops.count(train_step.compile(config, mesh, build.run(config, planned=True)).step, *arguments)


if __name__ == "__main__":
  main()
