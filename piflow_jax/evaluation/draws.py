"""What is drawn to be measured: noise and labels by number, and models as jitted functions of them."""

import functools
import math
import pickle
from typing import Callable, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from piflow_jax import build
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax.data import spec as spec_lib

NOISE, FRESH, _WAY, _LABELS = range(4)  # streams of draws: of all models, of the teacher's second set, of h > 0
_BLOCK = 2**24  # values of noise drawn at once


class Noises:
  """Rows of standard normal noise; row i is a function of (seed, stream, i) and its shape, however many there are."""

  def __init__(self, seed, stream, samples, shape):
    self._key, self._samples, self._shape = jax.random.fold_in(jax.random.key(seed), stream), samples, shape
    self._rows = max(_BLOCK // math.prod(shape), 1)
    self._block = functools.lru_cache(maxsize=1)(self._draw)

  def rows(self, start, stop):
    """Rows start to stop, [stop - start, *shape] float32."""
    found = []
    for b in range(start // self._rows, -(-stop // self._rows)):
      first = b * self._rows
      found.append(self._block(b)[max(start - first, 0):stop - first])
    return np.concatenate(found)

  def _draw(self, b):
    # JAX draws the first rows of an array alike, whatever its length.
    key = jax.random.fold_in(self._key, b) if b else self._key
    return np.asarray(jax.random.normal(key, (min(self._rows, self._samples - b * self._rows), *self._shape)))


def labels(index, classes, seed, how):
  """Classes [n] int32 of samples by number [n]; each is a function of (seed, its number).

  Args:
    index: numbers of samples.
    classes: how many there are.
    seed: a whole number.
    how: "balanced": classes in turn; "random": each class as likely.
  """
  if how == "balanced":
    return (index % classes).astype(np.int32)
  key = jax.random.fold_in(jax.random.key(seed), _LABELS)
  return np.asarray(_random_labels(key, index, classes))


@functools.partial(jax.jit, static_argnums=2)
def _random_labels(key, index, classes):
  return jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, classes))(index)


def conditions_of(spec, records, count=None):
  """(numbers of samples [n]) -> their cond tree: classes in turn, or where a label is not all, those of some records.

  Args:
    spec: data.spec.Spec.
    records: random access, held-out ones.
    count: the first so many of them, in turn; None: all.
  """
  classes, count = spec_lib.num_classes(spec), count or len(records)

  def conditions(index):
    if classes:
      return {name: (index % classes).astype(array.dtype) for name, array in spec.cond.items()}
    found = [records[int(i)]["cond"] for i in index % count] if spec.cond else []
    return {name: np.stack([cond[name] for cond in found]).astype(array.dtype) for name, array in spec.cond.items()}

  return conditions


class Batch(NamedTuple):
  """Samples to be drawn together."""

  placed: dict  # {"noise" [B, ...], "cond": tree, "index" [B]}, split over the mesh; the last batch is filled up
  own: np.ndarray  # rows that this process takes in
  index: np.ndarray  # numbers of these samples


def batches(noises, conditions, samples, size, mesh):
  """A Batch after another of `size` each, until all samples are drawn.

  Args:
    noises: Noises.
    conditions: numbers of samples [n] -> cond tree [n, ...].
    samples: how many.
    size: of a batch; a multiple of `sharding.sample_parts`.
    mesh: of `sharding.make_mesh`.
  """
  mine, held = own_rows(mesh, size), sharding.rows(mesh, size)

  def filled(x):
    return np.resize(x, (size, *x.shape[1:]))

  for start in range(0, samples, size):
    index = np.arange(start, min(start + size, samples), dtype=np.int32)
    rows = {"noise": noises.rows(start, start + len(index)), "cond": conditions(index), "index": index}
    placed = sharding.place_batch(jax.tree.map(lambda x: filled(x)[held], rows), mesh, size)
    own = mine[mine < len(index)]
    yield Batch(placed, own, index[own])


def own_rows(mesh, n):
  """Rows of a batch of n that this process takes in: of devices that hold the same, the first process's."""
  owner = np.full(n, jax.process_count())
  for device, (part,) in jax.NamedSharding(mesh, sharding.BATCH).devices_indices_map((n,)).items():
    owner[part] = np.minimum(owner[part], device.process_index)
  return np.flatnonzero(owner == jax.process_index())


def rows_of(x, rows):
  """Rows, all of which are on this process's devices, of an array [n, ...] that is split over all devices."""
  if x.is_fully_addressable:
    return np.asarray(x)[rows]
  found = np.empty(x.shape, x.dtype)
  for shard in x.addressable_shards:
    found[shard.index[0]] = shard.data
  return found[rows]


def from_all(value):
  """[each process's value], the first process's first, on all of them."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([len(data)])).ravel()
  padded = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
  return [pickle.loads(row[:size].tobytes()) for row, size in zip(padded, sizes)]


class Model(NamedTuple):
  """One row of a report."""

  name: str
  calls: int
  draw: Callable  # (batch, seed) -> x_0 [B, ...]


def drawer(mesh, flow_map_of, clock, h=0.0):
  """Jitted (weights, {"noise" [B, ...], "cond": tree, "index" [B]}, seed) -> x_0 [B, ...], all split over the mesh.

  Args:
    mesh: of `sharding.make_mesh`.
    flow_map_of: (weights, cond) -> flow map.
    clock: flow.Clock; its nfe is the number of calls.
    h: stochasticity, see `sampler.sample`.
  """
  split = jax.NamedSharding(mesh, sharding.BATCH)

  def draw(weights, batch, seed):
    way = jax.random.fold_in(jax.random.key(seed), _WAY)
    keys = jax.vmap(functools.partial(jax.random.fold_in, way))(batch["index"])
    return sampler.sample(flow_map_of(weights, batch["cond"]), batch["noise"], keys, clock, h=h)

  return jax.jit(sharding.under(mesh, draw), in_shardings=(None, split, None), out_shardings=split)


def teacher_drawer(mesh, run, nfe):
  """`drawer` of a run's teacher in nfe Euler steps; its weights are the teacher's parameters."""
  clock = build.teacher_clock(run, nfe)

  def flow_map_of(weights, cond):
    return build.teacher_flow_map(run, weights, cond, clock)

  return drawer(mesh, flow_map_of, clock)


def model_drawer(mesh, config, run, nfe):
  """`drawer` of a run's model in nfe calls by config.sampling; its weights are (params, base)."""
  clock = build.sampling_clock(config, run, nfe)

  def flow_map_of(weights, cond):
    return run.method.flow_map(*weights, cond, clock)

  return drawer(mesh, flow_map_of, clock, config.sampling.h)
