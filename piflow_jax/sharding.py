"""Where arrays live: a mesh, rules from path patterns to partition specs, and the placement of batches."""

import functools
import re

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from piflow_jax import errors
from piflow_jax import params as params_lib

# Slices are joined by the data-centre network, which only gradients cross; `tensor` splits layers, not samples.
AXES = ("slice", "data", "fsdp", "tensor")
SAMPLES = AXES[:3]
BATCH = P(SAMPLES)  # samples are split over all of these; parameters over `fsdp` and `tensor` only


def make_mesh(data=-1, fsdp=1, tensor=1, slices=1, devices=None):
  """A (slice, data, fsdp, tensor) mesh of all devices; one of data, fsdp, tensor may be -1.

  Raises:
    errors.UserError: sizes whose product is not the number of devices, or slices that are not there.
  """
  devices = jax.devices() if devices is None else devices
  sizes, n = [data, fsdp, tensor], len(devices)
  told = f"config.mesh: slices={slices} x data={data} x fsdp={fsdp} x tensor={tensor}"
  known = slices * int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) == 1 and known > 0 and n % known == 0:
    sizes[sizes.index(-1)] = n // known
  if min(slices, *sizes) < 1 or slices * int(np.prod(sizes)) != n:
    raise errors.UserError(f"{told} does not make {n} devices; set one of data, fsdp, tensor to -1 to infer it")
  # GPUs name a host, or what NVLink joins, a slice; their mesh need not follow it.
  there = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu" or slices > 1})
  if there > 1:
    if slices != there:
      raise errors.UserError(f"{told}, but the devices are {there} slices; set slices={there}")
    grid = mesh_utils.create_hybrid_device_mesh((1, *sizes), (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
  else:
    # One slice may be taken for several: how a laptop's devices stand in for a pod's.
    grid = mesh_utils.create_device_mesh((slices, *sizes), devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def sample_parts(mesh):
  """Into how many parts a mesh splits a batch."""
  return int(np.prod([mesh.shape[axis] for axis in SAMPLES]))


def under(mesh, f):
  """f, traced with the mesh at hand for `constrain`, `platform` and `per_device`."""
  @functools.wraps(f)
  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return f(*args)

  return traced


def splits(n):
  """Whether the mesh that is being traced under, if any, can split n samples evenly."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or n % sample_parts(mesh) == 0


def constrain(x, *spec):
  """x laid out over the mesh that is being traced under as `spec` says of its axes; x itself where there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(*spec))


def platform():
  """What is being traced for, "tpu", "gpu" or "cpu": the mesh's devices, which need not be here, or JAX's own."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  found = device.platform if device else jax.default_backend()
  return "gpu" if found in ("cuda", "rocm") else found


def per_device(f, spec):
  """f of arrays laid out as `spec` says, run by each device of the mesh that is being traced under on its own part."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f
  return lambda *args: jax.shard_map(f, in_specs=(spec,) * len(args), out_specs=spec, check_vma=False)(*args)


def shardings(tree, rules, mesh, *, spread=()):
  """A NamedSharding for each leaf of a tree of shapes, by the first rule whose pattern ends the leaf's path.

  So the state of an optimizer, whose paths end in a parameter's, follows the parameter. Scalars are replicated.

  Args:
    tree: of shapes.
    rules: (pattern, axes of the mesh for the leaf's); None in place of axes hands on to the next rule that names the leaf,
      to be followed along those axes that divide.
    mesh: see `make_mesh`.
    spread: axes of the mesh over which a leaf is split too, along the first of its axes that they divide: ("data",) is
      ZeRO (arXiv 1910.02054) for what no forward pass reads. A leaf with no such axis stays whole, which for many parts
      may be a large one: the plan shows what is left.
  Raises:
    ValueError: a leaf that no rule names: silence here would be a replicated 20B matrix.
  """
  def place(name, leaf):
    if leaf.ndim == 0:
      return NamedSharding(mesh, P())
    fit = _dividing
    for pattern, spec in rules:
      if re.search(f"(^|/)({pattern})$", name):
        if spec is None:
          fit = _where_dividing
          continue
        return NamedSharding(mesh, P(*_spread(leaf.shape, fit(name, leaf.shape, spec, mesh), spread, mesh)))
    raise ValueError(f"no sharding rule names {name} {leaf.shape}")

  return params_lib.map_with_path(place, tree)


def _dividing(name, shape, spec, mesh):
  for size, axis in zip(shape, spec):
    if axis is not None and size % mesh.shape[axis]:
      raise errors.UserError(
          f"config.mesh.{axis}: {mesh.shape[axis]} does not divide {size}, an axis of {name}; choose one that does")
  return spec


def _where_dividing(name, shape, spec, mesh):
  del name
  return tuple(axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(shape, spec))


def _spread(shape, spec, axes, mesh):
  parts = int(np.prod([mesh.shape[axis] for axis in axes]))
  if parts == 1:
    return spec
  spec = [*spec, *(None,) * (len(shape) - len(spec))]
  for i, (size, axis) in enumerate(zip(shape, spec)):
    mine = (axis,) if axis else ()
    if size % (parts * int(np.prod([mesh.shape[a] for a in mine]))) == 0:
      return (*spec[:i], (*mine, *axes), *spec[i + 1:])
  return spec


def rows(mesh, n, process_of=lambda device: device.process_index):
  """The rows of a batch of n that this process's devices hold, ascending.

  A pod's mesh follows its wires, so they need not lie together; devices that split layers hold the same rows, and may be
  of several processes.
  """
  held = NamedSharding(mesh, BATCH).devices_indices_map((n,))
  mine = {row for device, (part,) in held.items() if process_of(device) == jax.process_index() for row in range(n)[part]}
  return np.array(sorted(mine))


def place_batch(batch, mesh, n):
  """A batch of n as global arrays, split over all devices, from the rows of it that are this process's (see `rows`)."""
  sharding, mine = NamedSharding(mesh, BATCH), _rows(mesh, n)

  def place(x):
    x = np.asarray(x)

    def part(index):
      first, last, _ = index[0].indices(n)
      return x[np.searchsorted(mine, first):np.searchsorted(mine, last)]

    return jax.make_array_from_callback((n, *x.shape[1:]), sharding, part)

  return jax.tree.map(place, batch)


_rows = functools.lru_cache(rows)


def replicated(mesh):
  return NamedSharding(mesh, P())
