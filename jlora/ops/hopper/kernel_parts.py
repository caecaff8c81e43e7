"""What all kernels for Hopper GPUs share: sizes, shared memory and the launch."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.ops.hopper import mosaic_gpu as plgpu

# Columns of a step of the inner loop: one row of the 128-byte swizzle in bfloat16.
DEPTH = 64
# Registers of a thread that copies, and of one that multiplies.
COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 232
# The largest rank of dropout_kernels, whose sums stay in registers, and of swiglu_kernel,
# whose tiles fit in shared memory.
MAX_RANK = 32


def transposed_view(ref: Any) -> Any:
    """Returns the view of a tile with its axes exchanged."""
    with warnings.catch_warnings():
        # jax 0.12 prefers a method that 0.10 does not have.
        warnings.simplefilter("ignore", DeprecationWarning)
        return plgpu.transpose_ref(ref, (1, 0))


def from_global(ref: Any, place: Any) -> Any:
    """Returns part of a vector in global memory, in whatever order registers need it."""
    with warnings.catch_warnings():
        # jax 0.11 wants the place as part of ref, which 0.10 does not take.
        warnings.simplefilter("ignore", DeprecationWarning)
        return plgpu.load(ref, (place,), optimized=False)


def depth_of(dtype: Any) -> int:
    """Returns the columns of a step of the inner loop: 128 bytes of a row."""
    return 2 * DEPTH // jnp.dtype(dtype).itemsize


def shared_tiles(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Returns shared memory laid out for the tensor cores; 128 bytes deep at most."""
    depth = min(depth_of(dtype), shape[-1])
    swizzle = depth * jnp.dtype(dtype).itemsize
    layout = plgpu.TilingTransform((8, depth)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=layout)


def multiprocessors() -> int:
    """Returns how many thread blocks the GPU runs at a time."""
    return getattr(jax.devices()[0], "core_count", 132)


def build_kernel(
    body: Callable[..., None],
    outputs: Any,
    scratch: Sequence[Any],
    *,
    grid: Mapping[str, int],
    warpgroups: int,
    interpret: Any,
    cluster: Mapping[str, int] | None = None,
    approx_math: bool = False,
) -> Callable[..., Any]:
    """Returns the function that runs the kernel.

    Args:
        body: the program of one warpgroup.
        outputs: shapes and dtypes of the results.
        scratch: shared memory and barriers of a thread block.
        grid: {name: number} of thread blocks along each axis.
        warpgroups: of a thread block, the copying one included.
        interpret: simulates the GPU on a CPU, for tests.
        cluster: likewise for the thread blocks that share tiles.
        approx_math: use the fast exponential.
    """
    cluster = cluster or {}
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=approx_math,
        ),
        interpret=interpret,
    )
