"""The file for --config as a JSON schema, by which an editor completes and checks it."""

import dataclasses
import types
import typing
from typing import Any, Literal

from jlora.cli.flags import Flag, flags_of, summary_of

_TYPES: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": ["string", "integer"]},  # an integer also serves as text
    types.NoneType: {"type": "null"},
    Any: {},
}


def json_schema(cls: type) -> dict[str, Any]:
    """Returns the schema (draft 7) of a command's file; keys are nested or with a dot.

    No key is required, as the command line may give it.
    """
    flags = [flag for flag in flags_of(cls).values() if not flag.is_positional]
    properties = {flag.key: _property(flag) for flag in flags}
    groups: dict[str, dict[str, Any]] = {}
    for flag in flags:
        group, _, name = flag.key.rpartition(".")
        if group:
            found = groups.setdefault(group, _group(flag))
            found["properties"][name] = {"$ref": f"#/properties/{flag.key}"}
    for name, group in groups.items():
        inside = [flag for flag in flags if flag.key.startswith(f"{name}.")]
        if switches := [f.key.removeprefix(f"{name}.") for f in inside if f.is_switch]:
            group["type"].append("string")  # `mesh: auto`
            group["pattern"] = f"^({'|'.join(switches)})$"
        # Of evaluate, data is a file or a group.
        own = properties.pop(name, None)
        properties[name] = {"anyOf": [own, group]} if own else group
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": summary_of(cls),
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _group(flag: Flag) -> dict[str, Any]:
    return {
        "description": flag.group,
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {},
    }


def _property(flag: Flag) -> dict[str, Any]:
    found = {**_kind(flag.kind)}
    if flag.help:
        found["description"] = flag.help
    if flag.default is not dataclasses.MISSING and not flag.is_hidden:
        found["default"] = flag.default
    return found


def _kind(kind: Any) -> dict[str, Any]:
    """Returns the schema of the values that a field of this type takes."""
    if kind in _TYPES:
        return _TYPES[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is list:
        return {"type": "array", "items": _kind(parts[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _kind(parts[1])}
    return {"anyOf": [_kind(part) for part in parts]}
