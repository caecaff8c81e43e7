"""The documents name only commands, flags, files, links and `make` targets that exist."""

import importlib
import re
import shlex
import tomllib
from typing import Any

import pytest
from helpers import ROOT

from jlora.cli import jlora_command
from jlora.cli.arguments import parse
from jlora.cli.flags import flags_of

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {file.name: file.read_text("utf-8") for file in DOCS}
SCRIPTS = ["train", "generate", "evaluate", "serve"] + [
    f"convert.{name}"
    for name in ("from_hf", "to_hf", "to_gguf", "to_peft", "combine", "info")
]
# Flags of llama.cpp's script, and those that every command has.
OTHER_FLAGS = {"--base", "--config", "--help", "--version", "--to"}
each_document = pytest.mark.parametrize("name", TEXTS)


def code_lines(text: str) -> list[str]:
    """The lines of all code blocks; one that ends in a backslash goes on in the next."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(r"^ {4}\S.*$(?:\n {4,}\S.*$)*", text, re.M)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def code(pattern: str) -> list[str]:
    """The lines and `spans` of code in all documents that begin so."""
    found = [line for text in TEXTS.values() for line in code_lines(text)]
    found += [s for text in TEXTS.values() for s in re.findall(r"`([^`\n]+)`", text)]
    return [line for line in dict.fromkeys(found) if re.match(pattern, line)]


def test_code_is_found():
    assert code_lines("a\n\n    b \\\n        c   # d\n    e\n\n```sh\nf\n```\n") == [
        *("f", "b c", "e")
    ]


@pytest.mark.parametrize("line", code(r"jlora [a-z]+ .*-|jlora --"))
def test_a_jlora_command_has_these_flags(line, monkeypatch, capsys):
    def only_parse(_: Any, arguments: type, *, argv: list[str], program: str) -> int:
        return 0 if "--help" in argv or parse(arguments, argv) else 1

    monkeypatch.setattr(jlora_command, "run_command", only_parse)
    assert jlora_command.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "line", code(r"python (train|generate|evaluate)\.py .*-|python -m convert\.\w+ .")
)
def test_a_script_has_these_flags(line):
    module, *words = shlex.split(line.removeprefix("python ").removeprefix("-m "))
    parse(importlib.import_module(module.removesuffix(".py")).Arguments, words)


@pytest.mark.parametrize("line", code(r"python (benchmarks|tests|examples)/"))
def test_a_tool_exists_and_knows_its_flags(line):
    _, file, *words = shlex.split(line)
    text = (ROOT / file).read_text("utf-8")
    assert [word for word in words if word[:2] == "--" and word not in text] == []


def test_every_make_target_exists():
    named = {
        target for line in code(r"make\b") for target in re.findall(r" ([a-z]+)", line)
    }
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "parity"} <= named <= there


def test_every_extra_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"'(?:\.|jlora)\[(\w+)\]'", "\n".join(TEXTS.values())))
    assert named == project["optional-dependencies"].keys() - {"dev"}


@each_document
def test_every_flag_that_is_named_exists(name):
    known = {
        flag.name
        for script in SCRIPTS
        for flag in flags_of(importlib.import_module(script).Arguments).values()
    }
    named = set(re.findall(r"`(--[a-z][a-z_.]*[a-z])", TEXTS[name]))
    groups = {flag for flag in named if any(k.startswith(f"{flag}.") for k in known)}
    assert named - known - groups - OTHER_FLAGS == set()


@each_document
def test_every_file_that_is_named_exists(name):
    folders = "jlora|convert|tests|docs|benchmarks|examples|requirements"
    paths = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.]*\w/?)", TEXTS[name])
    names = [ROOT / path for path in paths]
    assert [
        n for n in names if not n.exists() and not n.with_suffix(".py").exists()
    ] == []


@each_document
def test_every_link_leads_somewhere(name):
    file = next(file for file in DOCS if file.name == name)
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([\w-]*)\)", TEXTS[name]):
        other = file.parent / target if target else file
        if not other.exists():
            broken.append(target)
        elif anchor:
            titles = re.findall(r"^#+ (.*)", other.read_text("utf-8"), re.M)
            if anchor not in [
                re.sub(r"[^\w ]", "", t).lower().replace(" ", "-") for t in titles
            ]:
                broken.append(f"{target}#{anchor}")
    assert broken == []


def test_what_to_read_first_is_short():
    names = ("train.py", "jlora/lora/*.py", "jlora/model/*.py", "jlora/train/step.py")
    files = [file for name in names for file in ROOT.glob(name)]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    assert len(files) > 10
    assert sum(1 for line in lines if line.strip()) < 2500


def test_a_command_is_a_page():
    files = [*ROOT.glob("*.py"), *ROOT.glob("convert/*.py")]
    assert len(files) > 10
    for file in files:
        assert len(file.read_text("utf-8").splitlines()) < 200, file


def test_the_memory_table_is_what_the_plan_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = importlib.import_module("memory_table")
    assert table.row("Llama 3.2 1B", 16) in TEXTS["README.md"].splitlines()
    cards = TEXTS["performance.md"].splitlines()
    assert table.card_row("Llama 3.2 1B") in cards
