"""Low-rank adapters (LoRA, arXiv 2106.09685): W' = W + s A B beside frozen matrices, of any network of dense layers.

An adapter is two leaves beside a kernel [in, out] of `nn.Dense` (or [layers, in, out] of a loop over layers): lora_a
[in, r] and lora_b [r, out]. A layer uses them where they lie in the tree that it is given; networks know nothing of it.
"""

import math
from typing import NamedTuple
import zlib

from flax import linen as nn
import jax
import jax.numpy as jnp

from piflow_jax import config as config_lib
from piflow_jax import params as params_lib
from piflow_jax import sharding
from piflow_jax.models import layers

A, B = "lora_a", "lora_b"
# Of the network's rules these go first. Where the width that they name is not divided by the mesh, a leaf stays whole.
SHARDING = ((rf"{A}|{B}", None), (rf"{A}|{B}", (None, "fsdp")))


class Lora(NamedTuple):
  """Which layers have adapters, and of which kind."""

  targets: tuple  # patterns of the layers' paths
  rank: int
  scale: float
  dropout: float


def config(**fields):
  """Adapters as of pi-Flow's text-to-image students."""
  return config_lib.noun(make, dict(
      rank=256,  # r
      alpha=0.0,  # the adapters' product counts alpha / rank times; 0: once
      rslora=False,  # alpha / sqrt(rank) times instead (arXiv 2312.03732)
      dropout=0.05,  # chance that an adapter's input is dropped in training, in steps of 1 / 256
      targets=(),  # patterns of the layers' paths, e.g. "mlp_in"
  ), fields)


def make(*, rank, alpha, rslora, dropout, targets):
  """Lora. Raises ValueError: a field out of its range."""
  config_lib.whole("rank", rank, most=2**16)
  config_lib.number("alpha", alpha, least=0)
  config_lib.one_of("rslora", rslora, (False, True))
  config_lib.number("dropout", dropout, least=0, below=255 / 256)
  if not targets:
    raise ValueError("targets: is empty; name layers, e.g. (\"mlp_in\", \"mlp_out\")")
  if rslora and not alpha:
    raise ValueError("rslora: has no effect where alpha is 0, which is a scale of 1; set alpha")
  return Lora(tuple(targets), rank, scale_of(rank, alpha or None, rslora), dropout)


def scale_of(rank, alpha=None, rslora=False):
  """s: alpha / r, of rsLoRA alpha / sqrt(r); 1 where there is no alpha."""
  return 1.0 if alpha is None else alpha / (math.sqrt(rank) if rslora else rank)


def layers_of(lora, shapes):
  """{path of a layer: its kernel's shape} of those that have adapters.

  Raises:
    ValueError: a pattern that names no layer, or one whose kernel is no plain matrix.
  """
  found, unused = {}, set(lora.targets)
  for name, leaf in params_lib.named_leaves(shapes).items():
    layer, _, last = name.rpartition("/")
    hits = [pattern for pattern in lora.targets if last == "kernel" and params_lib.ends_with(pattern, layer)]
    if hits:
      unused -= set(hits)
      if leaf.ndim not in (2, 3):
        raise ValueError(f"lora.targets: {layer} has a kernel {tuple(leaf.shape)}, which is no plain matrix [in, out]; "
                         "name other layers")
      found[layer] = tuple(leaf.shape)
  if unused:
    raise ValueError(f"lora.targets: {sorted(unused)[0]!r} names no layer of this network")
  return found


def shapes_of(lora, shapes):
  """The tree of adapters of a network whose parameters have these shapes."""
  flat = {}
  for layer, (*stack, inputs, outputs) in layers_of(lora, shapes).items():
    flat[f"{layer}/{A}"] = jax.ShapeDtypeStruct((*stack, inputs, lora.rank), jnp.float32)
    flat[f"{layer}/{B}"] = jax.ShapeDtypeStruct((*stack, lora.rank, outputs), jnp.float32)
  return params_lib.nested(flat)


def init(adapters, key):
  """A ~ N(0, 1 / r^2), B = 0, as the authors' students begin: the adapted layer is the layer.

  Args:
    adapters: of `shapes_of`.
    key: random key.
  """
  def draw(name, leaf):
    if name.endswith(B):
      return jnp.zeros(leaf.shape, leaf.dtype)
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return jax.random.normal(own, leaf.shape, leaf.dtype) / leaf.shape[-1]

  return params_lib.map_with_path(draw, adapters)


def scaled(tree, scale):
  """The tree with its lora_b times the scale: what `adapted` layers take."""
  if scale == 1:
    return tree
  return params_lib.map_with_path(lambda name, leaf: scale * leaf if name.endswith(f"/{B}") else leaf, tree)


def adapted(dropout=0.0):
  """A context in which dense layers add x A B where their tree has the two.

  Args:
    dropout: chance that a number of x is dropped, the others count 1 / (1 - dropout) times; it draws from the stream
      `layers.DROPOUT`, and where `apply` is given none nothing is dropped.
  """
  def layer(next_fun, args, kwargs, context):
    y, module = next_fun(*args, **kwargs), context.module
    if context.method_name != "__call__" or not module.has_variable("params", A):
      return y
    # Gathered from all of `fsdp` first, as the kernel beside them is.
    a, b = (sharding.constrain(module.get_variable("params", name).astype(y.dtype)) for name in (A, B))
    x = jax.tree.map(lambda part: part.astype(y.dtype), args[0])  # of `layers.Rows` several, of others one
    if dropout and module.has_rng(layers.DROPOUT):
      x = jax.tree.map(lambda part: _dropped(part, module.make_rng(layers.DROPOUT), dropout), x)
    product = layers.rows_product(x, a) if isinstance(x, tuple) else x @ a
    return y + (product @ b).reshape(y.shape)

  return nn.intercept_methods(layer)


def _dropped(x, key, rate):
  """x with a share of its numbers dropped: the nearest to `rate` in steps of 1 / 256."""
  # A draw of 32 bits serves four numbers: of a large network's gradient on a TPU a quarter was drawing. The four stand
  # along axis 1, which no mesh splits (x of a vector a sample is small). So the mask is joined before it is used; a
  # plain one XLA draws anew in each matrix product that it goes into; FLUX.1 did not compile so in 28 minutes.
  several = x.ndim > 2
  shape = (x.shape[0], -(-x.shape[1] // 4), *x.shape[2:]) if several else x.shape
  bits, least = jax.random.bits(key, shape), round(256 * rate)
  kept = [(bits >> shift & 255) >= least for shift in ((0, 8, 16, 24) if several else (0,))]
  return jnp.where(jnp.concatenate(kept, axis=1)[:, :x.shape[1]], x / (1 - least / 256), 0)


def merge(tree, scale=1.0):
  """The tree without adapters: each adapted kernel is W + s A B, computed in float32, in W's own type."""
  leaves = params_lib.named_leaves(tree)
  found = {name: leaf for name, leaf in leaves.items() if not name.endswith((f"/{A}", f"/{B}"))}
  for name, a in leaves.items():
    layer, _, last = name.rpartition("/")
    if last == A:
      kernel, b = found[f"{layer}/kernel"], leaves[f"{layer}/{B}"]
      delta = scale * jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
      found[f"{layer}/kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
  return params_lib.nested(found)
