"""Parameter trees by path: nested dicts whose leaves are named like "blocks/attention/qkv/kernel".

One language of patterns serves sharding, what is trained, weight decay and converters: a regular expression that the
end of a path must match, from a border between names on.
"""

import re

import jax
import jax.numpy as jnp


def path_name(path):
  """A JAX key path as "a/b/c"."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def map_with_path(fn, tree):
  """fn(path name, leaf) over a tree."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_name(path), leaf), tree)


def named_leaves(tree):
  """{path name: leaf}."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def ends_with(pattern, name):
  """Whether the end of a path matches a pattern."""
  return re.search(f"(^|/)({pattern})$", name) is not None


def is_any(patterns, name):
  """Whether a path is named by one of the patterns."""
  return any(ends_with(pattern, name) for pattern in patterns)


def nested(leaves):
  """The nested dict of {path name: leaf}."""
  found = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = found
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return found


def select(tree, keep):
  """The nested dict of those leaves whose path `keep(name)` holds for; branches without any are left out."""
  return nested({name: leaf for name, leaf in named_leaves(tree).items() if keep(name)})


def joined(*trees):
  """The nested dict of all leaves of several; of one path the last tree's."""
  return nested({name: leaf for tree in trees for name, leaf in named_leaves(tree).items()})


def overlay(base, params, like):
  """A tree shaped like `like`: each leaf from params where it has one, else from base.

  A student is its teacher's tree overlaid by what is trained, so that frozen weights exist once.

  Raises:
    ValueError: a leaf that neither has, or one of another shape.
  """
  trained, inherited = named_leaves(params), named_leaves(base)

  def pick(name, leaf):
    found = trained.get(name, inherited.get(name))
    if found is None:
      raise ValueError(f"{name}: is neither trained nor in the base")
    if found.shape != leaf.shape:
      raise ValueError(f"{name}: is {tuple(found.shape)}, the network has {tuple(leaf.shape)}")
    return found

  return map_with_path(pick, like)


def ema_decay(step, *, gamma=7.0, start=0, max_decay=1.0):
  """Power-function EMA, beta = (1 - 1/n)^(gamma + 1) with n = step - start + 1 (method.md, 11).

  Args:
    step: updates made before this one. Up to and with `start` the average is a copy.
    gamma: 7 weighs about the last eighth of the run.
    start: the end of the warm-up.
    max_decay: upper bound.
  """
  n = jnp.maximum(step - start + 1, 1).astype(jnp.float32)
  return jnp.minimum((1 - 1 / n) ** (gamma + 1), max_decay)


def ema_update(ema, params, decay):
  """decay * ema + (1 - decay) * params, float32."""
  return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(jnp.float32), ema, params)
