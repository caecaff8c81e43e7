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
    from jlora.lora import LoRADense, count_parameters, trainable_mask
    from jlora.lora_init import add_lora
    from jlora.merging import merge
    from jlora.model import Llama

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
    "Llama": "model",
    "LlamaConfig": "config.llama_config",
    "LoRADense": "lora",
    "LoraConfig": "config.lora_config",
    "add_lora": "lora_init",
    "count_parameters": "lora",
    "merge": "merging",
    "trainable_mask": "lora",
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
