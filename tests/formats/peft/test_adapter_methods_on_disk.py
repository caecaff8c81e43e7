from typing import Any

import jax
import numpy as np
import pytest
from helpers.adapter_methods import METHODS, trained_adapter
from helpers.adapters import golden
from helpers.training_cases import (
    llama_config,
    logits_of,
    moved,
    random_params,
    random_tokens,
)

from jlora import LoraConfig, add_lora, merge
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.adapter_writer import save_adapter
from jlora.formats.peft.attach_adapter import attach_adapter
from jlora.loading import open_adapter
from jlora.lora.adapter_tree import module_at, split, trainable_mask
from jlora.lora.merging import merge_module
from jlora.model.llama import Llama
from jlora.train.checkpoint import save_checkpoint

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("method", [method for method in METHODS if method != "olora"])
def test_a_written_adapter_of_every_method_reads_back(method, tmp_path):
    config, params, lora = trained_adapter(method)
    base = random_params(config)
    save_adapter(params, lora, tmp_path / "out", None)
    again = attach_adapter(base, config, read_adapter(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa", "use_rslora": True},
        {
            "init_lora_weights": "olora",
            "target_modules": ["q_proj", "v_proj", "embed_tokens"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"q_proj": 5},
            "modules_to_save": ["norm"],
            "use_dora": True,
        },
    ],
    ids=["pissa", "olora"],
)
def test_factors_of_the_base_kernel_are_exported_as_plain_lora(fields, tmp_path):
    config, tokens = llama_config(num_hidden_layers=1), random_tokens(2, 8)
    settings: dict[str, Any] = {"r": 2}
    base, lora = random_params(config), LoraConfig(**(settings | fields))
    params = moved(add_lora(base, lora, jax.random.key(0)))
    save_adapter(params, lora, tmp_path / "out", None)
    adapter = read_adapter(tmp_path / "out")
    assert adapter.config.init_lora_weights is True
    assert adapter.config.r == 4
    model = Llama(config)
    again = attach_adapter(base, config, adapter)
    expected = logits_of(model, params, tokens)
    np.testing.assert_allclose(logits_of(model, again, tokens), expected, atol=2e-5)
    merged = logits_of(model, merge(again), tokens)
    np.testing.assert_allclose(merged, expected, atol=2e-5)


def test_pissa_of_a_run_without_its_adapter_folder_is_computed_again(tmp_path):
    case = golden("basic")
    _, base, _ = case.load()
    lora: dict[str, Any] = {"r": 2, "init_lora_weights": "pissa_niter_3"}
    params = moved(add_lora(base, LoraConfig(**lora), jax.random.key(4)))
    trainable, _ = split(params, trainable_mask(params))
    settings: dict[str, Any] = {"model": str(case.base), "lora": lora, "seed": 4}
    settings["compute"] = {"base_dtype": "keep"}
    save_checkpoint(
        tmp_path / "checkpoints",
        3,
        {"trainable": trainable},
        {"settings": settings},
        keep=1,
    )
    found = merge_module(
        {
            **jax.tree.map(np.asarray, module_at(base, Q0)),
            **open_adapter(tmp_path).pairs["layers/0/self_attn/q_proj"],
            "lora_scaling": np.asarray(4, np.float32),
        }
    )
    expected = np.asarray(module_at(merge(params), Q0)["kernel"])
    np.testing.assert_allclose(found["kernel"], expected, atol=1e-5)
