"""Combine several adapters into one, weighted: `jlora combine`.

To merge several adapters into a base, either run `jlora export` once for each, which
rounds each time as PEFT's merge does, or combine them by `cat` and merge once, which rounds
once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL


@dataclass(frozen=True)
class Arguments:
    """Combine several adapters into one PEFT adapter folder."""

    out: str = field(metadata=POSITIONAL)
    """Folder to write; it appears whole or not at all."""
    adapters: list[str]
    """PEFT adapter folders or run folders: [A,B]."""
    weights: list[float]
    """Weight of each adapter, also negative: [1,-0.5]."""
    how: Literal["linear", "cat", "svd"] = "cat"
    """cat: exact, ranks add up; svd: best of svd_rank; linear: weights on A and on B."""
    svd_rank: int | None = None
    """Rank of the result of svd; null: the largest of the adapters'."""
    overwrite: bool = False
    """Replace OUT if it is an adapter folder."""


def main(arguments: Arguments) -> None:
    """Reads the adapters, combines them and writes the result."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.formats.atomic_folder import check_target
    from jlora.formats.peft.adapter_writer import write_adapter_folder
    from jlora.formats.peft.combine_adapters import combine_adapters
    from jlora.loading import open_adapter

    out = Path(arguments.out)
    check_target(out, arguments.overwrite)
    adapters = [open_adapter(folder) for folder in arguments.adapters]
    for adapter in adapters:
        check_target(out, arguments.overwrite, adapter.location)
    combined = combine_adapters(
        adapters, arguments.weights, arguments.how, svd_rank=arguments.svd_rank
    )
    write_adapter_folder(combined, out, overwrite=arguments.overwrite)
    print(
        f"{out}: {len(combined.tensors)} modules of rank {combined.config.r}, "
        f"{arguments.how} of {len(adapters)} adapters"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
