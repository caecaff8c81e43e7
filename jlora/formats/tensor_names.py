"""The table of tensor names, from which every conversion derives its own.

A params path is the HF key without `model.` and `.weight`. Its last part names the leaf:
`kernel` ([in, out], the transpose of HF's [out, in]), `embedding` ([V, D]), `scale` ([D])
or `bias` ([out]). Paths are written with slashes, as in `layers/0/self_attn/q_proj/kernel`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jlora.config.llama_config import LlamaConfig


@dataclass(frozen=True)
class Name:
    """One tensor: its HF key, its params path and its shape in HF's layout."""

    key: str
    path: str
    hf_shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether jlora stores the transpose of HF's matrix."""
        return is_transposed(self.path.rpartition("/")[2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape in jlora's layout."""
        return self.hf_shape[::-1] if self.transposed else self.hf_shape

    def to_params(self, array: np.ndarray) -> np.ndarray:
        """Converts a tensor from HF's layout to jlora's, or back."""
        return array.T if self.transposed else array


def is_transposed(leaf: str) -> bool:
    """Returns whether jlora stores the transpose of HF's or PEFT's matrix."""
    return leaf in ("lora_A", "lora_B", "kernel", "trained_kernel")


def all_names(config: LlamaConfig) -> list[Name]:
    """Returns every tensor of the model in HF's order; a tied head has no entry."""
    d, f = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q, d, config.attention_bias),
        "self_attn.k_proj": (kv, d, config.attention_bias),
        "self_attn.v_proj": (kv, d, config.attention_bias),
        "self_attn.o_proj": (d, q, config.attention_bias),
        "mlp.gate_proj": (f, d, config.mlp_bias),
        "mlp.up_proj": (f, d, config.mlp_bias),
        "mlp.down_proj": (d, f, config.mlp_bias),
    }
    names = [_name("model.embed_tokens", "embedding", (config.vocab_size, d))]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for linear, (out_features, in_features, bias) in linears.items():
            module = f"{layer}.{linear}"
            names.append(_name(module, "kernel", (out_features, in_features)))
            if bias:
                names.append(_name(module, "bias", (out_features,)))
        names.append(_name(f"{layer}.input_layernorm", "scale", (d,)))
        names.append(_name(f"{layer}.post_attention_layernorm", "scale", (d,)))
    names.append(_name("model.norm", "scale", (d,)))
    if not config.tie_word_embeddings:
        names.append(_name("lm_head", "kernel", (config.vocab_size, d)))
    return names


def _name(module: str, leaf: str, shape: tuple[int, ...]) -> Name:
    suffix = "bias" if leaf == "bias" else "weight"
    return Name(f"{module}.{suffix}", f"{module_path(module)}/{leaf}", shape)


def module_path(module: str) -> str:
    """Returns the params path of an HF module name: `model.norm` -> `norm`."""
    return module.removeprefix("model.").replace(".", "/")


def module_name(path: str) -> str:
    """Returns the HF module name of a params path: the inverse of `module_path`."""
    name = path.replace("/", ".")
    return name if name == "lm_head" else f"model.{name}"


def set_leaf(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Sets the leaf at a slash-separated path of a nested dict."""
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
