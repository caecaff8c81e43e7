import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT

from jlora.data.cache.token_store import RECORD, StoreWriter, TokenBlock, open_or_build
from jlora.errors import ResourceError, UsageError


def block(*lengths: int, first: int = 0) -> TokenBlock:
    total = sum(lengths)
    records = np.zeros(len(lengths), RECORD)
    records["length"] = lengths
    records["start"] = np.cumsum(lengths) - lengths
    return TokenBlock(
        np.arange(first, first + total, dtype=np.int32),
        np.ones(total, np.uint8),
        records,
    )


def build(writer: StoreWriter) -> dict[str, int]:
    writer.append(block(2, 3))
    writer.append(block(4, first=5))
    return {"rows": 3}


def never(writer: StoreWriter):
    raise AssertionError("built although it is there")


def names(cache: Path) -> set[str]:
    return {p.name for p in cache.iterdir() if p.suffix not in (".lock", ".use")}


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_blocks_are_read_back_one_after_the_other(cache):
    store = open_or_build(cache, "k", build)
    assert store.tokens.tolist() == list(range(9))
    assert store.records["start"].tolist() == [0, 2, 5]
    assert store.records["length"].tolist() == [2, 3, 4]
    assert store.loss_mask.tolist() == [1] * 9
    assert store.note == {"rows": 3}


def test_arrays_are_mapped_not_read(cache):
    assert isinstance(open_or_build(cache, "k", build).tokens, np.memmap)


def test_a_store_that_is_there_is_not_built_again(cache):
    built, opened = open_or_build(cache, "k", build), open_or_build(cache, "k", never)
    np.testing.assert_array_equal(built.tokens, opened.tokens)
    assert (built.digest, built.note) == (opened.digest, opened.note)


def test_another_key_is_another_store(cache):
    first = open_or_build(cache, "a", build)
    second = open_or_build(cache, "b", lambda writer: writer.append(block(9)) or {})
    assert first.digest != second.digest
    assert names(cache) == {"a", "b"}


def test_digest_depends_on_the_borders(cache):
    first = open_or_build(cache, "a", lambda writer: writer.append(block(4, 5)) or {})
    second = open_or_build(cache, "b", lambda writer: writer.append(block(5, 4)) or {})
    assert first.digest != second.digest


def test_a_store_without_records_opens(cache):
    open_or_build(cache, "k", lambda writer: {})
    assert len(open_or_build(cache, "k", never).records) == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.bin", "loss_mask.bin", "records.bin"])
@pytest.mark.parametrize(
    "damage",
    [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])],
    ids=["flipped", "missing", "cut"],
)
def test_a_damaged_store_is_reported_and_built_again(cache, capsys, name, damage):
    good = open_or_build(cache, "k", build).digest
    damage(cache / "k" / name)
    store = open_or_build(cache, "k", build)
    assert store.tokens.tolist() == list(range(9))
    assert store.digest == good
    assert "building it again" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 0}'])
def test_a_store_with_a_damaged_note_is_built_again(cache, text):
    open_or_build(cache, "k", build)
    (cache / "k" / "note.json").write_text(text)
    assert open_or_build(cache, "k", build).note == {"rows": 3}


def test_a_failed_build_leaves_nothing(cache):
    def fail(writer: StoreWriter):
        writer.append(block(3))
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        open_or_build(cache, "k", fail)
    assert names(cache) == set()


def test_a_full_disk_is_an_error_that_names_the_setting(cache):
    def fail(writer: StoreWriter):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"disk is full .*data.cache_dir"):
        open_or_build(cache, "k", fail)
    assert names(cache) == set()


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written .*data.cache_dir"):
        open_or_build(tmp_path / "file" / "cache", "k", build)


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = ["tests", "tests/data/cache", "."]
from jlora.data.cache.token_store import open_or_build
from test_token_store import block
def build(writer):
    print("building", flush=True)
    for i in range(10):
        writer.append(block(3, 4))
        time.sleep(float(sys.argv[2]))
    return {}
store = open_or_build(Path(sys.argv[1]), "k", build)
print("has", len(store.records), flush=True)
"""


def start(cache: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(cache), str(pause)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_a_killed_build_left_is_cleared(cache):
    process = start(cache, 30)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert names(cache) == {"k.tmp"}
    open_or_build(cache, "other", build)
    assert names(cache) == {"other"}


@pytest.fixture
def room_for_two(cache, monkeypatch):
    """Stores a, used last, and b; the disk has room for half of one more."""
    for key, used in (("a", 200), ("b", 100)):
        open_or_build(cache, key, build)
        os.utime(cache / key, (used, used))
    total = 2.5 * sum(file.stat().st_size for file in (cache / "a").iterdir())
    monkeypatch.setattr("jlora.data.cache.token_store.SHARE", 1)
    usage = SimpleNamespace(total=total)
    monkeypatch.setattr(
        "jlora.data.cache.token_store.shutil.disk_usage", lambda _: usage
    )


def test_the_store_unused_for_longest_makes_room(cache, room_for_two, capsys):
    open_or_build(cache, "c", build)
    assert names(cache) == {"a", "c"}
    assert capsys.readouterr().out == (
        f"token cache: {cache / 'b'} was removed to make room\n"
    )


def test_opening_a_store_counts_as_use(cache, room_for_two):
    open_or_build(cache, "b", never)
    open_or_build(cache, "c", build)
    assert names(cache) == {"b", "c"}


def test_a_store_in_use_is_not_removed(cache, room_for_two):
    used = open_or_build(cache, "b", never)
    os.utime(cache / "b", (100, 100))
    open_or_build(cache, "c", build)
    assert names(cache) == {"b", "c"}
    assert used.tokens.tolist() == list(range(9))
    del used
    os.utime(cache / "b", (100, 100))
    open_or_build(cache, "d", build)
    assert names(cache) == {"c", "d"}


def test_a_store_larger_than_the_share_stays_while_it_is_the_newest(cache, monkeypatch):
    monkeypatch.setattr("jlora.data.cache.token_store.SHARE", 0)
    open_or_build(cache, "a", build)
    assert names(cache) == {"a"}


def test_folders_that_are_no_stores_are_left_alone(cache, monkeypatch):
    monkeypatch.setattr("jlora.data.cache.token_store.SHARE", 0)
    for name in ("mine", "mine.tmp"):
        (cache / name).mkdir(parents=True)
        (cache / name / "note.json").write_text('{"key": "other"}')
    open_or_build(cache, "a", build)
    open_or_build(cache, "b", build)
    assert names(cache) == {"b", "mine", "mine.tmp"}


def test_of_two_processes_one_builds_and_the_other_waits(cache):
    first, second = start(cache, 0.2), start(cache, 0.2)
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert sorted(text.count("building") for text in outputs) == [0, 1]
    assert all("has 20" in text for text in outputs)


def test_a_build_in_another_process_is_not_cleared_as_stale(cache):
    process = start(cache, 0.3)
    deadline = time.monotonic() + 30
    while not (cache / "k.tmp").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    open_or_build(cache, "other", build)
    assert "has 20" in process.communicate(timeout=60)[0]
    assert os.path.isdir(cache / "k")


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from helpers.data_cases import load
from jlora.data.cache import build_cache
from jlora.data.batch.batches import Dataset
from jlora.data.cache.token_store import RECORD, TokenBlock, open_or_build

lines = Path("/proc/self/status").read_text().splitlines()
used = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((used << 10) + (64 << 20),) * 2)
build_cache._BYTES_PER_WORKER = 1 << 40
build_cache._REPORT_EVERY_S = 600
print(load(Path(sys.argv[1])).num_records)

block = TokenBlock(np.ones(10**6, np.int32), np.ones(10**6, np.uint8), np.zeros(100, RECORD))
block.records["length"] = 10**4
block.records["start"] = np.arange(100) * 10**4

def fill(writer):
    for _ in range(30):
        writer.append(block)
    return {}

store = open_or_build(Path(sys.argv[1]).parent, "k", fill)
data = Dataset(
    store, store.records["start"], store.records["length"], num_supervised=1,
    seq_len=10**4, packing=True, batch_size=8, pad_id=0, seed=0, shuffle=True,
)
print(sum(int(data.batch(i)["tokens"].sum()) for i in range(data.steps_per_epoch)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_files_and_stores_may_be_larger_than_memory(tmp_path):
    # 120 MB of text and a store of 150 MB, where 64 MiB may be used.
    row = json.dumps({"text": "the sum", "more": "x" * 10**6}) + "\n"
    with (tmp_path / "data.jsonl").open("w") as file:
        file.writelines([row] * 120)
    tests = ROOT / "tests"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "data.jsonl")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{tests.parent}:{tests}",
            "JLORA_CACHE": str(tmp_path / "cache"),
        },
    )
    assert (done.stdout.split(), done.stderr) == (["120", str(30 * 10**6)], "")
