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
    from jlora.loading import exported_adapter, open_adapter, run_of
    from jlora.train.checkpoint import saved_steps
    from jlora.train.resuming import exported_step

    if is_adapter(Path(arguments.path)):
        if arguments.digest:
            raise UsageError("--digest is for models; an adapter has none")
        adapter, path = open_adapter(arguments.path), Path(arguments.path)
        run = run_of(path)
        found = exported_adapter(run) if run == path else None
        read_from = path if run != path else found or run / "checkpoints"
        steps = sorted(saved_steps(run / "checkpoints"))
        held = exported_step(run) if found else None
        print("\n".join(describe_adapter(adapter, run, read_from, steps, held)))
        return
    source = open_model(arguments.path)
    lines = describe_model(source)
    if arguments.digest:
        with hash_weights(source) as digests:
            lines += [f"sha256 of {name}: {text}" for name, text in digests().items()]
    print("\n".join(lines))


def is_adapter(path: Path) -> bool:
    """Returns whether the folder is an adapter, a run or a checkpoint of one, not a model."""
    if path.parent.name == "checkpoints" and (path / "meta").is_dir():
        return True
    if not path.is_dir() or (path / "config.json").exists():
        return False
    return (path / "adapter_config.json").exists() or (path / "checkpoints").is_dir()


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
