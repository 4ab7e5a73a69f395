"""Measure a student against its teacher, and both against real data; or a teacher in several numbers of steps.

  python -m piflow_jax.evaluate --workdir=runs/digits/student
  python -m piflow_jax.evaluate --workdir=runs/digits/student --config.sampling.nfe=2 --config.sampling.h=0.5

Draws config.evaluation.samples from the teacher at 128, 4, 2 and 1 Euler steps and from the student, all from the same
noises, and the teacher's own again from fresh noise. A run without a teacher is measured by itself, at these numbers
of calls and config.sampling.nfe. Sample i's noise is a function of config.evaluation.seed and i. Samples are not kept,
only sums over them, so that there may be many.

With --reference, --samples or one of the flags below it measures FID and what is published beside it, of 50,000 samples
or of anybody's pictures: docs/evaluation.md.

  python -m piflow_jax.evaluate --samples=FILE.npz --reference=FILE.npz --inception=FILE.pth
  python -m piflow_jax.evaluate --workdir=DIR --reference=FILE.npz --inception=FILE.pth --autoencoder=DIR

Leaves report.html and report.json in WORKDIR/report and prints the path. What differs from the workdir's own config
goes into the folder's name, report-nfe=2,h=0.5. config.evaluation.checks says what a good result is.
"""

import functools
import json
import time

from absl import logging
from etils import epath
import jax
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import errors
from piflow_jax import fid
from piflow_jax import images
from piflow_jax import program
from piflow_jax import run_log
from piflow_jax import train_step
from piflow_jax import weights
from piflow_jax import workdir as workdir_lib
from piflow_jax.evaluation import checks as checks_lib
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import figures
from piflow_jax.evaluation import measure
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import naming
from piflow_jax.evaluation import report

STEPS = (128, 4, 2, 1)  # of a teacher; the first is what the others are held against


def evaluate(config, workdir, step=None):
  """Measure the run in workdir by config and write its report.

  Args:
    config: of the run.
    workdir: local or gs://.
    step: of the checkpoint, as --step says it; None: the newest.

  Returns:
    epath.Path of report.html.
  Raises:
    errors.UserError: bad input, before anything is drawn.
  """
  began = time.time()
  run, mesh = build.run(config), build.mesh(config)
  names = rows_of(config, run)
  with build.field(""):
    checks_lib.validate(config.evaluation.checks, names)
  folder = epath.Path(workdir) / (naming.named("report", config, workdir) + (f"-step={step}" if step else ""))
  measure.check_samples(config.evaluation.samples, run.data.spec)
  models = _models(config, run, mesh, workdir, names, step)
  bench = measure.Bench(config, run, mesh)
  workdir_lib.warn_of_other(workdir, config)
  with tqdm.tqdm(total=bench.samples * (len(models) + 1), unit="image", desc=f"{workdir}: sampling",
                 disable=jax.process_index() > 0 or None) as bar:
    tallies = bench.measure(models, bench.seed, bar)
    fresh, = bench.measure(models[:1], bench.seed, bar, draws.FRESH)
  rows = [dict(model=name, calls=calls) | bench.values(tally, tallies[0], fresh)
          for (name, calls), tally in zip(names, tallies)]
  if jax.process_index() > 0:
    return folder / "report.html"
  minutes, curves = _training(config, workdir, student=run.teacher is not None)
  title = "the student and its teacher" if run.teacher is not None else "at several numbers of calls"
  return report.write_report(
      folder, title=f"{workdir}: {title}", rows=rows, settings=settings(config, bench),
      notes=bench.remarks() + _remarks(config, run, names, tallies), minutes=minutes | {
          "evaluation": (time.time() - began) / 60},
      reference=_reference(bench, names, tallies, fresh), pictures=_pictures(bench, names, tallies, rows) | curves,
      checks=checks_lib.hold(config.evaluation.checks, rows))


def rows_of(config, run):
  """[(model, calls)] of a report's rows: the teacher's, which the student comes last after; or the model's alone."""
  if run.teacher is not None:
    return [*(("teacher", n) for n in STEPS), ("student", config.sampling.nfe)]
  return [("model", n) for n in sorted({*STEPS, config.sampling.nfe}, reverse=True) if _can(run, n, config.sampling.h)]


def _can(run, nfe, h):
  try:
    run.method.calls(nfe, h)
  except ValueError:
    return False
  return True


def _models(config, run, mesh, workdir, names, step):
  """A draws.Model for each row; compiles nothing yet."""
  jitted = train_step.compile(config, mesh, run)
  teacher_params = None if run.teacher is None else train_step.load_teacher(config, run, jitted.teacher)
  params = weights.load(workdir, jitted.state.ema, "ema", "--workdir", step=weights.step_of(workdir, step))
  own = params, train_step.load_base(config, run, jitted)
  models = []
  for name, calls in names:
    if name == "teacher":
      draw = functools.partial(draws.teacher_drawer(mesh, run, calls), teacher_params)
    else:
      draw = functools.partial(draws.model_drawer(mesh, config, run, calls), own)
    models.append(draws.Model(name, calls, draw))
  return models


def settings(config, bench):
  """How was drawn and measured, for the report."""
  return naming.settings(config) | {
      "features": bench.features.name if bench.features else None, "held_out_records": bench.held_out.count}


def _remarks(config, run, names, tallies):
  found = [f"{name}, {calls} calls: samples that are not finite; nothing is measured of them."
           for (name, calls), tally in zip(names, tallies) if not tally.finite]
  if remark := run.method.calls(config.sampling.nfe, config.sampling.h):
    found.append(remark)
  if run.teacher is not None and config.teacher.get("guidance_scale", 1) > 1:
    found.append(f"The teacher is guided by {config.teacher.guidance_scale:g}: distances to real data say little.")
  return found


def _reference(bench, names, tallies, fresh):
  """Numbers to compare the rows with, by name in words."""
  found = {"held-out records": bench.held_out.count}
  if bench.features is None:
    return found
  if "labels" in bench.have:
    found["accuracy on held-out records"] = bench.held_out.correct / bench.held_out.count
  if {"texts", "conditions"} <= bench.have:
    found["CLIP score of held-out records"] = bench.held_out.scores / bench.held_out.count
  (best, calls), (last, _) = names[0], names[-1]
  pairs = {"training records to held-out ones": (bench.train, bench.held_out),
           f"fresh samples of the {best} at {calls} calls to held-out records": (fresh, bench.held_out),
           f"samples of the {best} at {calls} calls to training records": (tallies[0], bench.train),
           f"samples of the {last} to training records": (tallies[-1], bench.train)}
  for words, (a, b) in pairs.items():
    found[f"Fréchet distance of {words}"] = measure.distance("", a, b) if a.finite and b.finite else None
  return found


def _pictures(bench, names, tallies, rows):
  """{caption: PNG bytes} of samples, where they are pictures, and of figures."""
  found = {}
  numbers = sorted(set.intersection(*(set(tally.shown) for tally in tallies)))
  if numbers and images.shows(bench.data.spec.x_0):
    shown = [(f"{name}, {calls} call{'s' if calls != 1 else ''}", np.stack([tally.shown[i] for i in numbers]))
             for (name, calls), tally in zip(names, tallies)]
    real = bench.real(np.array(numbers))
    if np.ptp(real):  # a cache of prompts alone has no pictures
      shown.append(("real", real))
    found["The same noises through every model"] = figures.comparison(shown)
  return found | {"Quality by network calls": figures.quality(rows)}


def _training(config, workdir, student):
  """({stage: minutes}, {caption: PNG bytes of its losses}) by the logs of this run and of its teacher's."""
  folders = {"student" if student else "training": workdir}
  if config.teacher is not None and config.teacher.get("checkpoint"):
    folders = {"teacher": config.teacher.checkpoint} | folders
  minutes, pictures = {}, {}
  for stage, folder in folders.items():
    lines = run_log.read_metrics(folder)
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    minutes[stage] = seconds[-1] / 60 if seconds else None
    series = {key: ([line["step"] for line in lines if key in line], [line[key] for line in lines if key in line])
              for key in ("loss", "eval_loss")}
    if lines:
      pictures[f"Loss, {stage}"] = figures.curves(series, title=f"{stage}: {folder}", ylabel="loss")
  return minutes, pictures


def _main(given):
  """Evaluates and prints the figures."""
  if fid.asked(given.flags):
    return fid.main(given)
  if given.config is None or given.workdir is None:
    raise errors.UserError("--workdir: missing; give a run's folder, or pictures by --samples")
  path = evaluate(given.config, given.workdir, given.flags.step)
  if jax.process_index() > 0:
    return 0
  result = json.loads((path.parent / "report.json").read_text())
  keys = [key for key, metric in metrics.METRICS.items() if metric.title and "pixels" not in metric.needs
          and any(row[key] is not None for row in result["rows"] if key in row)]
  headings = [metrics.heading(key).rjust(9) for key in keys]
  print(f"{'model':<8} {'calls':>5}  " + "  ".join(headings))
  for row in result["rows"]:
    cells = ("–" if row[key] is None else f"{row[key]:.3f}" for key in keys)
    print(f"{row['model']:<8} {row['calls']:>5}  " + "  ".join(
        cell.rjust(len(heading)) for cell, heading in zip(cells, headings)))
  for check in result["checks"]:
    value = "–" if check["value"] is None else f"{check['value']:.3f}"
    print(f"{'ok  ' if check['passed'] else 'MISS'} {check['text']}: {value} ({check['bound']})")
  for note in result["notes"]:
    logging.warning("%s", note)
  print(path)
  return 0


PROGRAM = program.Program(_main, fid.define, __doc__, needs=(), config="workdir or none")

if __name__ == "__main__":
  program.run(PROGRAM)
