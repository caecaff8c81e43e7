"""The config.json of an exported model, for transformers 4 and 5, vLLM and llama.cpp.

These programs look for the dtype and the rotary settings in different places and have
different defaults. So each place gets the same numbers. All else is as in the source.
"""

import math
from typing import Any

from jlora.config.architectures import FAMILIES, find_family
from jlora.config.llama_config import LlamaConfig
from jlora.config.rope_config import RopeParameters, longrope_mscale, yarn_mscale

# What llama.cpp assumes if config.json has no such key at the top level.
_LLAMA_CPP_ORIGINAL_POSITIONS = 8192
_ORIGINAL = "original_max_position_embeddings"
_STRIPPED = ("auto_map", "quantization_config")


def export_config(
    hf_config: dict[str, Any], parsed: LlamaConfig, dtype: str
) -> dict[str, Any]:
    """Returns the config.json of an exported model whose tensors are mostly `dtype`.

    Args:
        hf_config: config.json of the base model.
        parsed: what it says.
        dtype: the new value of torch_dtype and dtype.
    """
    config = {
        key: value
        for key, value in hf_config.items()
        if key not in _STRIPPED and not key.startswith("_")
    }
    rope = parsed.rope_parameters
    scaling = _scaling(config, rope)
    config["rope_theta"] = rope.rope_theta
    config["rope_scaling"] = scaling if rope.rope_type != "default" else None
    config["rope_parameters"] = {**scaling, "rope_theta": rope.rope_theta}
    # For longrope, transformers 4 reads it only here; for llama3, llama.cpp does.
    original = rope.original_max_position_embeddings
    if rope.rope_type == "longrope" or (
        rope.rope_type == "llama3" and original != _LLAMA_CPP_ORIGINAL_POSITIONS
    ):
        config[_ORIGINAL] = original
    # The source may have an old spelling, or the class without a head.
    family = find_family({**config, "quantization_config": None})
    config["architectures"], config["model_type"] = [FAMILIES[family][0]], family
    config["torch_dtype"] = config["dtype"] = dtype
    return config


def reader_notes(config: LlamaConfig) -> list[str]:
    """Returns a note for each setting that vLLM or llama.cpp ignores without an error.

    Source: vLLM 0.33, `rotary_embedding.get_rope` (`tests/parity/vllm_reader.py` runs
    it) and older ones; llama.cpp, conversion/base.py and src/llama-context.cpp.
    """
    rope, longest = config.rope_parameters, config.max_position_embeddings
    original = rope.original_max_position_embeddings
    wrong = []
    if rope.rope_type == "dynamic":
        wrong = [
            "llama.cpp ignores it",
            f"{_cut(longest)}; 0.20 and older take the frequencies of the longest text "
            "for all",
        ]
    elif rope.rope_type == "longrope":
        wrong = [
            "llama.cpp ignores it for a Llama",
            "vLLM takes long_factor for every text unless max_model_len is "
            f"{original} or less",
        ]
        derived = longrope_mscale(longest / original, original)
        if not math.isclose(rope.attention_factor, derived):
            wrong.append(
                f"vLLM derives {derived:.6g} from the lengths where the model has "
                f"attention_factor {rope.attention_factor:.6g}"
            )
    elif rope.rope_type == "yarn":
        if not math.isclose(rope.attention_factor, yarn_mscale(rope.factor)):
            wrong.append(
                "llama.cpp, and vLLM before 0.30, ignore attention_factor and mscale"
            )
        if not rope.truncate:
            wrong.append("llama.cpp ignores truncate")
        positions = math.ceil(original * rope.factor)
        if positions < longest:
            wrong.append(_cut(positions))
    notes = [
        f"note: rope type {rope.rope_type}: {what}; transformers serves it as trained"
        for what in wrong
    ]
    if config.sliding_window:
        notes.append(
            f"note: sliding_window={config.sliding_window}: llama.cpp ignores it for this "
            "architecture, and is the same up to that length"
        )
    return notes


def _cut(positions: int) -> str:
    return (
        f"vLLM has {positions} positions but accepts longer texts, set its max_model_len "
        f"to {positions}"
    )


def _scaling(config: dict[str, Any], rope: RopeParameters) -> dict[str, Any]:
    """Returns the rotary settings without theta; defaults are written out as numbers."""
    if rope.rope_type == "default":
        return {"rope_type": "default"}
    group = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    for key in ("type", "rope_theta"):
        group.pop(key, None)
    group |= {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type in ("llama3", "yarn", "longrope"):
        group[_ORIGINAL] = rope.original_max_position_embeddings
    if rope.rope_type == "longrope":  # its default differs between versions
        group["attention_factor"] = rope.attention_factor
    return group
