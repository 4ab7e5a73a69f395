"""What is drawn to be measured: noise by number, and models as jitted functions of it."""

import functools
import math
from typing import Callable, NamedTuple

import jax
import numpy as np

from piflow_jax import build
from piflow_jax import sampler
from piflow_jax import sharding

NOISE, FRESH, _WAY = range(3)  # streams of draws: of all models, of the teacher's second set, of h > 0
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
