"""Measure a student against its teacher, and both against real data; write the report.

  python -m piflow_jax.evaluation.run --config=configs/digits.py:student --workdir=runs/digits/student

Draws config.evaluation.samples from the teacher at 128, 4, 2 and 1 Euler steps and from the student, all from the same noise,
and the teacher's own again from fresh noise. Leaves report.html and report.json in <workdir>/report and prints the path.
"""

import functools
import json
import time
from typing import Callable, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax import main as program
from piflow_jax import run_log
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax import train_loop
from piflow_jax.evaluation import figures
from piflow_jax.evaluation import metrics
from piflow_jax.evaluation import report

TEACHER_STEPS = (128, 4, 2, 1)


def draw_all(draw, noise, labels, batch_size, bar):
  """(x_0 of all noises, seconds without the compiling call) by draw(noise, cond, batch's number), batches of one shape."""
  n, batches = len(noise), sampler.batches(batch_size, noise, labels)
  jax.block_until_ready(draw(*batches[0], 0))
  began, parts = time.perf_counter(), []
  for i, batch in enumerate(batches):
    parts.append(np.asarray(draw(*batch, i)))
    bar.update(min(batch_size, n - i * batch_size))
  seconds = time.perf_counter() - began
  return np.concatenate(parts)[:n], seconds * n / (len(batches) * batch_size)


def measure(samples, labels, reference, real, teacher, extract, predict):
  """The figures of one row.

  Args:
    samples: [n, H, W, C] of the given labels.
    labels: [n].
    reference: the many-step teacher's from the same noise and labels.
    real: images to be like, [m, H, W, C].
    teacher: the many-step teacher's from other noise, alike.
    extract, predict: images -> features [n, D], labels [n].
  """
  features, real_features = extract(samples), extract(real)
  precision, recall = metrics.precision_recall(real_features, features)
  pixels = lambda images: images.reshape(len(images), -1)
  return dict(
      frechet=metrics.frechet_distance(real_features, features),
      frechet_to_teacher=metrics.frechet_distance(extract(teacher), features),
      pixel_frechet=metrics.frechet_distance(pixels(real), pixels(samples)),
      pixel_frechet_to_teacher=metrics.frechet_distance(pixels(teacher), pixels(samples)),
      precision=precision, recall=recall,
      accuracy=metrics.accuracy(predict(samples), labels),
      diversity=metrics.class_diversity(samples, labels),
      endpoint_error=metrics.endpoint_error(samples, reference, labels))


class Bench(NamedTuple):
  """What models of one data set are held against."""

  train: tuple  # (images, labels)
  held_out: tuple
  extract: Callable  # images -> features [n, D]
  predict: Callable  # images -> labels [n]
  labels: np.ndarray  # [samples] of what is drawn
  noises: Callable  # seed -> (noise, fresh noise), [samples, H, W, C] each
  draw: Callable  # (flow_map_of, nfe, h, the model's own config) -> jitted (weights, noise, cond, batch's number) -> x_0


def bench(config, mesh):
  """The data, features and draws that config.evaluation names. Raises errors.UserError."""
  c = config.evaluation
  if c.features is None:
    raise errors.UserError("config.evaluation.features: is empty; name a function that gives (extract, predict), or draw "
                           "without measuring: python -m piflow_jax.sample")
  if c.batch_size % sharding.sample_parts(mesh):
    raise errors.UserError(
        f"config.evaluation.batch_size: {c.batch_size} does not divide over {sharding.sample_parts(mesh)} parts of the mesh; choose a multiple")
  source = functools.partial(config.data.source, shape=config.data.shape, num_classes=config.data.num_classes)
  train, held_out = (_stack(source(split)) for split in ("train", "held_out"))
  extract, predict = c.features(*train)
  split = jax.NamedSharding(mesh, sharding.BATCH)

  def noises(seed):
    draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), (c.samples, *config.data.shape))
    return tuple(np.asarray(draw(i)) for i in range(2))

  def draw(flow_map_of, nfe, h=0.0, config=config):
    def sample(weights, noise, cond, batch):
      key = jax.random.fold_in(jax.random.key(c.seed), batch)  # of what h > 0 draws on the way
      return sampler.sample(flow_map_of(weights, cond), noise, key, nfe=nfe, h=h, shift=build.shift(config),
                            final_scale=config.flow.final_scale)

    return jax.jit(sharding.under(mesh, sample), in_shardings=(None, split, split, None))

  labels = (np.arange(c.samples) % config.data.num_classes).astype(np.int32)
  return Bench(train, held_out, extract, predict, labels, noises, draw)


def teacher_flow_map_of(config):
  """(weights, cond) -> the teacher's flow map, for `Bench.draw`."""
  return lambda weights, cond: build.teacher_flow_map(config, weights, cond)


def student_flow_map_of(run, nfe):
  """((params, teacher's params), cond) -> the student's flow map in nfe calls, for `Bench.draw`."""
  return lambda weights, cond: run.flow_map(*weights, cond, nfe)


def evaluate(config, workdir):
  """All rows of the report for the student in workdir; returns the path of report.html."""
  c, began = config.evaluation, time.time()
  mesh = sharding.make_mesh(**config.mesh)
  run = build.run(config)
  if run.teacher_shapes is None:
    raise errors.UserError("config.method: this run has no teacher to be held against; evaluate a student's config, or only "
                           "draw from it: python -m piflow_jax.sample")
  b = bench(config, mesh)
  jitted = train_loop.compile_run(config, mesh, run)
  teacher_params = train_loop.load_teacher(config, jitted["teacher"])
  params = checkpoint.load_weights(workdir, jitted["state"].ema, "ema", "--workdir")
  run_log.warn_of_other(workdir, config)
  noise, fresh = b.noises(c.seed)

  nfe = config.sampling.nfe
  models = [("teacher", n, functools.partial(b.draw(teacher_flow_map_of(config), n), teacher_params))
            for n in TEACHER_STEPS]
  student_draw = b.draw(student_flow_map_of(run, nfe), nfe, config.sampling.h)
  models.append(("student", nfe, functools.partial(student_draw, (params, teacher_params))))

  with tqdm.tqdm(total=c.samples * (len(models) + 1), unit="image", desc=f"{workdir}: sampling") as bar:
    drawn = [draw_all(draw, noise, b.labels, c.batch_size, bar) for _, _, draw in models]
    own, _ = draw_all(models[0][2], fresh, b.labels, c.batch_size, bar)
  # Held-out images, not those trained on: a teacher that learnt its data by heart must not look better for it.
  rows = []
  for (model, calls, _), (samples, seconds) in zip(models, drawn):
    rows.append(dict(model=model, calls=calls) | measure(
        samples, b.labels, drawn[0][0], b.held_out[0], own, b.extract, b.predict)
        | dict(seconds_per_1000=seconds * 1000 / c.samples))

  real_features, train_features = b.extract(b.held_out[0]), b.extract(b.train[0])
  to_train = lambda samples: metrics.frechet_distance(train_features, b.extract(samples))
  reference = dict(
      frechet_of_train_images=metrics.frechet_distance(real_features, train_features),
      frechet_of_fresh_teacher=metrics.frechet_distance(real_features, b.extract(own)),
      frechet_to_train_of_teacher=to_train(drawn[0][0]), frechet_to_train_of_student=to_train(drawn[-1][0]),
      held_out_images=len(b.held_out[0]), held_out_accuracy=metrics.accuracy(b.predict(b.held_out[0]), b.held_out[1]),
      guidance_scale=config.teacher.guidance_scale, samples=c.samples, seed=c.seed)
  classes = config.data.num_classes
  shown = slice(0, 2 * classes)
  name = lambda model, calls: f"{model}, {calls} {'call' if calls == 1 else 'calls'}"
  pictures = {
      "The same noises through teacher and student": figures.comparison(
          [(name(m, n), samples[shown]) for (m, n, _), (samples, _) in zip(models, drawn)]
          + [("real digits" if classes == 10 else "real", _by_label(b.train, b.labels[shown]))]),
      "Quality by network calls": figures.quality(rows),
  }
  minutes = {}
  for stage, folder in (("teacher", config.teacher.checkpoint), ("student", workdir)):
    lines = run_log.read_metrics(folder)
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    minutes[stage] = seconds[-1] / 60 if seconds else None
    series = {key: ([line["step"] for line in lines if key in line], [line[key] for line in lines if key in line])
              for key in ("loss", "eval_loss")}
    pictures[f"Loss of the {stage}"] = figures.curves(series, title=f"{stage}: {folder}", ylabel="loss")
  minutes["evaluation"] = (time.time() - began) / 60
  folder = epath.Path(workdir) / "report"
  return report.write_report(
      folder, title=f"{workdir}: the student and its teacher", rows=rows, minutes=minutes, reference=reference,
      pictures=pictures, checks=checks(rows))


def checks(rows):
  """(text, value, bound, passed) of what a good distillation shows, from the rows of a report."""
  find = lambda model, calls: next(r for r in rows if r["model"] == model and r["calls"] == calls)
  student, best, few, one = rows[-1], find("teacher", 128), find("teacher", 4), find("teacher", 1)
  at_most = lambda text, value, bound: (text, value, f"<= {bound}", bool(value <= bound))
  ratio = student["diversity"] / best["diversity"]
  return [
      at_most("student's Frechet distance over the teacher's at 128 calls", student["frechet"] / best["frechet"], 1.15),
      at_most("student's Frechet distance over the teacher's at 4 calls", student["frechet"] / few["frechet"], 0.7),
      at_most("student's distance to the teacher's samples over that of the teacher at 4 calls",
              student["frechet_to_teacher"] / few["frechet_to_teacher"], 1.0),
      ("accuracy of the student's conditioned class", student["accuracy"], ">= 0.96", student["accuracy"] >= 0.96),
      ("diversity of the student over the teacher's", ratio, "0.9 to 1.1", 0.9 <= ratio <= 1.1),
      at_most("endpoint error of the student", student["endpoint_error"], 0.25),
      ("endpoint error of one Euler step, for comparison", one["endpoint_error"], "about 0.7", True),
  ]


def _stack(records):
  images, labels = zip(*((r["x_0"], r["cond"]) for r in (records[i] for i in range(len(records)))))
  return np.stack(images), np.array(labels)


def _by_label(real, labels):
  """A real image of each label, a different one each time that a label recurs."""
  images, classes = real
  seen = {}
  picked = []
  for label in labels:
    of_class = np.flatnonzero(classes == label)
    picked.append(images[of_class[seen.get(label, 0)]])
    seen[label] = seen.get(label, 0) + 1
  return np.stack(picked)


def _main(argv):
  del argv
  path = evaluate(program.CONFIG.value, program.WORKDIR.value)
  result = json.loads((path.parent / "report.json").read_text())
  shown = ("frechet", "frechet_to_teacher", "accuracy", "diversity", "endpoint_error")
  print(f"{'model':<8} {'calls':>5} " + " ".join(f"{name:>18}" for name in shown))
  for row in result["rows"]:
    print(f"{row['model']:<8} {row['calls']:>5} " + " ".join(f"{row[name]:>18.3f}" for name in shown))
  for check in result["checks"]:
    print(f"{'ok  ' if check['passed'] else 'MISS'} {check['text']}: {check['value']:.3f} ({check['bound']})")
  print(path)
  return 0


if __name__ == "__main__":
  program.run(_main)
