"""One small trained adapter of each method that jlora trains, on a Llama of one layer."""

from typing import Any

import jax

from helpers.training_cases import llama_config, moved, random_params
from jlora.config.llama_config import LlamaConfig
from jlora.config.lora_config import LoraConfig
from jlora.lora.adapter_tree import Params
from jlora.lora.initialisation import add_lora

EVERYWHERE = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
# Whether the base model ties its head, and the settings of the adapter.
METHODS: dict[str, tuple[bool, dict[str, Any]]] = {
    "dora": (False, {"target_modules": EVERYWHERE, "use_dora": True}),
    "dora, tied": (True, {"target_modules": EVERYWHERE, "use_dora": True}),
    "saved": (False, {"modules_to_save": ["norm", "lm_head", "embed_tokens"]}),
    "saved head, tied": (True, {"modules_to_save": ["lm_head"]}),
    "saved, shared": (
        True,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "lora, shared": (
        True,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens": (
        False,
        {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [7]}},
    ),
    "tokens, tied": (True, {"trainable_token_indices": [3, 1]}),
    "olora": (False, {"init_lora_weights": "olora", "use_dora": True}),
}


def trained_adapter(method: str) -> tuple[LlamaConfig, Params, LoraConfig]:
    """Returns the architecture, all parameters and the adapter's settings."""
    tied, fields = METHODS[method]
    config = llama_config(num_hidden_layers=1, tie_word_embeddings=tied)
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 3}
    lora = LoraConfig(**(settings | fields))
    return config, moved(add_lora(random_params(config), lora, jax.random.key(1))), lora
