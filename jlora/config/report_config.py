"""The flags that say where a run reports to."""

import importlib.util
from dataclasses import dataclass, field
from operator import not_

from jlora.config.field_types import check_at_least, replaces
from jlora.errors import UsageError, listing, nearest

DEFAULT_SAMPLES = 2
# The package of each tracker; the extra that installs it has the tracker's name.
TRACKER_PACKAGES = {
    "wandb": "wandb",
    "tensorboard": "tensorboardX",
    "trackio": "trackio",
}


@dataclass(frozen=True)
class ReportConfig:
    """Where a run reports to, besides the terminal and its folder."""

    to: list[str] | str = field(default="", metadata=replaces("project", when=not_))
    """Trackers that also get the run: wandb, tensorboard, trackio, or several: wandb,trackio."""
    project: str = "jlora"
    """Name of the project in wandb and trackio."""
    samples: int | None = None
    """Held-out prompts that are answered before and after training; null: 2 if there are any."""

    def __post_init__(self) -> None:
        """Raises UsageError for a tracker that is unknown or not installed."""
        if self.samples is not None:
            check_at_least("report", self, "samples", 0)
        for name in self.trackers:
            if name.lower() == "none":
                raise UsageError(
                    "report.to=none; leave report.to out to have no tracker"
                )
            if name not in TRACKER_PACKAGES:
                raise UsageError(
                    f"report.to={name!r}; there are {listing(list(TRACKER_PACKAGES))}"
                    f"{nearest(name, TRACKER_PACKAGES)}"
                )
            package = TRACKER_PACKAGES[name]
            if importlib.util.find_spec(package) is None:
                raise UsageError(
                    f"report.to={name} needs {package}: pip install 'jlora[{name}]'"
                )

        if self.project != ReportConfig.project and not {"wandb", "trackio"} & {
            *self.trackers
        }:
            raise UsageError(
                f"report.project={self.project} has no effect without report.to=wandb or "
                "trackio; give one, or leave it out"
            )

    def num_samples(self, *, has_data: bool) -> int:
        """Returns how many prompts are answered.

        Raises:
            UsageError: some are asked for, and there is no held-out data.
        """
        if self.samples and not has_data:
            raise UsageError(
                f"report.samples={self.samples} has no effect without held-out data; give "
                "data.eval or data.eval_fraction, or leave it out"
            )
        asked = DEFAULT_SAMPLES if self.samples is None else self.samples
        return asked if has_data else 0

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers."""
        names = self.to.split(",") if isinstance(self.to, str) else self.to
        return list(dict.fromkeys(name.strip() for name in names if name.strip()))
