"""How fast a step can be: floating-point operations of a token, and peaks of devices."""

import jax

from jlora.config.llama_config import LlamaConfig
from jlora.lora.adapter_tree import Params, is_adapter, is_trainable, modules
from jlora.ops.quantize import SCALES, num_weights
from jlora.parallel.described_devices import kind_of


def flops_per_token(params: Params, config: LlamaConfig, length: int) -> float:
    """Returns the model FLOPs of one trained token.

    4 per frozen weight in a matmul (forward and input gradient; a frozen weight has no
    gradient of its own), 6 per trained one, and causal attention forward and backward.
    Recomputation does not count.
    """
    frozen = trained = 0
    for leaves in modules(params).values():
        sizes = {k: num_weights(leaf) for k, leaf in leaves.items() if k not in SCALES}
        if "trained_kernel" in sizes:
            sizes |= {"kernel": 0, "kernel_q": 0}
        if "embedding" in sizes and "kernel" in params.get("lm_head", {}):
            sizes["embedding"] = 0  # looked up, not multiplied
        trained += sum(
            size
            for key, size in sizes.items()
            if is_trainable(key) and key != "trained_embedding"
        )
        frozen += sum(size for key, size in sizes.items() if not is_adapter(key))
    attention = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 4 * frozen + 6 * trained + 7 * attention * length


def peak_flops(devices: int) -> float | None:
    """Returns the bfloat16 peak of so many devices together, or None where it is not known."""
    kind = kind_of(jax.devices()[0])
    return kind.products["bf16"] * devices if kind else None
