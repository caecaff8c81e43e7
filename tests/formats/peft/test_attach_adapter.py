import pytest
from helpers.adapters import changed_copy, config_of, golden, with_value

from jlora.errors import UnsupportedError
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.attach_adapter import attach_adapter
from jlora.lora.adapter_tree import module_at


def test_attached_leaves_share_the_base():
    _, base, params = golden("basic").load()
    name = "model.layers.0.self_attn.q_proj"
    assert module_at(params, name)["kernel"] is module_at(base, name)["kernel"]
    assert "lora_A" not in module_at(base, name)


def test_trained_biases_are_not_trained_on():
    case = golden("bias_all")
    model, base, _ = case.load()
    with pytest.raises(UnsupportedError, match=r"bias_all: bias='all'.*jlora export"):
        attach_adapter(base, model.config, read_adapter(case.folder), train=True)


def test_a_resized_vocabulary_is_not_trained_on():
    case = golden("resized_vocab")
    _, base, _ = case.load()
    config = config_of("untied_fp32")
    with pytest.raises(
        UnsupportedError, match=r"84 tokens, the base has 80.*jlora export"
    ):
        attach_adapter(base, config, read_adapter(case.folder), train=True)


def test_different_adapters_of_tied_embeddings_are_both_used(folder, capsys):
    key = "base_model.model.lm_head.lora_B.weight"
    changed_copy(folder, "tied_embed_ensured", arrays=with_value(key, lambda b: 2 * b))
    model, base, _ = golden("tied_embed_ensured").load()
    found = attach_adapter(base, model.config, read_adapter(folder))
    assert "lora_shared" not in found["lm_head"]
    assert "both are used" in capsys.readouterr().err


def test_an_adapter_with_other_embeddings_than_the_bases_is_not_trained_on(folder):
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    changed_copy(folder, "embed", arrays=with_value(key, lambda e: 2 * e))
    model, base, _ = golden("embed").load()
    with pytest.raises(
        UnsupportedError, match=r"copies of model\.embed_tokens differ.*jlora export"
    ):
        attach_adapter(base, model.config, read_adapter(folder), train=True)
