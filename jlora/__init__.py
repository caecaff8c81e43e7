"""Llama with LoRA in pure JAX: exact, fast, and small enough to read in an afternoon.

Names are loaded when they are asked for: what needs no JAX (reading data, converting
settings) does not wait for it.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.config.llama_config import LlamaConfig
    from jlora.config.lora_config import LoraConfig
    from jlora.lora.adapter_tree import count_parameters, trainable_mask
    from jlora.lora.initialisation import add_lora
    from jlora.lora.lora_dense import LoRADense
    from jlora.lora.merging import merge
    from jlora.model.llama import Llama

__all__ = [
    "Llama",
    "LlamaConfig",
    "LoRADense",
    "LoraConfig",
    "add_lora",
    "count_parameters",
    "merge",
    "trainable_mask",
]
_MODULES = {
    "Llama": "model.llama",
    "LlamaConfig": "config.llama_config",
    "LoRADense": "lora.lora_dense",
    "LoraConfig": "config.lora_config",
    "add_lora": "lora.initialisation",
    "count_parameters": "lora.adapter_tree",
    "merge": "lora.merging",
    "trainable_mask": "lora.adapter_tree",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"jlora.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if importlib.util.find_spec(f"jlora.{name}"):
        return importlib.import_module(f"jlora.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
