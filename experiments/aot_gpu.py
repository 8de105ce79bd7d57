"""GPUs that need not be there, to compile for: `h100:8` is one host of eight.

Needs JAX's GPU plugin and NVIDIA's assembler, and neither a GPU nor its driver, on Linux:

pip install --no-deps jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX nvidia-cuda-nvcc-cu12     # JAX: the version of jax

Without a GPU, kernels cannot be timed against each other, so the compiler takes the first that it thinks of.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from jax.experimental import topologies

# What the compiler wants to know of a GPU: an `xla.gpu.GpuTargetConfigProto` as text. Numbers of the H100 SXM, from
# NVIDIA's data sheet and the CUDA programming guide's table of compute capability 9.0.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def missing() -> str | None:
    """Why nothing can be compiled for GPUs here; None if it can."""
    names = ("jax_cuda12_plugin", "jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")
    if lacking := [name for name in names if not _found(name)]:
        return (
            f"compiling for a GPU needs {', '.join(lacking)}, not installed: pip install --no-deps "
            "jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX nvidia-cuda-nvcc-cu12, with JAX the version of jax"
        )
    return None


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def gpu_devices(topology: str) -> list[Any]:
    """The devices of `h100:COUNT`.

    Raises:
        ValueError: There is no compiler, or no such topology.
    """
    kind, _, count = topology.partition(":")
    if kind != "h100" or not count.isdigit() or int(count) < 1:
        raise ValueError(f"topology={topology!r} is not known; of GPUs there is h100:COUNT, e.g. h100:8")
    if reason := missing():
        raise ValueError(reason)
    nvcc = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert nvcc is not None
    assert nvcc.submodule_search_locations is not None
    folder = next(iter(nvcc.submodule_search_locations))
    flags = f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology=f"1x1x{count}", target_config=H100
    )
    return list(described.devices)
