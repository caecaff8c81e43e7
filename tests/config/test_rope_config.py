import pytest
from helpers.hf_configs import LLAMA3, make, without

from jlora.errors import CorruptError, UnsupportedError


def test_v4_and_v5_layouts_mean_the_same_theta():
    old = make(rope_theta=5e5)
    new = make(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert old == new
    assert old.rope_parameters.rope_theta == 5e5


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_llama3_in_v4_and_v5_layout_is_the_same(type_key):
    scaling = {**without(LLAMA3, "rope_type"), type_key: "llama3"}
    old = make(rope_theta=5e5, rope_scaling=scaling)
    new = make(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == new
    assert old.rope_parameters.factor == 8.0
    assert old.rope_parameters.original_max_position_embeddings == 32


def test_rope_settings_repeated_in_every_place_are_accepted():
    config = make(
        rope_theta=5e5,
        rope_scaling=LLAMA3,
        rope_parameters={**LLAMA3, "rope_theta": 5e5},
        original_max_position_embeddings=32,
    )
    assert config == make(rope_theta=5e5, rope_scaling=LLAMA3)


@pytest.mark.parametrize("empty", [None, {}])
def test_empty_rope_scaling_is_no_scaling(empty):
    assert make(rope_scaling=empty) == make()


def test_an_unsupported_rope_type_is_refused_with_a_list_of_the_supported():
    with pytest.raises(
        UnsupportedError, match="default, linear, dynamic, llama3, yarn, longrope"
    ):
        make(rope_scaling={"rope_type": "su"})


@pytest.mark.parametrize("key", without(LLAMA3, "rope_type"))
def test_a_missing_llama3_key_is_named_with_its_type(key):
    with pytest.raises(CorruptError, match=f"llama3.*{key}"):
        make(rope_scaling=without(LLAMA3, key))


@pytest.mark.parametrize("value", [[], {"a": 1}, 3])
def test_a_rope_type_of_a_strange_type_is_refused(value):
    with pytest.raises(UnsupportedError, match="rope"):
        make(rope_scaling={"rope_type": value, "factor": 2.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": None}, "rope_theta=None"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": [10000.0]}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta"),
        ({"rope_theta": "a", "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "10000.0, 500000.0",
        ),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "type and rope_type differ"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 4.0}},
            "differ in factor",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "differ",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
            "64 at the top and 32",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": 0.5}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings",
        ),
    ],
)
def test_wrong_and_contradictory_rope_settings_are_refused_with_the_key(changes, words):
    with pytest.raises(CorruptError, match=words):
        make(**changes)
