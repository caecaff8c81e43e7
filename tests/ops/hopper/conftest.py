import pytest
from helpers import plain_kernels as plain

from jlora.ops.hopper import (
    dropout_kernels,
    matmul_kernel,
    product_kernels,
    quantize_kernel,
    swiglu_kernel,
)


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts plain JAX of any size in the place of the kernels."""
    for module, name in (
        (product_kernels, "sum_of_products"),
        (product_kernels, "swiglu_forward"),
        (product_kernels, "swiglu_gradients"),
        (quantize_kernel, "quantize_rows"),
        (swiglu_kernel, "swiglu_and_lora_gradients"),
        (dropout_kernels, "dropped_x_times_a"),
        (dropout_kernels, "dropped_x_times_a_gradients"),
    ):
        monkeypatch.setattr(module, name, getattr(plain, name))
    monkeypatch.setattr(matmul_kernel, "ROWS", 1)
    monkeypatch.setattr(matmul_kernel, "COLUMNS", 1)
