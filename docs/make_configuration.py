"""Writes every flag of jlora train: the tables of configuration.md, and config.schema.json.

python docs/make_configuration.py
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jlora.cli.flag_values import as_text, describe  # noqa: E402
from jlora.cli.flags import flags_of  # noqa: E402
from jlora.cli.json_schema import json_schema  # noqa: E402
from train import Arguments  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
SCHEMA = ROOT / "docs" / "config.schema.json"
BEGIN = "<!-- flags: made by docs/make_configuration.py -->\n"
END = "<!-- end of flags -->\n"


def tables() -> str:
    """Returns a table of key, values, default and meaning for each group of flags."""
    lines: list[str] = []
    group = ""
    for flag in flags_of(Arguments).values():
        if flag.is_hidden:
            continue
        if flag.group != group:
            group, (name, _, rest) = flag.group, flag.key.partition(".")
            title = f"`{name}`: {group[0].lower()}{group[1:]}" if rest else "The run"
            lines += ["", f"## {title.rstrip('.')}", ""]
            lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        default = "required" if flag.is_required else f"`{as_text(flag.default)}`"
        values = re.sub(r"^(one of|an?) ", "", describe(flag.kind))
        cells = " | ".join(
            cell.replace("|", r"\|")
            for cell in (f"`{flag.key}`", values, default, flag.help)
        )
        lines.append(f"| {cells} |")
    return "\n".join([*lines[1:], ""])


def page() -> str:
    """Returns the page with current tables."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    SCHEMA.write_text(json.dumps(json_schema(Arguments), indent=1) + "\n", "utf-8")
