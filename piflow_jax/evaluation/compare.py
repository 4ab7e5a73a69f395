"""Few-step methods against one another and their teacher: same network, same training compute, several seeds.

  python -m piflow_jax.evaluation.compare --config=configs/digits.py --workdir=runs/digits/compare

The config file must take ROLE,NFE as its argument. Every method named by --methods is trained for each number of
--calls (one model for all of them where the method knows no segments), with seeds 0 to --seeds - 1, in its own folder of
the workdir: what is there already is not trained again. config.steps is that of the first method; the others get as many
network passes, the teacher's counted. Leaves compare.html and compare.json in <workdir>/report and prints the path.
"""

import functools
import json
import time

from absl import flags
from etils import epath
import jax
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax import main as program
from piflow_jax import run_log
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax.evaluation import figures
from piflow_jax.evaluation import report
from piflow_jax.evaluation import run as run_lib

METHODS = flags.DEFINE_list(
    "methods", ["student", "gm32", "dx", "parallel", "meanflow", "improved-meanflow"], "Roles of the config file.")
CALLS = flags.DEFINE_list("calls", ["1", "2", "4"], "Network calls a sample.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of each model, and sets of noises.", lower_bound=1)

TEACHER_STEPS = (1, 2, 4, 8, 128)
METRICS = {  # of `run.measure`, and what a picture calls them
    "frechet": "Fréchet to held-out data, features",
    "frechet_to_teacher": "Fréchet to the teacher, features",
    "pixel_frechet": "Fréchet to held-out data, pixels",
    "pixel_frechet_to_teacher": "Fréchet to the teacher, pixels",
    "accuracy": "Accuracy of the conditioned class",
    "diversity": "Diversity within a class",
    "endpoint_error": "Endpoint error",
}


def passes(config):
  """Network passes a sample and update: a forward pass 1, a backward pass 2, a forward-mode derivative 1; the teacher's too.

  Raises:
    errors.UserError: a method that no student is trained by.
  """
  guided = 2 if config.teacher.guidance_scale > 1 else 1
  label = 2 if config.imitation.label == "midpoint" else 1
  if config.method is build.imitation:
    return (3 + config.imitation.num_states * label * guided) * (config.flow.nfe if config.imitation.data_free else 1)
  if config.method is build.parallel_decoding:
    blocks = config.policy.intervals // config.parallel_decoding.min_block if config.imitation.data_free else 1
    return (3 + 2 * guided) * blocks
  if config.method is build.meanflow:
    by_teacher = config.meanflow.target == "teacher"
    extra = guided if by_teacher else int(config.meanflow.guidance_scale > 1)
    return 4 + extra + int(config.meanflow.improved)
  raise errors.UserError(f"--methods: {config.method.__name__} trains no student")


def trained_per_call(config):
  """Whether a model of this method belongs to one number of calls."""
  return config.method is build.imitation


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
  plan = _plan(config_of, epath.Path(workdir), methods, calls, seeds)
  config = plan[0]["config"]
  mesh = sharding.make_mesh(**config.mesh)
  b = run_lib.bench(config, mesh)
  for i, job in enumerate(plan):
    print(f"[{i + 1}/{len(plan)}] {job['folder']}: {job['config'].steps} steps", flush=True)
    try:
      status = train_loop.train(job["config"], str(job["folder"]))
    except errors.NotFinite as e:
      print(f"{job['folder']}: {e}", flush=True)
      job["diverged"] = True
      continue
    if status:
      raise SystemExit(status)
    jax.clear_caches()

  teacher_params = train_loop.load_teacher(config, train_loop.compile_run(config, mesh, build.run(config))["teacher"])
  total = seeds * (len(TEACHER_STEPS) + 1) + sum(len(job["calls"]) for job in plan)
  rows, shown = {}, {}
  with tqdm.tqdm(total=total * config.evaluation.samples, unit="image", desc=f"{workdir}: sampling") as bar:
    draw_all = lambda draw, noise: run_lib.draw_all(draw, noise, b.labels, config.evaluation.batch_size, bar)

    def add(name, nfe, seed, samples, seconds, job=None):
      values = dict.fromkeys(METRICS)  # of a model that diverged there is nothing to measure
      if np.isfinite(samples).all():
        values |= run_lib.measure(samples, b.labels, ends[seed], b.held_out[0], own[seed], b.extract, b.predict)
      values = {k: values[k] for k in METRICS} | {
          "seconds_per_step": _seconds_per_step(job["folder"]) if job else None,
          "seconds_per_1000": seconds * 1000 / config.evaluation.samples}
      row = rows.setdefault((name, nfe), dict(
          method=name, calls=nfe, seeds=[], passes=passes(job["config"]) if job else None,
          steps=job["config"].steps if job else None, values={k: [] for k in values}))
      row["seeds"].append(seed)
      for k, v in values.items():
        row["values"][k].append(v)
      if seed == 0:
        shown[name, nfe] = samples[:2 * config.data.num_classes]

    noises = [b.noises(config.evaluation.seed + seed) for seed in range(seeds)]
    of_teacher = run_lib.teacher_flow_map_of(config)
    finest = functools.partial(b.draw(of_teacher, TEACHER_STEPS[-1]), teacher_params)
    drawn, own = [draw_all(finest, n[0]) for n in noises], [draw_all(finest, n[1])[0] for n in noises]
    ends = [samples for samples, _ in drawn]
    for nfe in TEACHER_STEPS[:-1]:
      draw = functools.partial(b.draw(of_teacher, nfe), teacher_params)
      for seed in range(seeds):
        add("teacher", nfe, seed, *draw_all(draw, noises[seed][0]))
    for seed in range(seeds):
      add("teacher", TEACHER_STEPS[-1], seed, *drawn[seed])

    draws = {}
    for job in plan:
      if "diverged" in job:
        for nfe in job["calls"]:
          add(job["name"], nfe, job["seed"], np.full_like(ends[0], np.nan), np.nan, job)
        continue
      run = build.run(job["config"])
      jitted = train_loop.compile_run(job["config"], mesh, run)
      params = checkpoint.load_weights(str(job["folder"]), jitted["state"].ema, "ema", "--workdir")
      for nfe in job["calls"]:
        # One compilation for all seeds: weights are arguments.
        draw = draws.setdefault((job["name"], nfe), b.draw(
            run_lib.student_flow_map_of(run, nfe), nfe, job["config"].sampling.h, job["config"]))
        samples, seconds = draw_all(functools.partial(draw, (params, teacher_params)), noises[job["seed"]][0])
        add(job["name"], nfe, job["seed"], samples, seconds, job)

  rows = list(rows.values())
  settings = dict(
      samples=config.evaluation.samples, held_out_images=len(b.held_out[0]), seeds=seeds,
      batch_size=config.batch_size, guidance_scale=config.teacher.guidance_scale, teacher=config.teacher.checkpoint,
      network=run_log.flat_config(config.network), minutes=(time.time() - began) / 60)
  pictures = {"Figures by network calls": figures.methods(rows, list(METRICS), list(METRICS.values()))}
  for nfe in calls:
    pictures[f"The same noises, {nfe} {'call' if nfe == 1 else 'calls'} each"] = figures.comparison(
        [(f"teacher, {TEACHER_STEPS[-1]} calls", shown["teacher", TEACHER_STEPS[-1]])]
        + [(name, samples) for (name, n), samples in shown.items() if n == nfe])
  return report.write_comparison(
      epath.Path(workdir) / "report", title=f"{workdir}: few-step methods at the same training compute", rows=rows,
      settings=settings, notes=_notes(config), pictures=pictures)


def _plan(config_of, workdir, methods, calls, seeds):
  """A job for each training: {name, seed, calls, config, folder}."""
  plan, budget = [], None
  for role in methods:
    for nfe in calls:
      config = config_of(role, nfe)
      build.run(config)  # fields that do not fit are told now, not after an hour
      cost = passes(config)
      budget = budget or config.steps * cost
      per_call = trained_per_call(config)
      if not per_call and nfe != calls[0]:
        continue
      for seed in range(seeds):
        config = config_of(role, nfe)
        config.seed, config.steps = seed, round(budget / cost)
        plan.append(dict(
            name=role, seed=seed, calls=[nfe] if per_call else list(calls), config=config,
            folder=workdir / (f"{role}-{nfe}" if per_call else role) / f"seed{seed}"))
  return plan


def _seconds_per_step(folder):
  """Median of what the run logged, without its first line, in which the step was compiled."""
  speeds = [line["steps_per_second"] for line in run_log.read_metrics(str(folder)) if "steps_per_second" in line]
  return float(1 / np.median(speeds[1:] or speeds))


def _notes(config):
  return [
      "All students have the teacher's network and, where it has a checkpoint, start from its weights; a row's passes "
      "are network passes a sample and update (forward 1, backward 2, forward-mode derivative 1; the teacher's counted), and steps are chosen so that "
      "passes times steps is the same for all.",
      "Policies are trained for their number of calls; parallel decoding and MeanFlow are one model for all of them.",
      "Seeds change the training and the noises; the teacher is one and the same.",
      f"Frechet distances are to {'held-out data and to ' if config.teacher.guidance_scale <= 1 else ''}fresh samples of the "
      f"teacher at {TEACHER_STEPS[-1]} steps" + ("." if config.teacher.guidance_scale <= 1 else
                                               "; with guidance, those to data say little."),
  ]


def _main(argv):
  del argv
  path = compare(program.configs_of(program.CONFIG), program.WORKDIR.value, methods=METHODS.value,
                 calls=program.whole_numbers(CALLS), seeds=SEEDS.value)
  result = json.loads((path.parent / "compare.json").read_text())
  print(f"{'method':<18} {'calls':>5} " + " ".join(f"{name:>24}" for name in METRICS))
  for row in result["rows"]:
    number = lambda value: "-" if value is None else f"{value:.3f}"
    cells = (f"{number(row['mean'][k])} ± {number(row['std'][k])}" for k in METRICS)
    print(f"{row['method']:<18} {row['calls']:>5} " + " ".join(f"{cell:>24}" for cell in cells))
  print(path)
  return 0


if __name__ == "__main__":
  program.run(_main)
