"""Converts an HF folder, a hub id or a GGUF file into a jlora base checkpoint."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL
from jlora.config.run_config import Dtype, Format


@dataclass(frozen=True)
class Arguments:
    """Convert an HF folder, a hub id or a .gguf file into a jlora base checkpoint."""

    src: str = field(metadata=POSITIONAL)
    """HF folder, hub id (owner/name or owner/name@revision) or .gguf file."""
    out: str = field(metadata=POSITIONAL)
    """Folder to write; it appears whole or not at all."""
    dtype: Dtype = "keep"
    """Storage of every tensor; keep: as stored, quantised GGUF blocks as float32."""
    quantize: Format = "none"
    """Format of the seven projections' weights; the others get dtype."""
    overwrite: bool = False
    """Replace OUT if it is a model folder."""


def main(arguments: Arguments) -> None:
    """Converts and prints a summary."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.formats.atomic_folder import check_space, check_target
    from jlora.formats.base.base_reader import open_base
    from jlora.formats.base.base_writer import write_base
    from jlora.formats.describe import describe_model
    from jlora.formats.model_source import size_as
    from jlora.formats.open_model import open_model

    start = time.perf_counter()
    out = Path(arguments.out)
    check_target(out, arguments.overwrite)  # before anything is fetched or read
    source = open_model(arguments.src)
    check_space(out, size_as(source, arguments.dtype, arguments.quantize))
    write_base(source, out, arguments.dtype, arguments.overwrite, arguments.quantize)
    print("\n".join(describe_model(open_base(out))))
    print(f"{'written':<14}{out} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
