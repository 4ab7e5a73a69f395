"""Where arrays live: a mesh, rules from path patterns to partition specs, and the placement of batches."""

import functools
import operator

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from piflow_jax import params as params_lib

# Slices are joined by the data-centre network, which only gradients cross; `tensor` splits layers, not samples.
AXES = ("slice", "data", "fsdp", "tensor")
SAMPLES = AXES[:3]
BATCH = P(SAMPLES)  # samples are split over all of these; parameters over `fsdp` and `tensor` only


def make_mesh(data=-1, fsdp=1, tensor=1, slices=1, devices=None):
  """A (slice, data, fsdp, tensor) mesh of all devices; one of data, fsdp, tensor may be -1.

  Raises:
    ValueError: sizes whose product is not the number of devices, or slices that are not there.
  """
  devices = jax.devices() if devices is None else devices
  sizes, n = [data, fsdp, tensor], len(devices)
  asked = f"mesh: slices={slices} x data={data} x fsdp={fsdp} x tensor={tensor}"
  known = slices * int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) == 1 and known > 0 and n % known == 0:
    sizes[sizes.index(-1)] = n // known
  if min(slices, *sizes) < 1 or slices * int(np.prod(sizes)) != n:
    raise ValueError(f"{asked} does not make {n} devices; set one of data, fsdp, tensor to -1 to infer it")
  # JAX calls a GPU host, or the GPUs that NVLink joins, a slice too; a mesh of GPUs need not follow those.
  there = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu" or slices > 1})
  if there > 1:
    if slices != there:
      raise ValueError(f"{asked}, but the devices are {there} slices; set slices={there}")
    grid = mesh_utils.create_hybrid_device_mesh((1, *sizes), (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
  else:
    # One slice may stand in for several: so a laptop's devices can play a pod's.
    grid = mesh_utils.create_device_mesh((slices, *sizes), devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def sample_parts(mesh):
  """The number of parts that a mesh splits a batch into."""
  return int(np.prod([mesh.shape[axis] for axis in SAMPLES]))


def under(mesh, f):
  """f, traced under the mesh, so that `constrain`, `platform` and `per_device` find it."""
  @functools.wraps(f)
  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return f(*args)

  return traced


def splits(n):
  """Whether the mesh of the current trace splits n samples evenly; True where there is no mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or n % sample_parts(mesh) == 0


def constrain(x, *spec):
  """x, its axes laid out over the mesh of the current trace as `spec` says; x itself where there is no mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(*spec))


def platform():
  """The platform that the current trace is for, "tpu", "gpu" or "cpu".

  The mesh's devices decide, which need not be attached here; without a mesh, JAX's default backend.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  found = device.platform if device else jax.default_backend()
  return "gpu" if found in ("cuda", "rocm") else found


def per_device(f, in_specs, out_spec):
  """f of arrays laid out as the specs say; each device of the current trace's mesh runs f on its own part."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f

  def split(*args):
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_spec, check_vma=False)(*args)

  return split


def shardings(tree, rules, mesh, *, spread=()):
  """A NamedSharding for each leaf of a tree of shapes, by the first rule whose pattern ends the leaf's path.

  The paths of an optimizer's state end in a parameter's path, so the state follows the parameter. Scalars are
  replicated.

  Args:
    tree: a tree of shapes.
    rules: (pattern, axes of the mesh for the leaf's axes). axes = None: use the next matching rule, but drop mesh axes
      that do not divide the leaf (8-bit scales follow their parameter).
    mesh: see `make_mesh`.
    spread: axes of the mesh over which a leaf is split too, along the first of its axes that they divide: ("data",) is
      ZeRO (arXiv 1910.02054) for what no forward pass reads. A leaf with no such axis stays whole, which for many parts
      may be a large one: the plan shows what is left.
  Raises:
    ValueError: no rule names a leaf (replicating it in silence could be a 20B matrix on every device), or the mesh
      does not divide an axis of one.
  """
  def place(name, leaf):
    if leaf.ndim == 0:
      return NamedSharding(mesh, P())
    fit = _dividing
    for pattern, spec in rules:
      if params_lib.ends_with(pattern, name):
        if spec is None:
          fit = _where_dividing
          continue
        return NamedSharding(mesh, P(*_spread(leaf.shape, fit(name, leaf.shape, spec, mesh), spread, mesh)))
    raise ValueError(f"network: no sharding rule names {name} {leaf.shape}; add one to the network's file")

  return params_lib.map_with_path(place, tree)


def _dividing(name, shape, spec, mesh):
  for size, axis in zip(shape, spec):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
          f"mesh.{axis}: {mesh.shape[axis]} does not divide {size}, an axis of {name}; choose one that does")
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


def rows(mesh, n, process_of=operator.attrgetter("process_index")):
  """The rows of a batch of n that this process's devices hold, ascending.

  A pod's mesh follows its wires, so a process's rows need not lie together. Devices that split layers hold the same
  rows, and they may belong to several processes.
  """
  held = NamedSharding(mesh, BATCH).devices_indices_map((n,))
  mine = [part for device, (part,) in held.items() if process_of(device) == jax.process_index()]
  return np.array(sorted({row for part in mine for row in range(n)[part]}))


_rows = functools.lru_cache(rows)


def place_batch(batch, mesh, n):
  """Global arrays of a batch of n, split over all devices; `batch` holds this process's rows only, see `rows`."""
  sharding, mine = NamedSharding(mesh, BATCH), _rows(mesh, n)

  def place(x):
    x = np.asarray(x)

    def part(index):
      first, last, _ = index[0].indices(n)
      return x[np.searchsorted(mine, first):np.searchsorted(mine, last)]

    return jax.make_array_from_callback((n, *x.shape[1:]), sharding, part)

  return jax.tree.map(place, batch)


def replicated(mesh):
  return NamedSharding(mesh, P())
