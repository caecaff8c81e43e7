"""Prints what is at a path: a model, an adapter or a run; weights are not read.

Architecture, sizes, dtypes, rotary settings, tokenizer, template and origin, one line per
fact. Of a run, the newest checkpoint is read if it holds no adapter yet.
"""

from dataclasses import dataclass, field
from pathlib import Path

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL
from jlora.errors import UsageError


@dataclass(frozen=True)
class Arguments:
    """Show what a model, adapter or run folder, hub id or .gguf file holds."""

    path: str = field(metadata=POSITIONAL)
    """Converted base, HF folder, hub id (owner/name), .gguf file, PEFT adapter or run."""
    digest: bool = False
    """Also read the files with weights and print their sha256."""


def main(arguments: Arguments) -> None:
    """Prints one line per fact."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.formats.describe import describe_adapter, describe_model
    from jlora.formats.model_source import hash_weights
    from jlora.formats.open_model import open_model
    from jlora.loading import exported_adapter, open_adapter
    from jlora.train.checkpoint import saved_steps

    if is_adapter(Path(arguments.path)):
        if arguments.digest:
            raise UsageError("--digest is for models; an adapter has none")
        folder = Path(arguments.path)
        steps = sorted(saved_steps(folder / "checkpoints"))
        adapter, found = open_adapter(folder), exported_adapter(folder)
        lines = describe_adapter(adapter, folder, found, steps)
        print("\n".join(lines))
        return
    source = open_model(arguments.path)
    lines = describe_model(source)
    if arguments.digest:
        with hash_weights(source) as digests:
            lines += [f"sha256 of {name}: {text}" for name, text in digests().items()]
    print("\n".join(lines))


def is_adapter(path: Path) -> bool:
    """Returns whether the folder is an adapter or a run, not a model."""
    if not path.is_dir() or (path / "config.json").exists():
        return False
    return (path / "adapter_config.json").exists() or (path / "checkpoints").is_dir()


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
