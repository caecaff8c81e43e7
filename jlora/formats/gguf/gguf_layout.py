"""Names and row order of a Llama's tensors in GGUF.

The rows of q and k are in another order than HF's, as llama.cpp's rotary embedding
interleaves the pairs that turn together.

Source: llama.cpp, convert_hf_to_gguf.py.
"""

import re

import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.formats.tensor_names import Name

_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(key: str) -> str:
    """Returns the name in GGUF of a tensor with this HF key."""
    module, _, suffix = key.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
    if layer:
        return f"blk.{layer[1]}.{_MODULES[layer[2]]}.{suffix}"
    return f"{_MODULES[module]}.{suffix}"


def restore_rows(array: np.ndarray, name: Name, config: LlamaConfig) -> np.ndarray:
    """Returns a tensor of GGUF with its rows in HF's order: (head, half, pair).

    llama.cpp stores those of q and k as (head, pair, half).
    """
    return _swapped(array, name, config, (config.head_dim // 2, 2))


def interleave_rows(array: np.ndarray, name: Name, config: LlamaConfig) -> np.ndarray:
    """Returns a tensor with its rows in the order of GGUF: the inverse of `restore_rows`."""
    return _swapped(array, name, config, (2, config.head_dim // 2))


def _swapped(
    array: np.ndarray, name: Name, config: LlamaConfig, parts: tuple[int, int]
) -> np.ndarray:
    if ".q_proj." in name.key:
        heads = config.num_attention_heads
    elif ".k_proj." in name.key:
        heads = config.num_key_value_heads
    else:
        return array
    pairs = array.reshape(heads, *parts, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
