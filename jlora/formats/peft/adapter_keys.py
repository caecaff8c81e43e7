"""The names of an adapter's tensors: PEFT key <-> (module, leaf).

A key is `base_model.model.`, the module's HF name and an ending. Leaves are named as in
`jlora.lora.adapter_tree`. `parse_key` has names of its own for whole weights and biases,
because the settings say whether these were trained; `adapter_reader.py` decides that.

Source: PEFT `utils/save_and_load.py`, `get_peft_model_state_dict`.
"""

import re
from collections.abc import Collection, Iterable

import numpy as np

from jlora.formats.tensor_names import is_transposed, module_name, module_path
from jlora.lora.adapter_tree import EMBEDDING

PREFIX = "base_model.model."
EXAMPLE = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
# Params path of the input embedding; that of the head is its HF name, `HEAD`.
EMBED_PATH = module_path(EMBEDDING)
# Where a tied head shares the embedding's adapter, PEFT writes it under both names: leaf of
# the head -> leaf of the embedding whose transpose it is.
TIED_COPIES = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "trained_kernel": "trained_embedding",
}
_ENDINGS = {
    "lora_A": r"lora_A(?:\.default)?\.weight",
    "lora_B": r"lora_B(?:\.default)?\.weight",
    "embedding_A": r"lora_embedding_A(?:\.default)?(?:\.weight)?",
    "embedding_B": r"lora_embedding_B(?:\.default)?(?:\.weight)?",
    "lora_magnitude": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "token_rows": r"token_adapter\.trainable_tokens_delta(?:\.default)?",
    # After the vocabulary was resized, PEFT writes all weights of an adapted or saved
    # embedding.
    "base_weight": r"(?:base_layer|original_module)\.weight",
    "copy": r"modules_to_save(?:\.default)?\.weight",
    "base_bias": r"base_layer\.bias",
    "weight": r"weight",
    "bias": r"bias",
}
# As DDP: `module.` around all, or around the model.
_WRAPPED = re.compile(rf"^(?:module\.)?({re.escape(PREFIX)})(?:module\.)?")
_TEXT_PART = re.compile(
    rf"^{re.escape(PREFIX)}(?:language_model\.model\.|model\.language_model\.)"
)
_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)\.(?:"
    + "|".join(f"(?P<{leaf}>{ending})" for leaf, ending in _ENDINGS.items())
    + ")"
)


def unwrapped(keys: Iterable[str]) -> dict[str, str]:
    """Returns {key: key without what wrappers of the model put into it}.

    torch.compile, FSDP and DDP name themselves; a multimodal model's text part is
    `language_model`, which is left out only if all keys are of it.
    """
    plain = {
        key: _WRAPPED.sub(r"\1", key.replace("_orig_mod.", "")).replace(
            "_fsdp_wrapped_module.", ""
        )
        for key in keys
    }
    of_text = {
        key: _TEXT_PART.sub(PREFIX + "model.", text) for key, text in plain.items()
    }
    return of_text if all(of_text[key] != plain[key] for key in plain) else plain


def parse_key(key: str) -> tuple[str, str] | None:
    """Returns (HF module name, leaf) of a PEFT key; None if it is not of PEFT's form."""
    match = _KEY.fullmatch(key)
    if match is None or match.lastgroup is None or ".lora_" in match["module"]:
        return None
    module, leaf = match["module"], match.lastgroup
    if leaf.startswith("embedding_") or leaf in ("lora_A", "lora_B"):
        is_embedding = module.rpartition(".")[2] == EMBED_PATH
        if is_embedding != leaf.startswith("embedding_"):
            return None
        leaf = f"lora_{leaf[-1]}"
    return module, leaf


def adapter_key(path: str, leaf: str, siblings: Collection[str] = ()) -> str:
    """Returns the PEFT key of a leaf.

    Args:
        path: params path of its module.
        leaf: its name.
        siblings: the adapter's leaves of the same module, which change some keys.
    """
    adapted = "lora_A" in siblings
    if leaf in ("lora_A", "lora_B"):
        form = f"lora_embedding_{leaf[-1]}" if path == EMBED_PATH else f"{leaf}.weight"
    elif leaf == "trained_bias":
        form = "base_layer.bias" if adapted else "bias"
    elif leaf in ("embedding", "kernel"):
        saved = f"trained_{leaf}" in siblings
        parts = ["base_layer"] if adapted else []
        parts += ["original_module"] if saved else []
        form = ".".join([*parts, "weight"])
    else:
        form = {
            "lora_magnitude": "lora_magnitude_vector",
            "token_rows": "token_adapter.trainable_tokens_delta",
        }.get(leaf, "weight")
    return f"{PREFIX}{module_name(path)}.{form}"


def convert_layout(leaf: str, array: np.ndarray) -> np.ndarray:
    """Converts a tensor from PEFT's layout to jlora's, or back; the result is contiguous."""
    return np.ascontiguousarray(array.T if is_transposed(leaf) else array)
