"""One update of a run as a jitted, sharded function of arrays; drawing and held-out losses beside it."""

import functools
from typing import Any, Callable, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

from piflow_jax import build
from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax import weights

_DRAWN = 2**31 - 1  # folded into a sample's key for what x_0 is drawn by, where it is drawn
FINISHED = 2**30  # a step beyond any schedule of an objective: what the finished student is measured at


@flax.struct.dataclass
class TrainState:
  """All that an update changes."""

  step: jax.Array  # [] int32, updates made
  params: dict  # what is trained, float32
  ema: dict  # alike
  opt_state: optax.OptState


class Jitted(NamedTuple):
  """The jitted functions of a run and where its arrays live."""

  init: Callable  # (key, teacher_params) -> state
  step: Callable  # (state, teacher_params, batch, key) -> (state, metrics); donates the state
  evaluate: Callable  # (params, teacher_params, batch, key) -> metrics
  draw: Callable  # (params, base, noise [B, ...], cond, keys [B]) -> x_0
  state: TrainState  # shapes with shardings
  teacher: Any  # alike, or None
  base: Any  # the part of the teacher's parameters that drawing needs, or None
  rate: Callable  # step -> learning rate


def init_state(params, optimizer):
  """The state before the first update."""
  # A copy: the step donates its state, and two names of one buffer cannot both be given away.
  return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def accumulate(objective, params, teacher_params, batch, keys, step, microbatches, dtype=jnp.float32):
  """Gradients (summed in `dtype`) and metrics of a batch [B, ...], averaged over microbatches, one after the other."""
  if microbatches == 1:
    return objective(params, teacher_params, batch, keys, step)

  def split(x):
    # Every microbatch takes its samples from all devices: the axis that is split is the one that is not sharded.
    return jnp.swapaxes(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 0, 1)

  def one(batch, keys):
    grads, metrics = objective(params, teacher_params, batch, keys, step)
    return jax.tree.map(lambda g: g.astype(dtype), grads), metrics

  def add(total, part):
    return jax.tree.map(jnp.add, total, one(*part)), None

  parts = jax.tree.map(split, (batch, keys))
  shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts))
  total, _ = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), parts)
  return jax.tree.map(lambda x: x.astype(jnp.float32) / microbatches, total)


def train_step(state, teacher_params, batch, key, *, objective, optimizer, ema, microbatches, accumulator):
  """One update. Random draws come from (key, step, sample): key is the run's own and never changes.

  Args:
    state: TrainState.
    teacher_params: whatever the teacher takes.
    batch: {"x_0": [B, ...], "cond": tree of [B, ...]}.
    key: the run's.
    objective: see `distill.method.Method`.
    optimizer: optax transformation.
    ema: arguments of `params.ema_decay`.
    microbatches, accumulator: see `accumulate`.
  Returns:
    (TrainState, metrics).
  """
  batch_size = jax.tree.leaves(batch)[0].shape[0]
  keys = jax.random.split(jax.random.fold_in(key, state.step), batch_size)
  grads, metrics = accumulate(
      objective, state.params, teacher_params, batch, keys, state.step, microbatches, accumulator)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  average = params_lib.ema_update(state.ema, params, params_lib.ema_decay(state.step, **ema))
  metrics = metrics | {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params),
                       "ema_norm": optax.global_norm(average)}
  return TrainState(state.step + 1, params, average, opt_state), metrics


def of_stored(objective, draw):
  """An objective of batches whose x_0 are as they are stored, of which `draw` makes them: see `data.spec.Stored`."""
  if draw is None:
    return objective

  def drawn(params, teacher_params, batch, keys, step):
    own = jax.vmap(lambda key: jax.random.fold_in(key, _DRAWN))(keys)
    return objective(params, teacher_params, batch | {"x_0": jax.vmap(draw)(own, batch["x_0"])}, keys, step)

  return drawn


def compile(config, mesh, run, draw=None):
  """Jitted functions of a run on a mesh.

  Args:
    config: of the run.
    mesh: of `sharding.make_mesh`.
    run: of `build.run`.
    draw: of `data.spec.Stored`, where `step` and `evaluate` are given batches as they are stored.
  Raises:
    errors.UserError: arrays that the mesh does not divide.
  """
  optimizer, rate = build.optimizer(config.optimizer, config.steps)
  everywhere, split = sharding.replicated(mesh), jax.sharding.NamedSharding(mesh, sharding.BATCH)

  def place(tree, **more):
    if tree is None:
      return None
    with build.field(""):
      found = sharding.shardings(tree, run.rules, mesh, **more)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, found)

  def spots(tree):
    return jax.tree.map(lambda x: x.sharding, tree)

  teacher, base = place(run.teacher_shapes), place(run.base_shapes)

  def init(key, teacher_params):
    return init_state(run.method.init(key, teacher_params), optimizer)

  with build.field("network"):
    state = jax.eval_shape(init, jax.random.key(0), teacher)
  unread = dict(spread=("slice", "data") if config.zero else ())
  state = TrainState(
      place(state.step), place(state.params), place(state.ema, **unread), place(state.opt_state, **unread))
  objective = of_stored(run.method.objective, draw)
  step = functools.partial(
      train_step, objective=objective, optimizer=optimizer, ema=dict(config.ema),
      microbatches=config.microbatches, accumulator=jnp.dtype(config.accumulator))

  def evaluate(params, teacher_params, batch, key):
    keys = jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])
    return objective(params, teacher_params, batch, keys, jnp.array(FINISHED))[1]

  clock = build.sampling_clock(config, run)

  def draw(params, base, noise, cond, keys):
    return sampler.sample(run.method.flow_map(params, base, cond, clock), noise, keys, clock, h=config.sampling.h)

  def under(f):
    return sharding.under(mesh, _in_words(f))

  return Jitted(
      init=jax.jit(under(init), out_shardings=spots(state)),
      step=jax.jit(under(step), donate_argnums=0, in_shardings=(spots(state), spots(teacher), split, everywhere),
                   out_shardings=(spots(state), everywhere)),
      evaluate=jax.jit(under(evaluate), out_shardings=everywhere),
      draw=jax.jit(under(draw), out_shardings=everywhere),
      state=state, teacher=teacher, base=base, rate=rate)


def _in_words(f):
  """f, whose complaints about a network, while it is traced, are errors.UserError: a kernel, a shape unlike x_0's."""
  @functools.wraps(f)
  def traced(*args):
    try:
      with build.field("network"):
        return f(*args)
    except AssertionError as e:  # chex's
      raise errors.UserError(f"config.network: {' '.join(str(e).split())[:300]}") from e

  return traced


def load_teacher(config, run, shapes):
  """The teacher's weights, placed like `shapes`, of which there may be only a part.

  Raises:
    errors.UserError: there are none, or they are another network's.
  """
  if run.teacher.params is not None:
    return jax.device_put(run.teacher.params(), jax.tree.map(lambda s: s.sharding, shapes))
  check_teacher(config, run)
  whole = jax.tree.structure(shapes) == jax.tree.structure(run.teacher_shapes)
  return weights.load(
      config.teacher.checkpoint, shapes, config.teacher.weights, "config.teacher.checkpoint", strict=whole)


def check_teacher(config, run):
  """Raises errors.UserError: no workdir of a teacher is named."""
  if run.teacher.params is None and not config.teacher.get("checkpoint"):
    raise errors.UserError("config.teacher.checkpoint: is empty; give the workdir of the teacher's run")


def as_saved(shape):
  """A parameter's shape in float32, the type in which checkpoints have it."""
  dtype = jnp.float32 if jnp.issubdtype(shape.dtype, jnp.floating) else shape.dtype
  return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=shape.sharding)


def load_base(config, run, jitted):
  """What drawing needs beside the trained weights: the teacher's frozen ones, or None where all is trained."""
  return None if jitted.base is None else load_teacher(config, run, jitted.base)


def check_batch(config, mesh):
  """Raises errors.UserError: the batch does not divide over the mesh."""
  parts = sharding.sample_parts(mesh) * config.microbatches
  if config.batch_size % parts:
    raise errors.UserError(
        f"config.batch_size: {config.batch_size} does not divide over {parts // config.microbatches} parts of the mesh "
        f"x {config.microbatches} microbatches; choose a multiple of {parts}")
