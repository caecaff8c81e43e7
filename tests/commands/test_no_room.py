"""What a run meets when its disk is full, its limits are low or nobody reads its output."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.commands import Done, adapter_bytes, call, losses, succeed, train_flags

pytestmark = pytest.mark.usefixtures("in_workdir")


def flags(folder: object) -> list[object]:
    return train_flags(folder, "--train.save_every", 10, "--train.keep", 3)


def shell(line: str, folder: Path) -> Done:
    """Trains as TRAIN in a line of bash, without a terminal."""
    train = [sys.executable, str(ROOT / "train.py"), *map(str, flags(folder))]
    done = subprocess.run(
        ["bash", "-c", line.replace("TRAIN", '"$@"'), "bash", *train],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def check(done: Done, words: str) -> None:
    assert done.status == 5
    assert words in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir)
        succeed("train", *flags(folder))
    return folder


def check_continued(folder: Path, whole: Path) -> None:
    assert call("train", *flags(folder)).status == 0
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert losses(folder) == losses(whole)


@pytest.mark.parametrize("blocks", [0, 15, 30])  # of 1,024 bytes
def test_a_limit_of_files_is_one_message_and_the_run_continues(whole, tmp_path, blocks):
    done = shell(f"ulimit -f {blocks}; exec TRAIN", tmp_path / "run")
    check(done, "a file may not become larger (ulimit -f)")
    check_continued(tmp_path / "run", whole)


def test_too_few_open_files_is_one_message(tmp_path):
    done = shell("ulimit -n 14; exec TRAIN", tmp_path / "run")
    check(done, "no more files may be open (ulimit -n)")


@pytest.fixture
def small_disk(request, tmp_path) -> Iterator[Path]:
    """A file system of a few bytes."""
    size = f"size={request.param}"
    words = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(tmp_path)]
    if (
        os.geteuid()
        or subprocess.run(words, capture_output=True, check=False).returncode
    ):
        pytest.skip("cannot mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("small_disk", ["64k", "250k", "600k"], indirect=True)
def test_a_full_disk_is_one_message_and_the_run_continues(
    small_disk, whole, tmp_path_factory
):
    done = call("train", *flags(small_disk / "run"))
    check(done, "the disk is full")
    assert str(small_disk / "run") in done.err
    words = ["mount", "-o", "remount,size=4m", str(small_disk)]
    subprocess.run(words, check=True)
    check_continued(small_disk / "run", whole)


@pytest.mark.parametrize(
    "line",
    [
        "TRAIN | head -1; exit ${PIPESTATUS[0]}",
        "TRAIN 2>&1 | head -1; exit ${PIPESTATUS[0]}",
        "TRAIN >&-",
        "TRAIN <&- >&- 2>&-",
        "TRAIN > /dev/full",
    ],
)
def test_a_run_whose_output_nobody_reads_trains_to_its_end(whole, tmp_path, line):
    done = shell(line, tmp_path / "run")
    assert (done.status, done.err) == (0, "")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)
    assert losses(tmp_path / "run") == losses(whole)


def test_a_run_that_is_stopped_unread_has_the_status_of_a_stop(tmp_path):
    folder = tmp_path / "run"
    read, write = os.pipe()
    train = [sys.executable, str(ROOT / "train.py"), *map(str, flags(folder))]
    process: Any = subprocess.Popen(
        [*train, "--train.max_steps", "100000"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=write,
        stderr=write,
    )
    os.close(write)
    with os.fdopen(read) as output:
        while not output.readline().startswith("step 5/"):
            assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
