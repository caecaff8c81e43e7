import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llamas
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

import convert
from jlora.errors import UnsupportedError
from jlora.formats.hf.export_config import export_config
from jlora.formats.open_model import open_model


def jax_logits(path, tokens, **options):
    model, params = convert.load(str(path), **options)
    return np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(tokens)))


def assert_same_logits(folder, theirs):
    tokens = llamas.random_tokens()
    np.testing.assert_allclose(
        jax_logits(folder, tokens),
        llamas.torch_logits(theirs, tokens),
        rtol=0,
        atol=1e-4,
    )


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("name", llamas.CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    assert_same_logits(tmp_path, llamas.save(tmp_path, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_half_precision_checkpoint_equal_transformers(dtype, tmp_path):
    assert_same_logits(tmp_path, llamas.save(tmp_path, "gqa", dtype))


def test_logits_of_a_mixed_checkpoint_equal_transformers(tmp_path):
    llamas.save(tmp_path, "gqa")
    dtypes = [torch.float32, torch.bfloat16, torch.float16]

    def mixed(tensors):
        keys = sorted(tensors)
        return {k: tensors[k].to(dtypes[i % 3]) for i, k in enumerate(keys)}

    change_tensors(tmp_path, mixed)
    assert_same_logits(tmp_path, llamas.load(tmp_path))


@pytest.mark.parametrize("name", ["mha", "tied"])
def test_logits_of_a_sharded_checkpoint_equal_transformers(name, tmp_path):
    theirs = llamas.save(tmp_path, name, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(tmp_path, theirs)


def test_logits_of_a_bare_model_save_equal_transformers(tmp_path):
    theirs = llamas.save(tmp_path, "tied")
    theirs.model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("model.") for name in names)
    assert_same_logits(tmp_path, theirs)


def test_frequencies_stored_by_old_versions_are_ignored(tmp_path):
    theirs = llamas.save(tmp_path, "gqa")
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    change_tensors(
        tmp_path, lambda t: t | {name.format(i): torch.ones(4) for i in range(3)}
    )
    assert_same_logits(tmp_path, theirs)


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("name", [*llamas.ROPES, "llama3"])
def test_the_layout_of_transformers_4_means_the_same(name, key, tmp_path):
    theirs = llamas.save(tmp_path, name)

    def older(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope | {key: rope.pop("rope_type")}
        return config

    change_config(tmp_path, older)
    assert_same_logits(tmp_path, theirs)


@pytest.mark.parametrize("name", llamas.CONFIGS)
def test_an_exported_configuration_means_the_same_in_transformers(name, tmp_path):
    theirs = llamas.save(tmp_path / "a", name)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    source = open_model(str(tmp_path / "a"))
    exported = export_config(source.hf_config, source.config, "float32")
    change_config(tmp_path / "b", lambda _: exported)
    assert_same_logits(tmp_path / "b", theirs)
    again = llamas.load(tmp_path / "b")
    tokens = llamas.random_tokens()
    np.testing.assert_array_equal(
        llamas.torch_logits(again, tokens), llamas.torch_logits(theirs, tokens)
    )


MISTRALS: list[tuple[Any, Any]] = [(MistralConfig, MistralForCausalLM)]
if hasattr(transformers, "MinistralConfig"):  # since Transformers 5
    MISTRALS.append((transformers.MinistralConfig, transformers.MinistralForCausalLM))


def save_mistral(folder, window, kind=MISTRALS[0], **settings):
    torch.manual_seed(0)
    settings = llamas.PLAIN | {"num_key_value_heads": 2, "head_dim": 12} | settings
    kind[1](kind[0](**settings, sliding_window=window)).save_pretrained(folder)
    return kind[1].from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.parametrize(
    ("window", "kind"),
    # Transformers cannot run a Ministral without a window.
    [(None, MISTRALS[0]), *itertools.product([96, 4096], MISTRALS)],
)
def test_logits_of_a_mistral_up_to_its_window_equal_transformers(
    tmp_path, kind, window
):
    theirs = save_mistral(tmp_path, window, kind)
    assert llamas.random_tokens().shape[1] <= 96
    assert_same_logits(tmp_path, theirs)


def test_window_matters_to_transformers_beyond_its_length_only(tmp_path):
    tokens = llamas.random_tokens()
    length = tokens.shape[1]
    logits = [
        llamas.torch_logits(save_mistral(tmp_path / str(window), window), tokens)
        for window in (None, length, length - 1)
    ]
    np.testing.assert_array_equal(logits[1], logits[0])
    np.testing.assert_array_equal(logits[2][:, :-1], logits[0][:, :-1])
    assert not np.allclose(logits[2][:, -1], logits[0][:, -1])
    with pytest.raises(
        UnsupportedError, match=f"={length} exceeds the model's sliding"
    ):
        jax_logits(tmp_path / str(length - 1), tokens)


def test_exported_mistral_keeps_its_window(tmp_path):
    theirs = save_mistral(tmp_path, 96)
    source = open_model(str(tmp_path))
    exported = export_config(source.hf_config, source.config, "float32")
    change_config(tmp_path, lambda _: exported)
    again = MistralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.sliding_window == theirs.config.sliding_window == 96


def test_a_mistral_that_does_not_mention_its_window_has_one_of_4096(tmp_path):
    theirs = save_mistral(tmp_path, 4096)
    change_config(tmp_path, lambda c: {k: c[k] for k in c if k != "sliding_window"})
    again = MistralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (
        again.config.sliding_window == open_model(str(tmp_path)).config.sliding_window
    )
    assert_same_logits(tmp_path, theirs)
