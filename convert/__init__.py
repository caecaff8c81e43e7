"""The commands of conversion and export; `load` is `jlora.load` without the tokenizer."""

from typing import TYPE_CHECKING

import jlora

if TYPE_CHECKING:
    from jlora.formats.model_source import Dtype
    from jlora.lora.adapter_tree import Params
    from jlora.model.llama import Llama


def load(
    path: str, adapter: str | None = None, dtype: "Dtype" = "float32"
) -> "tuple[Llama, Params]":
    """Returns the model and its params; arguments as `jlora.load`."""
    return jlora.load(path, adapter, dtype)[:2]
