"""The progress display in the output of a notebook's cell."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from jlora.cli.printing import unescaped_output

_WIDTH = 120
_SECONDS = 0.2


def notebook() -> Any:
    """Returns the module IPython if this program is a notebook's kernel, else None."""
    module = sys.modules.get("IPython")
    is_kernel = module is not None and hasattr(module.get_ipython(), "kernel")
    return module if is_kernel else None


class NotebookProgress(Progress):
    """A display that IPython replaces when it changes; rich's own needs ipywidgets there."""

    def __init__(self, ipython: Any, *columns: ProgressColumn) -> None:
        """Prepares the columns.

        Args:
            ipython: as `notebook` returns it.
            columns: as of `rich.progress.Progress`.
        """
        console = Console(file=unescaped_output(), force_jupyter=False, width=_WIDTH)
        super().__init__(*columns, console=console, auto_refresh=False)
        self._ipython = ipython
        self._handle: Any = None
        self._drawn_at = 0.0

    def start(self) -> None:
        """Shows the display."""
        text = self._text()
        self._handle = self._ipython.display.display(text, raw=True, display_id=True)

    def stop(self) -> None:
        """Shows the last state, which stays."""
        if self._handle is not None:
            self._handle.update(self._text(), raw=True)

    def update(self, *args: Any, **fields: Any) -> None:
        """Updates a task, and the display a few times a second."""
        super().update(*args, **fields)
        if self._handle is not None and time.monotonic() - self._drawn_at > _SECONDS:
            self._handle.update(self._text(), raw=True)
            self._drawn_at = time.monotonic()

    def _text(self) -> dict[str, str]:
        with self.console.capture() as captured:
            self.console.print(self.get_renderable())
        return {"text/plain": captured.get().rstrip()}
