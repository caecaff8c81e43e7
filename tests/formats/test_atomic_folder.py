import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from helpers.adapters import golden
from helpers.tiny import CONFIG, tensors, write_hf

from convert import from_hf, to_hf
from jlora.cli.command import run_command
from jlora.errors import CorruptError
from jlora.formats import atomic_folder as target
from jlora.formats.atomic_folder import atomic_folder
from jlora.formats.base.base_reader import open_base

CASE = golden("basic")


@pytest.fixture
def hf(tmp_path):
    (tmp_path / "work").mkdir()
    return write_hf(tmp_path / "hf", CONFIG, tensors(CONFIG))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "work" / "out"


def words_of(what, hf, out):
    if what == "convert":
        return from_hf, [str(hf), str(out)]
    paths = [str(out), "--model", str(CASE.base), "--adapter", str(CASE.folder)]
    return to_hf, [*paths, "--verify", "false"]


def run(what, hf, out, *more):
    module, words = words_of(what, hf, out)
    return run_command(module.main, module.Arguments, argv=[*words, *more])


def bytes_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "jlora.json"
    }


# Runs the command, and dies at the count-th call of a function of the module.
KILLED = """
import importlib, os, runpy, signal, sys
module, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = importlib.import_module(module)
original, calls = getattr(owner, name), []

def deadly(*args, **kwargs):
    calls.append(name)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, deadly)
command, words = sys.argv[4], sys.argv[5:]
from jlora.cli.command import run_command
main = importlib.import_module(command)
run_command(main.main, main.Arguments, argv=words)
"""


def killed(what, hf, out, place, *more):
    module, words = words_of(what, hf, out)
    result = subprocess.run(
        [sys.executable, "-c", KILLED, *place, module.__name__, *words, *more],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize(
    ("what", "place"),
    [
        ("convert", ("jlora.formats.base.base_writer", "write_safetensors", "3")),
        ("convert", ("jlora.formats.atomic_folder", "_sync", "1")),
        ("export", ("jlora.formats.export_merged", "_read_back", "1")),
    ],
)
def test_a_killed_command_leaves_no_target_and_can_be_repeated(what, place, hf, out):
    killed(what, hf, out, place)
    assert not out.exists()
    assert run(what, hf, out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["_sync", "_sync_one"])
def test_a_command_killed_while_it_replaces_leaves_the_old_folder(place, hf, out):
    assert run("export", hf, out) == 0
    before = bytes_of(out)
    # "_sync_one" is called for every file, and last when the new folder is in place.
    count = 1 if place == "_sync" else len(list(out.iterdir())) + 2
    more = ["--overwrite", "--dtype", "float16"]
    killed("export", hf, out, ("jlora.formats.atomic_folder", place, str(count)), *more)
    after = bytes_of(out)
    new = json.loads(after["config.json"])["dtype"] == "float16"
    assert new == (place == "_sync_one")
    assert new or after == before
    assert run("export", hf, out, *more) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_folder_is_replaced_in_one_step_where_the_system_can(
    can_swap, out, monkeypatch
):
    renames = []
    if not can_swap:
        monkeypatch.setattr(target, "_exchange", lambda *_: False)
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda *paths: (renames.append(paths), rename(*paths))[1]
    )
    for text in ("old", "new"):
        with atomic_folder(out, overwrite=True) as folder:
            (folder / "config.json").write_text(text)
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len(renames) == (1 if can_swap and sys.platform == "linux" else 3)


@pytest.mark.parametrize("what", ["convert", "export"])
def test_a_disk_too_small_is_told_before_anything_is_written(
    what, hf, out, monkeypatch, capsys
):
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert run(what, hf, out) == 5
    assert "bytes are needed, 1,000 are free" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("what", ["convert", "export"])
def test_a_disk_that_fills_up_meanwhile_is_told_and_leaves_nothing(
    what, hf, out, monkeypatch, capsys
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    place = (
        "jlora.formats.base.base_writer.write_safetensors"
        if what == "convert"
        else "jlora.formats.export_merged._read_back"
    )
    monkeypatch.setattr(place, full)
    assert run(what, hf, out) == 5
    assert "the disk is full" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


# A file system of its own, as users without rights may make one, of 2 MB; the check of
# the free space, which comes first, is answered wrongly, as if others filled the disk.
ON_A_SMALL_DISK = """
import shutil, sys
from convert import from_hf
from jlora.cli.command import run_command
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)
sys.exit(run_command(from_hf.main, from_hf.Arguments,
                     argv=sys.argv[1:]))
"""
MOUNT = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'
SMALL_DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT]


@pytest.mark.slow
def test_a_disk_that_really_fills_up_ends_in_one_message(hf, out):
    config = CONFIG | {"vocab_size": 40_000}
    write_hf(hf, config, tensors(config))
    disk = [*SMALL_DISK, str(out.parent)]
    if not shutil.which("unshare") or subprocess.run([*disk, "true"]).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        [*disk, sys.executable, "-c", ON_A_SMALL_DISK, str(hf), str(out)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith(f"error: {out}: the disk is full")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("what", ["convert", "export"])
def test_a_target_that_cannot_be_made_is_a_usage_error(what, hf, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(what, hf, tmp_path / "file" / "out") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["convert", "export"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(what, umask, hf, out):
    before = os.umask(umask)
    try:
        assert run(what, hf, out) == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in out.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~umask}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


def test_a_conversion_repeated_gives_the_same_digest_and_record(hf, out):
    assert run("convert", hf, out) == 0
    first = (out / "jlora.json").read_bytes()
    digest = open_base(out).provenance["content_digest"]
    assert run("convert", hf, out, "--overwrite") == 0
    assert (out / "jlora.json").read_bytes() == first
    assert open_base(out).provenance["content_digest"] == digest


def test_a_failure_after_the_check_of_the_target_keeps_the_old_folder(hf, out):
    assert run("convert", hf, out) == 0
    before = bytes_of(out)
    arrays = tensors(CONFIG)
    arrays["model.norm.weight"][0] = np.nan
    write_hf(hf, CONFIG, arrays)
    assert run("convert", hf, out, "--overwrite") == 4
    assert bytes_of(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_names_the_folder_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(CorruptError, match=r"^out/model\.safetensors: bad; out$"),
        atomic_folder(Path("out"), False) as folder,
    ):
        raise CorruptError(f"{folder / 'model.safetensors'}: bad; {folder}")


def test_a_failed_comparison_of_the_logits_names_out(hf, out, capsys, monkeypatch):
    monkeypatch.setattr(
        "jlora.formats.verify_export._distance", lambda *_: float("nan")
    )
    words = words_of("export", hf, out)[1][:-2]
    assert run_command(to_hf.main, to_hf.Arguments, argv=words) == 4
    err = capsys.readouterr().err
    assert f"{out}: not the model of base and adapter" in err
    assert ".partial" not in err
    assert not out.exists()
