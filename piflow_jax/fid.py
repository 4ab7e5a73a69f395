"""FID, sFID, Inception score, precision and recall: of a run's samples, or of anybody's pictures.

  python -m piflow_jax.evaluate --samples=FILE.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=FILE.pth
  python -m piflow_jax.evaluate --workdir=DIR --reference=... --inception=... --autoencoder=DIR --protocol=adm

is the part of piflow_jax.evaluate that works on pictures: docs/evaluation.md.
"""

import contextlib
import functools
import json
import time

from absl import flags
from etils import epath
import jax
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import errors
from piflow_jax import sharding
from piflow_jax import train_step
from piflow_jax import weights
from piflow_jax import workdir as workdir_lib
from piflow_jax.convert import inception as inception_weights
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import draws
from piflow_jax.evaluation import fid
from piflow_jax.evaluation import gates
from piflow_jax.evaluation import inception_features
from piflow_jax.evaluation import naming
from piflow_jax.evaluation import pictures
from piflow_jax.evaluation import protocol as protocol_lib
from piflow_jax.evaluation import references
from piflow_jax.evaluation import samples_file

COUNT = 50_000  # samples of a published figure
_CHUNK = 512  # pictures read from a file at once
_TAPS = ("pool", "spatial", "logits")
# Flags that ask for this module's work, others that only it reads, and what each kind of pictures does not read.
_ASKING = ("samples", "real", "reference", "save_reference", "self_test", "teacher_steps")
_READ = ("inception", "protocol", "count", "autoencoder", "keep", "out")
_UNREAD = {"self_test": ("samples", "real", "reference", "save_reference", "teacher_steps", *_READ[1:], "step"),
           "samples": ("real", "teacher_steps", "autoencoder", "keep", "step"),
           "real": ("teacher_steps", "keep", "step"), "teacher_steps": ("step",)}


def define(values):
  """The flags of what this module does."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  string("samples", None, "Pictures to measure: FILE.npz with arr_0 uint8 [n, H, W, 3], or a folder of them.")
  string("real", None, "Measure the data's own records in their place: train, or held_out.")
  string("reference", None, "Statistics of real pictures: ADM's, MAR's or MeanFlow's .npz, LakonLab's .pkl, or ours.")
  string("inception", None, "FID's Inception weights: pytorch-fid's or torch-fidelity's .pth, jax-fid's .pkl.")
  flags.DEFINE_enum("protocol", "adm", tuple(protocol_lib.PROTOCOLS), "How it is measured: labels, Inception score, "
                    "precision and recall.", flag_values=values)
  flags.DEFINE_integer("count", COUNT, "Samples to draw, or the first ones of --samples.", lower_bound=2,
                       upper_bound=2**30, flag_values=values)
  flags.DEFINE_integer("teacher_steps", None, "Draw from the run's teacher in so many steps, by its guidance.",
                       lower_bound=1, upper_bound=10**6, flag_values=values)
  string("autoencoder", None, "Workdir of the converted autoencoder that decodes latents.")
  string("keep", None, "FILE.npz to keep the pictures in, as others' evaluators take them.")
  string("save_reference", None, "FILE.npz to keep the statistics in, as a reference.")
  string("out", None, "FILE.json for the figures; a run's own go into its workdir too.")
  string("step", None, "Checkpoint to draw from: a step, or best; the newest if not given.")
  string("self_test", None, "FOLDER of known files: measures those that are there, beside what is published of them.")


def asked(values):
  """Whether the flags ask for this module's work. Raises errors.UserError: one of them would have no effect."""
  given = [name for name in (*_ASKING, *_READ, "step") if values[name].present]
  if not any(name in _ASKING for name in given):
    if unread := [name for name in given if name in _READ]:
      raise errors.UserError(f"--{unread[0]}: is read for a FID alone; give --reference too, or leave it out")
    return False
  for kind, names in _UNREAD.items():
    if kind in given and (unread := [name for name in names if name in given]):
      raise errors.UserError(f"--{unread[0]}: --{kind} does not read it; leave it out")
  return True


def main(given):
  """What the flags say; returns the exit status."""
  values = given.flags
  if values.inception is None:
    raise errors.UserError("--inception: missing; give FID's Inception weights: docs/evaluation.md says whose")
  for name in ("keep", "save_reference"):
    if values[name].value is not None and not values[name].value.endswith(".npz"):
      raise errors.UserError(f"--{name}: {values[name].value!r} does not end in .npz")
  params, digest = inception_weights.load(values.inception)
  size = 64 * jax.local_device_count() if jax.default_backend() != "cpu" else 8  # a CPU is busy with few pictures
  extract = inception_features.extractor(params, size, _TAPS)
  if values.self_test is not None:
    return _self_test(values.self_test, extract)
  protocol = protocol_lib.PROTOCOLS[values.protocol]
  reference = rows = None
  if values.reference is not None:
    reference, rows = _reference(values.reference, protocol, extract)
  elif values.save_reference is None:
    raise errors.UserError("--reference: missing; give statistics of real pictures: docs/evaluation.md says whose")
  began, keeps_rows = time.time(), bool(protocol.neighbours and rows is not None or values.save_reference)
  sums, source = _sums(given, protocol, extract, keeps_rows)
  with errors.flag("samples"):
    found = fid.figures(sums, reference, protocol, rows)
  if jax.process_index() > 0:
    return 0
  if values.save_reference is not None:
    with _writing("save_reference", values.save_reference):
      references.save(values.save_reference, sums.pool, sums.spatial, sums.rows[:protocol_lib.ADM_ROWS])
    print(values.save_reference)
  drawn = {} if given.config is None else {"settings": naming.settings(given.config)}
  report = {"source": source, "count": sums.pool.count, "reference": values.reference, "inception sha256": digest,
            **protocol.says(), **drawn, "values": found.values, "remarks": found.remarks,
            "minutes": (time.time() - began) / 60}
  _show(report)
  for path in filter(None, (values.out, _own_path(given, values, protocol, sums.pool.count))):
    _write(path, report)
    print(path)
  return 0


@contextlib.contextmanager
def _writing(flag, path):
  try:
    yield
  except OSError as e:
    raise errors.UserError(f"--{flag}: {str(path)!r} cannot be written ({e})") from e


def _reference(path, protocol, extract):
  """(Reference, rows [m, D] or None)."""
  with errors.flag("reference"):
    reference = references.load(path)
    rows = references.rows_of(reference, extract, protocol.neighbours) if protocol.neighbours else None
  return reference, rows


def _sums(given, protocol, extract, rows):
  """(fid.Sums of what the flags name, where it is from in words)."""
  values = given.flags
  if values.samples is not None:
    with errors.flag("samples"):
      count = min(samples_file.shape_of(values.samples)[0], values.count)
      batches = samples_file.batches(values.samples, _CHUNK, count)
      with _bar(values.samples, count) as bar:
        return fid.take(batches, extract, rows, bar), values.samples
  if given.config is None:
    raise errors.UserError("--samples: missing; give pictures, or the --workdir of a run to draw from")
  config = given.config
  run, mesh = build.run(config), build.mesh(config)
  decoder = inception_features.load_autoencoder(values.autoencoder, run.data.spec.x_0, mesh, "--autoencoder")
  if values.real is not None:
    return _real(run, mesh, decoder, values, extract, rows), f"{values.real} records of {given.workdir or 'the data'}"
  model = _model(config, run, mesh, given.workdir, values)
  return _drawn(config, run, mesh, model, decoder, given, protocol, extract, rows), (
      f"{given.workdir or 'the config'}: {model.name}, {model.calls} calls")


def _model(config, run, mesh, folder, values):
  """draws.Model of the run, or of its teacher in so many steps."""
  steps = values.teacher_steps
  if steps is None and folder is None:
    raise errors.UserError("--workdir: missing; give the folder of the run to draw from")
  if steps is not None:
    if run.teacher is None:
      raise errors.UserError("--teacher_steps: the run has no teacher; its own steps are --config.sampling.nfe")
    params = train_step.load_teacher(config, run, train_step.compile(config, mesh, run).teacher)
    return draws.Model("teacher", steps, functools.partial(draws.teacher_drawer(mesh, run, steps), params))
  jitted, calls = train_step.compile(config, mesh, run), config.sampling.nfe
  step = weights.step_of(folder, values.step)
  own = weights.load(folder, jitted.state.ema, "ema", "--workdir", step=step), train_step.load_base(config, run, jitted)
  workdir_lib.warn_of_other(folder, config)
  return draws.Model("model" if run.teacher is None else "student", calls,
                     functools.partial(draws.model_drawer(mesh, config, run, calls), own))


def _drawn(config, run, mesh, model, decoder, given, protocol, extract, rows):
  """fid.Sums of samples that are drawn; sample i is a function of config.evaluation.seed and i."""
  values, seed, spec = given.flags, config.evaluation.seed, run.data.spec
  classes, parts = spec_lib.num_classes(spec), sharding.sample_parts(mesh)
  if spec.cond and not classes:
    raise errors.UserError("--workdir: the run's conditions are no labels, of which a FID's samples are drawn; sample "
                           "them by piflow_jax.sample and give --samples")
  size = -(-min(config.evaluation.batch_size, values.count) // parts) * parts

  def conditions(index):
    return {name: draws.labels(index, classes, seed, protocol.labels) for name in spec.cond}

  noises = draws.Noises(seed, draws.NOISE, values.count, tuple(spec.x_0))
  look = pictures.maker(mesh, decoder, everywhere=values.keep is not None)
  sums, done = fid.Sums(rows), 0
  with _bar(f"{given.workdir}: sampling", values.count) as bar, _keeper(values.keep, values.count) as keep:
    for batch in draws.batches(noises, conditions, values.count, size, mesh):
      x_0 = model.draw(batch.placed, seed)
      _check_finite(draws.rows_of(x_0, batch.own), given.workdir)
      images, n = look(x_0), min(size, values.count - done)
      if values.keep is not None:
        keep(np.asarray(images)[:n])
      if len(batch.index):
        sums.update(batch.index, extract(draws.rows_of(images, batch.own)))
      done += n
      bar.update(n)
  return sums.gather()


def _check_finite(x_0, folder):
  if bad := int((~np.isfinite(x_0.reshape(len(x_0), -1)).all(1)).sum()):
    raise errors.NotFinite(f"{bad} of {len(x_0)} samples of {folder} are not finite; its weights are broken, or "
                           "config.sampling takes them where they were not trained")


@contextlib.contextmanager
def _keeper(path, count):
  """A function that the first process keeps pictures by; those of the others, and without a path all, keep nothing."""
  if path is None or jax.process_index() > 0:
    yield lambda images: None
    return
  with contextlib.ExitStack() as stack:
    add = None

    def keep(images):
      nonlocal add
      if add is None:
        add = stack.enter_context(samples_file.writer(path, (count, *images.shape[1:])))
      add(images)

    with _writing("keep", path):
      yield keep
      stack.close()


def _real(run, mesh, decoder, values, extract, rows):
  if values.real not in ("train", "held_out"):
    raise errors.UserError(f"--real: {values.real!r}; choose train or held_out")
  records = spec_lib.checked_records(run.data, values.real)
  look, count = pictures.maker(mesh, decoder), min(len(records), values.count)
  size = 8 * sharding.sample_parts(mesh)
  split = jax.NamedSharding(mesh, sharding.BATCH)

  def batches():
    for start in range(0, count, size):
      x_0 = np.stack([records[i]["x_0"] for i in range(start, min(start + size, count))])
      yield np.asarray(look(jax.device_put(np.resize(x_0, (size, *x_0.shape[1:])), split)))[:len(x_0)]

  if jax.process_count() > 1:
    raise errors.UserError("--real: is measured by one process; leave --distributed out")
  with _bar(f"{values.real} records", count) as bar:
    return fid.take(batches(), extract, rows, bar)


def _bar(text, total):
  return tqdm.tqdm(total=total, unit="image", desc=text, disable=jax.process_index() > 0 or None)


def _own_path(given, values, protocol, count):
  """Where a run's figures are kept, or None: one file for each way to measure."""
  if given.workdir is None or values.samples is not None or values.real is not None:
    return None
  name = naming.named(f"{protocol.name},{count}", given.config, given.workdir)
  for flag in ("teacher_steps", "step"):
    if values[flag].value is not None:
      name += f"-{flag}={values[flag].value}"
  return epath.Path(given.workdir) / "fid" / f"{name}.json"


def _write(path, report):
  path = epath.Path(path)
  with _writing("out", path):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _show(report):
  width = max(map(len, report))
  for key, value in report.items():
    if key not in ("values", "remarks"):
      print(f"{key:<{width}}  {value:.2f}" if isinstance(value, float) else f"{key:<{width}}  {value}")
  for key, title in fid.TITLES.items():
    value = report["values"][key]
    print(f"{title:<{width}}  {'–' if value is None else format(value, '.4f')}")
  for remark in report["remarks"]:
    print(f"note: {remark}")


def _self_test(folder, extract):
  """Prints a line for each gate; returns 1 where one is missed."""
  rows = gates.run(epath.Path(workdir_lib.path_of(folder, "--self_test")), extract)
  print(f"{'':<5}{'gate':<58}{'figure':<10}{'expected':>10}{'found':>12}{'tolerance':>11}")
  for row in rows:
    state = {None: "-", True: "ok", False: "MISS"}[row.passed]
    found = "no file" if row.found is None else f"{row.found:.4f}"
    print(f"{state:<5}{row.gate:<58}{row.figure:<10}{row.expected:>10.4f}{found:>12}{row.tolerance:>11.4f}")
  return int(any(row.passed is False for row in rows))
