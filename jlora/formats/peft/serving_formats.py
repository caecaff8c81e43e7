"""What vLLM and llama.cpp load of an adapter, and an adapter in a form that they do.

Both read one rank and one scaling for all modules. llama.cpp also ignores rsLoRA.
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from jlora.errors import UnsupportedError, listing
from jlora.formats.open_model import open_config
from jlora.formats.peft.adapter import Adapter, padded_pair
from jlora.formats.peft.adapter_keys import EMBED_PATH
from jlora.formats.peft.named_base import open_named_base
from jlora.hub import is_hub_id
from jlora.lora.adapter_tree import HEAD

Reader = Literal["vllm", "gguf"]
# What vLLM accepts as --max-lora-rank; 16 is its default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MERGE = "merge the adapter with jlora export and serve the merged model"


def convert_for_serving(
    adapter: Adapter, reader: Reader, out: Path
) -> tuple[Adapter, str]:
    """Returns the adapter in a form that `reader` understands, and how to load it from `out`.

    Raises:
        UnsupportedError: parts that the reader cannot load, or a rank above vLLM's limit.
    """
    _check_supported(adapter, reader)
    config = adapter.config
    has_patterns = bool(config.rank_pattern or config.alpha_pattern)
    if has_patterns or (reader == "gguf" and config.use_rslora):
        adapter = with_one_rank(adapter)
    if reader == "gguf":
        base = adapter.config.base_model_name_or_path
        target = shlex.quote(str(out))
        return adapter, f"next: convert_lora_to_gguf.py {target}{_base_flag(base)}"
    rank = adapter.config.r
    if rank > VLLM_RANKS[-1]:
        raise UnsupportedError(
            f"{adapter.location}: rank {rank}; vLLM serves ranks up to {VLLM_RANKS[-1]}; "
            f"{_MERGE}"
        )
    needed = next(size for size in VLLM_RANKS if size >= rank)
    return adapter, f"serve with --enable-lora --max-lora-rank {needed}"


def _base_flag(base: str | None) -> str:
    """Returns the flag of llama.cpp's script for the base; it finds a hub id by itself."""
    if base and (Path(base) / "config.json").is_file():
        return f" --base {base}"
    if base and is_hub_id(base):
        return ""
    return " --base FOLDER (any with the base's config.json)"


def _check_supported(adapter: Adapter, reader: Reader) -> None:
    """Refuses what a reader does not load; some of it would be ignored without an error."""
    leaves = {leaf for found in adapter.tensors.values() for leaf in found}
    parts = {
        "DoRA (use_dora)": "lora_magnitude" in leaves,
        "biases": "trained_bias" in leaves,
        "rows of single tokens (trainable_token_indices)": "token_rows" in leaves,
        "whole weights (modules_to_save)": any(
            leaf.startswith("trained_") and leaf != "trained_bias" for leaf in leaves
        ),
        "a resized vocabulary": adapter.has_own_embeddings,
    }
    found = [part for part, is_there in parts.items() if is_there]
    on_embeddings = adapter.pairs.keys() & {EMBED_PATH, HEAD}
    if reader == "gguf" and on_embeddings and _is_tied(adapter):
        found.append("adapters on tied embeddings (embed_tokens or lm_head)")
    if found:
        name = {"vllm": "vLLM", "gguf": "llama.cpp"}[reader]
        raise UnsupportedError(
            f"{adapter.location}: {name} does not load {listing(found)}; {_MERGE}"
        )


def _is_tied(adapter: Adapter) -> bool:
    """Returns whether the base uses one matrix as input and output embedding."""
    if adapter.config.ensure_weight_tying:
        return True
    why = "finding out whether its embeddings are tied"
    return open_named_base(adapter, open_config, why).tie_word_embeddings


def with_one_rank(adapter: Adapter) -> Adapter:
    """Returns an adapter with the same update, one rank, scaling 1 and no patterns.

    lora_B is multiplied by the scaling, with one rounding, and smaller ranks are padded
    with zeros.
    """
    pairs = adapter.pairs
    rank = max(pair["lora_A"].shape[1] for pair in pairs.values())
    tensors = dict(adapter.tensors)
    for path, pair in pairs.items():
        scaled = pair["lora_B"] * np.float32(adapter.scalings[path])
        tensors[path] = pair | padded_pair(pair["lora_A"], scaled, rank)
    config = replace(
        adapter.config,
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
    )
    return Adapter.make(config, tensors, adapter.location, adapter.has_own_embeddings)
