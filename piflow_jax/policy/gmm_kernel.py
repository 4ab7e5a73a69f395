"""A mixture's rollout as one Pallas kernel for TPUs, which reads the mixture from HBM once.

A block is one sample's next 1,024 positions, so that each component and channel fills one vector register: sums over
components add registers, and nothing crosses lanes. The mixture stays in the core's own memory for all substeps, and a
sample makes as many of them as it needs, not as many as the batch's longest stretch.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from piflow_jax import sharding

_BLOCK = (8, 128)  # positions, as float32 lies in a register


def suits(batch):
  """Whether each device has whole samples of a batch of this size to itself, under the mesh that is being traced."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:  # nothing says which of several devices has which sample
    return jax.device_count() == 1
  return set(sharding.SAMPLES) <= set(mesh.axis_names) and sharding.splits(batch)


def integrate(run, per_position, per_sample, *, interpret=False):
  """run(*blocks, *columns, n_max=) for every sample and block of positions; [B, C, P].

  Args:
    run: takes blocks [1, ..., 8, 128] of the arrays by position, the sample's numbers [1, 1, 8, 128] and the first of
      them again as n_max [], and returns a block [1, C, 8, 128]. The kernel traces it.
    per_position: arrays [B, ..., P], the last one [B, C, P].
    per_sample: arrays [B, 1, 1].
    interpret: run on any platform, slowly: for tests.
  """
  def cut(a, rows):
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, rows * _BLOCK[1] - a.shape[-1])])
    return a.reshape(*a.shape[:-1], rows, _BLOCK[1])

  def block_spec(a):
    return pl.BlockSpec((1, *a.shape[1:-1], *_BLOCK), lambda i, j: (i, *(0,) * (a.ndim - 2), j, 0))

  def kernel(numbers, *blocks):
    *blocks, out = blocks
    sample = pl.program_id(0)
    columns = [jnp.full((1, 1, *_BLOCK), numbers[i, sample]) for i in range(len(per_sample))]
    out[...] = run(*(block[...] for block in blocks), *columns, n_max=numbers[0, sample])

  def on_device(*arrays):
    per_position, per_sample = arrays[:n], arrays[n:]
    *_, (b, c, p) = (a.shape for a in per_position)
    blocks = -(-p // (_BLOCK[0] * _BLOCK[1]))
    rows = blocks * _BLOCK[0]
    numbers = jnp.stack([s[:, 0, 0] for s in per_sample])  # [., B]: scalar memory pads the minor axis to 128
    y = pl.pallas_call(
        kernel, grid=(b, blocks), name="gmm_rollout", interpret=interpret,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *map(block_spec, per_position)],
        out_specs=block_spec(per_position[-1]),
        out_shape=jax.ShapeDtypeStruct((b, c, rows, _BLOCK[1]), per_position[-1].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(numbers, *(cut(a, rows) for a in per_position))
    return y.reshape(b, c, -1)[..., :p]

  n = len(per_position)
  # XLA cannot split a Pallas call over devices: each device calls it on its own samples.
  return sharding.per_device(on_device, sharding.BATCH, sharding.BATCH)(*per_position, *per_sample)
