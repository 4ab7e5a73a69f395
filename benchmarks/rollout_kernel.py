"""The rollout's TPU kernel against XLA's loop over the same mixture, by the compiler's own schedules. Nothing runs.

  PYTHONPATH=.libtpu python -m benchmarks.rollout_kernel

256 samples of 32x32x4, K = 32, 128 substeps, one chip of v5e. Of XLA's loop the compiler states its cycles. Of a kernel it
states none, but it writes the kernel's schedule down when asked to, a line a bundle of instructions that start together:
those of the loop over substeps, times its trips, are the cycles that it takes when nothing is waited for. Beside them, its
floor: the mixture read once, and the loop's multiplications and additions at four registers a cycle.
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
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=jax.NamedSharding(mesh, sharding.BATCH) if under else spot)
  mixture = gmm.Mixture(shape(BATCH, CHANNELS, COMPONENTS, n), shape(BATCH, COMPONENTS, n), shape(BATCH))
  f = functools.partial(rollout.fast_rollout, substeps=SUBSTEPS)
  return jax.jit(sharding.under(mesh, f) if under else f).lower(mixture, shape(BATCH, SIDE, SIDE, CHANNELS), shape(BATCH)).compile()


def loop_bundles(folder):
  """(bundles, vector operations) of the kernel's innermost loop."""
  written = lambda name: next(pathlib.Path(folder).glob(f"*gmm_rollout.{name}.txt")).read_text().splitlines()
  # An instruction's nesting is the number of >; the loop over substeps lies in that over samples.
  numbers = [int(found[1], 16) for line in written("[0-9]*-final_bundles") if (found := re.match(r"\s*(0x[0-9a-f]+)\s.*?: >> \{", line))]
  use = [line.split() for line in written("[0-9]*final_hlo-static-per-bundle-utilization") if re.fullmatch(r"[\d ]+", line)]
  return len(numbers), sum(int(use[1 + i][2]) for i in numbers)  # after a line of what there is; the third is the vector unit


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
  size = lambda c: c.memory_analysis().temp_size_in_bytes / 2**20
  by_xla = lambda c: hlo.cycles(hlo.runs(c.as_text())) / chip.clock
  trips = BATCH * -(-SIDE**2 // 1024) * SUBSTEPS
  took = bundles * trips / chip.clock
  mixture = BATCH * SIDE**2 * COMPONENTS * (CHANNELS + 1) * 4
  print(f"{where}: {BATCH} samples of {SIDE}x{SIDE}x{CHANNELS}, K = {COMPONENTS}, {SUBSTEPS} substeps")
  print(f"  XLA's loop, by the compiler's cycles       {by_xla(loop) * 1e3:7.1f} ms, temporaries {size(loop):.0f} MiB")
  print(f"  kernel, {bundles} bundles a substep and block     {took * 1e3:7.1f} ms, {by_xla(loop) / took:.0f} times less; "
        f"temporaries {size(kernel):.0f} MiB, around it {by_xla(kernel) * 1e3:.1f} ms")
  print(f"  floor, its vector operations               {operations / 4 * trips / chip.clock * 1e3:7.1f} ms ({operations}, four a bundle)")
  print(f"  floor, the mixture read once               {mixture / _HBM * 1e3:7.1f} ms ({mixture / 2**20:.0f} MiB)")


if __name__ == "__main__":
  main()
