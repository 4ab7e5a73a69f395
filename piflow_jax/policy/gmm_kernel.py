"""A mixture's rollout as one Pallas kernel for TPUs: what `gmm.py` computes, with the mixture read from HBM once.

A block is one sample's next 1,024 positions, so that each component and channel is one full vector register: sums over
components are additions of registers, and nothing crosses lanes. The mixture stays in the core's own memory for all of
the sample's substeps, of which it makes as many as it needs, not as many as the batch's longest stretch.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from piflow_jax import sharding

_BLOCK = (8, 128)  # positions, as float32 lies in a register


def suits(x):
  """Whether what is being traced is for a TPU, and each device has whole samples of x [B, ...] to itself."""
  mesh = jax.sharding.get_abstract_mesh()
  if sharding.platform() != "tpu":
    return False
  if mesh.empty:  # of several devices nobody has said which has what
    return jax.device_count() == 1
  return set(sharding.SAMPLES) <= set(mesh.axis_names) and sharding.splits(x.shape[0])


def integrate(run, per_position, per_sample, *, interpret=False):
  """run(*blocks, *columns, n_max=) of every sample and block of positions; [B, C, P].

  Args:
    run: of blocks [1, ..., 8, 128] of the arrays by position, the sample's numbers [1, 1, 8, 128] and the first of them
      again as n_max [], to a block [1, C, 8, 128]. It is traced into the kernel.
    per_position: arrays [B, ..., P], of which the last is [B, C, P].
    per_sample: arrays [B, 1, 1].
    interpret: run on any platform, slowly: for tests.
  """
  def on_device(*arrays):
    per_position, per_sample = arrays[:n], arrays[n:]
    *_, (b, c, p) = (a.shape for a in per_position)
    blocks = -(-p // (_BLOCK[0] * _BLOCK[1]))
    rows = blocks * _BLOCK[0]
    numbers = jnp.stack([s[:, 0, 0] for s in per_sample])  # [., B]: scalars' memory pads the minor axis to 128

    def cut(a):
      a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, rows * _BLOCK[1] - p)])
      return a.reshape(*a.shape[:-1], rows, _BLOCK[1])

    def kernel(numbers, *blocks):
      *blocks, out = blocks
      sample = pl.program_id(0)
      columns = [jnp.full((1, 1, *_BLOCK), numbers[i, sample]) for i in range(len(per_sample))]
      out[...] = run(*(block[...] for block in blocks), *columns, n_max=numbers[0, sample])

    spec = lambda a: pl.BlockSpec((1, *a.shape[1:-1], *_BLOCK), lambda i, j: (i, *(0,) * (a.ndim - 2), j, 0))
    y = pl.pallas_call(
        kernel, grid=(b, blocks), name="gmm_rollout", interpret=interpret,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *map(spec, per_position)], out_specs=spec(per_position[-1]),
        out_shape=jax.ShapeDtypeStruct((b, c, rows, _BLOCK[1]), per_position[-1].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(numbers, *map(cut, per_position))
    return y.reshape(b, c, -1)[..., :p]

  n = len(per_position)
  # A Pallas call is not XLA's to split over devices: each does its own samples.
  return sharding.per_device(on_device, sharding.BATCH)(*per_position, *per_sample)
