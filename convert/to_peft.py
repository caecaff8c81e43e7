"""Writes the adapter of a run as a PEFT folder, if need be in a form others read."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL
from jlora.errors import JloraError, UnsupportedError, listing
from jlora.formats.atomic_folder import check_target
from jlora.formats.hub import is_hub_id
from jlora.formats.open_model import open_config
from jlora.formats.peft.adapter_base import from_base
from jlora.formats.peft.adapter_config import warn
from jlora.formats.peft.adapter_keys import EMBEDDING, HEAD
from jlora.formats.peft.attach_adapter import Adapter, plain, save_adapter
from jlora.loading import open_adapter

# What vLLM accepts as --max-lora-rank; 16 is its default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MERGE = "merge the adapter with convert.to_hf and serve the merged model"


@dataclass(frozen=True)
class Arguments:
    """Write a run's adapter as a PEFT adapter folder."""

    out: str = field(metadata=POSITIONAL)
    """Folder to write; it appears whole or not at all."""
    adapter: str
    """Run folder of train.py, or PEFT adapter folder."""
    for_: Literal["peft", "vllm", "gguf"] = "peft"
    """Who reads it: PEFT, vLLM, or llama.cpp's convert_lora_to_gguf.py."""
    overwrite: bool = False
    """Replace OUT if it is an adapter folder."""


def main(arguments: Arguments) -> None:
    """Reads, adapts to the reader and writes."""
    out = Path(arguments.out)
    check_target(out, arguments.overwrite)
    adapter, notes = open_adapter(arguments.adapter), []
    source = adapter.location
    adapter = mark_resized(plain(adapter))
    if arguments.for_ != "peft":
        adapter, notes = adapt(adapter, arguments.for_)
    save_adapter(adapter, out, overwrite=arguments.overwrite, source=source)
    print(f"{out}: {len(adapter.tensors)} modules, written for {arguments.for_}")
    for note in notes:
        print(note)


def mark_resized(adapter: Adapter) -> Adapter:
    """Returns the adapter, marked if its tables have another vocabulary than its base.

    PEFT writes the tables of adapted modules in any case; copies of the base's own are
    left out.
    """
    brings = any(
        {"embedding", "kernel"} & leaves.keys() for leaves in adapter.tensors.values()
    )
    if adapter.resized or not brings:
        return adapter
    try:
        rows = from_base(
            adapter, open_config, "telling a resized vocabulary"
        ).vocab_size
    except JloraError as error:
        warn(f"{error}; its copy of the base's tables is left out")
        return adapter
    return replace(adapter, resized=rows != adapter.vocab_size)


def adapt(
    adapter: Adapter, reader: Literal["vllm", "gguf"]
) -> tuple[Adapter, list[str]]:
    """Returns the adapter as `reader` understands it, and what its user has to know.

    Both readers take one rank and one alpha for all modules; llama.cpp also ignores
    rsLoRA.

    Raises:
        UnsupportedError: parts that the reader cannot load, or a rank above vLLM's largest.
    """
    config = adapter.config
    _refuse(adapter, reader)
    uneven = bool(config.rank_pattern or config.alpha_pattern)
    if uneven or (reader == "gguf" and config.use_rslora):
        adapter = bake(adapter)
    rank = adapter.config.r
    if reader == "gguf":
        base = adapter.config.base_model_name_or_path
        return adapter, [f"next: convert_lora_to_gguf.py OUT{_base_flag(base)}"]
    if rank > VLLM_RANKS[-1]:
        raise UnsupportedError(
            f"{adapter.location}: rank {rank}; vLLM serves ranks up to {VLLM_RANKS[-1]}; "
            f"{_MERGE}"
        )
    needed = next(size for size in VLLM_RANKS if size >= rank)
    return adapter, [f"serve with --enable-lora --max-lora-rank {needed}"]


def _base_flag(base: str | None) -> str:
    """Returns what tells llama.cpp's script the base; a hub id it finds by itself."""
    if base and (Path(base) / "config.json").is_file():
        return f" --base {base}"
    if base and is_hub_id(base) and not Path(base).exists():
        return ""
    return " --base FOLDER (any with the base's config.json)"


def _refuse(adapter: Adapter, reader: Literal["vllm", "gguf"]) -> None:
    """Refuses what a reader stops at or, worse, drops without a word."""
    leaves = {leaf for found in adapter.tensors.values() for leaf in found}
    parts = {
        "DoRA (use_dora)": "lora_magnitude" in leaves,
        "biases": "trained_bias" in leaves,
        "rows of single tokens (trainable_token_indices)": "token_rows" in leaves,
        "whole weights (modules_to_save)": any(
            leaf.startswith("trained_") and leaf != "trained_bias" for leaf in leaves
        ),
        "a resized vocabulary": adapter.resized,
    }
    found = [part for part, there in parts.items() if there]
    if (
        reader == "gguf"
        and adapter.pairs.keys() & {EMBEDDING, HEAD}
        and _is_tied(adapter)
    ):
        found.append("adapters on either end of a table that embedding and head share")
    if found:
        name = {"vllm": "vLLM", "gguf": "llama.cpp"}[reader]
        raise UnsupportedError(
            f"{adapter.location}: {name} does not load {listing(found)}; {_MERGE}"
        )


def _is_tied(adapter: Adapter) -> bool:
    """Returns whether the base ties its head to the embedding, as it says itself."""
    if adapter.config.ensure_weight_tying:
        return True
    why = "telling whether embedding and head share a table"
    return from_base(adapter, open_config, why).tie_word_embeddings


def bake(adapter: Adapter) -> Adapter:
    """Returns the same update with one rank, scaling 1 and no patterns.

    Scalings move into lora_B (one rounding, none for powers of two); smaller ranks are
    padded with zeros.
    """
    rank = max(pair["lora_A"].shape[1] for pair in adapter.pairs.values())
    tensors = {path: dict(leaves) for path, leaves in adapter.tensors.items()}
    for path, pair in adapter.pairs.items():
        extra = rank - pair["lora_A"].shape[1]
        scaled = pair["lora_B"] * np.float32(adapter.scalings[path])
        tensors[path] |= {
            "lora_A": np.pad(pair["lora_A"], ((0, 0), (0, extra))),
            "lora_B": np.pad(scaled, ((0, extra), (0, 0))),
        }
    config = replace(
        adapter.config,
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
    )
    return replace(
        adapter,
        config=config,
        tensors=tensors,
        scalings=dict.fromkeys(adapter.pairs, 1.0),
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
