"""A real data set without a network: what the functions of Python's library do.

Reads the source files of the running Python (nothing is imported or executed), pairs each
documented function's signature with the first sentence of its docstring, and writes chat
records to train.jsonl and held_out.jsonl. A module's functions all land on one side.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTION = "What does this Python function do?\n{signature}"
HELD_OUT_SHARE = 0.1
# Tests, other programs, and packages that not every Python has.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "tkinter", "site-packages"}


def module_names() -> Iterator[tuple[str, Path]]:
    """Yields (module name, source file) of the standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or SKIPPED & set(parts):
            continue
        if not parts[0].startswith("_"):
            yield ".".join(parts).removesuffix(".__init__"), file


def documented_functions(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Yields (qualified signature, first sentence) of public functions and methods."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = f"{module}.{node.name}" if isinstance(node, ast.ClassDef) else module
        for function in inner:
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            sentence = first_sentence(ast.get_docstring(function) or "")
            if sentence and not function.name.startswith("_"):
                arguments = ast.unparse(function.args)
                yield f"{owner}.{function.name}({arguments})", sentence


def first_sentence(docstring: str) -> str:
    """Returns the first sentence in one line, or nothing if there is no plain one."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    plain = re.fullmatch(r"[A-Z][^<>|]{15,160}\.", sentence)
    return sentence if plain else ""


def is_held_out(module: str) -> bool:
    """Whether a module is for evaluation: by a hash of its top-level name."""
    digest = hashlib.sha256(module.split(".")[0].encode()).digest()
    return digest[2] < 256 * HELD_OUT_SHARE


def build(folder: Path) -> tuple[int, int]:
    """Writes both files; returns the number of training and of held-out records."""
    sides: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for module, file in module_names():
        tree = ast.parse(file.read_text("utf-8", errors="replace"))
        for signature, sentence in documented_functions(tree, module):
            if len(signature) <= 120 and sentence not in sides[False].values():
                sides[is_held_out(module)].setdefault(signature, sentence)
    folder.mkdir(parents=True, exist_ok=True)
    for held_out, name in ((False, "train"), (True, "held_out")):
        lines = [json.dumps(record(*pair)) + "\n" for pair in sides[held_out].items()]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return len(sides[False]), len(sides[True])


def record(signature: str, sentence: str) -> dict[str, Any]:
    """Returns one question and its answer as a chat."""
    question = QUESTION.format(signature=signature)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": sentence},
        ]
    }


if __name__ == "__main__":
    train, held_out = build(Path(sys.argv[1]))
    print(f"{train} records to train on, {held_out} held out, in {sys.argv[1]}")
