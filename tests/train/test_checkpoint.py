"""Damage to every file of the newest checkpoint ends in the older one, and in no traceback."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError
from jlora.train.checkpoint import (
    adapter_of_step,
    load_newest,
    save_checkpoint,
    saved_steps,
)

META = {"identity": {"data": "x"}, "settings": {"lora": asdict(LoraConfig(r=2))}}
Damage = Callable[[Path], Any]


def state(step: int) -> dict[str, Any]:
    leaf = np.full((3, 2), step, np.float32)
    return {"step": np.int32(step), "trainable": {"q_proj": {"lora_A": leaf}}}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (1, 2):
        save_checkpoint(folder, step, state(step), META, keep=2)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "checkpoints")


def step_of(folder: Path) -> int:
    """The step that is restored, which must be as it was written."""
    saved, problems = load_newest(folder)
    assert saved is not None
    assert saved.leaves["trainable.q_proj.lora_A"].tolist() == [[saved.step] * 2] * 3
    assert {key: saved.meta[key] for key in META} == json.loads(json.dumps(META))
    assert len(problems) == 2 - saved.step
    return saved.step


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "a folder": to_folder,
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "a list": lambda path: path.write_bytes(b"[]"),
    "null": lambda path: path.write_bytes(b"null"),
    "not UTF-8": lambda path: path.write_bytes(b"\xe9" + path.read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_of_the_newest_step_falls_back(written, damage, tmp_path):
    files = [path for path in (written / "2").rglob("*") if path.is_file()]
    assert len(files) > 5
    for number, file in enumerate(files):
        if not file.stat().st_size:  # nothing can be flipped or cut
            continue
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        damage(folder / file.relative_to(written))
        assert step_of(folder) == 1


def change(folder: Path, **changes: Any) -> None:
    file = folder / "2" / "meta" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("value", [None, 2, 4, True, "x", [], [[1]], {"a": 1}])
@pytest.mark.parametrize(
    "key", ["schema", "sha256", "files", "identity", "settings", "digest"]
)
def test_a_changed_value_beside_the_arrays_falls_back(folder, key, value):
    change(folder, **{key: value})
    assert step_of(folder) == 1


@pytest.mark.parametrize("key", ["sha256", "identity", "settings", "versions"])
def test_damage_to_a_checkpoint_without_digests_of_files_is_found(folder, key):
    change(folder, schema=2, **{key: [1]})
    file = folder / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["digest"]
    file.write_text(json.dumps(meta))
    shutil.rmtree(folder / "1")
    with pytest.raises(CorruptError, match="its settings are damaged"):
        load_newest(folder, [2])


def test_settings_without_an_adapter_are_damaged(tmp_path):
    save_checkpoint(tmp_path / "checkpoints", 1, state(1), {"settings": {}}, keep=1)
    with pytest.raises(CorruptError, match="step 1 has no settings of an adapter"):
        adapter_of_step(tmp_path / "checkpoints")


def test_an_adapter_that_is_read_from_an_older_step_is_warned_of(folder, capsys):
    flip(folder / "2" / "meta" / "metadata")
    assert adapter_of_step(folder)[1]["q_proj"]["lora_A"].tolist() == [[1, 1]] * 3
    warning = capsys.readouterr().err
    assert warning.startswith("warning: skipped a damaged checkpoint: ")
    assert warning.count("\n") == 1


@pytest.mark.parametrize("name", ["²", "１", "03", "-3", "3 ", "3.tmp"])  # noqa: RUF001
def test_a_folder_with_an_odd_name_is_no_step(folder, name):
    (folder / name).mkdir()
    assert saved_steps(folder) == [2, 1]
    assert step_of(folder) == 2


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to(p)])
def test_what_stands_where_a_later_step_belongs_is_skipped_and_replaced(folder, make):
    make(folder / "3")
    saved, problems = load_newest(folder)
    assert saved is not None
    assert (saved.step, len(problems)) == (2, 1)
    save_checkpoint(folder, 3, state(3), META, keep=2)
    assert saved_steps(folder) == [3, 2]
    saved, problems = load_newest(folder)
    assert saved is not None
    assert (saved.step, problems) == (3, [])


def test_what_a_killed_save_left_is_removed_by_the_next(folder):
    (folder / ".3.partial" / "state").mkdir(parents=True)
    save_checkpoint(folder, 4, state(4), META, keep=2)
    assert {path.name for path in folder.iterdir()} == {"2", "4"}


def test_a_step_of_a_later_schema_is_refused_and_not_skipped(folder, monkeypatch):
    monkeypatch.setattr("jlora.train.checkpoint.SCHEMA_VERSION", 4)
    save_checkpoint(folder, 3, state(3), META, keep=2)
    with pytest.raises(UnsupportedError, match="schema 4; this jlora reads schema 3"):
        load_newest(folder)


def test_the_newest_steps_stay_and_one_more(tmp_path):
    for step, also in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2)):
        save_checkpoint(tmp_path, step, state(step), META, keep=2, also=also)
    assert saved_steps(tmp_path) == [5, 4, 2]
    assert adapter_of_step(tmp_path, 2)[1]["q_proj"]["lora_A"].tolist() == [[2, 2]] * 3
    with pytest.raises(UsageError, match="no step 3; there are 2, 4, 5"):
        adapter_of_step(tmp_path, 3)


def test_a_step_that_is_saved_again_is_there_until_the_new_one_is_whole(
    folder, monkeypatch
):
    save_checkpoint(folder, 2, state(2), {**META, "progress": 1}, keep=2)
    assert step_of(folder) == 2
    with monkeypatch.context() as patched:
        patched.setattr("jlora.train.checkpoint.leaf_digest", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_checkpoint(folder, 2, state(2), META, keep=2)
    assert step_of(folder) == 2
    saved, _ = load_newest(folder)
    assert saved is not None
    assert saved.meta["progress"] == 1
