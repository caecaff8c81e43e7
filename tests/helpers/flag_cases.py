"""A small command's dataclasses, for the tests of flags."""

from dataclasses import dataclass, field
from typing import Literal

from jlora.cli.flags import POSITIONAL
from jlora.config.field_types import replaces


@dataclass(frozen=True)
class Group:
    """Group of settings."""

    rank: int = 8
    """Rank of the update."""
    rate: float = 0.5
    """How fast."""
    is_fast: bool = False
    """Whether fast."""
    names: list[str] | str | None = None
    """Which names."""
    share: float = field(default=0.0, metadata=replaces("rank", when=bool))
    """Rank as a share."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Name -> rank."""


@dataclass(frozen=True)
class Arguments:
    """Do the thing."""

    model: str
    """Where the model is."""
    group: Group = field(default_factory=Group)
    plan: bool = False
    """Only say what would be done."""
    when: Literal["auto", "never"] = "auto"
    """When to do it."""
    text: str | None = None
    """Something to say."""
    verify: bool | None = None
    """Whether to check."""
    for_: str = "me"
    """Whom it is for."""


@dataclass(frozen=True)
class Placed(Arguments):
    """Do the thing to a model."""

    model: str = field(metadata=POSITIONAL)
    """Where the model is."""
