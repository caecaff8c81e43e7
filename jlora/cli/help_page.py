"""The answer to --help: usage, then one line for each flag."""

import re
import shutil
import textwrap

from jlora.cli.flag_values import as_text, describe
from jlora.cli.flags import Flag, flags_of, summary_of

_COMMON = [
    (
        "--config",
        "YAML file with the same keys; flags beat it, later flags earlier ones.",
    ),
    ("--schema", "Print the JSON schema of such a file, for editors."),
    ("--help", "Print this."),
]


def help_page(program: str, cls: type) -> str:
    """Returns usage, and meaning, type and default of every flag that is not hidden."""
    flags = [flag for flag in flags_of(cls).values() if not flag.is_hidden]
    flags.sort(key=lambda flag: not flag.is_required)
    summary = summary_of(cls)
    words = [flag.name for flag in flags if flag.is_positional]
    words += [
        f"{flag.name} {flag.key.upper()}"
        for flag in flags
        if flag.is_required and not flag.is_positional
    ]
    groups: dict[str, list[tuple[str, str]]] = {"": []}
    for flag in flags:
        title = "" if flag.group == summary else flag.group.rstrip(".")
        groups.setdefault(title, []).append((flag.name, _meaning(flag)))
    groups[""] += _COMMON
    usage = " ".join([program, *words, "[flags]"])
    return f"usage: {usage}\n\n{summary}\n\n{table(groups)}"


def _meaning(flag: Flag) -> str:
    default = "required" if flag.is_required else f"default {as_text(flag.default)}"
    return f"{flag.help} ({re.sub(r'^an? ', '', describe(flag.kind))}, {default})"


def table(groups: dict[str, list[tuple[str, str]]]) -> str:
    """Returns {title: names with texts} in two columns, as wide as the terminal."""
    indent = 4 + max(len(name) for rows in groups.values() for name, _ in rows)
    width = max(shutil.get_terminal_size().columns, indent + 40)
    blocks = []
    for title, rows in groups.items():
        lines = [title] if title else []
        lines += [
            textwrap.fill(
                f"  {name:<{indent - 2}}{text}",
                width,
                subsequent_indent=" " * indent,
                break_on_hyphens=False,
            )
            for name, text in rows
        ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)
