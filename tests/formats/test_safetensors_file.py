import errno
import json
import os
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers.tiny import write_file

from jlora.errors import CorruptError, ResourceError, UnsupportedError, UsageError
from jlora.formats.atomic_folder import atomic_folder
from jlora.formats.safetensors_file import Spec, read_header, read_tensor


def raw(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


EIGHT = b"\0" * 8
CORRUPT = {
    "empty": (b"", "cut or damaged"),
    "cut in the header": (raw(b"{", length=100), "cut or damaged"),
    "cut in the data": (raw({"a": entry()}, b"\0" * 7), "cut"),
    "trailing bytes": (raw({"a": entry()}, b"\0" * 9), "longer than declared"),
    "huge length": (raw(b"{}", length=2**40), "cut or damaged"),
    "not JSON": (raw(b"{'a'"), "not JSON"),
    "deep JSON": (raw(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "duplicate key": (raw(b'{"a": 1, "a": 1}'), "occurs twice"),
    "fields": (raw({"a": {"dtype": "F32"}}), "expected dtype, shape"),
    "dtype": (raw({"a": entry(dtype="F33")}, EIGHT), "unknown dtype 'F33'"),
    "shape": (raw({"a": entry(shape=(2.0,))}, EIGHT), "not a list of sizes"),
    "bool shape": (raw({"a": entry(shape=(True,))}, EIGHT), "not a list of sizes"),
    "negative": (raw({"a": entry(shape=(-1, -2))}, EIGHT), "not a list of sizes"),
    "overflow": (raw({"a": entry(shape=(2**63, 2))}, EIGHT), "takes"),
    "span": (raw({"a": entry(shape=(3,))}, EIGHT), "takes 12 bytes"),
    "hole": (raw({"a": entry(4, 12)}, b"\0" * 12), "a hole"),
    "overlap": (
        raw({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
        "an overlap",
    ),
    "alias": (raw({"a": entry(), "b": entry()}, EIGHT), "an overlap"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>", "a saved web page"),
}
UNSUPPORTED = {
    "GGUF": (b"GGUF\3\0\0\0\0\0\0\0", "a GGUF file"),
    "torch zip": (b"PK\x03\x04\x14\0\0\0", "pickled"),
    "pickle": (b"\x80\x02}q\0.", "pickled"),
    "int": (raw({"a": entry(dtype="I32")}, EIGHT), "a (I32)"),
    "fp8": (raw({"a": entry(dtype="F8_E4M3")}, EIGHT), "original bfloat16"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_damaged_file_is_refused_as_corrupt(tmp_path, name):
    content, message = CORRUPT[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CorruptError, match=message):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_format_under_this_name_is_named(tmp_path, name):
    content, message = UNSUPPORTED[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedError) as error:
        read_header(tmp_path / "x.safetensors")
    assert message in str(error.value)


def test_header_above_the_cap_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + b"{")
        file.truncate(300_000_000)
    with pytest.raises(CorruptError, match="at most 4,194,304"):
        read_header(path)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
)
def test_tensor_comes_back_bit_for_bit(tmp_path, dtype):
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    write_file(tmp_path / "x", {"a": array, "b": array[:0], "c": array[0, 0]})
    again = read_tensor(read_header(tmp_path / "x")["a"])
    assert again.dtype == dtype
    assert again.tobytes() == array.tobytes()


def test_written_file_is_read_by_the_safetensors_library(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.ones(1, np.float16)}
    write_file(tmp_path / "x", arrays)
    again = safetensors.numpy.load_file(tmp_path / "x")
    assert all(np.array_equal(again[key], array) for key, array in arrays.items())


def test_written_bytes_do_not_depend_on_the_order_of_tensors(tmp_path):
    arrays = {"b": np.ones(3, np.float16), "a": np.ones(2, np.float32)}
    write_file(tmp_path / "x", arrays)
    write_file(tmp_path / "y", dict(reversed(arrays.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_written_file_has_the_pt_format_and_the_umask_mode(tmp_path):
    mask = os.umask(0o022)
    write_file(tmp_path / "x", {"a": np.ones(2, np.float32)})
    os.umask(mask)
    assert b'"__metadata__":{"format":"pt"}' in (tmp_path / "x").read_bytes()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_every_written_tensor_is_aligned_to_its_items(tmp_path):
    sizes = {"a": np.float16, "b": np.float32, "c": ml_dtypes.bfloat16, "d": np.float64}
    write_file(tmp_path / "x", {k: np.ones(3, dtype) for k, dtype in sizes.items()})
    entries = read_header(tmp_path / "x").values()
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in entries)


def test_spec_knows_its_size():
    assert Spec((3, 4), np.dtype(np.float16)).nbytes == 24


def write(out, text="new", *, overwrite=False, source=None):
    with atomic_folder(out, overwrite, source) as folder:
        (folder / "config.json").write_text(text)
        (folder / "sub").mkdir()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_whole(tmp_path):
    write(tmp_path / "a" / "out")
    assert names(tmp_path / "a" / "out") == ["config.json", "sub"]
    assert names(tmp_path / "a") == ["out"]


def test_empty_folder_is_a_valid_target(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path / "out") == ["config.json", "sub"]


def test_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", False):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_failure_keeps_the_old_folder(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", True):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_overwrite_replaces_the_whole_folder(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").touch()
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["config.json", "sub"]
    assert names(tmp_path) == ["out"]


def test_remains_of_a_killed_writer_are_cleared(tmp_path):
    (tmp_path / ".out.partial" / "sub").mkdir(parents=True)
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_folder_moved_aside_by_a_killed_writer_comes_back(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(UsageError, match="not empty"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_is_no_model_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="choose another OUT"):
        write(tmp_path / "out", overwrite=overwrite)
    assert names(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("inside", [".", "model.gguf"])
def test_target_that_holds_the_source_is_refused(tmp_path, inside):
    write(tmp_path / "out")
    with pytest.raises(UsageError, match="is or holds the source"):
        write(tmp_path / "out", overwrite=True, source=tmp_path / "out" / inside)


def test_file_as_target_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="not a folder"):
        write(tmp_path / "out")


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write(tmp_path / "file" / "out")


def test_second_writer_is_refused_and_the_first_one_finishes(tmp_path):
    with atomic_folder(tmp_path / "out", False) as folder:
        with pytest.raises(UsageError, match="another process"):
            write(tmp_path / "out")
        (folder / "config.json").touch()
    assert names(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device"),
    ],
)
def test_full_disk_is_one_message_and_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(ResourceError, match="out: the disk is full"),
        atomic_folder(tmp_path / "out", False),
    ):
        raise error
    assert names(tmp_path) == []


def test_read_only_parent_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        write(tmp_path / "out")
