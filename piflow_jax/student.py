"""A student: what is trained of a network under a policy's head, over the base that its teacher is."""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from piflow_jax import lora as lora_lib
from piflow_jax import params as params_lib
from piflow_jax.models import layers


class Student(NamedTuple):
  """A few-step student as pure functions of its trained parameters."""

  head: Any  # makes policies of what the network says
  init: Callable  # (key, teacher_params or None) -> trained leaves
  tree: Callable  # (params, base) -> the whole tree: trained leaves over the base's
  policy: Callable  # (params, base, x [B, ...], t [B] noise level, cond, clock, eps=1e-6, keys=None) -> policy
  trained: Any  # shapes of the trained leaves
  frozen: Any  # shapes of those that come from the base; {} where all is trained
  noisy: bool = False  # whether training gives `policy` the samples' keys [B], which adapters drop their inputs by


def inputs(spec):
  """(x, t, cond) of one sample of zeros, as a network is initialised with."""
  cond = {name: jnp.zeros((1, *array.shape), array.dtype) for name, array in spec.cond.items()}
  return jnp.zeros((1, *spec.x_0)), jnp.zeros(1), cond


def fitting(tree, theirs):
  """The leaves of `theirs` that `tree` has too; {} where one of them has another shape there: another network's."""
  mine, found = params_lib.named_leaves(tree), params_lib.named_leaves(theirs)
  if any(name in mine and mine[name].shape != leaf.shape for name, leaf in found.items()):
    return {}
  return params_lib.select(theirs, mine.__contains__)


def make(network, head, spec, *, trained=(".*",), teacher_shapes=None, lora=None):
  """The student of a network and a policy's head.

  Args:
    network: models.network.Network.
    head: see policy/__init__.py.
    spec: data.spec.Spec of the records.
    trained: patterns of the paths that are trained.
    teacher_shapes: tree of the teacher network's parameters, None where it has none that a student could start from.
    lora: `lora.Lora` of the adapters, which are trained beside; None where there are none.
  Raises:
    ValueError: nothing is trained, or what is not trained is not the teacher's.
  """
  net, given = network.module(head), inputs(spec)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *given))["params"]
  theirs = {} if teacher_shapes is None else teacher_shapes
  trunk_shapes = {k: v for k, v in theirs.items() if k != "head"}
  fits = bool(fitting({k: v for k, v in shapes.items() if k != "head"}, trunk_shapes))
  mine = params_lib.select(shapes, lambda name: params_lib.is_any(trained, name))
  frozen = params_lib.select(shapes, lambda name: not params_lib.is_any(trained, name))
  adapters = lora_lib.shapes_of(lora, shapes) if lora else {}
  everything = params_lib.joined(shapes, adapters)
  if not mine and not adapters:
    raise ValueError(f"trained: {tuple(trained)} names no array of this network; \".*\" names all")
  inherited = {name: leaf.shape for name, leaf in params_lib.named_leaves(theirs).items()}
  lost = [name for name, leaf in params_lib.named_leaves(frozen).items() if inherited.get(name) != leaf.shape]
  if lost:
    raise ValueError(f"trained: {lost[0]} is not trained, and the teacher has no such array; add its pattern")
  frozen = params_lib.select(theirs, params_lib.named_leaves(frozen).__contains__)  # in the type in which they are kept

  def init(key, teacher_params):
    fresh_key, head_key, *lora_key = jax.random.split(key, 3 if adapters else 2)
    fresh = net.init(fresh_key, *given)["params"]
    if fits and teacher_params is not None:
      trunk = {k: v for k, v in teacher_params.items() if k != "head"}
      whole = params_lib.overlay(fresh, fitting(fresh, trunk), fresh) | {
          "head": head.from_teacher(teacher_params["head"], fresh["head"], head_key)}
      fresh = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), whole, shapes)
    fresh = params_lib.select(fresh, lambda name: params_lib.is_any(trained, name))
    return params_lib.joined(fresh, lora_lib.init(adapters, *lora_key)) if adapters else fresh

  def tree(params, base):
    whole = params_lib.overlay(base if frozen else {}, params, everything)
    return lora_lib.scaled(whole, lora.scale) if adapters else whole

  def policy(params, base, x, t, cond, clock, eps=1e-6, keys=None):
    # One key for the batch: a layer draws one mask for all samples' tokens. Of all draws of a run these alone depend on
    # which samples share a microbatch.
    rngs = {} if keys is None else {layers.DROPOUT: keys[0]}
    with lora_lib.adapted(lora.dropout if lora else 0.0):
      out = net.apply({"params": tree(params, base)}, x, t, cond, rngs=rngs)
    return head.to_policy(out, x, t, clock, eps=eps)

  return Student(head, init, tree, policy, params_lib.joined(mine, adapters), frozen, bool(lora and lora.dropout))
