"""Compiles a config's step for a TPU slice or for GPUs that are not attached: what it takes up, sends and costs."""

import contextlib
import functools
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from piflow_jax import build
from piflow_jax import errors
from piflow_jax import sharding
from piflow_jax import train_step
from piflow_jax.plan import chips
from piflow_jax.plan import flops
from piflow_jax.plan import gpus
from piflow_jax.plan import hlo

# With these settings libtpu does not look for a TPU, and several processes may load it.
_QUIET = dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost",
              TPU_WORKER_ID="0", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled")


def devices_of(topology, slices):
  """(chip, devices, name) of a slice that only the compiler knows. Raises errors.UserError."""
  kind, shape = chips.slice_name(topology)
  if chips.CHIPS[kind].card:
    if slices > 1:
      raise errors.UserError("--slices: only TPUs are planned in several slices; set 1")
    return chips.CHIPS[kind], gpus.devices(kind, shape), topology
  if not importlib.util.find_spec("libtpu"):
    raise errors.UserError(
        "--topology: the compiler for TPUs, libtpu, is not installed; say make plan ARGS=..., which brings it, or pip "
        "install --target .libtpu -r requirements-tpu.lock and set PYTHONPATH=.libtpu")
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)
  options = {"num_slices": slices} if slices > 1 else {}
  if math.prod(int(n) for n in shape.split("x")) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
    shape = "1x1"
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices
  except (RuntimeError, ValueError, NotImplementedError) as e:
    raise errors.UserError(f"--topology: {kind}:{shape}: {str(e).splitlines()[0]}") from e
  return chips.CHIPS[kind], found, f"{kind}:{shape}" + (f" x {slices}" if slices > 1 else "")


def plan(config, topology, *, slices=1, sampler=False, size=None):
  """What a config's training step, or with `sampler` a call of its sampler, would take up and cost on a slice.

  Args:
    config: of a run.
    topology, slices: of `devices_of`.
    sampler: see above.
    size: shape of x_0, where the data come in several; None: config.data's own.
  Returns:
    A dict of plain values: bytes on one device, FLOPs of a step over all devices, seconds of a step.
  Raises:
    errors.UserError: the slice is unknown, or the mesh or the batch does not fit it.
  """
  chip, devices, name = devices_of(topology, slices)
  with gpus.cudnn() if chip.card else contextlib.nullcontext():
    return _plan(config, chip, devices, name, sampler, size)


def _plan(config, chip, devices, name, sampler, size):
  mesh = build.mesh(config, devices)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # its devices, not this machine's, decide what can run
    run = build.run(config, planned=True, size=size)
    if not sampler:
      train_step.check_batch(config, mesh)
    jitted = train_step.compile(config, mesh, run)
  state, spec = jitted.state, run.data.spec
  if sampler:
    n, parts = config.evaluation.batch_size, sharding.sample_parts(mesh)
    if n % parts:
      raise errors.UserError(
          f"config.evaluation.batch_size: {n} does not divide over {parts} parts of the mesh; choose a multiple of "
          f"{parts}")
    batch = _batch(mesh, spec, n)
    keys = jax.eval_shape(functools.partial(jax.random.split, num=n), _key())
    arguments = state.ema, jitted.base, batch["x_0"], batch["cond"], keys
    trees = dict(parameters=state.ema, frozen=jitted.base, batch=batch)  # a student draws without its teacher
  else:
    n = config.batch_size
    batch = _batch(mesh, spec, n)
    arguments = state, jitted.teacher, batch, _key()
    trees = dict(parameters=state.params, ema=state.ema, optimizer=state.opt_state, teacher=jitted.teacher, batch=batch)
  memory = {kind: _bytes(tree) for kind, tree in trees.items() if tree is not None or kind != "frozen"}
  counted = _flops(config, mesh, arguments, sampler, size)
  found = dict(topology=name, x_0=spec.x_0, chips=len(devices), mesh=dict(mesh.shape), samples=n, memory=memory,
               model_flops=counted[0], flops=counted[1])
  try:
    lowered = (jitted.draw if sampler else jitted.step).lower(*arguments)
    compiled = lowered.compile(gpus.OPTIONS if chip.card else None)
  except jax.errors.JaxRuntimeError as e:
    total, limit = _too_much(str(e), sum(memory.values()))
    if limit is None:
      raise
    memory |= dict(activations=total - sum(memory.values()), total=total, limit=limit)
    return found | dict(fits=False)
  return found | _measured(compiled, memory, chip) | _times(compiled, chip, found, 0 if sampler else config.steps)


def _too_much(message, arguments):
  """(bytes wanted, bytes there) from the compiler's refusal; (None, None) from any other message."""
  size = r"\(?([\d.]+)([KMG])\)?"
  used = re.search(f"Used {size} of {size} hbm", message)
  temporaries = re.search(f"temporaries {size} exceeds available HBM {size}", message)
  if not (used or temporaries):
    return None, None
  number, unit, there, unit_there = (used or temporaries).groups()
  scale = {"K": 2**10, "M": 2**20, "G": 2**30}
  return float(number) * scale[unit] + (0 if used else arguments), float(there) * scale[unit_there]


def _measured(compiled, memory, chip):
  m = compiled.memory_analysis()
  program = m.generated_code_size_in_bytes
  activations = m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
  memory |= dict(padding=m.argument_size_in_bytes - sum(memory.values()), program=program, activations=activations,
                 total=m.argument_size_in_bytes + activations + program, limit=chip.memory)
  return dict(fits=memory["total"] <= memory["limit"], memory=memory)  # a GPU's compiler refuses nothing


def _times(compiled, chip, found, steps):
  runs = hlo.runs(compiled.as_text())
  sent = hlo.collectives(runs)
  links = sum(size for kind, (_, size) in sent.items() if kind != "send") / (2 * chip.link)
  flops_a_second = found["chips"] * chip.flops
  seconds = dict(peak=found["flops"] / flops_a_second, links=links,
                 network=sent.get("send", (0, 0))[1] / chip.network)
  if not chip.card:
    seconds["compiler"] = hlo.cycles(runs) / chip.clock
  step = max(seconds.values())
  waste = sorted(hlo.padded(runs), key=lambda b: b.bytes - b.padded)  # most first
  known = dict(seconds=seconds | {"step": step}, kernels=hlo.kernels(runs),
               collectives={kind: dict(count=count, bytes=size) for kind, (count, size) in sent.items()},
               padded=[dict(array=b.text, bytes=b.bytes, padded=b.padded) for b in waste])
  if chip.card:  # by peak FLOPs and links alone, MFU and hours would be promises
    return known
  recipe = dict(hours=steps * step / 3600, chip_hours=steps * step / 3600 * found["chips"]) if steps else {}
  return known | dict(mfu=found["model_flops"] / (flops_a_second * step), **recipe)


def _flops(config, mesh, arguments, sampler, size):
  """(FLOPs of the model, FLOPs of the step with all that the backward pass recomputes)."""
  def count(**network):
    c = config.copy_and_resolve_references()
    # XLA's attention consists of products that can be counted; a network without these fields has no other kind.
    wanted = {k: v for k, v in dict(network, attention="xla").items() if c.network is not None and k in c.network}
    if wanted:
      c.network.update(wanted)
    jitted = train_step.compile(c, mesh, build.run(c, planned=True, size=size))
    return flops.count(jitted.draw if sampler else jitted.step, *arguments)

  return count(remat="none"), count()


def _batch(mesh, spec, n):
  split = jax.sharding.NamedSharding(mesh, sharding.BATCH)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct((n, *shape), jnp.dtype(dtype), sharding=split)

  return {"x_0": array(spec.x_0, "float32"), "cond": {k: array(a.shape, a.dtype) for k, a in spec.cond.items()}}


def _key():
  return jax.eval_shape(functools.partial(jax.random.key, 0))


def _bytes(tree):
  """Bytes of the part of a tree that one device holds."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
