import json
from collections.abc import Mapping

import pytest
from helpers.data_cases import CONFIG, field_files

from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError

# tests/parity/test_tokenizers.py compares the same with Transformers.
END, EOM, LAST = 475, 474, 483


def tokenizer(settings: Mapping[str, object], **others: object) -> Tokenizer:
    files = field_files("llama31", **settings)
    files |= {f"{name}.json": json.dumps(x).encode() for name, x in others.items()}
    return Tokenizer(files, CONFIG)


def token(content: str, **flags: object) -> dict[str, object]:
    return {"content": content, **flags}


def ids(settings: Mapping[str, object], text: str, **others: object) -> list[int]:
    return tokenizer(settings, **others).encode(text, add_bos=False)


def test_tokens_of_added_tokens_decoder_are_added_by_their_ids():
    decoder = {"485": token("<b>", special=True), "484": token("<a>", special=False)}
    found = ids({"added_tokens_decoder": decoder}, "<a><b><think>")
    assert found == [LAST + 1, LAST + 2, 482]


def test_flags_of_added_tokens_decoder_win():
    decoder = {"482": token("<think>", special=True)}
    template = tokenizer({"added_tokens_decoder": decoder}).template()
    assert "<think>" in template.controls
    assert "</think>" not in template.controls


def test_tokens_of_added_tokens_json_are_added_without_a_decoder():
    old = {"<b>": 485, "<a>": 484, "<not this>": 482}
    assert ids({}, "<a><b>", added_tokens=old) == [LAST + 1, LAST + 2]
    assert ids({}, "<not this>", added_tokens=old)[0] < 470
    some = {"added_tokens_decoder": {}}
    assert ids(some, "<a>", added_tokens=old)[0] < 470


def test_additional_special_tokens_are_added_in_order():
    settings = {"additional_special_tokens": ["<x>", "<think>"]}
    others = {"special_tokens_map": {"additional_special_tokens": ["<y>", "<x>"]}}
    assert ids(settings, "<x><y>", **others) == [LAST + 1, LAST + 2]
    assert "<x>" in tokenizer(settings).template().controls


def test_pad_token_that_the_tokenizer_lacks_is_no_error():
    assert tokenizer({"pad_token": "<pad>"}).pad_id is None  # it has no embedding
    assert ids({"pad_token": "<pad>"}, "<pad>") == [LAST + 1]


@pytest.mark.parametrize(
    ("in_map", "in_config", "decoder", "eos"),
    [
        ("<|eom_id|>", "<|eot_id|>", False, EOM),
        ("<|eot_id|>", "<|eom_id|>", False, END),
        ("<|eom_id|>", "<|eot_id|>", True, END),
        (None, "<|eom_id|>", False, EOM),
    ],
)
def test_special_tokens_map_decides_unless_there_is_a_decoder(
    in_map, in_config, decoder, eos
):
    settings = {"eos_token": in_config}
    if decoder:
        settings["added_tokens_decoder"] = {"475": token("<|eot_id|>", special=True)}
    others = {"special_tokens_map": {"eos_token": in_map}} if in_map else {}
    assert tokenizer(settings, **others).eos_id == eos


def test_added_tokens_json_is_part_of_the_fingerprint():
    one, other = (tokenizer({}, added_tokens={x: 484}) for x in ("<a>", "<b>"))
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"added_tokens_decoder": []}, {}),
        ({"added_tokens_decoder": {"1": "<a>"}}, {}),
        ({"added_tokens_decoder": {"1": token("")}}, {}),
        ({"added_tokens_decoder": {"x": token("<a>")}}, {}),
        ({"added_tokens_decoder": {"1": token("<a>", special=1)}}, {}),
        ({"additional_special_tokens": [1]}, {}),
        ({}, {"added_tokens": {"<a>": "1"}}),
        ({}, {"added_tokens": {"<a>": True}}),
    ],
)
def test_entries_that_are_no_tokens_are_corrupt(settings, others):
    with pytest.raises(CorruptError, match=r"added_tokens|additional_special"):
        tokenizer(settings, **others)
