"""Options with which XLA compiles a step."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from jlora.lora.adapter_tree import Params

# cuBLASLt adds an adapter's product while it writes the layer's; Triton's matmuls,
# which XLA prefers for few columns, need a pass of their own. The library that multiplies
# on a CPU is slower than XLA's own loops at the sums and scalings around a product, which
# by default it is given, too.
COMPILER_OPTIONS = {
    "gpu": {"xla_gpu_enable_triton_gemm": False},
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
        "LIBRARY_FUSION_TYPE_REDUCE"
    },
}


def compiler_options(mesh: Mesh, params: Params) -> Any:
    """Returns the options for the devices of this mesh and these parameters."""
    platform = mesh.devices.flat[0].platform
    if platform == "gpu" and mesh.shape["fsdp"] > 1:
        # XLA then gathers a whole layer at once. Of several smaller ones, it starts each when
        # the one before has ended, and few beside attention.
        sizes = [
            sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(layer))
            for layer in params["layers"].values()
        ]
        limit = "xla_gpu_all_gather_combine_threshold_bytes"
        return {**COMPILER_OPTIONS[platform], limit: 2 * max(sizes)}
    return COMPILER_OPTIONS.get(platform)
