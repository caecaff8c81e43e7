"""The documents for readers, and the code in them."""

import ast
import re
import shlex
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from helpers import ROOT

FILES = {
    file.name: file
    for file in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/*.md")),
    )
}
_UNCHECKED = re.compile(r"<!-- unchecked: (.+) -->\n?")


class Block(NamedTuple):
    """A block of code."""

    page: str
    line: int
    language: str
    """What follows the fence; empty for an indented block."""
    text: str
    unchecked: str
    """Why it cannot be checked, from a comment before it: <!-- unchecked: WHY -->."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks_of(page: str, text: str) -> list[Block]:
    """All blocks of code of a page."""
    found, before = [], ""
    for token in _tokens(text):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            comment = _UNCHECKED.fullmatch(before)
            why = comment[1] if comment else ""
            line, language = token.map[0] + 1, token.info.strip()
            found.append(Block(page, line, language, token.content, why))
        before = token.content if token.type == "html_block" else ""
    return found


BLOCKS = [
    block
    for name, file in FILES.items()
    for block in blocks_of(name, file.read_text("utf-8"))
]
# The `spans` of code, also those inside tables.
SPANS = [
    inner.content
    for file in FILES.values()
    for token in _tokens(file.read_text("utf-8"))
    for inner in token.children or ()
    if inner.type == "code_inline"
]


def commands_of(text: str) -> list[list[str]]:
    """The words of each command line of a shell; one goes on after a backslash."""
    lines = text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]


def rows_of(page: str) -> list[list[list[str]]]:
    """The rows of all tables of a page: for each cell, the `spans` of code in it."""
    rows: list[list[list[str]]] = []
    for token in _tokens(FILES[page].read_text("utf-8")):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level > 3:
            spans = [x.content for x in token.children or () if x.type == "code_inline"]
            rows[-1].append(spans)
    return rows


def texts_of(code: str) -> list[str]:
    """The texts in Python code, with "\0" for each value that is put into one."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            parts = [
                x.value if isinstance(x, ast.Constant) else "\0" for x in node.values
            ]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found
