"""The flags of a command: names, types, defaults and help texts of a dataclass's fields."""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Iterable
from typing import Any

from jlora.errors import closest

# For a field that is given by its place among the words, not by name.
POSITIONAL = {"is_positional": True}
# For a list of texts whose flag may be given several times, also with a single text.
REPEATED = {"is_repeated": True}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag or positional argument."""

    key: str
    """Its name in a YAML file, such as data.seq_len."""
    kind: Any
    """Type of the field."""
    help: str
    default: Any
    group: str
    """First line of the docstring of the dataclass that the field belongs to."""
    is_positional: bool = False
    """Given by its place among the words, not by name."""
    is_repeated: bool = False
    """A list that every flag of this name adds to."""
    replaces: Callable[[Any], Iterable[str]] = lambda value: ()
    """Keys whose values in a file have no effect beside a value of this flag."""
    is_hidden: bool = False
    """Left out of --help: the dataclass checks the value and does not keep it."""

    @property
    def name(self) -> str:
        """The flag as it is typed; the word in capitals for a positional argument."""
        return self.key.upper() if self.is_positional else f"--{self.key}"

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        """Whether the flag without a value means true."""
        return self.kind in (bool, bool | None)


@functools.cache
def flags_of(cls: type, prefix: str = "") -> dict[str, Flag]:
    """Returns {key: flag}: a dataclass's fields, then those of the dataclasses inside it."""
    helps = _attribute_docstrings(cls)
    flags, groups = {}, {}
    for item in cls.__dataclass_fields__.values():  # init-only fields included
        # A field that would be a Python keyword ends in "_"; its flag does not.
        key = prefix + item.name.rstrip("_")
        if dataclasses.is_dataclass(item.type):
            groups |= flags_of(typing.cast(type, item.type), f"{key}.")
            continue
        is_hidden = isinstance(item.type, dataclasses.InitVar)
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        flags[key] = Flag(
            key,
            item.type.type if is_hidden else item.type,
            helps.get(item.name, ""),
            default,
            summary_of(cls),
            "is_positional" in item.metadata,
            "is_repeated" in item.metadata,
            functools.partial(_replaced, prefix, item.metadata.get("replaces")),
            is_hidden,
        )
    return flags | groups


def _replaced(
    prefix: str, names: Callable[[Any], Iterable[str]] | None, value: Any
) -> list[str]:
    return [prefix + name for name in names(value)] if names else []


def summary_of(cls: type) -> str:
    """Returns the first line of a class's docstring."""
    return (cls.__doc__ or "").strip().splitlines()[0]


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """Returns {field: the string below it}, which Python itself does not keep."""
    helps = {}
    for base in cls.__mro__[:-1]:  # all but `object`
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for pair in itertools.pairwise(tree.body):
            match pair:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    helps[name] = " ".join(text.split())
    return helps


def nearest_key(name: str, known: Iterable[str]) -> str | None:
    """Returns the known key closest to `name`, with or without its group's name."""
    keys = list(known)
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = closest(name, keys, 0.75)
    return close or last.get(closest(name.rpartition(".")[2], last, 0.7) or "")
