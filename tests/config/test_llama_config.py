import pytest
from helpers.hf_configs import HF, make

from jlora.config.llama_config import unused_keys
from jlora.errors import CorruptError, UsageError


def test_absent_keys_get_hf_defaults():
    config = make()
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.rope_parameters.rope_theta == 10000.0
    assert config.max_position_embeddings == 2048
    assert not config.tie_word_embeddings
    assert config.eos_token_id == ()


@pytest.mark.parametrize("head_dim", [16, 24, 128])
def test_head_dim_is_what_the_file_says(head_dim):
    assert make(head_dim=head_dim).head_dim == head_dim


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
def test_null_means_the_default(key):
    assert make(**{key: None}) == make()


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, ()), (2, (2,)), ([1, 2, 3], (1, 2, 3)), (0, (0,))]
)
def test_eos_token_id_is_one_or_several(eos, expected):
    assert make(eos_token_id=eos).eos_token_id == expected


@pytest.mark.parametrize(
    "key",
    [
        "pretraining_tp",
        "attention_dropout",
        "initializer_range",
        "use_cache",
        "auto_map",
        "torch_dtype",
        "somebody_elses_key",
    ],
)
def test_harmless_keys_change_nothing(key):
    assert make(**{key: "anything"}) == make()


def test_keys_that_are_not_used_are_known():
    harmless = {"pretraining_tp": 2, "auto_map": {}, "use_cache": True}
    assert unused_keys(HF | harmless) == ["auto_map", "pretraining_tp", "use_cache"]
    assert unused_keys(HF | {"sliding_window": None, "rope_theta": 1e4}) == []


@pytest.mark.parametrize("key", [key for key in HF if key.endswith(("size", "layers"))])
@pytest.mark.parametrize("value", [None, 0, -1, True, "64", 64.0])
def test_sizes_must_be_integers_above_zero(key, value):
    with pytest.raises(CorruptError, match=key):
        make(**{key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads='4'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_attention_heads": 5}, "head_dim is not given"),
        ({"head_dim": 15}, "odd"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps=1e.300"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps=1e-300"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_theta": 1e300}, "rope_theta=1e.300"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
    ],
)
def test_wrong_and_contradictory_values_are_refused_with_the_key(changes, words):
    with pytest.raises(CorruptError, match=words):
        make(**changes)


def test_rows_longer_than_the_model_takes_are_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"seq_len=129 .*=128"):
        make(max_position_embeddings=128).check_length(129, "data.seq_len")


def test_rows_as_long_as_the_model_takes_are_accepted():
    make(max_position_embeddings=128).check_length(128, "data.seq_len")
