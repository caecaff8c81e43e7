import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

from jlora.cli.arguments import parse
from jlora.cli.flags import flags_of
from jlora.cli.jlora_command import COMMANDS

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = {
    **{name: name for name in ("train", "generate", "evaluate")},
    **{module: f"convert.{module}" for module in COMMANDS.values()},
    "to_peft": "convert.to_peft",
} | {name: name for name in ("train", "generate", "evaluate")}
# Flags of other programs that the documents name.
FOREIGN = {"--base", "--host", "--port"}
READING_PATH = ("train.py", "jlora/lora/*.py", "jlora/model/*.py", "jlora/train/step.py")


def code_lines(text: str) -> list[str]:
    """The lines of all code blocks, without comments; a line that ends in \\ goes on."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(r"^ {4}\S.*(?:\n {4,}\S.*)*", text, re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s#.*", "", line).removeprefix("$ ").strip() for line in lines]


def commands() -> list[tuple[str, list[str]]]:
    """(module, words) of each of our commands in the documents."""
    found = {}
    for line in (line for file in DOCS for line in code_lines(file.read_text("utf-8"))):
        start = re.match(r"jlora (\w+)|python (\w+)\.py|python -m convert\.(\w+)", line)
        if start:
            name = COMMANDS[start[1]] if start[1] else start[2] or start[3]
            words = shlex.split(line[start.end() :])
            found[line] = (SCRIPTS[name], words)
    return list(found.values())


def arguments(module: str) -> type:
    return importlib.import_module(module).Arguments


@pytest.mark.parametrize(
    ("module", "words"), commands(), ids=[" ".join([m, *w]) for m, w in commands()]
)
def test_a_command_of_the_documents_has_these_flags(module, words):
    if words not in (["--help"], ["--version"]):
        parse(arguments(module), words)


def test_the_documents_show_every_command():
    assert {module for module, _ in commands()} == set(SCRIPTS.values())


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_every_flag_that_a_document_names_exists(file):
    known = {
        flag.name for module in SCRIPTS.values() for flag in flags_of(arguments(module)).values()
    }
    named = set(re.findall(r"`(--[a-z][a-z_.]*\w)", file.read_text("utf-8")))
    assert named - known - FOREIGN - {"--config", "--help", "--version"} == set()


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_every_file_that_a_document_names_exists(file):
    text = file.read_text("utf-8")
    folders = "jlora|convert|tests|docs|benchmarks|examples|requirements"
    paths = re.findall(rf"\b((?:{folders})/[\w/.]*\w/?)", text)
    paths += [match for match in re.findall(r"`(\w+\.py)`", text) if match in ("train.py",)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text)
    assert [link for link in links if not (file.parent / link).exists()] == []
