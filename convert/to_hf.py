"""Merge an adapter into its base model and write a Hugging Face model folder.

What was written is read back and compared before the folder appears.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL
from jlora.config.run_config import Dtype

# Comparing the logits of a larger model takes minutes; the bytes are compared anyway.
MAX_VERIFIED_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Arguments:
    """Merge an adapter into its base model and write a Hugging Face folder."""

    out: str = field(metadata=POSITIONAL)
    """Folder to write; it appears whole or not at all."""
    model: str
    """Base model: converted base, HF folder, hub id (owner/name) or .gguf file."""
    adapter: str
    """PEFT adapter folder or run folder of jlora train."""
    dtype: Dtype = "keep"
    """Storage of every tensor; keep: as in the base."""
    overwrite: bool = False
    """Replace OUT if it is a model folder."""
    verify: bool | None = None
    """Compare the logits of base+adapter and OUT; null: if below 1e9 parameters."""


def main(arguments: Arguments) -> None:
    """Merges, writes, reads back, compares the logits and prints the figures."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.formats.atomic_folder import atomic_folder, check_space, check_target
    from jlora.formats.export_merged import write_merged
    from jlora.formats.hf.export_config import reader_notes
    from jlora.formats.model_source import size_as
    from jlora.formats.open_model import open_model
    from jlora.formats.peft.adapter_placement import place_adapter
    from jlora.formats.verify_export import verify_export
    from jlora.loading import open_adapter

    began = time.perf_counter()
    out = Path(arguments.out)
    check_target(out, arguments.overwrite)
    source = open_model(arguments.model)
    adapter = open_adapter(arguments.adapter)
    check_target(out, arguments.overwrite, adapter.location)
    place_adapter(adapter, source.config)  # refuses another model's adapter at once
    check_space(out, size_as(source, arguments.dtype))
    verify = arguments.verify
    if verify is None:
        parameters = sum(math.prod(spec.shape) for spec in source.tensors.values())
        verify = parameters < MAX_VERIFIED_PARAMETERS
    with atomic_folder(out, arguments.overwrite, source.location) as folder:
        for line in write_merged(source, adapter, folder, arguments.dtype):
            print(line)
        if verify:
            print(verify_export(source, adapter, folder))
    for note in reader_notes(source.config):
        print(note)
    print(f"{out} written in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
