"""The rollout's TPU kernel against XLA's loop over the same mixture, by the compiler's own schedules. Nothing runs.

  PYTHONPATH=.libtpu python -m benchmarks.rollout_kernel

256 samples of 32x32x4, K = 32, 128 substeps, one chip of v5e. The compiler states the cycles of XLA's loop. It states
none of a kernel's, but it can write the kernel's schedule to a file, one line for each bundle of instructions that
start together: the bundles of the loop over substeps, times its trips, are the cycles that the loop takes if it never
waits. Beside them, its floor: the mixture read once, and the loop's multiplications and additions at four registers a
cycle.
"""

import functools
import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rollout
from piflow_jax import sharding
from piflow_jax.plan import compiled
from piflow_jax.plan import hlo
from piflow_jax.policy import gmm

BATCH, SIDE, COMPONENTS, CHANNELS, SUBSTEPS = 256, 32, 32, 4, 128
_HBM = 819e9  # bytes a second of v5e (cloud.google.com/tpu/docs/v5e)


def compile_for(mesh, devices, under):
  """The rollout's program for one device, with the kernel where `under` a mesh, else with XLA's loop."""
  n = SIDE**2
  spot = jax.sharding.SingleDeviceSharding(np.ravel(devices)[0])
  lies = jax.NamedSharding(mesh, sharding.BATCH) if under else spot
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=lies)
  mixture = gmm.Mixture(shape((BATCH, CHANNELS, COMPONENTS, n)), shape((BATCH, COMPONENTS, n)), shape((BATCH,)))
  f = functools.partial(rollout.fast_rollout, substeps=SUBSTEPS)
  program = jax.jit(sharding.under(mesh, f) if under else f)
  return program.lower(mixture, shape((BATCH, SIDE, SIDE, CHANNELS)), shape((BATCH,))).compile()


def loop_bundles(folder):
  """(bundles, vector operations) of the kernel's innermost loop."""
  def written(name):
    return next(pathlib.Path(folder).glob(f"*gmm_rollout.{name}.txt")).read_text().splitlines()

  # The number of > is an instruction's nesting: the loop over substeps lies inside the one over samples.
  found = [re.match(r"\s*(0x[0-9a-f]+)\s.*?: >> \{", line) for line in written("[0-9]*-final_bundles")]
  numbers = [int(match[1], 16) for match in found if match]
  use = written("[0-9]*final_hlo-static-per-bundle-utilization")
  use = [line.split() for line in use if re.fullmatch(r"[\d ]+", line)]
  # The first line counts the units there are; the third column is the vector unit's.
  return len(numbers), sum(int(use[1 + i][2]) for i in numbers)


def main():
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  with tempfile.TemporaryDirectory() as folder:
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    chip, devices, where = compiled.devices_of("v5e-1", 1)
    mesh = sharding.make_mesh(devices=devices)
    kernel = compile_for(mesh, devices, under=True)
    bundles, operations = loop_bundles(folder)
    loop = compile_for(mesh, devices, under=False)

  def size(program):
    return program.memory_analysis().temp_size_in_bytes / 2**20

  def by_xla(program):
    return hlo.cycles(hlo.runs(program.as_text())) / chip.clock

  trips = BATCH * -(-SIDE**2 // 1024) * SUBSTEPS
  took = bundles * trips / chip.clock
  mixture = BATCH * SIDE**2 * COMPONENTS * (CHANNELS + 1) * 4
  print(f"{where}: {BATCH} samples of {SIDE}x{SIDE}x{CHANNELS}, K = {COMPONENTS}, {SUBSTEPS} substeps")
  print(f"  XLA's loop, by the compiler's cycles       {by_xla(loop) * 1e3:7.1f} ms, temporaries {size(loop):.0f} MiB")
  print(f"  kernel, {bundles} bundles a substep and block     {took * 1e3:7.1f} ms, "
        f"{by_xla(loop) / took:.0f} times less; temporaries {size(kernel):.0f} MiB, "
        f"around it {by_xla(kernel) * 1e3:.1f} ms")
  print(f"  floor, its vector operations               {operations / 4 * trips / chip.clock * 1e3:7.1f} ms "
        f"({operations}, four a bundle)")
  print(f"  floor, the mixture read once               {mixture / _HBM * 1e3:7.1f} ms ({mixture / 2**20:.0f} MiB)")


if __name__ == "__main__":
  main()
