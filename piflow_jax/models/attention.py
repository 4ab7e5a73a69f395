"""Attention of tokens to all tokens: the kernel that suits the platform, or the one that is asked for."""

import functools

import jax
from jax.experimental.pallas.ops.tpu import flash_attention as flash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from piflow_jax import errors
from piflow_jax import sharding

KERNELS = ("auto", "xla", "splash", "flash", "cudnn")
_BLOCK = 128  # of tokens, below which the TPU kernels do not go


def attention(q, k, v, kernel="auto", *, interpret=False):
  """softmax(q k^T / sqrt(D)) v; q, k, v [B, N, heads, D] -> the same.

  Args:
    q, k, v: as above.
    kernel: "xla"; "splash" or "flash" (Pallas, TPU); "cudnn" (GPU, half precision); "auto": splash on a TPU and cuDNN on a
      GPU where the sizes suit them, else XLA. The Pallas kernels know no forward-mode derivative. Where the mesh cannot
      split the batch evenly (a row of pictures, the single sample that parameters are made with) it is XLA in their stead.
    interpret: run a Pallas kernel on any platform, slowly: for tests.
  Raises:
    errors.UserError: a kernel that is unknown, of another platform, or for other sizes.
  """
  platform, (_, n, _, dim) = sharding.platform(), q.shape
  if kernel == "auto":
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    suited = {"tpu": n % _BLOCK == 0 and "splash", "gpu": half and dim % 8 == 0 and dim <= 128 and "cudnn"}
    kernel = suited.get(platform) or "xla"
  if kernel in ("splash", "flash") and not sharding.splits(q.shape[0]):
    kernel = "xla"
  if kernel in ("xla", "cudnn"):
    if kernel == "cudnn" and platform != "gpu":
      raise errors.UserError(f"config.network.attention: cudnn needs a GPU, not {platform}; set auto")
    return jax.nn.dot_product_attention(q, k, v, implementation=kernel)
  if kernel not in KERNELS:
    raise errors.UserError(f"config.network.attention: {kernel!r} is none of {', '.join(KERNELS)}")
  if platform != "tpu" and not interpret:
    raise errors.UserError(f"config.network.attention: {kernel} needs a TPU, not {platform}; set auto")
  if n % _BLOCK:
    raise errors.UserError(f"config.network.attention: {kernel} takes multiples of {_BLOCK} tokens, not {n}; set auto")
  run = functools.partial(_splash, interpret=interpret) if kernel == "splash" else _flash
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  # A Pallas call is not XLA's to split over devices: each does its own samples and heads.
  by_device = sharding.per_device(run, P(sharding.SAMPLES, "tensor"))
  return heads_first(by_device(*map(heads_first, (q, k, v))))


def _splash(q, k, v, interpret):
  heads, n = q.shape[1:3]
  mask = mask_lib.MultiHeadMask([mask_lib.FullMask((n, n))] * heads)
  kernel = splash_lib.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=interpret)
  # The kernel itself does not scale; in float32, so that half precision is rounded to only once.
  scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
  return jax.vmap(kernel)(scaled, k, v)


def _flash(q, k, v):
  return flash_lib.flash_attention(q, k, v, sm_scale=q.shape[-1] ** -0.5)
