"""From a config to functions: the one place that knows every noun."""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from piflow_jax import adam8
from piflow_jax import errors
from piflow_jax import flow as flow_lib
from piflow_jax import params as params_lib
from piflow_jax import sampler
from piflow_jax import teacher as teacher_lib
from piflow_jax.distill import flow_matching as flow_matching_lib
from piflow_jax.distill import imitation as imitation_lib
from piflow_jax.distill import meanflow as meanflow_lib
from piflow_jax.distill import parallel_decoding as parallel_lib
from piflow_jax.distill import segments as segments_lib
from piflow_jax.models import attention
from piflow_jax.models import dit
from piflow_jax.models import layers
from piflow_jax.policy import rollout as rollout_lib


class Run(NamedTuple):
  """A training run as functions; `teacher_params` is None where there is no teacher."""

  init: Callable  # (key, teacher_params) -> params
  objective: Callable  # (params, teacher_params, batch, keys [B], step) -> (grads, metrics)
  flow_map: Callable  # (params, teacher_params, cond [B], nfe) -> flow map, to be sampled in nfe calls
  teacher_shapes: Any  # tree of the teacher's parameters, or None


def run(config):
  """The run that a config describes. Raises errors.UserError for fields that do not fit one another."""
  _check(config)
  return config.method(config)


def flow_matching(config):
  """A teacher by flow matching."""
  net = _network(config, _velocity_head(config))
  init = lambda key, teacher_params: net.init(key, *_inputs(config))["params"]
  c = config.flow_matching
  drop = functools.partial(dit.drop_labels, rate=c.label_dropout, num_classes=config.data.num_classes)
  apply = _apply(net)
  sampler.velocity_flow_map(apply, method=config.sampling.solver)  # an unknown one is told now, not with a first picture
  objective = flow_matching_lib.objective(
      apply, drop, shift=shift(config),
      logit_mean=c.logit_mean if c.logit_normal else None, logit_std=c.logit_std)
  return Run(init, objective,
             lambda p, _, cond, nfe: _velocity_map(config, apply, p, cond, config.sampling.solver), None)


def imitation(config):
  """A few-step student by imitation of a teacher of the same trunk, on data or without."""
  c, flow, student = config.imitation, config.flow, _student(config)
  if c.label != "euler" and not c.window_substeps:
    raise errors.UserError(f"config.imitation.label: {c.label!r} is the teacher's mean over a window, and there is none; "
                           "set config.imitation.window_substeps")
  segment = imitation_lib.segment(
      student.policy, teacher(config), student.head.perturb, num_states=c.num_states,
      window_substeps=c.window_substeps, total_substeps=flow.total_substeps, shift=shift(config),
      loss_scale=c.loss_scale, num_decay_steps=c.num_decay_steps, method=c.label,
      max_segment=(1 if flow.nfe > 1 else flow.final_scale) / (flow.nfe - 1 + flow.final_scale))

  def flow_map(params, teacher_params, cond, nfe):
    # Sharpening the last call's policy would cost detail; the calls before it only choose what the image is of.
    last = flow_lib.warp(flow_lib.step_times(nfe=nfe, final_scale=flow.final_scale)[-2], shift(config))

    def policy(x, t):
      # The authors sample with a larger floor under the noise level than they train with.
      policy = student.policy(params, teacher_params, x, t, cond, eps=1e-4)
      if config.sampling.temperature == 1:
        return policy
      return student.head.sharpen(policy, jnp.where(t > 1.001 * last, config.sampling.temperature, 1.0))

    roll = functools.partial(rollout_lib.rollout, shift=shift(config), total_substeps=flow.total_substeps)
    return sampler.policy_flow_map(policy, roll, shift=shift(config))

  objective = _on_data_or_free(config, segment, nfe=flow.nfe, final_scale=flow.final_scale)
  return Run(student.init, objective, flow_map, teacher_shapes(config))


def parallel_decoding(config):
  """A student by parallel decoding distillation; sampled through one fused output layer."""
  c, p, student = config.imitation, config.parallel_decoding, _student(config)
  if config.flow.final_scale != 1:
    raise errors.UserError(f"config.flow.final_scale: {config.flow.final_scale}; parallel decoding's blocks are alike, set 1")
  if not hasattr(student.head, "fuse"):
    raise errors.UserError(f"config.policy.make: {config.policy.make.__name__} is no head of fixed intervals; "
                           "parallel decoding takes piflow_jax.policy.parallel.ParallelHead")
  intervals = config.policy.intervals
  if p.min_block < 1 or intervals % p.min_block or not p.min_block <= p.max_block <= intervals:
    raise errors.UserError(f"config.parallel_decoding: min_block={p.min_block} must divide config.policy.intervals="
                           f"{intervals}, and max_block={p.max_block} lie between the two")

  def fits(nfe):
    # Blocks of other lengths and from other places have output layers in them that no training has reached.
    plan = sampler.step_plan(nfe=nfe, shift=shift(config), h=config.sampling.h)
    starts, lengths = (1 - plan["tau"]) * intervals / p.min_block, (plan["tau"] - plan["tau_dst"]) * intervals
    return np.abs(starts - np.round(starts)).max() < 1e-3 and lengths.max() < p.max_block + 1e-3

  def check_calls(nfe):
    if not fits(nfe):
      good = [str(n) for n in range(1, intervals // p.min_block + 1) if fits(n)]
      raise errors.UserError(
          f"config.sampling.nfe: {nfe}; trained are blocks that start at multiples of {p.min_block} of {intervals} intervals "
          f"and have at most {p.max_block}: at config.sampling.h={config.sampling.h} choose of {', '.join(good) or 'none'}")

  check_calls(config.sampling.nfe)
  segment = parallel_lib.segment(student.policy, teacher(config), intervals=intervals, max_block=p.max_block,
                                 method=c.label, shift=shift(config), loss_scale=c.loss_scale)
  velocity = _apply(_network(config, _velocity_head(config)))

  def flow_map(params, teacher_params, cond, nfe):
    check_calls(nfe)
    tree = student.tree(params, teacher_params)

    def step(x, tau_src, tau_dst, key):
      # One layer for the batch, so one block: a sampler has all samples at one time.
      fused = tree | {"head": student.head.fuse(tree["head"], tau_src[0], tau_dst[0])}
      return _velocity_map(config, velocity, fused, cond)(x, tau_src, tau_dst, key)

    return step

  objective = _on_data_or_free(config, segment, nfe=intervals // p.min_block)
  return Run(student.init, objective, flow_map, teacher_shapes(config))


def meanflow(config):
  """MeanFlow or improved MeanFlow on the teacher's network told two times, from data or from the teacher's velocity."""
  c = config.meanflow
  if c.target not in ("data", "teacher"):
    raise errors.UserError(f'config.meanflow.target: {c.target!r} is neither "data" nor "teacher"')
  if c.target == "teacher" and c.guidance_scale != 1:
    raise errors.UserError(f'config.meanflow.guidance_scale: {c.guidance_scale} is for target "data"; a teacher is guided by '
                           "config.teacher.guidance_scale, set 1")
  if config.network.attention not in ("auto", "xla"):
    raise errors.UserError(f"config.network.attention: {config.network.attention} has no forward-mode derivative, which "
                           "MeanFlow takes; set xla")
  net = _network(config, _velocity_head(config), two_times=True, attention="xla")
  inputs = (*_inputs(config), jnp.zeros(1))
  network = lambda params, x, t, t_dst, cond: net.apply({"params": params}, x, t, cond, t_dst)
  classes = dict(num_classes=config.data.num_classes)

  def init(key, teacher_params):
    fresh = net.init(key, *inputs)["params"]
    starts = teacher_params is not None and not config.teacher.mixture
    return params_lib.overlay(fresh, teacher_params, fresh) if starts else fresh

  def drop(cond, uniform):
    return dit.drop_labels(cond, uniform, rate=c.label_dropout, **classes), uniform < c.label_dropout

  objective = meanflow_lib.objective(
      network, teacher(config) if c.target == "teacher" else None, drop, functools.partial(dit.null_label, **classes),
      improved=c.improved, ratio=c.ratio, logit_mean=c.logit_mean, logit_std=c.logit_std, norm_power=c.norm_power,
      norm_eps=c.norm_eps, guidance_scale=c.guidance_scale, shift=shift(config))
  flow_map = lambda params, _, cond, nfe: sampler.mean_flow_map(
      lambda x, t, t_dst: network(params, x, t, t_dst, cond), shift=shift(config))
  # Without a checkpoint to start from, data are enough.
  needs_teacher = c.target == "teacher" or config.teacher.checkpoint
  return Run(init, objective, flow_map, teacher_shapes(config) if needs_teacher else None)


def teacher(config):
  """teacher(teacher_params, x, t, cond) -> u, guided as the config says; or exact, its parameters a mixture."""
  c = config.teacher
  if c.mixture:
    return teacher_lib.gaussian_mixture_teacher
  net = _network(config, _velocity_head(config))
  return teacher_lib.network_teacher(
      _apply(net), functools.partial(dit.null_label, num_classes=config.data.num_classes),
      guidance_scale=c.guidance_scale, guidance_interval=c.guidance_interval, orthogonal=c.orthogonal)


def teacher_shapes(config):
  """The tree of the teacher's parameters."""
  if config.teacher.mixture:
    return jax.eval_shape(lambda: exact_teacher(config))
  net = _network(config, _velocity_head(config))
  return jax.eval_shape(lambda: net.init(jax.random.key(0), *_inputs(config)))["params"]


def exact_teacher(config):
  """The parameters of a teacher that needs no training: the mixture that the data come from."""
  return teacher_lib.GaussianMixture(
      *map(jnp.asarray, config.teacher.mixture(tuple(config.data.shape), config.data.num_classes)))


def teacher_flow_map(config, teacher_params, cond):
  """The many-step teacher as a flow map of one Euler step."""
  return _velocity_map(config, teacher(config), teacher_params, cond)


def shift(config):
  """The shift of the noise schedule: the config's own, or by the number of tokens."""
  if not config.flow.dynamic_shift:
    return config.flow.shift
  height, width, _ = config.data.shape
  ends = {k: config.flow[k] for k in ("base_tokens", "max_tokens", "base_log_shift", "max_log_shift")}
  return flow_lib.dynamic_shift(height * width // config.network.patch**2, **ends)


def sharding_rules(config):
  """(path pattern, axes) rules of the config's networks."""
  return adam8.SHARDING + config.sharding_rules + ((("means|logweights", ()),) if config.teacher.mixture else ())


def optimizer(config, steps):
  """(optax transformation, learning-rate schedule): AdamW, linear warm-up, clipping once the warm-up is over."""
  warmup = optax.linear_schedule(0.001 * config.learning_rate, config.learning_rate, config.warmup_steps)
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup_steps, 1))
  elif config.schedule == "constant":
    main = optax.constant_schedule(config.learning_rate)
  else:
    raise errors.UserError(f'config.optimizer.schedule: {config.schedule!r} is neither "constant" nor "cosine"')
  rate = optax.join_schedules([warmup, main], [config.warmup_steps])
  clip = optax.conditionally_transform(
      optax.clip_by_global_norm(config.clip_norm), lambda step, **_: step >= config.warmup_steps)
  options = dict(b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
  if config.moments == "int8":
    adamw = adam8.adamw8(rate, **options)
  elif config.moments in ("float32", "bfloat16"):
    adamw = optax.adamw(rate, mu_dtype=config.moments, **options)
  else:
    raise errors.UserError(f'config.optimizer.moments: {config.moments!r} is none of "float32", "bfloat16", "int8"')
  return optax.chain(clip, adamw), rate


def describe_parameters(params, teacher_shapes_):
  """One line on where each leaf comes from: what starts from the teacher, what is new, what only the teacher has."""
  count = lambda tree: f"{sum(leaf.size for leaf in jax.tree.leaves(tree)):,}"
  if teacher_shapes_ is None:
    return f"{count(params)} parameters, all new"
  mine, theirs = set(params_lib.named_leaves(params)), set(params_lib.named_leaves(teacher_shapes_))
  return (f"{count(params)} parameters, {len(mine & theirs)} arrays of them from the teacher; new: "
          f"{', '.join(sorted(mine - theirs)) or 'none'}; the teacher's alone: {', '.join(sorted(theirs - mine)) or 'none'}")


class _Student(NamedTuple):
  head: Any
  init: Callable  # (key, teacher_params) -> params
  tree: Callable  # (params, base) -> the whole tree: what is trained over what the teacher has
  policy: Callable  # (params, base, x, t, cond, eps) -> policy


def _student(config):
  """The student's trunk and head, which start from the teacher's."""
  head = policy_head(config)
  net = _network(config, head)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *_inputs(config)))["params"]

  def init(key, teacher_params):
    fresh_key, head_key = jax.random.split(key)
    fresh = net.init(fresh_key, *_inputs(config))["params"]
    if config.teacher.mixture:
      return fresh  # there is no network to start from
    trunk = {k: v for k, v in teacher_params.items() if k != "head"}
    return params_lib.overlay(fresh, trunk, fresh) | {
        "head": head.from_teacher(teacher_params["head"], fresh["head"], head_key)}

  tree = lambda params, base: params_lib.overlay(base, params, shapes)

  def policy(params, base, x, t, cond, eps=1e-6):
    return head.to_policy(net.apply({"params": tree(params, base)}, x, t, cond), x, t, eps=eps)

  return _Student(head, init, tree, policy)


def _on_data_or_free(config, segment, *, nfe, final_scale=1.0):
  if config.imitation.data_free:
    return segments_lib.data_free(segment, nfe=nfe, final_scale=final_scale)
  return segments_lib.on_data(segment, nfe=nfe, final_scale=final_scale, shift=shift(config))


def policy_head(config):
  """The head, given those fields of config.policy that it has, and of its surroundings likewise."""
  flow, make = config.flow, config.policy.make
  if config.policy.segment < 0:
    raise errors.UserError(f"config.policy.segment: {config.policy.segment} is less than 0")
  given = dict(config.policy) | dict(
      channels=config.data.shape[-1], patch=config.network.patch, dtype=_dtype(config), shift=shift(config),
      segment=config.policy.segment or 1 / (flow.nfe - 1 + flow.final_scale))
  head = make(**{k: v for k, v in given.items() if k in make.__dataclass_fields__})
  if config.sampling.temperature != 1 and not hasattr(head, "sharpen"):
    raise errors.UserError(f"config.sampling.temperature: {make.__name__} makes policies that know no temperature; set 1")
  return head


def _dtype(config):
  return jnp.dtype(config.network.dtype)


def _velocity_head(config):
  return layers.VelocityHead(config.data.shape[-1], config.network.patch, _dtype(config))


def _network(config, head, **extra):
  arguments = {k: v for k, v in config.network.items() if k != "make"} | {"dtype": _dtype(config)} | extra
  return config.network.make(head=head, num_classes=config.data.num_classes, **arguments)


def _apply(net):
  return lambda params, x, t, cond: net.apply({"params": params}, x, t, cond)


def _inputs(config):
  return jnp.zeros((1, *config.data.shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)


def _velocity_map(config, velocity, params, cond, solver="euler"):
  return sampler.velocity_flow_map(lambda x, t: velocity(params, x, t, cond), shift=shift(config), method=solver)


def _check(config):
  positive = ("steps", "batch_size", "microbatches", "log_every", "checkpoint_every", "keep_checkpoints")
  for name in positive:
    if config[name] < 1:
      raise errors.UserError(f"config.{name}: {config[name]} is less than 1")
  for part, names in (("flow", ("nfe", "total_substeps")), ("policy", ("components", "points", "intervals", "logstd_width")),
                      ("imitation", ("num_states",)), ("sampling", ("nfe",))):
    for name in names:
      if config[part][name] < 1:
        raise errors.UserError(f"config.{part}.{name}: {config[part][name]} is less than 1")
  for name, good, want in (
      ("flow.final_scale", lambda v: 0 < v <= 1, "above 0 and at most 1"),
      ("flow.shift", lambda v: 0 < v < float("inf"), "above 0 and finite"),
      ("sampling.h", lambda v: v >= 0, "at least 0"),
      ("imitation.num_decay_steps", lambda v: v >= 0, "at least 0"),
      ("imitation.window_substeps", lambda v: v >= 0, "at least 0"),
      ("policy.dropout", lambda v: 0 <= v < 1, "at least 0 and below 1"),
      ("flow.max_tokens", lambda v: v > config.flow.base_tokens, f"above config.flow.base_tokens={config.flow.base_tokens}"),
      ("sampling.temperature", lambda v: 0 < v < float("inf"), "above 0 and finite"),
      ("teacher.guidance_interval", lambda v: len(v) == 2 and 0 <= v[0] <= v[1] <= 1,
       "two noise levels, 0 <= lower <= upper <= 1"),
      ("meanflow.ratio", lambda v: 0 <= v <= 1, "between 0 and 1"),
      ("meanflow.logit_std", lambda v: v > 0, "above 0"),
      ("meanflow.norm_eps", lambda v: v > 0, "above 0"),
      ("meanflow.label_dropout", lambda v: 0 <= v <= 1, "between 0 and 1"),
      ("flow_matching.logit_std", lambda v: v > 0, "above 0"),
      ("flow_matching.label_dropout", lambda v: 0 <= v <= 1, "between 0 and 1")):
    part, field = name.split(".")
    if not good(config[part][field]):
      raise errors.UserError(f"config.{name}: {config[part][field]} must be {want}")
  for name, unset, methods, why in (  # what a method does not read
      ("sampling.temperature", 1, (flow_matching, meanflow), "makes no policies to sharpen"),
      ("sampling.solver", "euler", (imitation, parallel_decoding, meanflow), "takes no steps of a teacher's solver"),
      ("imitation.label", "euler", (flow_matching, meanflow), "takes no mean of a teacher's velocity"),
      ("imitation.window_substeps", 0, (flow_matching, parallel_decoding, meanflow), "has no window of substeps"),
      ("imitation.num_decay_steps", 0, (flow_matching, parallel_decoding, meanflow), "mixes no trajectories"),
      ("imitation.data_free", False, (flow_matching, meanflow), "walks no segments from noise")):
    part, field = name.split(".")
    if config.method in methods and config[part][field] != unset:
      raise errors.UserError(f"config.{name}: {config.method.__name__} {why}; set {unset}")
  if config.teacher.mixture and config.teacher.guidance_scale > 1:
    raise errors.UserError(
        f"config.teacher.guidance_scale: {config.teacher.guidance_scale} needs a network; an exact teacher has no guidance")
  if config.network.dtype not in ("float32", "bfloat16"):
    raise errors.UserError(f'config.network.dtype: {config.network.dtype!r} is neither "float32" nor "bfloat16"')
  if config.accumulator not in ("float32", "bfloat16"):
    raise errors.UserError(f'config.accumulator: {config.accumulator!r} is neither "float32" nor "bfloat16"')
  if config.network.attention not in attention.KERNELS:
    raise errors.UserError(
        f"config.network.attention: {config.network.attention!r} is none of {', '.join(attention.KERNELS)}")
  if config.imitation.label not in ("euler", "midpoint"):
    raise errors.UserError(f'config.imitation.label: {config.imitation.label!r} is neither "euler" nor "midpoint"')
  if len(config.data.shape) != 3:
    raise errors.UserError(f"config.data.shape: {tuple(config.data.shape)} is not height, width, channels")
  height, width, _ = config.data.shape
  if height % config.network.patch or width % config.network.patch:
    raise errors.UserError(
        f"config.network.patch: {config.network.patch} does not divide config.data.shape {tuple(config.data.shape)}")
  if config.network.width % config.network.heads:
    raise errors.UserError(
        f"config.network.heads: {config.network.heads} does not divide config.network.width {config.network.width}")
