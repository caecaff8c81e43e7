"""An exported folder, made into GGUF as llama.cpp's converter would, is the same model."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import GOLDEN
from helpers.adapters import golden
from helpers.gguf_files import llama3_divisors, write_gguf

import convert
from convert import to_hf

gguf = pytest.importorskip("gguf")
ROPE = json.loads((GOLDEN / "rope/cases.json").read_text())


@pytest.fixture
def export(tmp_path):
    """Returns the folder of a golden base and adapter, with another rope."""
    case = golden("basic")

    def run(rope):
        base = tmp_path / "base"
        base.mkdir()
        config = json.loads((case.base / "config.json").read_text())
        config.pop("rope_parameters", None)
        config |= {"rope_theta": 5e4, "rope_scaling": rope}
        (base / "config.json").write_text(json.dumps(config))
        for path in case.base.glob("*.safetensors"):
            (base / path.name).write_bytes(path.read_bytes())
        arguments = to_hf.Arguments(
            out=str(tmp_path / "out"),
            model=str(base),
            adapter=str(case.folder),
            verify=False,
        )
        to_hf.main(arguments)
        return tmp_path / "out"

    return run


def as_llama_cpp(folder, path):
    """Writes what convert_hf_to_gguf.py makes of a Llama, from the keys that it reads."""
    config = json.loads((folder / "config.json").read_text())
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    metadata = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": head_dim,
        "tokenizer.ggml.tokens": [chr(200 + i) for i in range(config["vocab_size"])],
        "tokenizer.ggml.token_type": [1] * config["vocab_size"],
        "tokenizer.ggml.merges": None,
    }
    scaling = config["rope_scaling"] or {}
    if scaling.get("rope_type") == "llama3":
        original = config.get("original_max_position_embeddings", 8192)
        arrays["rope_freqs.weight"] = llama3_divisors(
            config["rope_theta"], head_dim, scaling["factor"], original
        )
    elif scaling:
        metadata["llama.rope.scaling.type"] = scaling["rope_type"]
        metadata["llama.rope.scaling.factor"] = scaling["factor"]
        if scaling["rope_type"] == "yarn":
            original = scaling["original_max_position_embeddings"]
            metadata["llama.rope.scaling.original_context_length"] = original
    counts = (heads, config["num_key_value_heads"])
    return write_gguf(path, arrays, metadata, heads=counts)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 2.0},
        ROPE["cases"]["llama3"],
        ROPE["cases"]["llama3"] | {"original_max_position_embeddings": 8192},
    ],
    ids=[
        "default",
        "linear",
        "yarn_factor_null",
        "yarn_whole",
        "llama3",
        "llama3_8192",
    ],
)
def test_llama_cpp_would_compute_the_same(rope, export, tmp_path):
    folder = export(rope)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (1, 60)), jnp.int32)
    logits = []
    for path in (str(folder), as_llama_cpp(folder, tmp_path / "model.gguf")):
        model, params = convert.load(path)
        found: Any = model.apply({"params": params}, tokens)
        logits.append(np.asarray(found))
    # The divisors are rounded to float32 once more: measured 2e-6.
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4)


def test_every_exported_name_is_known_to_llama_cpp(export):
    tensors = safetensors.numpy.load_file(export(None) / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert [k for k in tensors if names.get_name(k, (".weight", ".bias")) is None] == []
