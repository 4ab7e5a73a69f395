"""The training loop: a TrainState of arrays, one jitted sharded step, and what happens around it."""

import functools
import itertools
import signal
import sys
import time

from absl import logging
from clu import parameter_overview
import flax
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from piflow_jax import build
from piflow_jax import checkpoint
from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax import run_log
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax.data import loader

RESTART = 75  # exit status: stopped by a signal, all saved, start me again (sysexits' EX_TEMPFAIL)


@flax.struct.dataclass
class TrainState:
  """All that an update changes."""

  step: jax.Array  # [] int32, updates made
  params: dict  # what is trained, float32
  ema: dict  # alike
  opt_state: optax.OptState


def init_state(params, optimizer):
  """The state before the first update."""
  # A copy: the step donates its state, and two names of one buffer cannot both be given away.
  return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def accumulate(objective, params, teacher_params, batch, keys, step, microbatches, dtype=jnp.float32):
  """Gradients (summed in `dtype`) and metrics of a batch [B, ...], averaged over microbatches worked through one by one."""
  if microbatches == 1:
    return objective(params, teacher_params, batch, keys, step)
  # Every microbatch takes its samples from all devices: the axis that is split is the one that is not sharded.
  split = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 0, 1)
  parts = jax.tree.map(split, (batch, keys))

  def one(batch, keys):
    grads, metrics = objective(params, teacher_params, batch, keys, step)
    return jax.tree.map(lambda g: g.astype(dtype), grads), metrics

  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts)))
  total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, one(*part)), None), zeros, parts)
  return jax.tree.map(lambda x: x.astype(jnp.float32) / microbatches, total)


def train_step(state, teacher_params, batch, key, *, objective, optimizer, ema_gamma, ema_start, microbatches=1,
               accumulator=jnp.float32):
  """One update. Random draws come from (key, step, sample): key is the run's own and never changes."""
  batch_size = jax.tree.leaves(batch)[0].shape[0]
  keys = jax.random.split(jax.random.fold_in(key, state.step), batch_size)
  grads, metrics = accumulate(objective, state.params, teacher_params, batch, keys, state.step, microbatches, accumulator)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = params_lib.ema_decay(state.step, gamma=ema_gamma, start=ema_start)
  ema = params_lib.ema_update(state.ema, params, decay)
  metrics = metrics | {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
  return TrainState(state.step + 1, params, ema, opt_state), metrics


def compile_run(config, mesh, run):
  """The jitted functions of a run and where its arrays live.

  Returns:
    dict with init(key, teacher_params) -> state, step(state, teacher_params, batch, key) -> (state, metrics),
    evaluate(params, teacher_params, batch, key) -> metrics, draw(params, teacher_params, noise, cond, key) -> x_0,
    state (shapes with shardings), teacher (alike, or None), rate (step -> learning rate).
  """
  rules = build.sharding_rules(config)
  optimizer, rate = build.optimizer(config.optimizer, config.steps)
  everywhere, split = sharding.replicated(mesh), jax.sharding.NamedSharding(mesh, sharding.BATCH)
  place = lambda tree, **more: jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding.shardings(tree, rules, mesh, **more))
  spots = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  teacher = None if run.teacher_shapes is None else place(run.teacher_shapes)
  init = lambda key, teacher_params: init_state(run.init(key, teacher_params), optimizer)
  state = jax.eval_shape(init, jax.random.key(0), teacher)
  unread = dict(spread=("slice", "data") if config.zero else ())
  state = TrainState(place(state.step), place(state.params), place(state.ema, **unread), place(state.opt_state, **unread))

  step = functools.partial(
      train_step, objective=run.objective, optimizer=optimizer, ema_gamma=config.ema.gamma, ema_start=config.ema.start,
      microbatches=config.microbatches, accumulator=jnp.dtype(config.accumulator))

  def evaluate(params, teacher_params, batch, key):
    keys = jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])
    # At a step beyond any schedule of the objective: what the finished student is measured by.
    return run.objective(params, teacher_params, batch, keys, jnp.array(2**30))[1]

  def draw(params, teacher_params, noise, cond, key):
    c = config.sampling
    return sampler.sample(run.flow_map(params, teacher_params, cond, c.nfe), noise, key, nfe=c.nfe, h=c.h,
                          shift=build.shift(config), final_scale=config.flow.final_scale)

  init, step, evaluate, draw = (sharding.under(mesh, f) for f in (init, step, evaluate, draw))
  return dict(
      init=jax.jit(init, out_shardings=spots(state)),
      step=jax.jit(step, donate_argnums=0, in_shardings=(spots(state), spots(teacher), split, everywhere),
                   out_shardings=(spots(state), everywhere)),
      evaluate=jax.jit(evaluate, out_shardings=everywhere),
      draw=jax.jit(draw, out_shardings=everywhere),
      state=state, teacher=teacher, rate=rate)


def train(config, workdir):
  """Train until config.steps, or until a signal; the same call goes on where it was.

  Returns:
    exit status: 0, or RESTART.
  Raises:
    errors.UserError: bad input, before anything is written.
    errors.NotFinite: a loss that is not finite.
    errors.NotWritten: a checkpoint, a picture or the log.
  """
  began = time.time()
  mesh = sharding.make_mesh(**config.mesh)
  check_batch(config, mesh)
  run = build.run(config)
  jitted = compile_run(config, mesh, run)
  source = functools.partial(config.data.source, shape=config.data.shape, num_classes=config.data.num_classes)
  records = source("train")
  teacher_params = None
  if jitted["teacher"] is not None:
    teacher_params = load_teacher(config, jitted["teacher"])
  run_log.claim(workdir, config, write=jax.process_index() == 0)

  key = jax.random.key(config.seed)
  with checkpoint.open_manager(workdir, keep=config.keep_checkpoints, keep_every=config.keep_every) as manager:
    found = checkpoint.restore_latest(manager, jitted["state"])
    if found is None:
      start, position = 0, {"batches": 0, "seconds": 0.0, "began": began}
      state = jitted["init"](jax.random.fold_in(key, 2**31 - 1), teacher_params)
      logging.info("\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False))
      _say(f"{workdir}: {build.describe_parameters(state.params, run.teacher_shapes)}")
    else:
      start, state, position = found
      what = "going on from" if start < config.steps else "finished before, at"
      _say(f"{workdir}: {what} step {start} of {config.steps}")
    if start >= config.steps:
      return 0
    batches = loader.batches(records, batch_size=config.batch_size, seed=config.seed, start=position["batches"],
                             rows=sharding.rows(mesh, config.batch_size))
    goodput, seconds = run_log.Goodput(position), run_log.stopwatch(position["seconds"])
    step = lambda state, batch: jitted["step"](state, teacher_params, batch, key)
    if config.profile_steps:
      step = _profiled(step, f"{workdir}/profile", config.profile_steps)
    save = lambda state, done: checkpoint.save(
        manager, done, state, {"batches": done, "seconds": seconds()} | goodput.saved())
    log = run_log.RunLog(workdir, start) if jax.process_index() == 0 else None
    try:
      with _catch_sigterm() as told, tqdm.tqdm(
          total=config.steps, initial=start, unit="step", desc=str(workdir), dynamic_ncols=True,
          mininterval=0.5 if sys.stderr.isatty() else 20, disable=log is None) as bar:
        report = _reporter(config, log, bar, start, jitted["rate"], seconds, goodput)
        watch = functools.partial(_watch, config, jitted, source("held_out"), teacher_params, key, mesh, log)
        # Counted from the session's start: a notice that comes before the first step makes JAX name 1 as where all stop.
        stopping = lambda step: bool(told) or multihost_utils.reached_preemption_sync_point(step - start)
        placed = (sharding.place_batch(batch, mesh, config.batch_size) for batch in batches)
        done = _loop(config, state, start, placed, step, stopping, report, watch, save, goodput)
        checkpoint.finish(manager)
        if done == config.steps:
          return 0
        bar.write(f"{workdir}: stopped by a signal at step {done}, saved; the same command goes on from there")
        return RESTART
    except errors.NotFinite as e:
      last = manager.latest_step()
      kept = f"the last good checkpoint of {workdir} is kept (step {last})" if last is not None else "nothing was saved before"
      raise errors.NotFinite(f"{e}; {kept}; lower config.optimizer.learning_rate, or look at the data") from e
    finally:
      if log:
        log.close()


def _say(text):
  if jax.process_index() == 0:
    print(text, flush=True)


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
    due = lambda every: bool(every) and (done % every == 0 or done == config.steps)
    if due(config.checkpoint_every) or stop or due(config.eval_every) or due(config.image_every):
      with goodput.step():
        settle()  # nothing is saved or drawn from parameters whose loss has not been looked at
    if due(config.eval_every) or due(config.image_every):
      watch(state, done, due)
    if due(config.checkpoint_every) or stop:
      save(state, done)
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
  last = dict(time=time.time(), step=start)

  def report(done, values):
    bar.update(done - bar.n)
    # Of parameters too: those that a finite loss with a gradient that is none leaves would be saved over good ones.
    bad = sorted((name for name, value in values.items() if not np.isfinite(value)), key=lambda name: name != "loss")
    if log and (done % config.log_every == 0 or done == config.steps or bad):
      now = time.time()
      speed = (done - last["step"]) / max(now - last["time"], 1e-9)
      last.update(time=now, step=done)
      log.write(done, values | {
          "learning_rate": float(rate(done - 1)), "steps_per_second": speed, "seconds": seconds(), "goodput": goodput.share()})
      bar.set_postfix_str(f"loss {values['loss']:.4g}")
    if bad:
      raise errors.NotFinite(f"{bad[0]} is {values[bad[0]]} at step {done}")

  return report


def _watch(config, jitted, held_out, teacher_params, key, mesh, log, state, done, due):
  """The loss on held-out data and a picture of samples, both by the EMA and from draws that never change."""
  if due(config.eval_every):
    # The same batches and keys each time, so that the curve shows the student and not the draw.
    n = config.batch_size
    batches = loader.batches(held_out, batch_size=n, seed=config.seed, rows=sharding.rows(mesh, n))
    losses = [jitted["evaluate"](state.ema, teacher_params, sharding.place_batch(next(batches), mesh, n),
                                 jax.random.fold_in(key, 2**30 + i))["loss"] for i in range(config.eval_batches)]
    if log:
      log.write(done, {"eval_loss": float(np.mean(jax.device_get(losses)))})
  if due(config.image_every):
    columns = min(config.data.num_classes, 10)
    n = max(config.sampling.images // columns, 1) * columns
    noise = jax.random.normal(jax.random.fold_in(key, 2**30 - 1), (n, *config.data.shape))
    cond = jnp.arange(n) % columns
    x_0 = jitted["draw"](state.ema, teacher_params, noise, cond, jax.random.fold_in(key, 2**30 - 2))
    if log:
      from piflow_jax.evaluation import figures  # matplotlib comes with it, which only the one who draws needs

      log.image(done, "samples", figures.image_grid(np.asarray(x_0), columns))
  if log:
    log.flush()


def load_teacher(config, shapes):
  """The teacher's weights, placed like `shapes`."""
  c = config.teacher
  if c.mixture:
    return jax.device_put(build.exact_teacher(config), jax.tree.map(lambda s: s.sharding, shapes))
  if c.weights not in ("ema", "params"):
    raise errors.UserError(f'config.teacher.weights: {c.weights!r} is neither "ema" nor "params"')
  if not c.checkpoint:
    raise errors.UserError("config.teacher.checkpoint: is empty; give the workdir of the teacher's run")
  return checkpoint.load_weights(c.checkpoint, shapes, c.weights, "config.teacher.checkpoint")


def check_batch(config, mesh):
  """Raises errors.UserError: the batch does not divide over the mesh."""
  parts = sharding.sample_parts(mesh) * config.microbatches
  if config.microbatches < 1 or config.batch_size < 1 or config.batch_size % parts:
    raise errors.UserError(
        f"config.batch_size: {config.batch_size} does not divide over {parts // config.microbatches} parts of the mesh x "
        f"{config.microbatches} microbatches; choose a multiple of {parts}")


class _catch_sigterm(list):
  """A list that SIGTERM adds to: the loop ends at the next step's border, not in the middle of one.

  Of several processes only one may be told; then it is JAX's to tell all of them, by `reached_preemption_sync_point`.
  """

  def __enter__(self):
    self._before = None
    if not jax.distributed.is_initialized():
      self._before = signal.signal(signal.SIGTERM, lambda *_: self.append(True))
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
