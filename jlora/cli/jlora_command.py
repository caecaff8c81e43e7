"""The `jlora` program: `jlora train ...` runs the command that train.py holds."""

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from jlora.cli.command import run_command
from jlora.cli.help_page import table
from jlora.errors import UsageError, listing, nearest

# Commands, and the scripts that hold them.
COMMANDS = {
    "train": "train",
    "generate": "generate",
    "evaluate": "evaluate",
    "convert": "from_hf",
    "export": "to_hf",
    "info": "info",
    "combine": "combine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jlora NAME ...` and returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words else "--help"
    if name in ("-h", "--help"):
        rows = [(name, _summary(module)) for name, module in COMMANDS.items()]
        print(f"usage: jlora COMMAND ...\n\n{table({'': rows})}")
        print(
            "jlora COMMAND --help lists the flags; jlora --version prints the version."
        )
        return 0
    if name == "--version":
        print(f"jlora {importlib.metadata.version('jlora')}")
        return 0
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; there are {listing(list(COMMANDS))}"
        print(f"error: unknown command {name!r}{hint}", file=sys.stderr)
        return UsageError.exit_status
    module = _load(COMMANDS[name])
    return run_command(
        module.main, module.Arguments, argv=words, program=f"jlora {name}"
    )


def _file_of(module: str) -> Path:
    """Returns the script, which is copied to jlora/commands in the wheel."""
    package = Path(__file__).parents[1]
    folders = (package / "commands", package.parent, package.parent / "convert")
    return next(
        file for folder in folders if (file := folder / f"{module}.py").is_file()
    )


def _summary(module: str) -> str:
    """Returns the first line of a script's docstring, without running the script."""
    tree = ast.parse(_file_of(module).read_text("utf-8"))
    return (ast.get_docstring(tree) or "").splitlines()[0]


def _load(module: str) -> ModuleType:
    """Returns the script as a module, whatever else has its name on sys.path."""
    name = f"jlora.commands.{module}"
    spec = importlib.util.spec_from_file_location(name, _file_of(module))
    assert spec is not None
    assert spec.loader is not None
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
