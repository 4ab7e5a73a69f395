"""Attention of all tokens to all tokens, by the kernel that suits the platform or by the one that the config names."""

import functools

import jax
from jax.experimental.pallas.ops.tpu import flash_attention as flash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from piflow_jax import sharding

KERNELS = ("auto", "xla", "splash", "flash", "cudnn")
_HALF = (jnp.bfloat16, jnp.float16)
_BLOCK = 128  # tokens: the TPU kernels work on blocks of so many; other numbers are filled up


def attention(q, k, v, kernel="auto", *, lengths=None, interpret=False):
  """softmax(q k^T / sqrt(D)) v; q, k, v [B, N, heads, D] -> the same.

  Args:
    q, k, v: as above.
    kernel: "xla"; "splash" or "flash" (Pallas, TPU); "cudnn" (GPU, half precision); "auto": splash on a TPU and cuDNN
      on a GPU where the sizes suit them, else XLA. The Pallas kernels have no forward-mode derivative. XLA takes their
      place where the mesh cannot split the batch evenly (a row of pictures, the single sample that `init` sees).
    lengths: [B] int32: nothing attends to the keys from there on; what such tokens get themselves has no meaning.
    interpret: run a Pallas kernel on any platform, slowly: for tests.
  Raises:
    ValueError: an unknown kernel, or one that this platform or these sizes do not suit. It names `attention`, the field
      of a network's config.
  """
  platform, (_, n, _, dim) = sharding.platform(), q.shape
  if kernel == "auto":
    suited = {"tpu": -n % _BLOCK <= n // 8 and "splash",
              "gpu": q.dtype in _HALF and dim % 8 == 0 and dim <= 128 and "cudnn"}
    kernel = suited.get(platform) or "xla"
  if kernel in ("splash", "flash") and not sharding.splits(q.shape[0]):
    kernel = "xla"
  if kernel in ("xla", "cudnn"):
    if kernel == "cudnn" and platform != "gpu":
      raise ValueError(f"attention: cudnn needs a GPU, not {platform}; set auto")
    if kernel == "cudnn" and q.dtype not in _HALF:
      raise ValueError(f"attention: cudnn takes bfloat16 or float16, not {q.dtype}; set auto, or another dtype")
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=kernel)
  if kernel not in KERNELS:
    raise ValueError(f"attention: {kernel!r} is none of {', '.join(KERNELS)}")
  if platform != "tpu" and not interpret:
    raise ValueError(f"attention: {kernel} needs a TPU, not {platform}; set auto")
  if n < _BLOCK:
    raise ValueError(f"attention: {kernel} takes {_BLOCK} tokens or more, not {n}; set auto")
  run = functools.partial(_splash, interpret=interpret) if kernel == "splash" else _flash
  given = [_filled(jnp.swapaxes(x, 1, 2)) for x in (q, k, v)]
  if lengths is not None or n % _BLOCK:
    lengths = jnp.full(q.shape[0], n) if lengths is None else lengths
    given.append((jnp.arange(n + -n % _BLOCK)[None] < lengths[:, None]).astype(jnp.int32))
  # XLA cannot split a Pallas call over devices, so each device calls the kernel on its own samples and heads.
  specs = (P(sharding.SAMPLES, "tensor"),) * 3 + (P(sharding.SAMPLES),) * (len(given) - 3)
  return jnp.swapaxes(sharding.per_device(run, specs, specs[0])(*given), 1, 2)[:, :n]


def _filled(x):
  """[B, heads, N, D] with zeros up to a whole number of blocks; nothing attends to them."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _BLOCK), (0, 0)))


def _block(n):
  """The largest of a few block sizes that divides n: larger ones read q, k and v fewer times."""
  return next(block for block in (512, 256, _BLOCK) if n % block == 0)


def _splash(q, k, v, there=None, *, interpret):
  heads, n = q.shape[1:3]
  mask, b = mask_lib.MultiHeadMask([mask_lib.FullMask((n, n))] * heads), _block(n)
  sizes = splash_lib.BlockSizes(block_q=b, block_kv=b, block_q_dkv=b, block_kv_dkv=b, block_q_dq=b, block_kv_dq=b)
  kernel = splash_lib.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
  # Splash does not scale its logits. We scale q in float32, so that half precision is rounded once.
  scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
  if there is None:
    return jax.vmap(kernel)(scaled, k, v)
  # Who attends is of no matter: what tokens beyond the length get is thrown away.
  return jax.vmap(kernel)(scaled, k, v, splash_lib.SegmentIds(jnp.ones_like(there), there))


def _flash(q, k, v, there=None):
  ids = None if there is None else flash_lib.SegmentIds(jnp.ones_like(there), there)
  return flash_lib.flash_attention(q, k, v, segment_ids=ids, sm_scale=q.shape[-1] ** -0.5)
