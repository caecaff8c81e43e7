"""Write an adapter as a PEFT folder, for PEFT, vLLM or llama.cpp."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL


@dataclass(frozen=True)
class Arguments:
    """Write a run's adapter as a PEFT adapter folder."""

    adapter: str = field(metadata=POSITIONAL)
    """Run folder of jlora train, one of its checkpoints, or PEFT adapter folder."""
    out: str = field(metadata=POSITIONAL)
    """Folder to write; it appears whole or not at all."""
    step: int | None = None
    """Step of the run's checkpoint to take; null: its adapter/, or the newest if it went on."""
    for_: Literal["peft", "vllm", "gguf"] = "peft"
    """Who reads it: PEFT, vLLM, or llama.cpp's convert_lora_to_gguf.py."""
    overwrite: bool = False
    """Replace OUT if it is an adapter folder."""
    push: str | None = None
    """Also upload OUT to this repository of the hub, owner/name, with a model card."""


def main(arguments: Arguments) -> None:
    """Reads the adapter, converts it for its reader and writes it."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.formats.atomic_folder import check_target
    from jlora.formats.peft.adapter_writer import write_adapter_folder
    from jlora.formats.peft.named_base import mark_own_embeddings
    from jlora.formats.peft.plain_lora import plain_lora
    from jlora.formats.peft.serving_formats import convert_for_serving
    from jlora.loading import open_adapter
    from jlora.publishing import check_push, push_export

    check_push(arguments.push)
    out = Path(arguments.out)
    check_target(out, arguments.overwrite)
    adapter = open_adapter(arguments.adapter, arguments.step)
    source = adapter.location
    adapter, hint = mark_own_embeddings(plain_lora(adapter)), None
    if arguments.for_ != "peft":
        adapter, hint = convert_for_serving(adapter, arguments.for_, out)
    write_adapter_folder(adapter, out, overwrite=arguments.overwrite, source=source)
    print(f"{out}: {len(adapter.tensors)} modules, written for {arguments.for_}")
    if hint:
        print(hint)
    if arguments.push is not None:
        print(
            push_export(
                out, arguments.push, arguments.adapter, arguments.step, None, "adapter"
            )
        )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
