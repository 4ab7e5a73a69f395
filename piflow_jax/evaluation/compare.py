"""Few-step methods against one another and their teacher: same network, same training compute, several seeds.

  python -m piflow_jax.evaluation.compare --config=configs/digits.py --workdir=runs/digits/compare

The config file must take ROLE,NFE as its argument. Every method named by --methods is trained for each number of
--calls (one model for all of them where a model does not belong to one), with seeds 0 to --seeds - 1, in its own folder
of the workdir: what is there already is not trained again. config.steps is that of the first method; the others get as
many network passes, the teacher's counted. Leaves compare.html and compare.json in WORKDIR/report and prints the path.
"""

import functools
import json
import time
from typing import Any, NamedTuple

from absl import flags
from etils import epath
import jax
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import program
from piflow_jax import run_log
from piflow_jax import train_loop
from piflow_jax import train_step
from piflow_jax import weights
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import figures
from piflow_jax.evaluation import measure
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import report

TEACHER_STEPS = (128, 8, 4, 2, 1)  # the first is what the others are held against


class Job(NamedTuple):
  """A training."""

  name: str  # of the method
  seed: int
  calls: list  # that its model is measured at
  config: Any
  run: build.Run
  folder: epath.Path


def compare(config_of, workdir, *, methods, calls, seeds):
  """Train what is missing, sample, measure, write the report.

  Args:
    config_of: (role, nfe) -> config.
    workdir: folder of all runs.
    methods: roles.
    calls: numbers of network calls, ascending.
    seeds: how many.
  Returns:
    epath.Path of compare.html.
  Raises:
    errors.UserError: bad input, before anything is trained.
  """
  began = time.time()
  if not methods or len(set(methods)) < len(methods):
    raise errors.UserError(f"--methods: {','.join(methods) or 'nothing'}; name each method once")
  jobs = plan(config_of, epath.Path(workdir), methods, calls, seeds)
  config, mesh = jobs[0].config, build.mesh(jobs[0].config)
  bench = measure.Bench(config, jobs[0].run, mesh)
  lost = _train(jobs)
  rows, shown = _rows(jobs), {}
  total = seeds * (len(TEACHER_STEPS) + 1) + sum(len(job.calls) for job in jobs if job.folder not in lost)
  with tqdm.tqdm(total=total * bench.samples, unit="image", desc=f"{workdir}: sampling",
                 disable=jax.process_index() > 0 or None) as bar:
    drawers = _Drawers(jobs[0], mesh)
    for seed in range(seeds):
      mine = [job for job in jobs if job.seed == seed]
      tallies = _measure(bench, drawers, [job for job in mine if job.folder not in lost], seed, rows, bar)
      shown = shown or {key: tally.shown for key, tally in tallies.items() if tally.shown}
      for job in mine:
        if job.folder in lost:
          for nfe in job.calls:
            _add(rows[job.name, nfe], seed, {})
  path = epath.Path(workdir) / "report" / "compare.html"
  if jax.process_index() > 0:
    return path
  rows = list(rows.values())
  settings = dict(
      samples=bench.samples, held_out_records=bench.held_out.count, seeds=seeds, batch_size=config.batch_size,
      features=bench.features.name if bench.features else None, teacher=config_lib.to_plain(config.teacher),
      network=config_lib.to_plain(config.network), minutes=(time.time() - began) / 60)
  return report.write_comparison(
      path.parent, title=f"{workdir}: few-step methods at the same training compute", rows=rows, settings=settings,
      notes=_notes(config, bench), pictures=_pictures(rows, calls, shown))


def plan(config_of, workdir, methods, calls, seeds):
  """A Job for each training, seed by seed of each method and number of calls. Raises errors.UserError."""
  jobs, budget = [], None
  for role in methods:
    for nfe in calls:
      run = build.run(config_of(role, nfe))  # refuses fields that do not fit now, not after an hour
      if run.teacher is None:
        raise errors.UserError(f"--methods: {role} trains no student: its config has no teacher")
      cost, per_call = run.method.passes, run.method.per_call
      budget = budget or config_of(role, nfe).steps * cost
      if not per_call and nfe != calls[0]:
        continue
      for seed in range(seeds):
        config = config_of(role, nfe)
        config.seed, config.steps = seed, round(budget / cost)
        folder = workdir / (f"{role}-{nfe}" if per_call else role) / f"seed{seed}"
        jobs.append(Job(role, seed, [nfe] if per_call else list(calls), config, run, folder))
  return jobs


def _train(jobs):
  """Train what is missing; returns the folders of those that diverged."""
  lost = set()
  for i, job in enumerate(jobs):
    _say(f"[{i + 1}/{len(jobs)}] {job.folder}: {job.config.steps} steps")
    try:
      status = train_loop.train(job.config, str(job.folder))
    except errors.NotFinite as e:
      _say(f"{job.folder}: {e}")
      lost.add(job.folder)
      continue
    if status:
      raise SystemExit(status)
    jax.clear_caches()
  return lost


def _say(text):
  if jax.process_index() == 0:
    print(text, flush=True)


def _rows(jobs):
  """{(method, calls): row without values yet}: the teacher's, then the methods' as they were asked for."""
  keys = {("teacher", nfe): None for nfe in sorted(TEACHER_STEPS)}
  keys |= {(job.name, nfe): job for job in jobs for nfe in job.calls}
  return {key: dict(method=key[0], calls=key[1], seeds=[], passes=job and job.run.method.passes,
                    steps=job and job.config.steps, values={name: [] for name in metrics.METRICS})
          for key, job in keys.items()}


def _add(row, seed, values):
  row["seeds"].append(seed)
  for name, found in row["values"].items():
    found.append(values.get(name))


class _Drawers:
  """Jitted draws, one for all seeds of a method and number of calls: weights are arguments."""

  def __init__(self, job, mesh):
    self._mesh, self._found = mesh, {}
    shapes = train_step.compile(job.config, mesh, job.run).teacher
    self._teacher_params = train_step.load_teacher(job.config, job.run, shapes)
    self._teacher = {nfe: draws.teacher_drawer(mesh, job.run, nfe) for nfe in TEACHER_STEPS}

  def teacher(self):
    """A draws.Model for each number of the teacher's steps."""
    return [draws.Model("teacher", nfe, functools.partial(draw, self._teacher_params))
            for nfe, draw in self._teacher.items()]

  def student(self, job):
    """A draws.Model for each number of calls of a job's model."""
    jitted = train_step.compile(job.config, self._mesh, job.run)
    own = (weights.load(str(job.folder), jitted.state.ema, "ema", "--workdir"),
           train_step.load_base(job.config, job.run, jitted))
    for nfe in job.calls:
      if (job.name, nfe) not in self._found:
        self._found[job.name, nfe] = draws.model_drawer(self._mesh, job.config, job.run, nfe)
    return [draws.Model(job.name, nfe, functools.partial(self._found[job.name, nfe], own)) for nfe in job.calls]


def _measure(bench, drawers, jobs, seed, rows, bar):
  """Draw and measure the teacher and the jobs of a seed, all from the same noises; returns {(method, calls): Tally}."""
  models = [*drawers.teacher(), *(model for job in jobs for model in drawers.student(job))]
  tallies = bench.measure(models, bench.seed + seed, bar)
  fresh, = bench.measure(models[:1], bench.seed + seed, bar, draws.FRESH)
  folders = {(job.name, nfe): job.folder for job in jobs for nfe in job.calls}
  found = {(model.name, model.calls): tally for model, tally in zip(models, tallies)}
  for key, tally in found.items():
    values = bench.values(tally, tallies[0], fresh)
    values["seconds_per_step"] = _seconds_per_step(folders[key]) if key in folders else None
    _add(rows[key], seed, values)
  return found


def _seconds_per_step(folder):
  """Median of what the run logged, without its first line, in which the step was compiled."""
  speeds = [line["steps_per_second"] for line in run_log.read_metrics(str(folder)) if "steps_per_second" in line]
  return float(1 / np.median(speeds[1:] or speeds))


def _pictures(rows, calls, shown):
  """{caption: PNG bytes} of figures by calls, and where x_0 are pictures of the same noises through all methods."""
  known = [name for name, metric in metrics.METRICS.items()
           if metric.title and any(value is not None for row in rows for value in row["values"][name])]
  found = {}
  if known:
    titles = [metrics.METRICS[name].title for name in known]
    found["Figures by network calls"] = figures.methods(rows, known, titles)
  best = "teacher", TEACHER_STEPS[0]
  if best not in shown:
    return found
  for nfe in calls:
    these = {f"{best[0]}, {best[1]} calls": shown[best]}
    these |= {name: by for (name, n), by in shown.items() if n == nfe and name != "teacher"}
    pictures = [(name, np.stack([by[i] for i in sorted(by)])) for name, by in these.items()]
    found[f"The same noises, {nfe} call{'s' if nfe != 1 else ''} each"] = figures.comparison(pictures)
  return found


def _notes(config, bench):
  guided = config.teacher.get("guidance_scale", 1) > 1
  return [
      "All students have the teacher's network and, where it has a checkpoint, start from its weights; a row's passes "
      "are network passes a sample and update (forward 1, backward 2, forward-mode derivative 1; the teacher's "
      "counted). Steps are chosen so that passes times steps is the same for all.",
      "Policies are trained for their number of calls; parallel decoding and MeanFlow are one model for all of them.",
      "Seeds change the training and the noises; the teacher is one and the same.",
      f"Fréchet distances are to {'' if guided else 'held-out data and to '}fresh samples of the teacher at "
      f"{TEACHER_STEPS[0]} steps{'; with guidance, those to data say little' if guided else ''}.",
      *bench.remarks(),
  ]


def _define(values):
  flags.DEFINE_list("methods", ["student", "gm32", "dx", "parallel", "meanflow", "improved-meanflow"],
                    "Roles of the config file.", flag_values=values)
  flags.DEFINE_list("calls", ["1", "2", "4"], "Network calls a sample.", flag_values=values)
  flags.DEFINE_integer("seeds", 3, "Trainings of each model, and sets of noises.", lower_bound=1, flag_values=values)


def _main(given):
  path = compare(given.config_of, given.workdir, methods=given.flags.methods,
                 calls=program.whole_numbers(given.flags, "calls"), seeds=given.flags.seeds)
  if jax.process_index() > 0:
    return 0
  rows = json.loads((path.parent / "compare.json").read_text())["rows"]
  keys = [name for name, metric in metrics.METRICS.items() if metric.title]
  print(f"{'method':<18} {'calls':>5} " + " ".join(f"{name:>24}" for name in keys))
  for row in rows:
    cells = (f"{_number(row['mean'][name])} ± {_number(row['std'][name])}" for name in keys)
    print(f"{row['method']:<18} {row['calls']:>5} " + " ".join(f"{cell:>24}" for cell in cells))
  print(path)
  return 0


def _number(value):
  return "–" if value is None else f"{value:.3f}"


PROGRAM = program.Program(_main, _define, __doc__, config="file")

if __name__ == "__main__":
  program.run(PROGRAM)
