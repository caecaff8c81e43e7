from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.adapters import GOLDEN, changed_copy, config_of, renamed

from jlora.errors import CorruptError, JloraError, UnsupportedError, UsageError
from jlora.formats.peft.adapter_placement import place_adapter
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.loading import open_adapter


@pytest.mark.parametrize(
    "spelling",
    [
        renamed(".weight", ".default.weight"),
        renamed("model.model", "model._orig_mod.model"),
    ],
)
def test_other_spellings_of_keys_are_read(spelling, folder):
    changed_copy(folder, "basic", arrays=spelling)
    expected = read_adapter(GOLDEN / "basic")
    jax.tree.map(
        np.testing.assert_array_equal, read_adapter(folder).tensors, expected.tensors
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_tensors_are_converted_exactly(dtype, folder):
    changed_copy(
        folder, "basic", arrays=lambda a: {k: v.astype(dtype) for k, v in a.items()}
    )
    expected = read_adapter(GOLDEN / "basic")  # on a grid that both dtypes hold
    jax.tree.map(
        np.testing.assert_array_equal, read_adapter(folder).tensors, expected.tensors
    )


def test_an_adapter_that_changes_nothing_is_a_warning(folder, capsys):
    changed_copy(
        folder,
        "basic",
        arrays=lambda a: {k: v * 0 if "lora_B" in k else v for k, v in a.items()},
    )
    read_adapter(folder)
    assert "every lora_B is zero" in capsys.readouterr().err


def test_a_good_adapter_gives_no_warning(capsys):
    adapter = read_adapter(GOLDEN / "patterns")
    place_adapter(adapter, config_of("untied_fp32"))
    assert capsys.readouterr().err == ""


def test_a_pickled_adapter_is_refused_unopened(folder):
    changed_copy(folder, "basic")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=r"pickle.*save_pretrained"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda f: None, UsageError, "no such file or folder"),
        (lambda f: f.mkdir(), UsageError, "neither adapter_config.json nor"),
        (lambda f: (f / "checkpoints").mkdir(parents=True), UsageError, "checkpoint"),
        (lambda f: changed_copy(f / "en", "basic"), UsageError, "its subfolder en"),
        (lambda f: no_weights(f), CorruptError, "without adapter_model.safetensors"),
        (lambda f: outside(f), CorruptError, "a link that leaves"),
    ],
)
def test_a_folder_that_is_no_adapter_is_refused(prepare, error, message, folder):
    prepare(folder)
    with pytest.raises(JloraError, match=message) as caught:
        open_adapter(folder)
    assert isinstance(caught.value, error)


def no_weights(folder: Path) -> None:
    changed_copy(folder, "basic")
    (folder / "adapter_model.safetensors").unlink()


def outside(folder: Path) -> None:
    no_weights(folder)
    target = GOLDEN / "basic" / "adapter_model.safetensors"
    (folder / "adapter_model.safetensors").symlink_to(target)


@pytest.mark.parametrize("revision", [None, "abc"])
def test_an_adapter_may_be_named_by_its_hub_id(revision, monkeypatch):
    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        return str(GOLDEN / "basic")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    name = "owner/adapter" if revision is None else f"owner/adapter@{revision}"
    assert open_adapter(name).config == read_adapter(GOLDEN / "basic").config
    assert (asked["repository"], asked["revision"]) == ("owner/adapter", revision)
    assert all("adapter_" in pattern for pattern in asked["allow_patterns"])
