"""Quantised checkpoints, as those who publish them write and dequantise them."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import jax
import jax.numpy as jnp
import llamas
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.quantized_files import compressed, fp8_model
from helpers.tiny import write_hf
from transformers import (
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model
from jlora.model.llama import Llama

DTYPES = {torch.float32: np.dtype(np.float32), torch.bfloat16: ml_dtypes.bfloat16}


def kernel(params: Any, module: str) -> np.ndarray:
    """A module's weight in the layout of Transformers."""
    for part in module.removeprefix("model.").split("."):
        params = params[part]
    return np.asarray(params["kernel"]).T


@pytest.fixture(params=[False, True], ids=["absmax", "nested"])
def nf4(request, tmp_path):
    """A model that bitsandbytes quantised and Transformers saved, and its folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 2}
    plain = LlamaForCausalLM(LlamaConfig(**llamas.PLAIN | sizes))
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
    )
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=settings,
        device_map="cpu",
        dtype=torch.bfloat16,
    )
    model.save_pretrained(tmp_path / "nf4")
    return model, tmp_path / "nf4"


def dequantized(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a model's quantised modules, as bitsandbytes computes them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = dtype
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            found[name] = weight
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_that_bitsandbytes_dequantises(nf4, dtype):
    model, folder = nf4
    source = open_model(str(folder))
    assert source.quantize == "nf4"
    name = np.dtype(DTYPES[dtype]).name
    params = load_params(source, dtype=name)  # type: ignore[arg-type]
    expected = dequantized(model, dtype)
    assert len(expected) == len(source.held) == 7 * source.config.num_hidden_layers
    for module, weight in expected.items():
        np.testing.assert_array_equal(
            kernel(params, module).astype(np.float32), weight.float().numpy()
        )


def test_logits_are_those_of_the_weights_of_bitsandbytes(nf4):
    model, folder = nf4
    reference = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).float().eval()
    weights = {
        name: array.float()
        for name, array in model.named_parameters()
        if array.dtype != torch.uint8
    }
    for module, weight in dequantized(model, torch.float32).items():
        weights[f"{module}.weight"] = weight
    reference.load_state_dict(weights)
    tokens = llamas.random_tokens()
    source = open_model(str(folder))
    found = jax.jit(Llama(source.config).apply)(
        {"params": load_params(source)}, jnp.asarray(tokens)
    )
    np.testing.assert_allclose(
        np.asarray(found), llamas.torch_logits(reference, tokens), rtol=0, atol=1e-4
    )


ROWS, WHOLE = (1, 10**6), (10**6, 10**6)
FP8_CASES = {
    "blocks": (fp8_model((128, 128)), FineGrainedFP8Config(dequantize=True)),
    **{
        strategy: (
            fp8_model(block, "weight_scale", compressed(strategy)),
            CompressedTensorsConfig(dequantize=True),
        )
        for strategy, block in (("channel", ROWS), ("tensor", WHOLE))
    },
}


@pytest.mark.parametrize("name", FP8_CASES)
def test_fp8_weights_are_those_that_transformers_dequantises(name, tmp_path):
    (config, arrays), settings = FP8_CASES[name]
    if name == "tensor":
        arrays = {
            key: array.ravel() if key.endswith("weight_scale") else array
            for key, array in arrays.items()
        }
    if "config_groups" in config["quantization_config"]:
        config["quantization_config"]["quantization_status"] = "compressed"
    folder = write_hf(tmp_path / "fp8", json.loads(json.dumps(config)), arrays)
    theirs = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=settings
    )
    params = load_params(open_model(str(Path(folder))), dtype="bfloat16")
    compared = 0
    for key, weight in theirs.named_parameters():
        if "_proj" in key:
            assert weight.dtype == torch.bfloat16
            found = kernel(params, key.removesuffix(".weight"))
            expected = weight.detach().float().numpy()
            np.testing.assert_array_equal(found.astype(np.float32), expected)
            compared += 1
    assert compared == 7 * config["num_hidden_layers"]
