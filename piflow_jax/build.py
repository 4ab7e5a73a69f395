"""From a config to functions: hands every noun its surroundings; what a noun can check, it checks itself."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from piflow_jax import adam8
from piflow_jax import config as config_lib
from piflow_jax import errors
from piflow_jax import flow as flow_lib
from piflow_jax import lora as lora_lib
from piflow_jax import params as params_lib
from piflow_jax import sampler
from piflow_jax import sharding
from piflow_jax import student as student_lib
from piflow_jax.data import spec as spec_lib
from piflow_jax.distill import method as method_lib
from piflow_jax.models import layers
from piflow_jax.models import network as network_lib
from piflow_jax.teacher import Teacher


class Run(NamedTuple):
  """A training run as functions."""

  data: spec_lib.Data  # records and their spec
  network: network_lib.Network | None  # the student's, or the teacher's own where a teacher is trained
  student: student_lib.Student | None
  method: method_lib.Method  # init, objective, flow map
  teacher: Teacher | None
  teacher_shapes: Any  # tree of the teacher's parameters in the types in which they are kept, or None
  base_shapes: Any  # the part of it that the student's frozen arrays are; None where all is trained
  rules: tuple  # (path pattern, axes of the mesh), for every tree of the run


def run(config, *, planned=False, size=None):
  """The run that a config describes.

  Args:
    config: of the run.
    planned: only its shapes matter, and its data need not be there.
    size: shape of x_0; None: config.data's own. Records stay as they are, see `sized`.
  Raises:
    errors.UserError: fields are wrong or do not fit one another.
  """
  check(config)
  data = _made("data", config.data)
  with field("data"):
    spec_lib.check(data)
  if size is not None:
    data = data._replace(spec=data.spec._replace(x_0=size))
  if planned and data.null is not None:
    data = data._replace(null=lambda: {k: np.zeros(a.shape, np.float32) for k, a in data.spec.cond.items()})
  net = None if config.network is None else _made("network", config.network, data.spec)
  if config.flow is None:
    raise errors.UserError("config.flow: is not set; piflow_jax.flow.config() is a schedule without a shift")
  tokens = net.tokens(data.spec.x_0) if net is not None and net.tokens is not None else None
  shift = _made("flow", config.flow, tokens)
  velocity = _NO_NET if net is None else velocity_net(net, data.spec)

  teacher, theirs, shapes = None, net, None
  if config.teacher is not None:
    if (own := config.teacher.get("network")) is not None:
      theirs = _made("teacher.network", own, data.spec)
    teacher, shapes = _teacher(config, data, theirs)
  student = None
  if config.policy is not None:
    adapters = None if config.lora is None else _made("lora", config.lora)
    head = _made("policy", config.policy, jnp.dtype("float32" if net is None else net.dtype))
    trunk = shapes if teacher is not None and teacher.params is None else None
    if net is None:
      _no_network()
    with field(""):
      student = student_lib.make(net, head, data.spec, trained=config.trained, teacher_shapes=trunk, lora=adapters)
  elif config.lora is not None:
    raise errors.UserError("config.lora: only a student has adapters, and config.policy is not set")
  elif tuple(config.trained) != (".*",):
    raise errors.UserError("config.trained: only a student with a policy is trained in part; set (\".*\",)")
  two_times = None
  if net is not None and net.two_times is not None:
    with field("network"):
      two_times = _net(net.two_times(layers.VelocityHead(jnp.dtype(net.dtype))), data.spec, two_times=True)
  inherits = teacher is not None and teacher.params is None and bool(config.teacher.get("checkpoint"))
  parts = method_lib.Parts(
      shift=shift, velocity=velocity, two_times=two_times, student=student, teacher=teacher,
      null=_null_of(data, net), inherits=inherits)
  method = _made("method", config.method, parts)
  with field("sampling"):
    method.calls(config.sampling.nfe, config.sampling.h)
  rules = adam8.SHARDING + lora_lib.SHARDING + (net.sharding if net is not None else ())
  if theirs is not None and theirs is not net:
    rules += theirs.sharding
  if teacher is not None and teacher.params is not None or net is None:
    rules += ((".*", ()),)
  return Run(data, net, student, method, teacher, shapes,
             student.frozen if student is not None and student.frozen else None, rules)


def sized(config, run_):
  """{shape of x_0: run} of each size that a run's data come in, its own first; what is trained is the same in all."""
  found = {run_.data.spec.x_0: run_}
  for size, records in ({} if run_.data.sizes is None else run_.data.sizes()).items():
    if size not in found:
      other = run(config, size=size)
      found[size] = other._replace(data=other.data._replace(records=records))
  return found


def _no_network(*_):
  raise errors.UserError("config.network: is not set; set it to what a network's config() returns, e.g. of models.dit")


_NO_NET = method_lib.Net(_no_network, _no_network)


def velocity_net(network, spec):
  """method.Net of a network under a velocity's output layer."""
  return _net(network.module(layers.VelocityHead(jnp.dtype(network.dtype))), spec)


def _net(module, spec, two_times=False):
  x, t, cond = student_lib.inputs(spec)
  given = (x, t, cond, t) if two_times else (x, t, cond)

  def init(key):
    return module.init(key, *given)["params"]

  def apply(params, x, t, cond, *t_dst):
    with lora_lib.adapted():
      return module.apply({"params": params}, x, t, cond, *t_dst)

  return method_lib.Net(init, apply)


def _null_of(data, network):
  """cond -> the condition of guidance's unconditional pass, or None: the data's where they have one, a text's say."""
  if network is None:
    return None
  if data.null is None:
    return network.null
  one = functools.cache(data.null)  # read where guidance is, not to draw samples without any

  def null(cond):
    return cond | {k: jnp.broadcast_to(jnp.asarray(v), cond[k].shape).astype(cond[k].dtype) for k, v in one().items()}

  return null


def _teacher(config, data, network):
  """(Teacher, shapes of its parameters) of config.teacher."""
  net = _NO_NET if network is None else velocity_net(network, data.spec)
  teacher = _made("teacher", config.teacher, net, _null_of(data, network), data.spec)
  if teacher.params is not None:
    return teacher, jax.eval_shape(teacher.params)
  with field("network"):
    shapes = jax.eval_shape(net.init, jax.random.key(0))
  return teacher, params_lib.map_with_path(lambda name, leaf: _kept(name, leaf, network.dtype), shapes)


def _kept(name, leaf, dtype):
  # Every layer casts its kernel to the computation's type before it multiplies, so a frozen one is kept in that type.
  narrow = name.endswith(("kernel", "embedding"))
  return jax.ShapeDtypeStruct(leaf.shape, dtype if narrow else leaf.dtype)


@contextlib.contextmanager
def field(prefix):
  """A library function's ValueError("argument: what") as errors.UserError("config.<prefix>.argument: what")."""
  try:
    yield
  except ValueError as e:
    raise errors.UserError(f"config.{prefix}{'.' if prefix else ''}{_brief(e)}") from e


def _brief(error):
  text = " ".join(str(error).split())
  return text if len(text) < 400 else f"{text[:200]} ... {text[-190:]}"


def mesh(config, devices=None):
  """The mesh of config.mesh over all devices, or those given. Raises errors.UserError: it does not fit them."""
  with field(""):
    return sharding.make_mesh(**config.mesh, devices=devices)


def _made(name, noun, *surroundings):
  if not config_lib.is_noun(noun):
    raise errors.UserError(f"config.{name}: {noun!r} is no noun; set it to what a module's config() returns")
  with field(name):
    try:
      return noun.make(*surroundings, **config_lib.fields_of(noun))
    except TypeError as e:
      if "argument" not in str(e):
        raise
      raise ValueError(f"make: {e}; its module's config() must name what make takes") from e


def sampling_clock(config, run_, nfe=None):
  """The clock of a sampling run: the trained one with the number of calls that config.sampling, or nfe, says."""
  return run_.method.clock.replace(nfe=nfe or config.sampling.nfe)


def teacher_flow_map(run_, teacher_params, cond, clock):
  """The many-step teacher as a flow map of one Euler step."""
  def velocity(x, t):
    return run_.teacher.velocity(teacher_params, x, t, cond)

  return sampler.velocity_flow_map(velocity, clock)


def teacher_clock(run_, nfe):
  """The clock of a teacher's nfe equal steps, on the run's schedule."""
  return flow_lib.Clock.of_shift(run_.method.clock.shift).replace(nfe=nfe)


def optimizer(config, steps):
  """(optax transformation, learning-rate schedule): AdamW, linear warm-up, clipping once the warm-up is over."""
  warmup = optax.linear_schedule(0.001 * config.learning_rate, config.learning_rate, config.warmup_steps)
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup_steps, 1))
  else:
    main = optax.constant_schedule(config.learning_rate)
  rate = optax.join_schedules([warmup, main], [config.warmup_steps])

  def past_warmup(step, **_):
    return step >= config.warmup_steps

  def decayed(params):
    found = params_lib.map_with_path(lambda name, _: params_lib.is_any(config.decayed, name), params)
    if not any(jax.tree.leaves(found)):
      raise errors.UserError(f"config.optimizer.decayed: {tuple(config.decayed)} names no array that is trained")
    return found

  clip = optax.conditionally_transform(optax.clip_by_global_norm(config.clip_norm), past_warmup)
  mask = None if tuple(config.decayed) == (".*",) else decayed
  options = dict(b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=mask)
  if config.moments == "int8":
    adamw = adam8.adamw8(rate, **options)
  else:
    adamw = optax.adamw(rate, mu_dtype=config.moments, **options)
  return optax.chain(clip, adamw), rate


def describe_parameters(params, run_):
  """One line on where each array comes from: what starts from the teacher, what is new, what only the teacher has."""
  def count(tree):
    return f"{sum(leaf.size for leaf in jax.tree.leaves(tree)):,}"

  if run_.teacher_shapes is None:
    return f"{count(params)} parameters, all new"
  mine, theirs = set(params_lib.named_leaves(params)), set(params_lib.named_leaves(run_.teacher_shapes))
  frozen = f"; frozen, the teacher's: {count(run_.base_shapes)} parameters" if run_.base_shapes else ""
  new, only_theirs = (", ".join(sorted(names)) or "none" for names in (mine - theirs, theirs - mine))
  return (f"{count(params)} parameters, {len(mine & theirs)} arrays of them from the teacher; new: {new}; the "
          f"teacher's alone: {only_theirs}{frozen}")


def check(config):
  """Raises errors.UserError: one of the run's own fields has a value that cannot be."""
  with field(""):
    for name in ("steps", "batch_size", "microbatches", "log_every", "checkpoint_every", "keep_checkpoints",
                 "eval_batches", "sampling.nfe", "sampling.images", "evaluation.samples", "evaluation.batch_size",
                 "evaluation.during"):
      config_lib.whole(name, config_lib.field(config, name), most=2**30 - 1)
    for name in ("seed", "eval_every", "image_every", "keep_every", "profile_steps", "optimizer.warmup_steps",
                 "ema.start", "evaluation.seed", "evaluation.every"):
      config_lib.whole(name, config_lib.field(config, name), least=0)
    for name in ("data", "fsdp", "tensor", "slices"):
      if config.mesh[name] != -1 or name == "slices":
        config_lib.whole(f"mesh.{name}", config.mesh[name])
    for name, bounds in _NUMBERS.items():
      config_lib.number(name, config_lib.field(config, name), **bounds)
    for name, choices in _CHOICES.items():
      config_lib.one_of(name, config_lib.field(config, name), choices)
    for name in ("trained", "optimizer.decayed"):
      _check_patterns(name, config_lib.field(config, name))
    if config.sampling.h != float("inf"):
      config_lib.number("sampling.h", config.sampling.h, least=0)
    if tuple(config.optimizer.decayed) != (".*",) and not config.optimizer.weight_decay:
      raise ValueError("optimizer.decayed: weight_decay is 0 and shrinks nothing; set (\".*\",)")
    if not all(isinstance(row, (tuple, list)) and len(row) == 6 for row in config.evaluation.checks):
      raise ValueError("evaluation.checks: its rows are (text, metric, row, over, sign, bound), set in a config file")


_NUMBERS = {
    # A rate that is far too large ends by itself, with a word: nothing that is not finite is saved.
    "optimizer.learning_rate": dict(above=0, below=1e30), "optimizer.weight_decay": dict(least=0),
    "optimizer.b1": dict(least=0, below=1), "optimizer.b2": dict(least=0, below=1),
    "optimizer.clip_norm": dict(above=0), "ema.gamma": dict(least=0)}
_CHOICES = {
    "optimizer.schedule": ("constant", "cosine"), "optimizer.moments": ("float32", "bfloat16", "int8"),
    "accumulator": ("float32", "bfloat16")}


def _check_patterns(name, patterns):
  if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) and p for p in patterns):
    raise ValueError(f"{name}: {patterns!r} must be patterns of paths, as in (\"head/.*\",)")
  for pattern in patterns:
    try:
      params_lib.ends_with(pattern, "")
    except Exception as e:
      raise ValueError(f"{name}: {pattern!r} is no regular expression ({e})") from e
