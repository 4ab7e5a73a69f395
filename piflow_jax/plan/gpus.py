"""NVIDIA cards as XLA's compiler wants them described, to compile for cards that are not attached."""

import contextlib
import importlib.util
from unittest import mock

from jax.experimental import topologies
import jaxlib

from piflow_jax import errors

# Names are those of XLA's GpuTargetConfigProto; numbers are NVIDIA's, of its SXM cards ("H100 Tensor Core GPU
# Architecture", "A100 Tensor Core GPU Architecture", and the CUDA programming guide's table of compute capabilities).
_TARGET = """
gpu_device_info {{
  name: "{name}" device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {l2}
  cuda_compute_capability {{ major: {major} minor: 0 feature_extension: {extension} }}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_block}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""
_HOPPER = dict(major=9, extension="ACCELERATED_FEATURES", cores=132, units=128, clock=1.98, l2=50 * 2**20,
               shared=228 * 2**10, shared_block=227 * 2**10)
_CARDS = {
    "h100": dict(_HOPPER, name="NVIDIA H100 80GB HBM3", memory=84942979072, bandwidth=3352320000000),
    "h200": dict(_HOPPER, name="NVIDIA H200", memory=151397597184, bandwidth=4800000000000),
    "a100": dict(name="NVIDIA A100-SXM4-80GB", memory=85100068864, bandwidth=2039040000000, major=8, extension="NONE",
                 cores=108, units=64, clock=1.41, l2=40 * 2**20, shared=164 * 2**10, shared_block=163 * 2**10),
}
# XLA chooses tiles of its own matrix kernels by trying them on a card, and fails without one: cuBLAS takes their place.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def devices(kind, count):
  """So many cards of a kind in one host. Raises errors.UserError."""
  if not importlib.util.find_spec("jax_cuda12_plugin"):
    raise errors.UserError(
        "--topology: JAX's compiler for NVIDIA cards is not installed; say make plan ARGS=..., which brings it, or pip "
        f"install --no-deps --target .libcuda jax-cuda12-plugin=={jaxlib.__version__} jax-cuda12-pjrt=="
        f"{jaxlib.__version__} and set PYTHONPATH=.libcuda")
  described = _TARGET.format(**_CARDS[kind])
  return topologies.get_topology_desc(platform="cuda", target_config=described, topology=f"1x1x{count}").devices


@contextlib.contextmanager
def cudnn():
  """A context in which JAX takes cuDNN 9.10 for installed: it asks the library itself, which only cards' hosts have."""
  with mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000):
    yield
