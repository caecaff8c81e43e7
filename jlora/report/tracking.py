"""Sends what a run logs to its trackers, which never stop or delay training.

Each has a thread of its own. One that fails is warned of once and gets nothing more.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from jlora.config.report_config import ReportConfig
from jlora.errors import warn
from jlora.report.trackers import (
    PATIENCE_S,
    TRACKERS,
    GeneratedText,
    TrackedRun,
    Tracker,
    run_id,
    tracked_values,
)

_Call = Callable[[Tracker], None]


class Tracking:
    """The trackers of one run; none before `start`."""

    def __init__(self) -> None:
        """Has no tracker yet."""
        self._threads: list[_TrackerThread] = []
        self._deadline = 0.0

    def start(
        self,
        settings: dict[str, Any],
        *,
        start_step: int,
        in_sweep: bool,
        say: Callable[[str], None],
    ) -> None:
        """Starts the trackers that a run's settings name.

        Args:
            settings: of the run, as its config.yaml has them.
            start_step: steps done before.
            in_sweep: whether its folder is in that of a sweep.
            say: prints a line above the progress bar.
        """
        config = ReportConfig(**settings["report"])
        if not config.trackers:
            return
        folder = Path(settings["output_dir"])
        run = TrackedRun(
            folder=folder,
            project=config.project,
            settings=settings,
            start_step=start_step,
            id=run_id(folder, is_new=not start_step),
            group=folder.absolute().parent.name if in_sweep else None,
            say=say,
        )
        self._threads = [_TrackerThread(name, run) for name in config.trackers]
        for thread in self._threads:
            thread.start()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Sends a line of metrics.jsonl."""
        values, step = tracked_values(metrics), metrics["step"]
        self._send(lambda tracker: tracker.log(values, step))

    def show(self, texts: Sequence[GeneratedText], step: int) -> None:
        """Sends what the model writes after a step."""
        self._send(lambda tracker: tracker.show(texts, step))

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        """Sends the figures of the whole run."""
        self._send(lambda tracker: tracker.summarise(figures, step))

    def end(self, *, failed: bool) -> None:
        """Asks the trackers to send what they still have, and to end; waits for nothing.

        Of runs that end together all are asked before one is waited for.
        """
        if not self._deadline:
            self._deadline = time.monotonic() + PATIENCE_S
            self._send(lambda tracker: tracker.close(failed=failed))
            for thread in self._threads:
                thread.calls.put(None)

    def close(self, *, failed: bool) -> None:
        """Ends the trackers, and waits until a while after they were asked to end."""
        self.end(failed=failed)
        for thread in self._threads:
            thread.join(max(0.0, self._deadline - time.monotonic()))
            if thread.is_alive():
                warn(
                    f"{thread.tracker} did not take all of this run in {PATIENCE_S:.0f} s, "
                    "and is not waited for; metrics.jsonl has it"
                )

    def _send(self, call: _Call) -> None:
        for thread in self._threads:
            if thread.is_alive():
                thread.calls.put(call)


class _TrackerThread(threading.Thread):
    """Makes a tracker and calls it; None in `calls` ends it, and so does a failure."""

    def __init__(self, tracker: str, run: TrackedRun) -> None:
        super().__init__(name=f"report.to {tracker}", daemon=True)
        self.tracker, self._run = tracker, run
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()

    def run(self) -> None:
        """Works until the end, or the first error of whatever class."""
        try:
            tracker = TRACKERS[self.tracker](self._run)
            while (call := self.calls.get()) is not None:
                call(tracker)
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            warn(
                f"{self.tracker} failed and gets nothing more of this run, which goes on "
                f"({type(error).__name__}: {said})"
            )
