"""A student: what is trained of a network under a policy's head, over the base that its teacher is."""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from piflow_jax import params as params_lib


class Student(NamedTuple):
  """A few-step student as pure functions of its trained parameters."""

  head: Any  # makes policies of what the network says
  init: Callable  # (key, teacher_params or None) -> trained leaves
  tree: Callable  # (params, base) -> the whole tree: trained leaves over the base's
  policy: Callable  # (params, base, x [B, ...], t [B] noise level, cond, clock, eps=1e-6) -> policy
  trained: Any  # shapes of the trained leaves
  frozen: Any  # shapes of those that come from the base; {} where all is trained


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


def make(network, head, spec, *, trained=(".*",), teacher_shapes=None):
  """The student of a network and a policy's head.

  Args:
    network: models.network.Network.
    head: see policy/__init__.py.
    spec: data.spec.Spec of the records.
    trained: patterns of the paths that are trained.
    teacher_shapes: tree of the teacher network's parameters, None where it has none that a student could start from.
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
  if not mine:
    raise ValueError(f"trained: {tuple(trained)} names no array of this network; \".*\" names all")
  inherited = {name: leaf.shape for name, leaf in params_lib.named_leaves(theirs).items()}
  lost = [name for name, leaf in params_lib.named_leaves(frozen).items() if inherited.get(name) != leaf.shape]
  if lost:
    raise ValueError(f"trained: {lost[0]} is not trained, and the teacher has no such array; add its pattern")
  frozen = params_lib.select(theirs, params_lib.named_leaves(frozen).__contains__)  # in the type in which they are kept

  def init(key, teacher_params):
    fresh_key, head_key = jax.random.split(key)
    fresh = net.init(fresh_key, *given)["params"]
    if fits and teacher_params is not None:
      trunk = {k: v for k, v in teacher_params.items() if k != "head"}
      whole = params_lib.overlay(fresh, fitting(fresh, trunk), fresh) | {
          "head": head.from_teacher(teacher_params["head"], fresh["head"], head_key)}
      fresh = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), whole, shapes)
    return params_lib.select(fresh, lambda name: params_lib.is_any(trained, name))

  def tree(params, base):
    return params_lib.overlay(base if frozen else {}, params, shapes)

  def policy(params, base, x, t, cond, clock, eps=1e-6):
    out = net.apply({"params": tree(params, base)}, x, t, cond)
    return head.to_policy(out, x, t, clock, eps=eps)

  return Student(head, init, tree, policy, mine, frozen)
