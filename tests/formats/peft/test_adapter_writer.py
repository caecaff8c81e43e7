import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers.adapters import CASES, SEVEN, files, golden, read_settings, tensors

import jlora
from jlora.errors import UsageError
from jlora.formats.open_model import open_model
from jlora.formats.peft.adapter_placement import place_adapter
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.adapter_writer import save_adapter
from jlora.formats.peft.attach_adapter import attach_adapter
from jlora.lora.adapter_tree import split, trainable_mask

# The keys that PEFT has known since 0.6; an older PEFT stops at any other.
OLDEST_KEYS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
}


# Written back as plain LoRA on another base, and with tables of its own.
REWRITTEN = [n for n in CASES if n not in ("pissa", "olora", "resized_vocab")]


@pytest.fixture(params=REWRITTEN)
def rewritten(request):
    return golden(request.param)


def rewrite(case, folder, **kwargs):
    _, _, params = case.load()
    config = read_adapter(case.folder).config
    save_adapter(params, config, folder, "base", **kwargs)
    return folder


def kept(leaves):
    """The leaves that are written: not PEFT's copies of the base's tables."""
    return {k: v for k, v in leaves.items() if k not in ("kernel", "embedding")}


def test_written_adapter_reads_back_equal(rewritten, folder):
    before = read_adapter(rewritten.folder)
    after = read_adapter(rewrite(rewritten, folder))
    assert before.tensors.keys() == after.tensors.keys()
    for path, leaves in before.tensors.items():
        jax.tree.map(np.testing.assert_array_equal, kept(leaves), after.tensors[path])
    assert before.scalings == after.scalings
    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
    for field in fields:
        assert getattr(before.config, field) == getattr(after.config, field)
    place_adapter(after, open_model(str(rewritten.base)).config)


def test_written_tensors_are_those_of_peft(rewritten, folder):
    expected = {
        key: value
        for key, value in tensors(rewritten.folder).items()
        if not key.endswith("base_layer.weight")
    }
    written = tensors(rewrite(rewritten, folder))
    assert written.keys() == expected.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(value, expected[key].astype(value.dtype))
        assert value.dtype == np.float32 or ".lora_" not in key


def test_written_keys_are_the_oldest_and_newer_ones_that_are_set(rewritten, folder):
    keys = read_settings(rewrite(rewritten, folder)).keys()
    config = read_adapter(rewritten.folder).config
    newer = ("use_rslora", "use_dora", "ensure_weight_tying", "trainable_token_indices")
    assert keys == OLDEST_KEYS | {key for key in newer if getattr(config, key)}


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("basic", ["q_proj", "v_proj"]),
        ("all_linear", SEVEN),
        ("patterns", SEVEN),
        (
            "regex",
            [
                "model.layers.1.mlp.up_proj",
                "model.layers.1.self_attn.k_proj",
                "model.layers.1.self_attn.q_proj",
            ],
        ),
        (
            "exclude",
            [
                "model.layers.0.mlp.up_proj",
                "model.layers.1.mlp.up_proj",
                "model.layers.1.self_attn.q_proj",
            ],
        ),
        (
            "layers",
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
        ),
    ],
)
def test_written_targets_are_suffixes_if_they_suffice(name, targets, folder):
    settings = read_settings(rewrite(golden(name), folder))
    assert settings["target_modules"] == targets


@pytest.mark.parametrize(
    ("name", "count"), [("basic", 2), ("layers", 2), ("exclude", 3)]
)
def test_targets_are_the_same_without_the_base_at_hand(name, count, folder):
    case = golden(name)
    _, _, params = case.load()
    trainable, _ = split(params, trainable_mask(params))
    config = read_adapter(case.folder).config
    save_adapter(trainable, config, folder, "base")
    written = read_settings(folder)
    rewrite(case, folder, overwrite=True)
    assert written == read_settings(folder)
    assert len(written["target_modules"]) == count


def test_patterns_are_written_as_full_escaped_names(folder):
    settings = read_settings(rewrite(golden("patterns"), folder))
    q_proj = r"model\.layers\.{}\.self_attn\.q_proj"
    v_proj = r"model\.layers\.{}\.self_attn\.v_proj"
    assert settings["rank_pattern"] == {
        r"model\.layers\.0\.mlp\.down_proj": 2,
        q_proj.format(0): 4,
        q_proj.format(1): 4,
    }
    assert settings["alpha_pattern"] == {
        r"model\.layers\.1\.mlp\.gate_proj": 24,
        v_proj.format(0): 8,
        v_proj.format(1): 8,
    }


def test_settings_are_sorted_and_integral_alphas_plain(folder):
    rewrite(golden("basic"), folder)
    text = (folder / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert '"lora_alpha": 32,' in text


def test_base_and_revision_are_kept(folder):
    case = golden("basic")
    _, _, params = case.load()
    config = read_adapter(case.folder).config
    config = replace(config, base_model_name_or_path="owner/name", revision="abc")
    save_adapter(params, config, folder)
    adapter = read_adapter(folder)
    assert adapter.config.base_model_name_or_path == "owner/name"
    assert adapter.config.revision == "abc"


def test_the_revision_of_a_hub_id_is_written_apart(folder):
    case = golden("basic")
    _, _, params = case.load()
    save_adapter(params, read_adapter(case.folder).config, folder, "owner/name@abc")
    settings = read_settings(folder)
    assert settings["base_model_name_or_path"] == "owner/name"
    assert settings["revision"] == "abc"


def test_writing_twice_gives_the_same_bytes(tmp_path):
    case = golden("patterns")
    first, second = (rewrite(case, tmp_path / name) for name in "ab")
    assert files(first) == files(second)


def test_an_existing_adapter_needs_overwrite(folder):
    rewrite(golden("basic"), folder)
    with pytest.raises(UsageError, match="not empty"):
        rewrite(golden("defaults"), folder)
    rewrite(golden("defaults"), folder, overwrite=True)
    assert read_settings(folder)["lora_alpha"] == 8


def test_a_tree_without_adapter_is_not_written(folder):
    _, base, _ = golden("basic").load()
    with pytest.raises(UsageError, match="nothing to write"):
        save_adapter(base, jlora.LoraConfig(), folder, None)


def test_new_adapter_of_add_lora_reads_back(folder):
    model, base, _ = golden("basic").load()
    config = jlora.LoraConfig(r=2, lora_alpha=3.5, target_modules=["up_proj"])
    params = jlora.add_lora(base, config, jax.random.key(0))
    save_adapter(params, config, folder, None)
    again = attach_adapter(base, model.config, read_adapter(folder))
    jax.tree.map(np.testing.assert_array_equal, params, again)
