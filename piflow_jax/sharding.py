"""Where arrays live: a mesh, rules from path patterns to partition specs, and the placement of batches."""

import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from piflow_jax import errors
from piflow_jax import params as params_lib

AXES = ("data", "fsdp")
BATCH = P(AXES)  # samples are split over every device; parameters over `fsdp` only


def make_mesh(data=-1, fsdp=1, devices=None):
  """A (data, fsdp) mesh of all devices; one of the sizes may be -1.

  Raises:
    errors.UserError: sizes whose product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes, n = [data, fsdp], len(devices)
  known = int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) == 1 and known > 0 and n % known == 0:
    sizes[sizes.index(-1)] = n // known
  if min(sizes) < 1 or sizes[0] * sizes[1] != n:
    raise errors.UserError(
        f"config.mesh: data={data} x fsdp={fsdp} does not make {n} devices; set one of them to -1 to infer it")
  return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)


def shardings(tree, rules, mesh):
  """A NamedSharding for each leaf of a tree of shapes, by the first rule whose pattern ends the leaf's path.

  So the state of an optimizer, whose paths end in a parameter's, follows the parameter. Scalars are replicated.

  Raises:
    ValueError: a leaf that no rule names: silence here would be a replicated 20B matrix.
  """
  def place(name, leaf):
    if leaf.ndim == 0:
      return NamedSharding(mesh, P())
    for pattern, spec in rules:
      if re.search(f"(^|/)({pattern})$", name):
        return NamedSharding(mesh, P(*_dividing(name, leaf.shape, spec, mesh)))
    raise ValueError(f"no sharding rule names {name} {leaf.shape}")

  return params_lib.map_with_path(place, tree)


def _dividing(name, shape, spec, mesh):
  for size, axis in zip(shape, spec):
    if axis is not None and size % mesh.shape[axis]:
      raise errors.UserError(
          f"config.mesh.{axis}: {mesh.shape[axis]} does not divide {size}, an axis of {name}; choose one that does")
  return spec


def place_batch(batch, mesh):
  """This process's rows of a batch as global arrays, split over all devices."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def replicated(mesh):
  return NamedSharding(mesh, P())
