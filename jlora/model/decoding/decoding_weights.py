"""The weights in the form in which a step is fastest: adapters merged where that is possible."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.lora.adapter_tree import Params, is_adapter, module_at, modules
from jlora.lora.merging import merge
from jlora.ops.matmul import matmul_float32
from jlora.ops.quantize import is_quantized

_PLAIN = {"kernel", "lora_A", "lora_B", "lora_scaling"}


def decoding_weights(params: Params) -> Params:
    """Returns the weights with adapters merged, so that a step costs what the base's does.

    LoRA on dense layers is merged on the devices, in float32 and rounded once, which is
    `jlora.merge` but for the order of sums; other adapters by `jlora.merge`, in host memory.
    Adapters over a quantised base stay beside it.

    Args:
        params: a tree that is used up: its kernels are replaced one by one, so that
            no second copy of the model exists.
    """
    adapted = {
        name: leaves
        for name, leaves in modules(params).items()
        if any(map(is_adapter, leaves))
    }
    if any(map(is_quantized, adapted.values())):
        return params
    if any(leaves.keys() - {"bias"} != _PLAIN for leaves in adapted.values()):
        return merge(params)
    for name in list(adapted):
        del adapted[name]
        leaves = module_at(params, name)
        factors = [leaves.pop(f"lora_{key}") for key in ("A", "B", "scaling")]
        leaves["kernel"] = _merged(leaves.pop("kernel"), *factors)
    return params


@partial(jax.jit, donate_argnums=0)
def _merged(
    kernel: Float[Array, "D_in D_out"],
    a: Float[Array, "D_in R"],
    b: Float[Array, "R D_out"],
    scaling: Float[Array, ""],
) -> Float[Array, "D_in D_out"]:
    update = matmul_float32(a, b) * scaling
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
