import pytest
from helpers.adapters import GOLDEN, changed_copy, config_of

from jlora.errors import CorruptError, UnsupportedError
from jlora.formats.peft.adapter_placement import place_adapter
from jlora.formats.peft.adapter_reader import read_adapter


# What is refused: settings of `basic`, changed.
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"target_parameters": ["weight"]},
        {"alora_invocation_tokens": [1]},
        {"arrow_config": {}},
        {"use_bdlora": True},
        {"velora_config": {}},
        {"kasa_config": {}},
        {"monteclora_config": {}},
        {"use_qalora": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
    ],
    ids=str,
)
def test_an_unsupported_setting_is_refused_by_name(settings, folder):
    changed_copy(folder, "basic", settings)
    [(key, value)] = settings.items()
    with pytest.raises(UnsupportedError) as caught:
        read_adapter(folder)
    assert f"{key}={value!r}" in str(caught.value)
    assert "with PEFT" in str(caught.value)


def test_all_unsupported_settings_are_named_at_once(folder):
    changed_copy(folder, "basic", {"lora_bias": True, "use_qalora": True})
    with pytest.raises(UnsupportedError, match=r"lora_bias=True .*, use_qalora=True"):
        read_adapter(folder)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica", "eva", False])
def test_a_method_that_leaves_the_base_alone_is_plain_lora(start, folder):
    changed_copy(folder, "basic", {"init_lora_weights": start})
    expected = read_adapter(GOLDEN / "basic")
    assert read_adapter(folder).config == expected.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": None}, "no peft_type"),
        ({"r": 0}, "r=0"),
        ({"r": "8"}, "r='8' is not an integer"),
        ({"r": 8.5}, "r=8.5 is not an integer"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": True}, "lora_alpha=True is not a number"),
        ({"lora_dropout": 2}, "lora_dropout=2"),
        ({"target_modules": [1]}, "target_modules="),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": []}, "is empty"),
        ({"target_modules": r"model\.layers\.0"}, "not a linear layer"),
        ({"exclude_modules": {}}, "exclude_modules={}"),
        ({"layers_to_transform": "1"}, "layers_to_transform='1'"),
        ({"layers_pattern": "layers"}, "layers_pattern needs"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern="),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj=0"),
        ({"use_rslora": 1}, "use_rslora=1 is not true or false"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3"),
        ({"r": 4}, "q_proj has rank 8, the settings say 4"),
        ({"rank_pattern": {"v_proj": 2}}, "v_proj has rank 8, the settings say 2"),
    ],
    ids=str,
)
def test_damaged_settings_are_refused(settings, message, folder):
    changed_copy(folder, "basic", settings)
    with pytest.raises(CorruptError) as caught:
        place_adapter(read_adapter(folder), config_of("untied_fp32"))
    assert message in str(caught.value)


def test_absent_keys_take_the_defaults_of_peft(folder):
    changed_copy(folder, "defaults")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    adapter = read_adapter(folder)
    place_adapter(adapter, config_of("untied_fp32"))
    assert set(adapter.scalings.values()) == {1.0}


def test_an_unknown_key_is_dropped_with_a_warning(folder, capsys):
    changed_copy(folder, "basic", {"user_rslora": True})
    read_adapter(folder)
    expected = "unknown keys are ignored: user_rslora; did you mean 'use_rslora'?"
    assert expected in capsys.readouterr().err
