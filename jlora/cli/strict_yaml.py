"""YAML without surprises: no duplicate keys, anchors or tags; 1e-4 is a number, 010 is text."""

import re
from pathlib import Path
from typing import Any

import yaml

from jlora.errors import UsageError

MAX_YAML_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's null, booleans and numbers; no anchors, tags or duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent) or self.peek_event().anchor:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not read; write the value out",
                problem_mark=self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} occurs twice",
                    problem_mark=node.start_mark,
                )
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"0|-?[1-9][0-9]{0,99}", list("-0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def parse_yaml(text: str) -> Any:
    """Returns what a text of YAML stands for.

    Raises:
        yaml.YAMLError: it is not YAML, or uses what is refused.
        RecursionError: it is nested too deeply.
    """
    return yaml.load(text, _StrictLoader)


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        UsageError: missing, too large, not YAML, not a mapping, duplicate keys.
    """
    try:
        if file.stat().st_size > MAX_YAML_BYTES:
            raise UsageError(f"{file}: more than {MAX_YAML_BYTES:,} bytes of YAML")
        document = parse_yaml(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{file}{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{file}: nested too deeply") from error
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected keys and values, such as `seed: 1`")
    named = {str(key): value for key, value in document.items()}
    if len(named) != len(document):
        raise UsageError(f"{file}: a key occurs twice, as a number and as text")
    return named
