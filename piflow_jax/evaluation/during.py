"""A Frechet distance of the average's samples while a run trains: fewer of them than a published figure's."""

import functools
import json

from etils import epath
import jax
import numpy as np

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import sharding
from piflow_jax import weights
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import statistics

_MOST_RECORDS = 50_000  # held-out ones that are looked at


def watcher(config, run, mesh):
  """(params, base) -> {"frechet": distance, "frechet_bias": how much of it so few samples make up}, for all processes.

  The distance is to held-out records, by config.evaluation.features, of config.evaluation.during samples that are the
  same noises and conditions each time. Read once: the records; compiled once: the drawing.

  Raises:
    errors.UserError: there are no features, or too few held-out records.
  """
  c, spec = config.evaluation, run.data.spec
  if c.features is None:
    raise errors.UserError("config.evaluation.every: needs config.evaluation.features, which a config file sets")
  if c.during < 2:
    raise errors.UserError(f"config.evaluation.during: {c.during} is too few; give 2 samples or more")
  with build.field("evaluation.features"):
    features = c.features.make(run.data, **config_lib.fields_of(c.features))
  records, parts = spec_lib.checked_records(run.data, "held_out"), sharding.sample_parts(mesh)
  size = -(-min(c.batch_size, c.during) // parts) * parts
  real = _of_records(records, features, size)
  if real.count < 2:
    raise errors.UserError("config.evaluation.every: needs two held-out records or more")
  noises = draws.Noises(c.seed, draws.NOISE, c.during, tuple(spec.x_0))
  conditions = draws.conditions_of(spec, records)
  draw = draws.model_drawer(mesh, config, run, config.sampling.nfe)
  bias = statistics.frechet_bias(real, c.during, real.count)

  def watch(params, base):
    found = statistics.Statistics()
    for batch in draws.batches(noises, conditions, c.during, size, mesh):
      x_0 = draws.rows_of(draw((params, base), batch.placed, c.seed), batch.own)
      if len(x_0):
        found.update(features.extract(x_0))
    return {"frechet": statistics.frechet_distance(real, _gathered(found)), "frechet_bias": bias}

  return watch


def best_steps(workdir):
  """{step of the checkpoint with the least distance}; {} where none was measured."""
  try:
    return {weights.step_of(workdir, "best")}
  except errors.UserError:
    return set()


def note(workdir, best, step, found, write_it):
  """Take a distance into account: `best`, a set of the best step, and weights.BEST in the workdir are of the least one.

  Args:
    workdir: local or gs://.
    best: set, changed here.
    step: of the checkpoint, which is saved.
    found: what the watcher found.
    write_it: whether this process writes.
  """
  path = epath.Path(workdir) / weights.BEST
  try:
    least = json.loads(path.read_text())["frechet"] if best else float("inf")
  except (OSError, KeyError, TypeError, ValueError):
    least = float("inf")
  if not found["frechet"] < least:
    return
  best.clear()
  best.add(step)
  if write_it:
    with errors.storing(f"--workdir: {path}"):
      partial = path.with_name(f"{path.name}.partial")
      partial.write_text(json.dumps({"step": step} | found) + "\n")
      partial.replace(path)


def _of_records(records, features, size):
  found, count = statistics.Statistics(), min(len(records), _MOST_RECORDS)
  for start in range(0, count, size):
    block = range(start, min(start + size, count))[jax.process_index()::jax.process_count()]
    if len(block):
      found.update(features.extract(np.stack([records[i]["x_0"] for i in block])))
  return _gathered(found)


def _gathered(found):
  return functools.reduce(lambda a, b: a.merge(b), draws.from_all(found))
