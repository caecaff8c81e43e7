"""How a model computes: what `auto` means for dtype, attention and kernels.

The choice is for the devices of a mesh, also where this machine has others. Remat is chosen
by what fits, in `jlora.train.memory_estimate`.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.config.run_config import ComputeConfig
from jlora.errors import UsageError

# Sizes of a head that cuDNN's flash kernel takes, forward and backward.
_CUDNN_HEAD_MULTIPLE, _CUDNN_HEAD_LIMIT = 8, 128


def default_platform() -> str:
    """Returns cpu, gpu or tpu: the platform of JAX's default devices."""
    return jax.default_backend()


@dataclass(frozen=True)
class Compute:
    """The dtype and the implementations that a model uses; see `choose_compute`.

    Attributes:
        platform: cpu, gpu or tpu; operations take the form that is fastest there.
        dtype: of activations and matrix products.
        attention: xla, cudnn or splash; see `jlora.ops.attention`.
        kernels: of the projections, xla or hopper; see `jlora.lora.projections`.
        code_products: stored formats whose codes are multiplied as they are, by activations
            of the same format; weights of other formats are dequantised first.
        remat: none, minimal, full or offload; what the backward pass recomputes.
        max_segments: most documents in a row; cudnn needs it for packed rows.
        row_shards: shards of the batch axis that the model sees; set by the step.
    """

    platform: str = field(default_factory=default_platform)
    dtype: Any = jnp.float32
    attention: str = "xla"
    kernels: str = "xla"
    code_products: tuple[str, ...] = ()
    remat: str = "none"
    max_segments: int = 0
    row_shards: int = 1

    @property
    def loss_chunk_tokens(self) -> int:
        """Tokens per device whose logits exist at one time.

        Enough for full-speed matrix products. A CPU gets fewer, because there every pass
        of the softmax over more logits goes to memory.
        """
        return 512 if self.platform == "cpu" else 1024


def choose_compute(
    wanted: ComputeConfig, mesh: Mesh, *, head_dim: int, max_segments: int = 0
) -> Compute:
    """Returns what the flags mean for the devices of this mesh.

    Raises:
        UsageError: an attention or kernels that cannot run on these devices.
    """
    platform = mesh.devices.flat[0].platform
    dtype = choose_dtype(wanted.dtype, platform)
    return Compute(
        platform=platform,
        dtype=dtype,
        attention=choose_attention(
            wanted.attention, platform=platform, dtype=dtype, head_dim=head_dim
        ),
        kernels=choose_kernels(wanted.kernels, dtype=dtype, mesh=mesh),
        code_products=choose_code_products(dtype, mesh),
        max_segments=max_segments,
    )


def choose_dtype(wanted: str, platform: str) -> Any:
    """Returns the dtype of activations; auto is bfloat16 on GPU and TPU, else float32."""
    if wanted == "auto":
        wanted = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(wanted)


def choose_attention(wanted: str, *, platform: str, dtype: Any, head_dim: int) -> str:
    """Returns the attention to use; auto is cudnn or splash where it can run, else xla.

    The kernels round queries and keys to bfloat16, so auto takes neither with float32.

    Raises:
        UsageError: cudnn or splash is wanted where it cannot run.
    """
    fits = head_dim % _CUDNN_HEAD_MULTIPLE == 0 and head_dim <= _CUDNN_HEAD_LIMIT
    needed = {"splash": ("tpu", "a TPU"), "cudnn": ("gpu", "an NVIDIA GPU")}.get(wanted)
    if needed and platform != needed[0]:
        raise UsageError(
            f"compute.attention={wanted} needs {needed[1]}, and this is {platform}; use "
            "auto or xla"
        )
    if wanted == "cudnn" and not fits:
        raise UsageError(
            f"compute.attention=cudnn takes heads of at most {_CUDNN_HEAD_LIMIT} in "
            f"multiples of {_CUDNN_HEAD_MULTIPLE}, and this model has head_dim="
            f"{head_dim}; use auto or xla"
        )
    if wanted != "auto":
        return wanted
    if dtype != jnp.bfloat16:
        return "xla"
    if platform == "tpu":  # any size of a head: the kernel pads what it holds
        return "splash"
    return "cudnn" if platform == "gpu" and fits else "xla"


def choose_code_products(dtype: Any, mesh: Mesh) -> tuple[str, ...]:
    """Returns the stored formats whose codes these devices multiply faster than bfloat16.

    Tensor cores take int8 from compute capability 8.0 (A100) and fp8 from 8.9 (L4, RTX 4090,
    H100); TPUs take int8. With float32 activations nothing is rounded to codes.
    """
    if dtype != jnp.bfloat16:
        return ()
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return ("int8",)
    capability = getattr(device, "compute_capability", None) or ""
    numbers = capability.split(".")
    if not all(number.isdigit() for number in numbers):  # not an NVIDIA GPU
        return ()
    version = tuple(int(number) for number in numbers)
    least = {"int8": (8, 0), "fp8": (8, 9)}
    return tuple(name for name, needed in least.items() if version >= needed)


def choose_kernels(wanted: str, *, dtype: Any, mesh: Mesh) -> str:
    """Returns the kernels of the projections; auto is hopper where it can run, else xla.

    Even then calls that `jlora.lora.projections` cannot fuse use XLA.

    Raises:
        UsageError: hopper is wanted where it cannot run.
    """
    device = mesh.devices.flat[0]
    capability = getattr(device, "compute_capability", "")
    can_run = device.platform == "gpu" and capability == "9.0" and dtype == jnp.bfloat16
    if wanted == "hopper" and not can_run:
        raise UsageError(
            "compute.kernels=hopper needs an H100 or H200 and compute.dtype bfloat16, "
            f"and this is {device.device_kind} with {jnp.dtype(dtype).name}; use "
            "auto or xla"
        )
    if wanted != "auto":
        return wanted
    return "hopper" if can_run else "xla"
