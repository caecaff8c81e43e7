"""What is read under one of the given names: some files of one format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jlora.data.read.splits import VALIDATION, choose_split
from jlora.hub import data_set_files

DataPaths = str | Path | Sequence[str] | Mapping[str, float]
"""One path, several, or {path: passes per epoch}."""


@dataclass(frozen=True)
class DataSource:
    """One of the given paths and its files, which have the same format."""

    name: str
    """The path as the user gave it."""
    files: tuple[Path, ...]
    weight: float = 1.0
    """Passes over the source per epoch."""
    ignored: tuple[str, ...] = ()
    """Names of the other files in a folder."""
    split: str = ""
    """Which split of a folder these files are; "" if its names tell no splits."""
    other_splits: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """The folder's other splits; of the hub's, relative paths that are not fetched yet."""
    hub: str = ""
    """Data set of the hub and its commit, as owner/name@commit; "" for local files."""

    def validation(self) -> "DataSource | None":
        """Returns the validation split beside this one, if there is any."""
        name = choose_split(self.other_splits, (VALIDATION,))
        if name is None:
            return None
        files = self.other_splits[name]
        if self.hub:
            files = data_set_files(self.hub, [file.as_posix() for file in files])
        return DataSource(f"{self.name} ({name})", files, split=name, hub=self.hub)
