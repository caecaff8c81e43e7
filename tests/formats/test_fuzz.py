"""Damaged and hostile files, made at random but the same every time.

Longer: raise EXAMPLES and remove derandomize.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.quantized_files import (
    BNB,
    FP8,
    QUANTIZED_CONFIG,
    bnb_model,
    compressed,
    fp8_model,
)
from helpers.tiny import CONFIG, tensors, write_hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jlora.config.llama_config import LlamaConfig
from jlora.config.quantization import find_quantization
from jlora.errors import JloraError
from jlora.formats.hf.export_config import export_config
from jlora.formats.open_model import open_model
from jlora.formats.tensor_names import all_names
from jlora.model.rotary import rope_frequencies

EXAMPLES = 100
# Numbers that readers stumble over, as little-endian bytes of any width.
NUMBERS = [0, 1, 2, 8, 127, 128, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40]
NUMBERS += [2**63 - 1, 2**63, 2**64 - 1]
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
positions = st.floats(0, 1, exclude_max=True)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), positions, st.integers(0, 255)),
        st.tuples(
            st.just("number"),
            positions,
            st.tuples(st.sampled_from(NUMBERS), st.sampled_from([1, 2, 4, 8])),
        ),
        st.tuples(st.just("delete"), positions, st.integers(1, 64)),
        st.tuples(st.just("repeat"), positions, st.integers(1, 64)),
        st.tuples(st.just("cut"), positions, st.just(0)),
    ),
    min_size=1,
    max_size=5,
)


def damaged(data: bytes, edits: list[tuple[str, float, Any]], head: int) -> bytes:
    """Returns the bytes after the edits, most of which fall into the first `head`."""
    result = bytearray(data)
    for what, place, value in edits:
        at = int(place * min(len(result), head))
        if what == "byte" and at < len(result):
            result[at] = value
        elif what == "number":
            number, width = value
            result[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif what == "delete":
            del result[at : at + value]
        elif what == "repeat":
            result[at:at] = result[at : at + value]
        elif what == "cut":
            del result[at:]
    return bytes(result)


def read_all(path: Path) -> None:
    """Reads a model as a conversion would; a refusal is one sentence of some length."""
    try:
        source = open_model(str(path))
        for name in source.tensors:
            source.read(name)
    except JloraError as error:
        assert 20 < len(str(error)) < 3000  # noqa: PT017


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = write_hf(tmp_path_factory.mktemp("fuzz"), CONFIG, tensors(CONFIG))
    return folder, (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["nf4", "fp8"])
def quantized(request, tmp_path_factory):
    config, arrays = bnb_model() if request.param == "nf4" else fp8_model((48, 40))
    folder = write_hf(tmp_path_factory.mktemp("fuzz"), config, arrays)
    return folder, (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    from helpers.gguf_files import write_gguf

    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    write_gguf(
        path, tensors(CONFIG) | {"rope_freqs.weight": np.array([1, 2], np.float32)}
    )
    return path, path.read_bytes()


@fuzzed
@given(edits=changes)
def test_a_damaged_safetensors_file_is_read_or_refused(hf, edits):
    folder, data = hf
    header = 8 + int.from_bytes(data[:8], "little")
    (folder / "model.safetensors").write_bytes(damaged(data, edits, header))
    read_all(folder)


@fuzzed
@given(edits=changes, in_data=st.booleans())
def test_a_damaged_quantised_file_is_read_or_refused(quantized, edits, in_data):
    folder, data = quantized
    header = 8 + int.from_bytes(data[:8], "little")
    # Behind the header, no edit moves a tensor.
    kept = [edit for edit in edits if edit[0] in ("byte", "number")]
    changed = (
        data[:header] + damaged(data[header:], kept, len(data))[: len(data) - header]
        if in_data
        else damaged(data, edits, header)
    )
    (folder / "model.safetensors").write_bytes(changed)
    read_all(folder)


STATE = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
STATE_KEYS = [
    *("shape", "blocksize", "dtype", "quant_type", "nested_blocksize"),
    *("nested_offset", "nested_dtype"),
]


@fuzzed
@given(
    changes=st.dictionaries(
        st.sampled_from(STATE_KEYS),
        st.deferred(lambda: values | st.lists(st.integers(0, 2**40), max_size=3)),
        max_size=2,
    )
)
def test_a_wild_state_of_nf4_is_read_or_refused(tmp_path_factory, changes):
    config, arrays = bnb_model(config=QUANTIZED_CONFIG | {"num_hidden_layers": 1})
    state = json.loads(arrays[STATE].tobytes()) | changes
    arrays[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    read_all(write_hf(tmp_path_factory.getbasetemp() / "state", config, arrays))


QUANTIZATION_KEYS = [
    *("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "fmt"),
    *("weight_block_size", "format", "config_groups", "kv_cache_scheme"),
    *("sparsity_config", "transform_config"),
]


@fuzzed
@given(
    base=st.sampled_from([BNB, FP8, compressed("channel"), compressed("block")]),
    changes=st.deferred(
        lambda: st.dictionaries(st.sampled_from(QUANTIZATION_KEYS), values, max_size=3)
    ),
    weights=st.deferred(lambda: st.dictionaries(st.sampled_from(FORM_KEYS), values)),
)
def test_a_wild_quantization_is_understood_or_refused(base, changes, weights):
    settings = json.loads(json.dumps(base | changes))
    groups = settings.get("config_groups")
    if groups and groups == base.get("config_groups"):
        groups["group_0"]["weights"] |= weights
    try:
        found = find_quantization({"quantization_config": settings})
    except JloraError as error:
        assert 20 < len(str(error)) < 3000  # noqa: PT017
        return
    assert found is not None
    assert found.method in ("bitsandbytes", "fp8")


FORM_KEYS = ["num_bits", "type", "symmetric", "strategy", "block_structure"]


@fuzzed
@given(edits=changes)
def test_a_damaged_gguf_file_is_read_or_refused(gguf_file, edits):
    path, data = gguf_file
    path.write_bytes(damaged(data, edits, 3000))
    read_all(path)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(["", "llama", "1", "full_attention", *CONFIG]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
ROPE_KEYS = [
    *("rope_type", "type", "rope_theta", "factor", "attention_factor", "truncate"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"),
    *("mscale_all_dim", "short_factor", "long_factor", "low_freq_factor"),
]
MORE_KEYS = [
    *("head_dim", "eos_token_id", "bos_token_id", "attention_bias", "hidden_act"),
    *("layer_types", "quantization_config", "sliding_window", "num_experts"),
    *("original_max_position_embeddings", "dtype", "partial_rotary_factor"),
]
types = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
numbers = st.one_of(st.floats(1e-3, 1e6), st.integers(1, 2**31 - 1))
ropes = st.builds(
    lambda kind, sound, wild: {"rope_type": kind, **sound, **wild},
    st.sampled_from(types),
    st.fixed_dictionaries(
        {
            "factor": numbers,
            "original_max_position_embeddings": st.integers(1, 2**31 - 1),
            "short_factor": st.lists(numbers, min_size=2, max_size=2),
            "long_factor": st.lists(numbers, min_size=2, max_size=2),
            "low_freq_factor": numbers,
            "high_freq_factor": numbers,
        }
    ),
    st.dictionaries(st.sampled_from(ROPE_KEYS), values | numbers, max_size=2),
)


@fuzzed
@given(
    changes=st.dictionaries(st.sampled_from([*CONFIG, *MORE_KEYS]), values, max_size=2),
    rope=st.none() | ropes,
    place=st.sampled_from(["rope_scaling", "rope_parameters"]),
)
def test_a_wild_configuration_is_understood_or_refused(changes, rope, place):
    document = json.loads(json.dumps(CONFIG | changes | {place: rope}))
    try:
        config = LlamaConfig.from_hf(document)
    except JloraError as error:
        assert 20 < len(str(error)) < 3000  # noqa: PT017
        return
    hash(config)  # models are static arguments of compiled functions
    assert len(all_names(config)) <= 12 * 10_000 + 3
    if config.head_dim < 1000:
        for length in (1, 100, 10**6):
            assert np.isfinite(rope_frequencies(config, length)).all()
    again = json.loads(json.dumps(export_config(document, config, "float32")))
    assert LlamaConfig.from_hf(again) == config
