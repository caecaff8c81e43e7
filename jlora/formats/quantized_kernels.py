"""Quantises and dequantises the kernels of the projections, a few columns at a time."""

import numpy as np

from jlora.errors import UnsupportedError
from jlora.formats.array_blocks import empty, for_each
from jlora.formats.safetensors_file import Spec
from jlora.ops.quantize import Format, kernel_of, quantize_kernel, quantized_shapes

# Columns that are quantised at a time: a few megabytes of float32.
_COLUMNS = 128


def is_quantizable(path: str) -> bool:
    """Whether a params path is the kernel of one of the seven projections of a layer."""
    return path.startswith("layers/") and path.endswith("/kernel")


def quantized_specs(
    path: str, shape: tuple[int, ...], quantize: Format
) -> dict[str, Spec]:
    """Returns {params path: spec} of the codes and scales of a quantised kernel.

    Raises:
        UnsupportedError: the format cannot hold this shape.
    """
    stem = path.removesuffix("kernel")
    rows, columns = shape
    try:
        shapes = quantized_shapes((rows, columns), quantize)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    return {stem + leaf: Spec(*what) for leaf, what in shapes.items()}


def quantize_tensor(
    path: str, kernel: np.ndarray, quantize: Format
) -> dict[str, np.ndarray]:
    """Returns {params path: array}, the codes and scales of a kernel."""
    specs = quantized_specs(path, kernel.shape, quantize)
    arrays = {leaf: empty(spec.shape, spec.dtype) for leaf, spec in specs.items()}

    def columns(start: int) -> None:
        part = slice(start, start + _COLUMNS)
        found = quantize_kernel(kernel[:, part], quantize)
        for leaf, array in arrays.items():
            array[..., part] = found[leaf.rpartition("/")[2]]

    for_each(columns, range(0, kernel.shape[1], _COLUMNS))
    return arrays


def dequantize_tensor(
    arrays: dict[str, np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """Returns the float32 kernel of {params path: codes or scales}."""
    result = empty(shape, np.float32)

    def columns(start: int) -> None:
        part = slice(start, start + _COLUMNS)
        leaves = {
            leaf.rpartition("/")[2]: array[..., part] for leaf, array in arrays.items()
        }
        result[:, part] = kernel_of(leaves, np.float32)

    for_each(columns, range(0, shape[1], _COLUMNS))
    return result
