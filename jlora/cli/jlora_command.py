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
from jlora.cli.unread_output import allow_closed_output, say_error
from jlora.errors import UsageError, listing, nearest, printable

# Commands, and the scripts that hold them.
COMMANDS = {
    "train": "train",
    "generate": "generate",
    "chat": "generate",
    "serve": "serve",
    "evaluate": "evaluate",
    "convert": "from_hf",
    "export": "to_hf",
    "info": "info",
    "report": "report",
    "combine": "combine",
}
# What `jlora export --to NAME` runs.
EXPORTS = {
    "hf": ["to_hf"],
    "peft": ["to_peft"],
    "vllm": ["to_peft", "--for=vllm"],
    "gguf": ["to_gguf"],
}
# Of commands that are not a whole script by themselves.
_SUMMARIES = {
    "chat": "Talk with a model at the keyboard, with its adapter and without.",
    "export": "Write the merged model, also as GGUF (--to gguf), or the adapter.",
}


@allow_closed_output
def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jlora NAME ...` and returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words else "--help"
    if name in ("-h", "--help"):
        rows = [
            (name, _SUMMARIES.get(name) or _summary(script))
            for name, script in COMMANDS.items()
        ]
        print(f"usage: jlora COMMAND ...\n\n{table({'': rows})}")
        print(
            "jlora COMMAND --help lists the flags; jlora --version prints the version."
        )
        return 0
    if name == "--version":
        print(f"jlora {importlib.metadata.version('jlora')}")
        return 0
    program = f"jlora {name}"
    try:
        if name not in COMMANDS:
            hint = nearest(name, COMMANDS) or f"; there are {listing([*COMMANDS])}"
            raise UsageError(f"unknown command {name!r}{hint}")
        script = COMMANDS[name]
        if name == "chat":
            words = ["--chat", *words]
        if name == "export":
            program += f" [--to {'|'.join(EXPORTS)}]"
            script, *words = _choose_export(words)
    except UsageError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_status
    try:
        module = load_command(script)
    except KeyboardInterrupt:
        say_error("interrupted")
        return 130
    return run_command(module.main, module.Arguments, argv=words, program=program)


def _choose_export(words: Sequence[str]) -> list[str]:
    """Returns the script that --to chooses, and the words for it."""
    target, rest, queue = "hf", [], iter(words)
    for word in queue:
        if word == "--to":
            target = next(queue, "")
        elif word.startswith("--to="):
            target = word.removeprefix("--to=")
        else:
            rest.append(word)
    if target not in EXPORTS:
        known = listing([*EXPORTS])
        raise UsageError(f"--to is {target!r}; expected one of {known}")
    if len(EXPORTS[target]) > 1 and any(w.split("=")[0] == "--for" for w in rest):
        raise UsageError(
            f"--to {target} says already what --for would say; leave it out"
        )
    return [*EXPORTS[target], *rest]


def start_words(name: str) -> list[str]:
    """Returns how to start a command, in the way in which this one was started."""
    if Path(sys.argv[0]).name not in {f"{script}.py" for script in COMMANDS.values()}:
        return ["jlora", name]  # also in a notebook, and in a program of the user's
    script = COMMANDS[name]
    if _file_of(script).parent.name == "convert":
        return ["python", "-m", f"convert.{script}"]
    return ["python", f"{script}.py"]


def _file_of(script: str) -> Path:
    """Returns the file of a script, which the wheel carries in jlora/commands."""
    package = Path(__file__).parents[1]
    folders = (package / "commands", package.parent, package.parent / "convert")
    return next(
        file for folder in folders if (file := folder / f"{script}.py").is_file()
    )


def _summary(script: str) -> str:
    """Returns the first line of a script's docstring, without running the script."""
    tree = ast.parse(_file_of(script).read_text("utf-8"))
    return (ast.get_docstring(tree) or "").splitlines()[0]


def load_command(script: str) -> ModuleType:
    """Returns the script of a command as a module, whatever else has its name on sys.path."""
    name = f"jlora.commands.{script}"
    spec = importlib.util.spec_from_file_location(name, _file_of(script))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
