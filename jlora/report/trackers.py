"""wandb, TensorBoard and trackio, each behind the same four calls.

A tracker is made and called in one thread of its own, see `tracking.py`. Its library is
imported when a run asks for it.
"""

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import yaml

from jlora.errors import about_file

# How long a tracker may take to begin, and again to send the last lines.
PATIENCE_S = 60.0
# The file of a run folder with the id of the run in trackers; see `run_id`.
ID_FILE = ".tracked_run"
_STEP = "train/global_step"
Values = Mapping[str, float]


@dataclass(frozen=True)
class GeneratedText:
    """What a model wrote after a prompt, and what the data has there."""

    prompt: str
    reference: str
    text: str


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker gets when a run begins.

    Attributes:
        folder: of the run.
        project: in wandb and trackio.
        settings: of the run, as config.yaml has them.
        start_step: steps done before.
        id: the same whenever the run goes on, so that the tracker's run does, too.
        group: name of the sweep that it belongs to, or None.
        say: prints a line above the progress bar.
    """

    folder: Path
    project: str
    settings: dict[str, Any]
    start_step: int
    id: str
    group: str | None
    say: Callable[[str], None]


class Tracker(Protocol):
    """Takes what a run logs. Any call may raise any error, or block."""

    def log(self, values: Values, step: int) -> None:
        """Takes finite numbers of a step, such as train/loss and eval/loss."""
        ...

    def show(self, texts: Sequence[GeneratedText], step: int) -> None:
        """Takes what the model writes after a step."""
        ...

    def summarise(self, values: Values, step: int) -> None:
        """Takes the figures of the whole run, after its last step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Sends what is left."""
        ...


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb: Any = import_module("wandb")
        mode = None
        if not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False):
            mode = "offline"
        self._wandb = wandb
        self._run = wandb.init(
            project=run.project,
            id=run.id,
            name=run.folder.absolute().name,
            group=run.group,
            dir=str(run.folder),
            config=run.settings,
            mode=mode,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=PATIENCE_S,
                finish_timeout=PATIENCE_S,
            ),
        )
        # A run that goes on repeats steps, which wandb's own counter does not allow.
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP, step_sync=True)
        if mode == "offline":
            run.say(
                "wandb has no API key, so nothing is sent; `wandb login` and `wandb sync "
                f"{Path(self._run.dir).parent}` do that later"
            )
        elif self._run.url:
            run.say(f"wandb: {self._run.url}")

    def log(self, values: Values, step: int) -> None:
        self._run.log({**values, _STEP: step})

    def show(self, texts: Sequence[GeneratedText], step: int) -> None:
        rows = [[t.prompt, t.text, t.reference] for t in texts]
        table = self._wandb.Table(["prompt", "generated", "reference"], rows)
        self._run.log({f"samples/step_{step}": table, _STEP: step})

    def summarise(self, values: Values, step: int) -> None:
        self._run.summary.update(dict(values))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        # Hides what an earlier attempt wrote of the steps that come now.
        purged = run.start_step + 1 if run.start_step else 0
        folder = str(run.folder / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=purged, flush_secs=10)
        config = _as_code(yaml.safe_dump(run.settings, sort_keys=False))
        self._writer.add_text("config", config, purged)

    def log(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, texts: Sequence[GeneratedText], step: int) -> None:
        self._writer.add_text("samples", _as_markdown(texts), step)

    def summarise(self, values: Values, step: int) -> None:
        rows = "\n".join(f"| {name} | {value:g} |" for name, value in values.items())
        self._writer.add_text("summary", f"| | |\n|---|---|\n{rows}", step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        self._trackio: Any = import_module("trackio")
        self._run = self._trackio.init(
            project=run.project,
            name=f"{run.folder.absolute().name}-{run.id}",
            group=run.group,
            config=run.settings,
            resume="allow",
            embed=False,
        )

    def log(self, values: Values, step: int) -> None:
        self._run.log(dict(values), step=step)

    def show(self, texts: Sequence[GeneratedText], step: int) -> None:
        markdown = self._trackio.Markdown(_as_markdown(texts))
        self._run.log({"samples": markdown}, step=step)

    def summarise(self, values: Values, step: int) -> None:
        self.log({f"summary/{name}": value for name, value in values.items()}, step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
}


def run_id(folder: Path, *, is_new: bool) -> str:
    """Returns the id of a run for its trackers, which its folder keeps."""
    file = folder / ID_FILE
    if is_new or not file.is_file():
        with about_file(file):
            file.write_text(secrets.token_hex(4))
    return file.read_text().strip()


def tracked_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a line of metrics.jsonl by the names they usually have."""
    return {
        "eval/loss" if name == "eval_loss" else f"train/{name}": value
        for name, value in metrics.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _as_markdown(texts: Sequence[GeneratedText]) -> str:
    parts = [
        f"**Prompt**\n\n{_as_code(t.prompt)}\n\n**Generated**\n\n{_as_code(t.text)}\n\n"
        f"**Reference**\n\n{_as_code(t.reference)}"
        for t in texts
    ]
    return "\n\n---\n\n".join(parts)


def _as_code(text: str) -> str:
    """Returns text as a block of Markdown that is indented, whatever it holds."""
    return "\n".join(f"    {line}" for line in text.splitlines())
