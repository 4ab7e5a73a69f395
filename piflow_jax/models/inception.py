"""The InceptionV3 of FID: TensorFlow's of 2015-12-05, as pytorch-fid and torch-fidelity carry its weights.

Szegedy et al., arXiv 1512.00567, with 1008 outputs. It differs from torchvision's in three pools: an average counts
only the pixels that are there, the last block takes a maximum instead, and pictures come in by TensorFlow 1's resize.

Parameters: {block: {unit: {"conv": {"kernel"}, "bn": {"scale", "bias", "mean", "var"}}}, "fc": {"kernel", "bias"}},
float32; a unit is a convolution without bias, a batch norm by running statistics, a ReLU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299  # pixels that the first convolution sees
CLASSES = 1008
TAPS = ("pool", "spatial", "logits")
_EPS = 1e-3  # of the batch norms
_SPATIAL = 7  # channels of Mixed_6d's first branch that sFID reads (arXiv 2103.03841's code: mixed_6/conv)


class Unit(NamedTuple):
  """A convolution with its norm and ReLU."""

  name: str
  features: int
  kernel: tuple = (1, 1)
  stride: int = 1
  padded: bool = True  # with zeros, so that the size stays


class Pool(NamedTuple):
  """A pool of 3 x 3."""

  kind: str  # "mean" of the pixels that are there, or "max"
  stride: int = 1  # 1: padded, so that the size stays; 2: not padded


class Fork(NamedTuple):
  """Units that all read the same, side by side."""

  units: tuple


def _unit(name, features, height=1, width=None, **more):
  return Unit(name, features, (height, width or height), **more)


def _block_5(pool):
  return ((_unit("branch1x1", 64),),
          (_unit("branch5x5_1", 48), _unit("branch5x5_2", 64, 5)),
          (_unit("branch3x3dbl_1", 64), _unit("branch3x3dbl_2", 96, 3), _unit("branch3x3dbl_3", 96, 3)),
          (Pool("mean"), _unit("branch_pool", pool)))


def _block_6(inner):
  return ((_unit("branch1x1", 192),),
          (_unit("branch7x7_1", inner), _unit("branch7x7_2", inner, 1, 7), _unit("branch7x7_3", 192, 7, 1)),
          (_unit("branch7x7dbl_1", inner), _unit("branch7x7dbl_2", inner, 7, 1), _unit("branch7x7dbl_3", inner, 1, 7),
           _unit("branch7x7dbl_4", inner, 7, 1), _unit("branch7x7dbl_5", 192, 1, 7)),
          (Pool("mean"), _unit("branch_pool", 192)))


def _block_7(pool):
  def fork(name):
    return Fork((_unit(f"{name}a", 384, 1, 3), _unit(f"{name}b", 384, 3, 1)))

  return ((_unit("branch1x1", 320),),
          (_unit("branch3x3_1", 384), fork("branch3x3_2")),
          (_unit("branch3x3dbl_1", 448), _unit("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")),
          (Pool(pool), _unit("branch_pool", 192)))


_HALVING = dict(stride=2, padded=False)
# Name of a block -> its branches, whose results are put side by side; or the one unit or pool that it is.
BLOCKS = {
    "Conv2d_1a_3x3": _unit("", 32, 3, **_HALVING),
    "Conv2d_2a_3x3": _unit("", 32, 3, padded=False),
    "Conv2d_2b_3x3": _unit("", 64, 3),
    "pool_1": Pool("max", 2),
    "Conv2d_3b_1x1": _unit("", 80),
    "Conv2d_4a_3x3": _unit("", 192, 3, padded=False),
    "pool_2": Pool("max", 2),
    "Mixed_5b": _block_5(32), "Mixed_5c": _block_5(64), "Mixed_5d": _block_5(64),
    "Mixed_6a": (
        (_unit("branch3x3", 384, 3, **_HALVING),),
        (_unit("branch3x3dbl_1", 64), _unit("branch3x3dbl_2", 96, 3), _unit("branch3x3dbl_3", 96, 3, **_HALVING)),
        (Pool("max", 2),)),
    "Mixed_6b": _block_6(128), "Mixed_6c": _block_6(160), "Mixed_6d": _block_6(160), "Mixed_6e": _block_6(192),
    "Mixed_7a": (
        (_unit("branch3x3_1", 192), _unit("branch3x3_2", 320, 3, **_HALVING)),
        (_unit("branch7x7x3_1", 192), _unit("branch7x7x3_2", 192, 1, 7), _unit("branch7x7x3_3", 192, 7, 1),
         _unit("branch7x7x3_4", 192, 3, **_HALVING)),
        (Pool("max", 2),)),
    "Mixed_7b": _block_7("mean"), "Mixed_7c": _block_7("max"),
}
# Block after which a mean over positions is torch-fidelity's feature of so many channels.
_MEANS = {"pool_1": "64", "pool_2": "192", "Mixed_6e": "768"}


def shapes():
  """The tree of parameters, jax.ShapeDtypeStruct leaves: 23,885,392 numbers."""
  tree, channels = {}, 3
  for name, block in BLOCKS.items():
    if isinstance(block, Unit):
      tree[name], channels = _unit_shapes(block, channels), block.features
    elif not isinstance(block, Pool):
      tree[name], ends = {}, 0
      for branch in block:
        ends += _branch_shapes(branch, channels, tree[name])
      channels = ends
  return tree | {"fc": {"kernel": _array(channels, CLASSES), "bias": _array(CLASSES)}}


def _array(*shape):
  return jax.ShapeDtypeStruct(shape, np.float32)


def _unit_shapes(unit, channels):
  norm = {name: _array(unit.features) for name in ("scale", "bias", "mean", "var")}
  return {"conv": {"kernel": _array(*unit.kernel, channels, unit.features)}, "bn": norm}


def _branch_shapes(branch, channels, found):
  """Channels that a branch ends with; its units' shapes go into `found`."""
  for step in branch:
    units = step.units if isinstance(step, Fork) else [step] if isinstance(step, Unit) else []
    for unit in units:
      found[unit.name] = _unit_shapes(unit, channels)
    channels = sum(unit.features for unit in units) or channels
  return channels


def resize(images, side=SIDE):
  """TensorFlow 1's bilinear resize: output i reads at i H / side, without half a pixel's shift, without smoothing.

  Args:
    images: [B, H, W, C], any numbers.
  Returns:
    [B, side, side, C] float32, not rounded.
  """
  x = jnp.asarray(images, jnp.float32)

  def between(x, axis):
    length = x.shape[axis]
    place = np.arange(side, dtype=np.float32) * (np.float32(length) / np.float32(side))
    low = np.minimum(place.astype(np.int32), length - 1)
    share = (place - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    a, b = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, length - 1), axis)
    return a + (b - a) * share

  return between(between(x, 2), 1)


def apply(params, images, taps=TAPS):
  """What the network says of pictures.

  Args:
    params: tree of `shapes`.
    images: [B, H, W, 3], uint8 or whole numbers 0..255.
    taps: which of "pool" [B, 2048], what FID compares; "spatial" [B, 2023], what sFID does (17 x 17 positions of 7
      channels, channels last); "logits" [B, 1008] without their bias, what the Inception score reads; "64", "192",
      "768" [B, so many], means over positions; "biased_logits" [B, 1008].
  Returns:
    {tap: float32}.
  """
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images: must be [B, H, W, 3], got {images.shape}")
  x, found = (resize(images) - 128) / 128, {}
  for name, block in BLOCKS.items():
    if isinstance(block, Unit):
      x = _convolve(params[name], block, x)
    elif isinstance(block, Pool):
      x = _pool(block, x)
    else:
      ends = [_branch(params[name], branch, x) for branch in block]
      if name == "Mixed_6d":
        found["spatial"] = ends[0][..., :_SPATIAL].reshape(len(x), -1)
      x = jnp.concatenate(ends, -1)
    if name in _MEANS:
      found[_MEANS[name]] = x.mean((1, 2))
  found["pool"] = x.mean((1, 2))
  found["logits"] = jnp.dot(found["pool"], params["fc"]["kernel"], precision="highest")
  found["biased_logits"] = found["logits"] + params["fc"]["bias"][None]
  return {tap: found[tap] for tap in taps}


def _branch(params, branch, x):
  for step in branch:
    if isinstance(step, Pool):
      x = _pool(step, x)
    elif isinstance(step, Fork):
      x = jnp.concatenate([_convolve(params[unit.name], unit, x) for unit in step.units], -1)
    else:
      x = _convolve(params[step.name], step, x)
  return x


def _convolve(params, unit, x):
  # A TPU multiplies in bfloat16 and a GPU in TF32 unless it is told not to: both move a FID in its first decimal.
  padding = [(n // 2, n // 2) if unit.padded else (0, 0) for n in unit.kernel]
  x = jax.lax.conv_general_dilated(
      x, params["conv"]["kernel"], (unit.stride, unit.stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision="highest")
  norm = {name: value[None, None, None] for name, value in params["bn"].items()}
  return jax.nn.relu((x - norm["mean"]) * (norm["scale"] / jnp.sqrt(norm["var"] + _EPS)) + norm["bias"])


def _pool(pool, x):
  around = ((0, 0), (1, 1), (1, 1), (0, 0)) if pool.stride == 1 else ((0, 0),) * 4
  window, strides = (1, 3, 3, 1), (1, pool.stride, pool.stride, 1)
  if pool.kind == "max":
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, around)
  total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, around)
  there = jax.lax.reduce_window(np.ones((1, *x.shape[1:3], 1), np.float32), 0.0, jax.lax.add, window, strides, around)
  return total / there
