"""Floating-point operations of a function, counted in its jaxpr.

Each product of a matrix product counts as a multiplication and an addition. Everything else (norms, softmax, policies)
counts as nothing, as in every published MFU.
"""

import math

import jax

from piflow_jax import errors
from piflow_jax.models import layers


def count(f, *args):
  """FLOPs of f(*args), whose arguments may be shapes. A loop counts by its length, a conditional by its dearest branch.

  Raises:
    errors.UserError: a loop that ends by a condition, as an adaptive solver's does, has matrix products in it.
  """
  return _of(jax.make_jaxpr(f)(*args).jaxpr)


def _of(jaxpr):
  return sum(_equation(e) for e in jaxpr.eqns)


def _equation(e):
  if e.primitive.name == "dot_general":
    if layers.PERMUTATION in str(e.source_info.name_stack):
      return 0
    (contracted, _), _ = e.params["dimension_numbers"]
    return 2 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[axis] for axis in contracted)
  if e.primitive.name == "conv_general_dilated":
    kernel = e.invars[1].aval.shape
    outputs = kernel[e.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(e.outvars[0].aval.shape) * math.prod(kernel) // outputs
  if e.primitive.name == "cond":
    return max(_of(branch.jaxpr) for branch in e.params["branches"])
  if e.primitive.name == "while":
    if _of(e.params["cond_jaxpr"].jaxpr) + _of(e.params["body_jaxpr"].jaxpr):
      raise errors.UserError(
          "config: a loop over matrix products ends by a condition, so nobody can count them before it runs; choose "
          "what has a fixed number of steps, e.g. config.method.solver=euler")
    return 0
  inner = [getattr(p, "jaxpr", p) for name, p in e.params.items() if name in ("jaxpr", "call_jaxpr")]
  return e.params.get("length", 1) * sum(_of(jaxpr) for jaxpr in inner)
