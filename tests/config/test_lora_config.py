from dataclasses import fields
from typing import Any

import pytest

from jlora.config.lora_config import LoraConfig
from jlora.errors import UnsupportedError, UsageError


def test_lora_defaults_are_those_of_peft():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)
    assert config.target_modules is None
    assert config.init_lora_weights is True
    assert not config.use_rslora
    assert config.bias == "none"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj=0"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_alpha": 1e300}, "lora_alpha=1e.300"),
        ({"lora_alpha": 1e-300}, "lora_alpha=1e-300"),
        ({"lora_alpha": -1}, "lora_alpha=-1"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "q_proj=1e.300"),
        ({"alpha_pattern": {"q_proj": -1}}, "q_proj=-1"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_to_transform": [0, -1]}, "-1; layers count from 0"),
    ],
)
def test_lora_values_out_of_range_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        LoraConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "pissa_niter_0"},
    ],
)
def test_unsupported_initialisations_are_refused_by_name(changes):
    with pytest.raises(UnsupportedError, match=next(iter(changes))):
        LoraConfig(**changes)


# Every field of PEFT 0.21's LoraConfig that is not kept, with a value that has no effect.
WITHOUT_EFFECT = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "inference_mode": True,
    "fan_in_fan_out": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "runtime_config": {"ephemeral_gpu_offload": False},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": None,
    "lora_ga_config": None,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": [],
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "qalora_group_size": 16,
}


def test_fields_of_peft_without_effect_are_accepted_and_not_kept():
    assert LoraConfig(r=4, **WITHOUT_EFFECT) == LoraConfig(r=4)
    kept = {field.name for field in fields(LoraConfig)}
    assert LoraConfig.__dataclass_fields__.keys() == kept | WITHOUT_EFFECT.keys()
    assert not kept & WITHOUT_EFFECT.keys()


@pytest.mark.parametrize(
    "name",
    [
        *("peft_type", "task_type", "lora_bias", "layer_replication"),
        *("target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora"),
        *("velora_config", "kasa_config", "monteclora_config", "use_qalora"),
    ],
)
def test_an_unsupported_feature_is_refused_with_field_value_and_reason(name):
    wanted: dict[str, Any] = {name: "wanted"}
    with pytest.raises(
        UnsupportedError, match=rf"{name}='wanted' \(.{{10,}}\); leave it out"
    ):
        LoraConfig(**wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": "8"}, "r='8' is not an integer"),
        ({"r": None}, "r=None is not an integer"),
        ({"lora_alpha": True}, "lora_alpha=True is not a number"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is not true or false"),
        ({"use_dora": 1}, "use_dora=1 is not true or false"),
        ({"target_modules": [1]}, r"target_modules=\[1\] is not"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' is not a list"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0' is not"),
        ({"layers_to_transform": [0.5]}, r"layers_to_transform=\[0.5\] is not"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern="),
        ({"alpha_pattern": {1: 2}}, "alpha_pattern="),
        (
            {"alpha_pattern": {"q_proj": "2"}},
            "alpha_pattern=.* is not an object of numbers",
        ),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices="),
        ({"init_lora_weights": None}, "init_lora_weights=None"),
        ({"bias": None}, "bias=None is not a string"),
        ({"revision": 1}, "revision=1 is not a string"),
    ],
)
def test_lora_values_of_a_wrong_type_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        LoraConfig(**changes)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"rank_pattern": None, "alpha_pattern": None}, {}),
        (
            {"target_modules": {"v_proj", "k_proj"}},
            {"target_modules": ["k_proj", "v_proj"]},
        ),
        ({"target_modules": ("q_proj",)}, {"target_modules": ["q_proj"]}),
        ({"layers_to_transform": range(2)}, {"layers_to_transform": [0, 1]}),
        ({"init_lora_weights": "Gaussian"}, {"init_lora_weights": "gaussian"}),
    ],
)
def test_tuples_sets_and_null_are_accepted_as_in_peft(given, kept):
    assert LoraConfig(**given) == LoraConfig(**kept)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 2.0), (True, 8.0)])
def test_scaling_is_alpha_over_rank_or_its_root(rslora, expected):
    config = LoraConfig(r=16, lora_alpha=32, use_rslora=rslora)
    assert config.scaling(16, 32) == expected
