"""Text-to-image runs in small: a cache of random prompts, the recipes of configs/ on tiny networks."""

import pathlib

import jax
import numpy as np

from configs import flux
from configs import qwen_image
from piflow_jax import build
from piflow_jax import params as params_lib
from piflow_jax import weights as weights_lib
from piflow_jax import workdir as workdir_lib
from piflow_jax.data import prompt_cache
from piflow_jax.data import shards

CONFIGS = {"flux": flux, "qwen": qwen_image}
AXES = (4, 6, 6)
_NETWORK = {"network.heads": 2, "network.axes": AXES, "network.dtype": "float32", "network.remat": "none",
            "network.double_depth": 1, "network.single_depth": 2, "network.depth": 2}
FIELDS = _NETWORK | {
    "batch_size": 8, "steps": 4, "log_every": 1, "checkpoint_every": 2, "method.total_substeps": 16,
    "policy.components": 3, "policy.logstd_width": 16, "policy.intervals": 8, "method.min_block": 2,
    "method.max_block": 2, "lora.rank": 4, "optimizer.warmup_steps": 2, "ema.start": 2, "sampling.images": 4,
    "optimizer.moments": "float32",
    "mesh.data": -1, "mesh.fsdp": 1, "evaluation.batch_size": 8, "optimizer.learning_rate": 1e-2}


def config(kind, argument, cache, **more):
  """The tiny config of a recipe, with fields written a__b."""
  c = CONFIGS[kind].get_config(argument)
  fields = {k: v for k, v in FIELDS.items() if _has(c, k)} | data_fields(cache)
  with c.unlocked():
    c.update_from_flattened_dict(fields | {k.replace("__", "."): v for k, v in more.items()})
  return c


def arguments(kind, argument, cache):
  """What a user writes for the same."""
  c = CONFIGS[kind].get_config(argument)
  fields = {k: v for k, v in FIELDS.items() if _has(c, k)} | data_fields(cache)
  return [f"--config=configs/{'flux' if kind == 'flux' else 'qwen_image'}.py:{argument}",
          *(f"--config.{k}={v}" for k, v in fields.items())]


def data_fields(cache):
  """The fields of config.data that say what a cache says."""
  manifest = prompt_cache.read_manifest(cache)
  return {"data.path": str(cache), "data.shape": tuple(manifest.shape) or (4, 6, 4), "data.tokens": manifest.tokens,
          "data.width": manifest.width, "data.pooled": manifest.pooled, "data.encoder": manifest.encoder}


def _has(c, dotted):
  for name in dotted.split("."):
    if c is None or name not in c:
      return False
    c = c[name]
  return True


def cache(folder, kind, count=40, tokens=5, width=24, pooled=16, shape=(), seed=0, sizes=()):
  """Make a cache of random texts, for FLUX.1 padded and with a pooled vector, for Qwen-Image of several lengths."""
  count = sum(n for _, _, n in sizes) or count
  shapes = [(rows, columns, *shape[2:]) for rows, columns, n in sizes for _ in range(n)] or [shape] * count
  folder, rng, flux_ = pathlib.Path(folder), np.random.default_rng(seed), kind == "flux"
  folder.mkdir()

  def record(i):
    length = tokens if flux_ else 1 + i % tokens
    arrays = {"text": rng.standard_normal((length, width)).astype(prompt_cache.BFLOAT16)}
    arrays |= {"pooled": rng.standard_normal(pooled).astype(prompt_cache.BFLOAT16)} if flux_ else {}
    arrays |= {"x_0": rng.standard_normal(shapes[i]).astype(np.float16)} if shape and i < count else {}
    return prompt_cache.encode(f"prompt {i}", arrays)

  name = "prompts-00000-of-00001.array_record"
  shards.write_records(folder / name, (record(i) for i in range(count + 1)))
  known = {"name": name, "records": count + 1, "bytes": (folder / name).stat().st_size,
           "crc32": shards.crc32(folder / name)}
  prompt_cache.write_manifest(folder, prompt_cache.Manifest(
      count, tokens, width, pooled if flux_ else 0, flux_, shape, False, f"{kind}:nowhere", "", {}, (known,),
      sizes))
  return folder


def teacher(folder, kind, cache_, spread=0.3):
  """The workdir of a teacher with random weights."""
  c = config(kind, "teacher", cache_)
  shapes = params_lib.named_leaves(jax.eval_shape(build.run(c).method.init, jax.random.key(0), None))
  rng = np.random.default_rng(1)
  leaves = {}
  for name, leaf in shapes.items():
    size = leaf.shape[-2] ** -0.5 if name.endswith("kernel") else spread
    leaves[name] = (size * rng.standard_normal(leaf.shape) + name.endswith("scale")).astype(np.float32)
  weights_lib.save_weights(folder, leaves.items())
  workdir_lib.write(folder, c)
  return folder
