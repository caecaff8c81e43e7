"""What the experiments share: a model with data, processes that start fast, and a table."""

import importlib
import multiprocessing
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.commands import make_workdir

from jlora.cli.command import run_command

# What a process imports before it is forked; the modules that start no device.
PRELOADED = (
    *("train", "convert.from_hf", "convert.to_hf", "convert.to_peft"),
    *("jlora.loading", "jlora.train.loop", "jlora.report.html_report"),
    *("jlora.formats.base.base_writer", "jlora.formats.verify_export"),
)
# A command that takes longer hangs, also on a machine that is busy.
PATIENCE_S = 900
GOOD = ("same result", "refused", "older step used")


class Lab:
    """A folder with the model `hf` and its data, a source of chance, and the outcomes.

    Attributes:
        folder: where all relative paths begin.
        copy: of a folder, to be damaged.
        random: what is killed when, and which byte is changed.
        table: {what was done: {outcome: how often}}.
        wrong: a line for every outcome that must not be.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        """Makes the model, and the process that others are forked from."""
        self.folder = make_workdir(folder)
        self.copy = folder / "damaged"
        self.random = random.Random(seed)
        self.table: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload(list(PRELOADED))

    def count(self, what: str, outcome: str, detail: object = "") -> None:
        """Adds an outcome to the table; one that is not good also as a line."""
        self.table.setdefault(what, Counter())[outcome] += 1
        if outcome not in GOOD:
            self.wrong.append(f"{what}: {outcome}: {detail}")

    def start(
        self, name: str, flags: Iterable[object], **environment: str
    ) -> "Started":
        """Starts a command in a process of its own, on one device."""
        out = self.folder / f"out-{self.random.getrandbits(64):x}"
        words = list(map(str, flags))
        process: Any = self._fork.Process(
            target=_run, args=(name, words, self.folder, out, environment)
        )
        process.start()
        return Started(process, out)

    def run(self, name: str, flags: Iterable[object]) -> "Started":
        """Runs a command to its end."""
        return self.start(name, flags).wait()

    def print_table(self) -> None:
        """Prints the outcomes of everything, and what is wrong."""
        print(f"{'':44}" + "".join(f"{name:>17}" for name in (*GOOD, "wrong")))
        for what, counts in self.table.items():
            good = [counts[name] for name in GOOD]
            cells = [*good, counts.total() - sum(good)]
            print(f"{what:44}" + "".join(f"{cell:17,}" for cell in cells))
        print("\n".join(self.wrong) or "nothing wrong")


class Started:
    """A process and the file that it prints into."""

    def __init__(self, process: Any, out: Path) -> None:
        """Names both."""
        self.process, self._out = process, out

    @property
    def text(self) -> str:
        """Everything printed so far."""
        return self._out.read_text("utf-8", "replace") if self._out.exists() else ""

    @property
    def status(self) -> int | None:
        """Exit status; the signal's number, negative, of a killed one; None if it runs."""
        return self.process.exitcode

    def wait(self) -> "Started":
        """Waits for its end."""
        self.process.join(PATIENCE_S)
        if self.status is None:
            self.process.kill()
            raise TimeoutError(f"a command hangs:\n{self.text}")
        return self


def _run(
    name: str, flags: list[str], folder: Path, out: Path, environment: dict[str, str]
) -> None:
    os.environ.update({"XLA_FLAGS": ""} | environment)
    os.chdir(folder)
    with out.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    module = importlib.import_module(name)
    sys.exit(run_command(module.main, module.Arguments, argv=flags))
