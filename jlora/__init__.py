"""Fine-tune Llama models with LoRA in pure JAX.

    model, params, tokenizer = jlora.load("meta-llama/Llama-3.2-1B")
    params = jlora.add_lora(params, jlora.LoraConfig(r=8), jax.random.key(0))
    logits = model.apply({"params": params}, tokens)

`docs/architecture.md` explains the packages. A name below is imported when it is first
used, so that `import jlora` takes no time and starts no device.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlora.config.llama_config import LlamaConfig
    from jlora.config.lora_config import LoraConfig
    from jlora.fitting import fit
    from jlora.formats.peft.adapter_writer import save_adapter
    from jlora.loading import load
    from jlora.lora.adapter_tree import count_parameters, trainable_mask
    from jlora.lora.initialisation import add_lora
    from jlora.lora.lora_dense import LoRADense
    from jlora.lora.merging import merge
    from jlora.model.generation import generate
    from jlora.model.llama import Llama

__all__ = [
    "Llama",
    "LlamaConfig",
    "LoRADense",
    "LoraConfig",
    "add_lora",
    "count_parameters",
    "fit",
    "generate",
    "load",
    "merge",
    "save_adapter",
    "trainable_mask",
]
_PLACES = {
    "Llama": "model.llama",
    "LlamaConfig": "config.llama_config",
    "LoRADense": "lora.lora_dense",
    "LoraConfig": "config.lora_config",
    "add_lora": "lora.initialisation",
    "count_parameters": "lora.adapter_tree",
    "fit": "fitting",
    "generate": "model.generation",
    "load": "loading",
    "merge": "lora.merging",
    "save_adapter": "formats.peft.adapter_writer",
    "trainable_mask": "lora.adapter_tree",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(f"jlora.{_PLACES[name]}"), name)
        globals()[name] = value
        return value
    if name.isidentifier() and importlib.util.find_spec(f"jlora.{name}"):
        return importlib.import_module(f"jlora.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
