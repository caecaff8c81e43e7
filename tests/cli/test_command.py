import errno
import importlib.metadata
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers.flag_cases import Arguments

from jlora.cli import command as cli
from jlora.cli.command import run_command
from jlora.config.run_config import DataConfig, TrainConfig
from jlora.errors import (
    CorruptError,
    DivergedError,
    ResourceError,
    StopRequested,
    UnsupportedError,
    UsageError,
)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("a"), 2, "error: a\n"),
        (UnsupportedError("a"), 3, "error: a\n"),
        (CorruptError("a"), 4, "error: a\n"),
        (ResourceError("a"), 5, "error: a\n"),
        (DivergedError("a"), 6, "error: a\n"),
        (StopRequested("a"), 75, "stopped: a\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            RuntimeError("can't start new thread"),
            5,
            "error: no more threads may be started (ulimit -u, ulimit -v)\n",
        ),
        (
            ImportError("a.so: failed to map segment from shared object"),
            5,
            "error: out of memory while a library was loaded (ulimit -v)\n",
        ),
        (
            MemoryError("Unable to allocate 1 GiB"),
            5,
            "error: out of memory: Unable to allocate 1 GiB; "
            "end other programs or take a larger machine\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left", "f"),
            5,
            "error: the disk is full at f\n",
        ),
        (PermissionError(errno.EACCES, "Denied", "f"), 2, "error: f: Denied\n"),
        (FileNotFoundError(errno.ENOENT, "Not there", "f"), 2, "error: f: Not there\n"),
    ],
)
def test_a_failure_is_one_message_and_its_status(capsys, error, status, said):
    def main(_: Any) -> None:
        raise error

    assert run_command(main, Arguments, argv=["--model", "m"]) == status
    assert capsys.readouterr() == ("", said)


@dataclass(frozen=True)
class Grouped:
    """A command with the groups of train.py."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Flat:
    """A command without flag groups."""

    data: str = ""
    on_bad_row: str = "fail"
    batch_size: int = 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (Flat, "data.x: skip with on_bad_row=skip or data.eval, batch_size=3"),
        (
            Grouped,
            "data.x: skip with data.on_bad_row=skip or data.eval, train.batch_size=3",
        ),
    ],
)
def test_messages_name_the_flags_that_the_command_has(capsys, arguments, said):
    def main(_: Any) -> None:
        text = "data.x: skip with data.on_bad_row=skip or data.eval, train.batch_size=3"
        raise UsageError(text)

    run_command(main, arguments, argv=[])
    assert capsys.readouterr().err == f"error: {said}\n"


def test_out_of_device_memory_names_the_flags_that_the_command_has(capsys):
    def main(_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: 9 GiB")

    run_command(main, Flat, argv=[])
    assert capsys.readouterr().err.endswith("use a smaller batch_size\n")


def test_out_of_device_memory_says_what_to_lower(capsys):
    def main(_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore")

    assert run_command(main, Grouped, argv=[]) == 5
    assert "9 GiB); use fewer rows" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), OSError(5)])
def test_a_bug_keeps_its_traceback(error):
    def main(_: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        run_command(main, Arguments, argv=["--model", "m"])


def test_success_is_status_0(capsys):
    assert run_command(lambda arguments: None, Arguments, argv=["--model", "m"]) == 0
    assert capsys.readouterr() == ("", "")


LONG = """
import sys
sys.path[:0] = ['tests', '.']
from helpers.flag_cases import Arguments
from jlora.cli.command import run_command
from jlora.cli.jlora_command import main

def talk(arguments):
    print("a line")
    print("another", flush=True)
    raise AssertionError("nobody reads this")

if sys.argv[1:]:
    sys.exit(main(sys.argv[1:]))
sys.exit(run_command(talk, Arguments, argv=["--model", "m"]))
"""


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["--version"], ["train", "--help"], ["info", "--help"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_nobody_reads_ends_the_command_quietly(words, unbuffered):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", LONG, *words],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        text=True,
        timeout=120,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def with_versions(monkeypatch, **versions: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)


@pytest.mark.parametrize(
    ("jax", "flax"),
    [
        ("0.10.2", "0.12.8"),
        ("0.11.0", "0.12.8"),
        ("0.11.1", "0.12.9"),
        ("0.12.0", "0.13.0"),
        ("0.11.1.dev20260101", "0.12.9"),
    ],
)
def test_versions_that_work_together_are_accepted(monkeypatch, jax, flax):
    with_versions(monkeypatch, jax=jax, flax=flax)
    cli.check_versions()


@pytest.mark.parametrize(
    ("jax", "flax"), [("0.11.1", "0.12.8"), ("0.11.2", "0.12.7"), ("0.12.0", "0.12.8")]
)
def test_the_broken_pair_is_refused_with_what_to_install(
    monkeypatch, capsys, jax, flax
):
    with_versions(monkeypatch, jax=jax, flax=flax)
    assert run_command(print, Arguments, argv=["--model", "m"]) == 2
    assert capsys.readouterr().err == (
        f"error: jax {jax} does not work with flax {flax}; "
        "install flax 0.12.9 or newer (pip install -U flax)\n"
    )
