"""From a config to functions: the one place that knows every noun."""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

from piflow_jax import errors
from piflow_jax import params as params_lib
from piflow_jax import sampler
from piflow_jax import teacher as teacher_lib
from piflow_jax.distill import flow_matching as flow_matching_lib
from piflow_jax.distill import imitation as imitation_lib
from piflow_jax.models import dit
from piflow_jax.models import layers
from piflow_jax.policy import rollout as rollout_lib


class Run(NamedTuple):
  """A training run as functions; `teacher_params` is None where there is no teacher."""

  init: Callable  # (key, teacher_params) -> params
  objective: Callable  # (params, teacher_params, batch, keys [B], step) -> (grads, metrics)
  flow_map: Callable  # (params, teacher_params, cond [B]) -> flow map
  teacher_shapes: Any  # tree of the teacher's parameters, or None


def run(config):
  """The run that a config describes. Raises errors.UserError for fields that do not fit one another."""
  _check(config)
  return config.method(config)


def flow_matching(config):
  """A teacher by flow matching; sampled by Euler steps."""
  net = _network(config, _velocity_head(config))
  init = lambda key, teacher_params: net.init(key, *_inputs(config))["params"]
  c = config.flow_matching
  drop = functools.partial(dit.drop_labels, rate=c.label_dropout, num_classes=config.data.num_classes)
  apply = _apply(net)
  objective = flow_matching_lib.objective(
      apply, drop, shift=config.flow.shift,
      logit_mean=c.logit_mean if c.logit_normal else None, logit_std=c.logit_std)
  return Run(init, objective, lambda p, _, cond: _euler_map(config, apply, p, cond), None)


def imitation(config):
  """A few-step student by imitation of a teacher of the same trunk."""
  c, flow = config.imitation, config.flow
  head = config.policy.make(
      channels=config.data.shape[-1], patch=config.network.patch, dtype=_dtype(config), **_arguments(config.policy))
  net = _network(config, head)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *_inputs(config)))["params"]

  def init(key, teacher_params):
    fresh_key, head_key = jax.random.split(key)
    fresh = net.init(fresh_key, *_inputs(config))["params"]
    trunk = {k: v for k, v in teacher_params.items() if k != "head"}
    return params_lib.overlay(fresh, trunk, fresh) | {
        "head": head.from_teacher(teacher_params["head"], fresh["head"], head_key)}

  def student(params, base, x, t, cond, eps=1e-6):
    tree = params_lib.overlay(base, params, shapes)
    return head.to_policy(net.apply({"params": tree}, x, t, cond), x, t, eps=eps)

  def flow_map(params, teacher_params, cond):
    # The authors sample with a larger floor under the noise level than they train with.
    roll = functools.partial(rollout_lib.rollout, shift=flow.shift, total_substeps=flow.total_substeps)
    return sampler.policy_flow_map(
        lambda x, t: student(params, teacher_params, x, t, cond, eps=1e-4), roll, shift=flow.shift)

  objective = imitation_lib.objective(
      student, teacher(config), head.perturb, nfe=flow.nfe, num_states=c.num_states, window_substeps=c.window_substeps,
      total_substeps=flow.total_substeps, shift=flow.shift, final_scale=flow.final_scale, loss_scale=c.loss_scale,
      num_decay_steps=c.num_decay_steps)
  return Run(init, objective, flow_map, teacher_shapes(config))


def teacher(config):
  """teacher(teacher_params, x, t, cond) -> u, guided as the config says."""
  c = config.teacher
  net = _network(config, _velocity_head(config))
  return teacher_lib.network_teacher(
      _apply(net), functools.partial(dit.null_label, num_classes=config.data.num_classes),
      guidance_scale=c.guidance_scale, guidance_interval=c.guidance_interval, orthogonal=c.orthogonal)


def teacher_shapes(config):
  """The tree of the teacher's parameters."""
  net = _network(config, _velocity_head(config))
  return jax.eval_shape(lambda: net.init(jax.random.key(0), *_inputs(config)))["params"]


def teacher_flow_map(config, teacher_params, cond):
  """The many-step teacher as a flow map of one Euler step."""
  return _euler_map(config, teacher(config), teacher_params, cond)


def sharding_rules(config):
  """(path pattern, axes) rules of the config's network."""
  del config
  return dit.SHARDING


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
  adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
  return optax.chain(clip, adamw), rate


def describe_parameters(params, teacher_shapes_):
  """One line on where each leaf comes from: what starts from the teacher, what is new, what only the teacher has."""
  count = lambda tree: f"{sum(leaf.size for leaf in jax.tree.leaves(tree)):,}"
  if teacher_shapes_ is None:
    return f"{count(params)} parameters, all new"
  mine, theirs = set(params_lib.named_leaves(params)), set(params_lib.named_leaves(teacher_shapes_))
  return (f"{count(params)} parameters, {len(mine & theirs)} arrays of them from the teacher; new: "
          f"{', '.join(sorted(mine - theirs))}; the teacher's alone: {', '.join(sorted(theirs - mine))}")


def _arguments(spec):
  return {k: v for k, v in spec.items() if k != "make"}


def _dtype(config):
  return jnp.dtype(config.network.dtype)


def _velocity_head(config):
  return layers.VelocityHead(config.data.shape[-1], config.network.patch, _dtype(config))


def _network(config, head):
  arguments = _arguments(config.network) | {"dtype": _dtype(config)}
  return config.network.make(head=head, num_classes=config.data.num_classes, **arguments)


def _apply(net):
  return lambda params, x, t, cond: net.apply({"params": params}, x, t, cond)


def _inputs(config):
  return jnp.zeros((1, *config.data.shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)


def _euler_map(config, velocity, params, cond):
  return sampler.euler_flow_map(lambda x, t: velocity(params, x, t, cond), shift=config.flow.shift)


def _check(config):
  positive = ("steps", "batch_size", "microbatches", "log_every", "checkpoint_every", "keep_checkpoints")
  for name in positive:
    if config[name] < 1:
      raise errors.UserError(f"config.{name}: {config[name]} is less than 1")
  for name in ("nfe", "total_substeps"):
    if config.flow[name] < 1:
      raise errors.UserError(f"config.flow.{name}: {config.flow[name]} is less than 1")
  if config.network.dtype not in ("float32", "bfloat16"):
    raise errors.UserError(f'config.network.dtype: {config.network.dtype!r} is neither "float32" nor "bfloat16"')
  height, width, _ = config.data.shape
  if height % config.network.patch or width % config.network.patch:
    raise errors.UserError(
        f"config.network.patch: {config.network.patch} does not divide config.data.shape {tuple(config.data.shape)}")
  if config.network.width % config.network.heads:
    raise errors.UserError(
        f"config.network.heads: {config.network.heads} does not divide config.network.width {config.network.width}")
