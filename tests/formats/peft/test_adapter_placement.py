from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import (
    GOLDEN,
    HEAD,
    A,
    B,
    Q,
    changed_copy,
    config_of,
    golden,
    renamed,
    with_more,
    with_value,
    without,
)

from jlora.errors import CorruptError
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.adapter_placement import place_adapter
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.attach_adapter import attach_adapter

TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without(A), f"{A} is missing"),
        (without(A, B), "selects model.layers.0.self_attn.q_proj, which has no"),
        (lambda arrays: {}, "no tensors"),
        (renamed("q_proj", "q_porj"), "no model.layers.0.self_attn.q_porj; did you"),
        (renamed("v_proj", "k_proj"), "does not select model.layers.0.self_attn.k"),
        (renamed("layers.1", "layers.2"), "the model has no model.layers.2.self"),
        (renamed("base_model.model.", ""), "not of the form base_model.model.model"),
        (with_more(f"{Q}.lora_C.weight"), f"did you mean '{B}'"),
        (with_more(f"{Q}.lora_magnitude_vector"), "[8, 64] is not a vector"),
        (
            lambda a: a | {f"{Q}.lora_magnitude_vector": a[A][0]},
            f"{Q}.lora_magnitude_vector is not among what the settings select",
        ),
        (with_more(f"{Q}.weight"), f"{Q}.weight: weights of the base"),
        (with_more(f"{Q}.base_layer.weight"), "weights of the base"),
        (with_more("base_model.model.model.norm.weight"), "is not a vector"),
        (with_more(f"{Q}.lora_A.default.weight"), "two tensors for"),
        (with_value(A, lambda a: a[:4]), "different ranks"),
        (with_value(A, lambda a: a[:, :9]), "[8, 9] instead of [8, 64]"),
        (with_value(B, lambda b: b[:9]), "[9, 8] instead of [64, 8]"),
        (with_value(B, lambda b: b[None]), "is not a matrix"),
        (with_value(A, lambda a: np.where(a == a.max(), np.nan, a)), f"{A}: nan at"),
        (with_value(B, lambda b: np.where(b == b.max(), np.inf, b)), f"{B}: inf at"),
    ],
)
def test_damaged_tensors_are_refused(arrays, message, folder):
    changed_copy(folder, "basic", arrays=arrays)
    with pytest.raises(CorruptError) as caught:
        place_adapter(read_adapter(folder), config_of("untied_fp32"))
    assert message in str(caught.value)


def test_all_misfits_are_listed_at_once(folder):
    changed_copy(folder, "basic", {"target_modules": ["q_proj", "k_proj"]})
    with pytest.raises(CorruptError) as caught:
        place_adapter(read_adapter(folder), config_of("untied_fp32"))
    assert str(caught.value).count("which has no tensors") == 2
    assert str(caught.value).count("does not select") == 2


@pytest.mark.parametrize(
    ("name", "settings", "arrays", "message"),
    [
        ("dora", {}, without(f"{Q}.lora_magnitude_vector"), "vector is missing"),
        ("dora", {"use_dora": False}, None, "vector is not among what the settings"),
        ("modules_to_save", {}, without(HEAD), f"{HEAD} is missing"),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}, None, "weights of the b"),
        ("modules_to_save", {}, with_value(HEAD, lambda h: h[1:]), "[79, 64] instead"),
        ("resized_vocab", {}, without(HEAD), f"84 tokens, the base's 80, and {HEAD}"),
        ("trainable_tokens", {}, without(TOKENS), f"{TOKENS} is missing"),
        ("trainable_tokens", {"trainable_token_indices": [1, 5]}, None, "[3, 64] inst"),
        (
            "trainable_tokens",
            {"trainable_token_indices": [1, 5, 5]},
            None,
            "5 is given twice",
        ),
        (
            "trainable_tokens",
            {"trainable_token_indices": [1, 5, 80]},
            None,
            "not in 0.",
        ),
        (
            "trainable_tokens",
            {"trainable_token_indices": {"norm": [1]}},
            None,
            "has no rows of tokens",
        ),
        (
            "embed",
            {"trainable_token_indices": [1]},
            None,
            "target_modules or modules_to_save has already",
        ),
        ("embed", {"target_modules": ["q_proj"]}, None, "select model.embed_tokens"),
        (
            "basic",
            {"target_modules": ["q_proj", "v_proj", "lm_head"]},
            None,
            "selects lm_head, which has no tensors",
        ),
        ("basic", {"init_lora_weights": "magic"}, None, "not known to PEFT"),
    ],
)
def test_tensors_and_settings_that_disagree_are_refused(
    name, settings, arrays, message, folder
):
    changed_copy(folder, name, settings, arrays)
    with pytest.raises(CorruptError) as caught:
        place_adapter(read_adapter(folder), config_of("untied_fp32"))
    assert message in str(caught.value)


def test_an_adapter_of_a_larger_model_is_refused():
    _, params, _ = golden("basic").load()
    config = config_of("tied_fp32")
    adapter = read_adapter(GOLDEN / "basic")
    wide = Adapter.make(
        adapter.config,
        {
            path: {"lora_A": np.zeros((128, 8), np.float32), "lora_B": pair["lora_B"]}
            for path, pair in adapter.tensors.items()
        },
        Path("wide"),
    )
    with pytest.raises(CorruptError, match=r"\[8, 128\] instead of \[8, 64\]"):
        attach_adapter(params, config, wide)
