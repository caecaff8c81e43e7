"""Writes the adapter of a run as a PEFT folder, if need be in a form others read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from convert.peft import Adapter, open_adapter, save_adapter
from convert.safetensors import check_target
from jlora.cli import run_command
from jlora.errors import UnsupportedError

# What vLLM accepts as --max-lora-rank; 16 is its default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Arguments:
    """Write a run's adapter as a PEFT adapter folder."""

    out: str
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
    adapter = open_adapter(arguments.adapter)
    notes = []
    if arguments.for_ != "peft":
        adapter, notes = adapt(adapter, arguments.for_)
    save_adapter(adapter, out, overwrite=arguments.overwrite, source=adapter.location)
    print(f"{out}: {len(adapter.tensors)} modules, written for {arguments.for_}")
    for note in notes:
        print(note)


def adapt(
    adapter: Adapter, reader: Literal["vllm", "gguf"]
) -> tuple[Adapter, list[str]]:
    """Returns the adapter as `reader` understands it, and what its user has to know.

    Both readers take one rank and one alpha for all modules; llama.cpp also ignores
    rsLoRA.

    Raises:
        UnsupportedError: the rank is above vLLM's largest.
    """
    config = adapter.config
    uneven = bool(config.rank_pattern or config.alpha_pattern)
    if uneven or (reader == "gguf" and config.use_rslora):
        adapter = bake(adapter)
    rank = adapter.config.r
    if reader == "gguf":
        base = adapter.base_model_name_or_path
        hint = "" if base else "; the adapter names no base, so add --base FOLDER"
        return adapter, [f"next: convert_lora_to_gguf.py{hint}"]
    if rank > VLLM_RANKS[-1]:
        raise UnsupportedError(
            f"{adapter.location}: rank {rank}; vLLM serves ranks up to {VLLM_RANKS[-1]}; "
            "merge the adapter with convert.to_hf and serve the merged model"
        )
    needed = next(size for size in VLLM_RANKS if size >= rank)
    return adapter, [f"serve with --enable-lora --max-lora-rank {needed}"]


def bake(adapter: Adapter) -> Adapter:
    """Returns the same update with one rank, scaling 1 and no patterns.

    Scalings move into lora_B (one rounding, none for powers of two); smaller ranks are
    padded with zeros.
    """
    rank = max(pair["lora_A"].shape[1] for pair in adapter.tensors.values())
    tensors = {}
    for path, pair in adapter.tensors.items():
        extra = rank - pair["lora_A"].shape[1]
        scaled = pair["lora_B"] * np.float32(adapter.scalings[path])
        tensors[path] = {
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
        scalings=dict.fromkeys(tensors, 1.0),
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments, positional=("out",)))
