"""Merge an adapter into its base model and write a GGUF file, for llama.cpp and Ollama.

What was written is read back and compared before the folder appears.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL


@dataclass(frozen=True)
class Arguments:
    """Merge an adapter into its base model and write a GGUF file with an Ollama Modelfile."""

    adapter: str = field(metadata=POSITIONAL)
    """Run folder of jlora train, one of its checkpoints, or PEFT adapter folder."""
    out: str = field(metadata=POSITIONAL)
    """Folder to write; it appears whole or not at all."""
    step: int | None = None
    """Step of the run's checkpoint to take; null: its adapter/, or the newest if it went on."""
    model: str | None = None
    """Base model, as of jlora train; null: the one that the adapter was trained on."""
    type: Literal["F32", "F16", "BF16", "Q8_0"] = "F16"
    """Type of the matrices; norms and biases are F32."""
    overwrite: bool = False
    """Replace OUT if it is a model folder."""
    push: str | None = None
    """Also upload OUT to this repository of the hub, owner/name, with a model card."""
    verify: bool | None = None
    """Compare the logits of base+adapter and OUT; null: if below 1e9 parameters."""


def main(arguments: Arguments) -> None:
    """Merges, writes, reads back, compares the logits and prints the figures."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.formats.atomic_folder import atomic_folder, check_space, check_target
    from jlora.formats.export_gguf import FILE, write_gguf
    from jlora.formats.model_source import size_as
    from jlora.formats.open_model import open_model
    from jlora.formats.peft.adapter_placement import place_adapter
    from jlora.formats.verify_export import is_verified, verify_export
    from jlora.loading import base_model_of, open_adapter
    from jlora.publishing import check_push, push_export

    began = time.perf_counter()
    check_push(arguments.push)
    out = Path(arguments.out)
    check_target(out, arguments.overwrite)
    source = open_model(arguments.model or base_model_of(arguments.adapter))
    adapter = open_adapter(arguments.adapter, arguments.step)
    check_target(out, arguments.overwrite, adapter.location)
    place_adapter(adapter, source.config)  # refuses another model's adapter at once
    width = {"F32": 4, "Q8_0": 34 / 32}.get(arguments.type, 2)
    check_space(out, int(size_as(source, "float32") * width / 4))
    with atomic_folder(out, arguments.overwrite, source.location) as folder:
        for line in write_gguf(source, adapter, folder, arguments.type):
            print(line)
        if is_verified(source, arguments.verify):
            print(verify_export(source, adapter, folder / FILE))
    print(f"{out / FILE} written in {time.perf_counter() - began:.1f} s")
    print(f"ollama create NAME -f {out / 'Modelfile'}")
    if arguments.push is not None:
        print(
            push_export(
                out,
                arguments.push,
                arguments.adapter,
                arguments.step,
                arguments.model,
                "gguf",
            )
        )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
