"""The documents name only flags, files and links that exist."""

import importlib
import re

import pytest
from helpers import ROOT
from helpers.documents import FILES, rows_of, texts_of

import train
from jlora.cli.flags import flags_of
from jlora.cli.foreign_config import NAMES

TEXTS = {name: file.read_text("utf-8") for name, file in FILES.items()}
SCRIPTS = ["train", "generate", "evaluate", "serve"] + [
    f"convert.{name}"
    for name in ("from_hf", "to_hf", "to_gguf", "to_peft", "combine", "info")
]
# Flags of llama.cpp's script, and those that every command has.
OTHER_FLAGS = {"--base", "--config", "--schema", "--help", "--version", "--to"}
each_document = pytest.mark.parametrize("name", TEXTS)


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
    paths = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.-]*\w/?)", TEXTS[name])
    names = [ROOT / path for path in paths]
    assert [
        n for n in names if not n.exists() and not n.with_suffix(".py").exists()
    ] == []


@each_document
def test_every_link_leads_somewhere(name):
    file, broken = FILES[name], []
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


@each_document
def test_lists_are_lists_for_every_reader_of_markdown(name):
    """MkDocs wants a blank line before a list, and four spaces for what goes on in it."""
    text = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.M | re.S)
    assert re.findall(r"\n\n {1,3}\S.*", text) == []
    item = r"(?:[-*]|\d+\.) "
    assert re.findall(rf"^(?!{item}|\s|$).*\n{item}.*", text, re.M) == []


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


def test_the_page_of_flags_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    script = importlib.import_module("make_configuration")
    renew = "run: python docs/make_configuration.py"
    assert script.page() == TEXTS["configuration.md"], renew


def test_every_page_is_in_the_menu_and_in_the_index():
    menu = (ROOT / "mkdocs.yml").read_text("utf-8")
    for file in ROOT.glob("docs/*.md"):
        assert f": {file.name}\n" in menu
        assert f"]({file.name})" in TEXTS["index.md"] or file.name == "index.md"


def test_the_tables_of_other_tools_agree_with_what_their_flags_are_answered_with():
    flags = flags_of(train.Arguments)
    told: dict[str, str] = {}
    for theirs, ours, *_ in rows_of("coming-from.md"):
        if len(ours) == 1 and ours[0] in flags:
            told |= dict.fromkeys(theirs, ours[0])
    for name, key in told.items():
        same = key.rpartition(".")[2]  # as it is called here, but for the group
        assert NAMES.get(name, same if name == same else None) in (key, same), name
    assert NAMES.keys() - told.keys() == set()


def test_every_message_that_is_explained_is_one_of_the_code():
    files = [f for p in ("*.py", "convert/*.py", "jlora/**/*.py") for f in ROOT.glob(p)]
    texts = "\n\n".join(x for f in files for x in texts_of(f.read_text("utf-8")))
    messages = [row[0][0] for row in rows_of("troubleshooting.md") if row[0]]
    assert len(messages) > 40
    for message in messages:
        parts = [re.escape(part) for part in message.split("...")]
        assert re.search("[^\n]*".join(parts), texts), message


def test_texts_have_marks_for_values():
    assert texts_of("x = f'a {b:>{c}} d' + 'e'")[:2] == ["a \0 d", "e"]
