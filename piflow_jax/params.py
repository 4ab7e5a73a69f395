"""Parameter trees by path: nested dicts whose leaves are named like "blocks/attention/qkv/kernel"."""

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


def overlay(base, params, like):
  """A tree shaped like `like`: each leaf from params where it has one, else from base.

  A student is its teacher's tree overlaid by what is trained, so that frozen weights exist once.

  Raises:
    KeyError: a leaf that neither has.
  """
  trained, inherited = named_leaves(params), named_leaves(base)
  return map_with_path(lambda name, _: trained[name] if name in trained else inherited[name], like)


def ema_decay(step, *, gamma=7.0, start=0, max_decay=1.0):
  """Power-function EMA, beta = (1 - 1/n)^(gamma + 1) with n = step - start + 1 (Karras et al., arXiv 2312.02696).

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
