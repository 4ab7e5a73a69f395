"""What happens around the steps of a run: resuming, saving, watching, stopping."""

import functools
import itertools
import os
import signal
import sys
import time
from typing import Any, NamedTuple

from absl import logging
from clu import parameter_overview
import jax
from jax.experimental import multihost_utils
import numpy as np
import tqdm

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax import images
from piflow_jax import lock
from piflow_jax import params as params_lib
from piflow_jax import run_log
from piflow_jax import sharding
from piflow_jax import train_step
from piflow_jax import workdir as workdir_lib
from piflow_jax.data import loader
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import during

_INIT, _IMAGES, _WAY, _EVAL = 2**31 - 1, 2**30 - 1, 2**30 - 2, 2**30  # what draws outside of steps are folded in as


class _Around(NamedTuple):
  """What all parts of a session know."""

  config: Any
  workdir: str
  mesh: jax.sharding.Mesh
  run: build.Run
  jitted: train_step.Jitted
  key: jax.Array  # of the run: every draw is of (key, step, sample)
  held_out: Any  # (records, spec) that losses are measured on, of each size; or None
  by_size: dict  # {shape of x_0 as it is stored: train_step.Jitted}
  distance: Any  # of `evaluation.during.watcher`, or None
  best: set  # step of the checkpoint with the least distance, as far as one is known


def train(config, workdir):
  """Train until config.steps, or until a signal; the same call goes on where it was.

  Returns:
    exit status: 0, or errors.RESTART.
  Raises:
    errors.UserError: bad input, before anything is written.
    errors.NotFinite: a loss that is not finite.
    errors.NotWritten: a checkpoint or the log.
  """
  began, workdir = time.time(), str(workdir)
  mesh = build.mesh(config)
  run = build.run(config)
  config.data.update(run.data.found)  # with the names of classes, say, a workdir can be drawn from where no data are
  train_step.check_batch(config, mesh)
  sized = _sized(config, mesh, run)
  sources = _sources(sized, "train")
  around = _Around(config, workdir, mesh, run, sized[0][1], jax.random.key(config.seed),
                   _sources(sized, "held_out") if config.eval_every else None,
                   {stored.spec.x_0: jitted for stored, jitted in sized},
                   during.watcher(config, run, mesh) if config.evaluation.every else None,
                   during.best_steps(workdir))
  teacher_params = _load_teacher(around)  # before anything is written: what is wrong with it leaves no trace
  with lock.hold(workdir):
    workdir_lib.claim(workdir, config, write_it=jax.process_index() == 0)
    with checkpoint.open_manager(workdir, keep=config.keep_checkpoints, keep_every=config.keep_every,
                                 these=around.best) as manager:
      start, state, teacher_params, position = _begin(around, manager, teacher_params, began)
      if start >= config.steps:
        return 0
      batches = loader.mixed(
          sources, batch_size=config.batch_size, seed=config.seed, start=position["batches"],
          rows=sharding.rows(mesh, config.batch_size))
      try:
        return _session(around, manager, batches, state, teacher_params, start, position)
      except errors.NotFinite as e:
        last = manager.latest_step()
        kept = "nothing was saved before"
        if last is not None:
          kept = f"the last good checkpoint of {workdir} is kept (step {last})"
        raise errors.NotFinite(f"{e}; {kept}; lower config.optimizer.learning_rate, or look at the data") from e


def _sized(config, mesh, run):
  """(spec.Stored, train_step.Jitted) of each size of x_0 in the data, config.data's own first."""
  found = []
  for one in build.sized(config, run).values():
    with build.field("data"):
      stored = spec_lib.stored(one.data)
    found.append((stored, train_step.compile(config, mesh, one, stored.draw)))
  return found


def _sources(sized, split):
  """(records, spec) of each size that the split has records of; what is wrong with the first few ends the run here."""
  own, *others = [stored for stored, _ in sized]
  there = [own, *(stored for stored in others if len(stored.records(split)))]
  found = [(spec_lib.checked_records(stored, split), stored.spec) for stored in there]
  if len(found) > 1 and split == "train":
    counts = ", ".join(f"{' x '.join(map(str, spec.x_0))}: {len(records):,}" for records, spec in found)
    _say(f"records by size: {counts}; the step is compiled at each size's first batch")
  return found


def _load_teacher(around):
  """The teacher's parameters, or None. Raises errors.UserError: they are not there, or another network's."""
  config, jitted = around.config, around.jitted
  if jitted.teacher is None:
    return None
  train_step.check_teacher(config, around.run)
  workdir_lib.check_teacher(config)
  shapes = jitted.teacher
  if not workdir_lib.begun(around.workdir):
    # A student starts from the teacher's weights as they were saved; those that are kept beside it may be narrower,
    # and of what is frozen nothing else is ever read: twelve billion numbers need not be there in float32 first.
    frozen = params_lib.named_leaves(around.run.base_shapes or {})
    shapes = params_lib.map_with_path(
        lambda name, shape: shape if name in frozen else train_step.as_saved(shape), shapes)
  return train_step.load_teacher(config, around.run, shapes)


def _begin(around, manager, teacher_params, began):
  """(step, state, teacher's parameters, position) of a fresh start, or of the newest checkpoint."""
  config, run, jitted = around.config, around.run, around.jitted
  found = checkpoint.restore_latest(manager, jitted.state)
  if found is not None:
    start, state, position = found
    what = "going on from" if start < config.steps else "finished before, at"
    _say(f"{around.workdir}: {what} step {start} of {config.steps}")
    return start, state, teacher_params, position
  state = jitted.init(jax.random.fold_in(around.key, _INIT), teacher_params)
  if jitted.teacher is not None:
    teacher_params = jax.tree.map(lambda x, kept: x.astype(kept.dtype), teacher_params, jitted.teacher)
  logging.info("\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False))
  _say(f"{around.workdir}: {build.describe_parameters(state.params, run)}")
  return 0, state, teacher_params, {"batches": 0, "seconds": 0.0, "began": began}


def _session(around, manager, batches, state, teacher_params, start, position):
  """The steps from `start` on, with all that is due after them; returns the exit status."""
  config, workdir, jitted = around.config, around.workdir, around.jitted
  goodput, seconds = run_log.Goodput(position), run_log.stopwatch(position["seconds"])
  log = run_log.RunLog(workdir, start) if jax.process_index() == 0 else None

  def step(state, batch):
    return around.by_size[batch["x_0"].shape[1:]].step(state, teacher_params, batch, around.key)

  def save(state, done):
    checkpoint.save(manager, done, state, {"batches": done, "seconds": seconds()} | goodput.saved())

  if config.profile_steps:
    step = _profiled(step, f"{workdir}/profile", config.profile_steps)
  watch = functools.partial(_watch, around, teacher_params, log)
  try:
    with _catch_signals() as caught, tqdm.tqdm(
        total=config.steps, initial=start, unit="step", desc=workdir, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20, disable=log is None) as bar:
      report = _reporter(config, log, bar, start, jitted.rate, seconds, goodput)

      def stopping(i):
        # Counted from the session's start: a notice that comes before the first step makes JAX name 1 as where all
        # stop.
        return bool(caught) or multihost_utils.reached_preemption_sync_point(i - start)

      _watch_again(around, start, functools.partial(watch, state))
      placed = (sharding.place_batch(batch, around.mesh, config.batch_size) for batch in batches)
      done = _loop(config, state, start, placed, step, stopping, report, watch, save, goodput)
      checkpoint.finish(manager)
      if done == config.steps:
        return 0
      bar.write(f"{workdir}: stopped by a signal at step {done}, saved; the same command goes on from there")
      return errors.RESTART
  finally:
    if log:
      log.close()


def _say(text):
  if jax.process_index() == 0:
    print(text, flush=True)


def _due(config, every, done):
  return bool(every) and (done % every == 0 or done == config.steps)


def _loop(config, state, start, batches, step, stopping, report, watch, save, goodput):
  """Steps, and what is due after them, up to config.steps or where `stopping`; returns the number of steps made."""
  pending = None  # the step before's metrics: fetched when the next step is under way, so that no device waits

  def settle():
    nonlocal pending
    if pending is not None:
      (done, values), pending = pending, None
      report(done, {k: float(v) for k, v in jax.device_get(values).items()})

  for i in range(start, config.steps):
    batch = next(batches)
    with goodput.step():
      state, metrics = step(state, batch)
      settle()
    done = i + 1
    pending = (done, metrics)
    stop = stopping(i)
    measured = _due(config, config.evaluation.every, done)
    watched = measured or _due(config, config.eval_every, done) or _due(config, config.image_every, done)
    saved = measured or _due(config, config.checkpoint_every, done) or stop
    if saved or watched:
      with goodput.step():
        settle()  # nothing is saved or drawn from parameters whose loss has not been looked at
    # Saved first: what fails below must not take the checkpoint with it, nor fail again at every restart.
    if saved:
      save(state, done)
    if watched:
      watch(state, done)
    if stop:
      return done
  settle()
  return config.steps


def _profiled(step, folder, count):
  """The step function, of which `count` calls from the eleventh on are traced into a folder."""
  calls = itertools.count()

  def traced(*args):
    call = next(calls)
    if call == 10:
      jax.profiler.start_trace(folder)
    out = step(*args)
    if call == 9 + count:
      jax.block_until_ready(out)
      jax.profiler.stop_trace()
    return out

  return traced


def _reporter(config, log, bar, start, rate, seconds, goodput):
  """report(done, values): looks at a step's figures, shows and logs them every so often. Raises errors.NotFinite."""
  last = dict(time=time.monotonic(), step=start)

  def report(done, values):
    bar.update(done - bar.n)
    # Check every metric, not only the loss: a finite loss can come with a NaN gradient, and the broken parameters, or
    # their average, would overwrite a good checkpoint.
    names = ("loss", "grad_norm", "param_norm", *sorted(values))
    bad = [name for name in names if not np.isfinite(values.get(name, 0.0))]
    if log and (done % config.log_every == 0 or done == config.steps or bad):
      now = time.monotonic()
      speed = (done - last["step"]) / max(now - last["time"], 1e-9)
      last.update(time=now, step=done)
      log.write(done, values | {"learning_rate": float(rate(done - 1)), "steps_per_second": speed, "seconds": seconds(),
                                "goodput": goodput.share()})
      bar.set_postfix_str(f"loss {values['loss']:.4g}")
    if bad:
      raise errors.NotFinite(f"{bad[0]} is {values[bad[0]]} at step {done}")

  return report


def _watch(around, teacher_params, log, state, done):
  """The loss on held-out data and a picture of samples, both by the EMA and from draws that never change."""
  if _due(around.config, around.config.eval_every, done):
    loss = _held_out_loss(around, teacher_params, state)
    if log:
      log.write(done, {"eval_loss": loss})
  if _due(around.config, around.config.evaluation.every, done):
    found = around.distance(state.ema, teacher_params)
    during.note(around.workdir, around.best, done, found, write_it=log is not None)
    if log:
      log.write(done, found)
  if _due(around.config, around.config.image_every, done) and images.shows(around.run.data.spec.x_0):
    try:
      picture = _picture(around, teacher_params, state)
      if log:
        log.image(done, "samples", picture)
    except Exception as e:
      if errors.process_lost(e):
        raise
      logging.warning("%s: no picture of step %d: %s", around.workdir, done, " ".join(str(e).split())[:300])
  if log:
    log.flush()


def _held_out_loss(around, teacher_params, state):
  # The same batches and keys each time, so that the curve shows the student and not the draw.
  config, n = around.config, around.config.batch_size
  batches = loader.mixed(around.held_out, batch_size=n, seed=config.seed, rows=sharding.rows(around.mesh, n))
  losses = []
  for i in range(config.eval_batches):
    batch = sharding.place_batch(next(batches), around.mesh, n)
    key = jax.random.fold_in(around.key, _EVAL + i)
    jitted = around.by_size[batch["x_0"].shape[1:]]
    losses.append(jitted.evaluate(state.ema, teacher_params, batch, key)["loss"])
  return float(np.mean(jax.device_get(losses)))


def _picture(around, teacher_params, state):
  """[H, W, 3] uint8: samples of the average, a column a class or a record."""
  config, data = around.config, around.run.data
  columns = min(spec_lib.num_classes(data.spec) or 10, 10)
  rows = max(config.sampling.images // columns, 1)
  cond, _, names = spec_lib.conditions(data, num=rows) if data.spec.cond else ({}, None, [""] * columns)
  columns = len(names)
  # Condition by condition they come; the picture has a row of all of them, then another.
  cond = jax.tree.map(lambda x: np.swapaxes(x.reshape(columns, rows, *x.shape[1:]), 0, 1).reshape(x.shape), cond)
  n = rows * columns
  noise = jax.random.normal(jax.random.fold_in(around.key, _IMAGES), (n, *data.spec.x_0))
  keys = jax.random.split(jax.random.fold_in(around.key, _WAY), n)
  x_0 = around.jitted.draw(state.ema, teacher_params, noise, cond, keys)
  return images.image_grid(np.asarray(x_0), columns)


def _watch_again(around, start, watch):
  """What was due with the checkpoint that a session starts from, where a kill came between the two."""
  config = around.config
  lost = False
  if start and jax.process_index() == 0 and _due(config, config.eval_every, start):
    lost = not any(line["step"] == start and "eval_loss" in line for line in run_log.read_metrics(around.workdir))
  if start and jax.process_count() > 1:
    lost = bool(multihost_utils.broadcast_one_to_all(np.array(lost)))
  if lost:
    watch(start)


class _catch_signals(list):
  """A list that SIGTERM and a first Ctrl-C add to: the loop ends at the next step's border, not in the middle of one.

  Of several processes only one may be signalled; then JAX tells all of them, by `reached_preemption_sync_point`. A
  second Ctrl-C ends at once.
  """

  def __enter__(self):
    self._before = {}
    try:
      if not jax.distributed.is_initialized():
        self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._told)
      self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
    except ValueError:
      pass  # only the main thread may listen to signals: whoever trains in another listens there
    return self

  def _told(self, *_):
    self.append(True)

  def _interrupted(self, *_):
    signal.signal(signal.SIGINT, _leave)
    print("\nCtrl-C: saving at the end of this step; once more ends at once", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

  def __exit__(self, *_):
    for which, handler in self._before.items():
      signal.signal(which, handler)


def _leave(*_):
  # An orderly exit would wait for the save that is under way.
  errors.leave(errors.INTERRUPTED, "interrupted; the same command goes on from the last checkpoint")
