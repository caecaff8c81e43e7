import json
import shutil

import numpy as np
import pytest
from helpers.adapters import golden
from safetensors.numpy import load_file, save_file

from jlora.errors import CorruptError, UnsupportedError
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_placement import place_adapter
from jlora.formats.peft.adapter_reader import find_adapter, read_adapter

PREFIX = "base_model.model."
NAME = "all_linear"


def tensors() -> dict[str, np.ndarray]:
    return load_file(golden(NAME).folder / "adapter_model.safetensors")


def with_keys(folder, rename):
    """A copy of an adapter whose tensors have other names."""
    shutil.copytree(golden(NAME).folder, folder)
    renamed = {rename(key): array for key, array in tensors().items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    return folder


def assert_same(found, expected):
    assert found.tensors.keys() == expected.tensors.keys()
    for path, leaves in expected.tensors.items():
        for leaf, array in leaves.items():
            assert np.array_equal(found.tensors[path][leaf], array)
    assert found.scalings == expected.scalings


def mlx(folder, **changes):
    """The same adapter as mlx-lm would have saved it."""
    folder.mkdir()
    settings = json.loads((golden(NAME).folder / "adapter_config.json").read_text())
    rank = settings["r"]
    parameters = {"rank": rank, "scale": settings["lora_alpha"] / rank, "dropout": 0.0}
    document = {"fine_tune_type": "lora", "lora_parameters": parameters, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    arrays = {
        key.removeprefix(PREFIX)
        .replace(".lora_A.weight", ".lora_a")
        .replace(".lora_B.weight", ".lora_b"): np.ascontiguousarray(array.T)
        for key, array in tensors().items()
    }
    save_file(arrays, folder / "adapters.safetensors")
    return folder


def test_adapter_of_mlx_lm_is_read(tmp_path):
    assert_same(read_adapter(mlx(tmp_path / "a")), read_adapter(golden(NAME).folder))


def test_adapter_that_torchtune_saved_in_the_form_of_peft_is_read(tmp_path):
    # It names only these settings; beside the file is the same as a pickle.
    folder = with_keys(tmp_path / "epoch_0", str)
    settings = json.loads((folder / "adapter_config.json").read_text())
    names = ("r", "lora_alpha", "target_modules", "peft_type")
    kept = {name: settings[name] for name in names}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    (folder / "adapter_model.pt").touch()
    found = find_adapter(folder)
    assert found == folder
    assert_same(read_adapter(folder), read_adapter(golden(NAME).folder))


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_kinds_of_mlx_lm_are_refused(tmp_path, kind):
    with pytest.raises(UnsupportedError, match="mlx-lm's fine_tune_type"):
        read_adapter(mlx(tmp_path / "a", fine_tune_type=kind))


def test_mlx_settings_without_rank_or_weights_are_corrupt(tmp_path):
    folder = mlx(tmp_path / "a", lora_parameters={"rank": "8"})
    with pytest.raises(CorruptError, match="rank '8' and scale None"):
        read_adapter(folder)
    folder = mlx(tmp_path / "b")
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(CorruptError, match="without adapters"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".lora_", "._orig_mod.lora_", 1),
        lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
        lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
        lambda key: f"module.{key}",
        lambda key: key.replace(PREFIX, f"{PREFIX}module."),
        lambda key: key.replace(PREFIX, f"{PREFIX}language_model."),
        lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    ],
)
def test_names_of_wrappers_are_left_out(tmp_path, rename):
    found = read_adapter(with_keys(tmp_path / "a", rename))
    assert_same(found, read_adapter(golden(NAME).folder))


def test_part_of_a_multimodal_model_is_one_line_with_two_names(tmp_path):
    def rename(key: str) -> str:
        part = "vision_tower." if ".layers.0." in key else "language_model."
        return key.replace(PREFIX, PREFIX + part)

    adapter = read_adapter(with_keys(tmp_path / "a", rename))
    with pytest.raises(CorruptError) as error:
        place_adapter(adapter, open_model(str(golden(NAME).base)).config)
    message = str(error.value)
    assert "an adapter of another model" in message
    assert message.count("model.layers.") == 2


def test_zero_3_without_gathering_is_named(tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(golden(NAME).folder, folder)
    empty = {key: np.zeros(0, np.float32) for key in tensors()}
    save_file(empty, folder / "adapter_model.safetensors")
    with pytest.raises(CorruptError, match="saved without gathering"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "tool"),
    [
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
        ("transformer.h.0.attn.qkv.lora_A", "litgpt"),
    ],
)
def test_names_of_other_tools_are_refused_by_name(tmp_path, key, tool):
    folder = tmp_path / "a"
    shutil.copytree(golden(NAME).folder, folder)
    save_file({key: np.ones((2, 2))}, folder / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=f"a name of {tool}'s"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("lit_model.pth.lora", "litgpt"),
        ("adapter_0.pt", "torchtune"),
        ("adapter_model.pt", "torchtune"),
        ("adapters.npz", "mlx-lm"),
    ],
)
def test_files_of_other_tools_are_refused_by_name(tmp_path, name, tool):
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedError, match=tool):
        find_adapter(tmp_path)


def test_gguf_adapter_is_named(tmp_path):
    (tmp_path / "lora.gguf").touch()
    with pytest.raises(UnsupportedError, match="converter makes"):
        find_adapter(tmp_path / "lora.gguf")
