"""The parts of a method on a tiny DiT: what build.py makes of a config."""

import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import student as student_lib
from piflow_jax import teacher as teacher_lib
from piflow_jax.data import spec as spec_lib
from piflow_jax.distill import method as method_lib
from piflow_jax.models import dit
from piflow_jax.models import layers

SHAPE, CLASSES = (4, 4, 1), 3
LABELLED = spec_lib.Spec(SHAPE, {"label": spec_lib.Array(classes=CLASSES)})
UNLABELLED = spec_lib.Spec(SHAPE, {})


def cond(samples, spec=LABELLED):
  return {name: jnp.arange(samples) % array.classes for name, array in spec.cond.items()}


def make(noun, *surroundings):
  return noun.make(*surroundings, **config_lib.fields_of(noun))


def network(spec=LABELLED, **fields):
  return make(dit.config(**(dict(depth=1, width=8, heads=2, time_scale=1.0, dtype="float32") | fields)), spec)


def net(module, spec=LABELLED, two_times=False):
  """`method.Net` of a module."""
  x, t, none = student_lib.inputs(spec)
  given = (x, t, none, t) if two_times else (x, t, none)

  def init(key):
    return module.init(key, *given)["params"]

  def apply(params, *args):
    return module.apply({"params": params}, *args)

  return method_lib.Net(init, apply)


def teacher_params(spec=LABELLED):
  """A teacher's parameters, all of them drawn: those that start at zero too."""
  shapes = jax.eval_shape(net(network(spec).module(layers.VelocityHead()), spec).init, jax.random.key(0))
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(tree, [0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])


def parts(policy=None, *, spec=LABELLED, shift=1.0, teacher=None, **fields):
  """`method.Parts`; `policy` is the noun of a student, `teacher` fields of teacher.config."""
  network_ = network(spec, **fields)
  velocity = net(network_.module(layers.VelocityHead()), spec)
  student = None
  if policy is not None:
    shapes = jax.eval_shape(velocity.init, jax.random.key(0))
    student = student_lib.make(network_, make(policy, jnp.float32), spec, teacher_shapes=shapes)
  two_times = network_.two_times and net(network_.two_times(layers.VelocityHead()), spec, two_times=True)
  return method_lib.Parts(
      shift, velocity, two_times, student, make(teacher_lib.config(**(teacher or {})), velocity, network_.null, spec),
      network_.null, inherits=True)


def method(noun, parts_):
  return make(noun, parts_)
