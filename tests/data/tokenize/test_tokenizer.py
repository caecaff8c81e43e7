import dataclasses
import json

import pytest
from helpers.data_cases import CONFIG, make_files, make_tokenizer

from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, UnsupportedError


def test_missing_tokenizer_json_says_what_to_do():
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        Tokenizer({"tokenizer.model": b""}, CONFIG)


def test_broken_tokenizer_json_is_corrupt():
    with pytest.raises(CorruptError, match=r"tokenizer\.json"):
        Tokenizer({"tokenizer.json": b"{}"}, CONFIG)


def test_special_token_outside_the_vocabulary_is_corrupt():
    with pytest.raises(CorruptError, match="<nope>"):
        make_tokenizer(eos_token="<nope>")


def test_bos_is_added_once_where_the_tokenizer_adds_one():
    tokenizer = make_tokenizer("llama2")
    assert tokenizer.encode("the sum", add_bos=True)[:2] == [
        tokenizer.bos_id,
        *tokenizer.encode("the sum", add_bos=False)[:1],
    ]


def test_bos_in_the_text_is_not_doubled():
    tokenizer = make_tokenizer("llama2")
    once = tokenizer.encode("<s>sum", add_bos=False)
    assert tokenizer.encode("<s>sum", add_bos=True) == once


def test_bos_is_left_out_on_request():
    tokenizer = make_tokenizer("llama2")
    assert tokenizer.bos_id not in tokenizer.encode("the sum", add_bos=False)


def test_bos_is_never_added_where_the_tokenizer_adds_none():
    tokenizer = make_tokenizer("chatml")
    assert tokenizer.bos_id not in tokenizer.encode("the sum", add_bos=True)


@pytest.mark.parametrize(("name", "add_bos"), [("llama2", False), ("chatml", True)])
def test_add_bos_token_of_the_config_decides(name, add_bos):
    assert make_tokenizer(name, add_bos_token=add_bos).adds_bos == add_bos


def test_saved_truncation_and_padding_are_switched_off():
    files = make_files()
    document = json.loads(files["tokenizer.json"])
    document["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    document["padding"] = {
        "strategy": {"Fixed": 4},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    files["tokenizer.json"] = json.dumps(document).encode()
    text = "What is the sum of two numbers?"
    ids = Tokenizer(files, CONFIG).encode(text, add_bos=False)
    assert ids == make_tokenizer().encode(text, add_bos=False)


def test_decode_leaves_special_tokens_out():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("the sum<|im_end|>", add_bos=False)
    assert tokenizer.decode(ids) == "the sum"


def test_stop_ids_are_the_union_of_all_files():
    files = make_files() | {"generation_config.json": b'{"eos_token_id": [7, 8]}'}
    config = dataclasses.replace(CONFIG, eos_token_id=(6,))
    tokenizer = Tokenizer(files, config)
    assert tokenizer.stop_ids == {6, 7, 8, tokenizer.eos_id}


def test_special_tokens_fall_back_to_the_model_config():
    files = make_files()
    files.pop("tokenizer_config.json")
    config = dataclasses.replace(CONFIG, eos_token_id=(2,), pad_token_id=-1)
    tokenizer = Tokenizer(files, config)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, None)


def test_fingerprint_depends_on_the_template():
    assert make_tokenizer().fingerprint != make_tokenizer(chat_template="").fingerprint


def test_continuation_gets_no_space_in_front():
    tokenizer = make_tokenizer("llama2")
    head = tokenizer.encode("the", add_bos=False)
    assert tokenizer.decode([*head, *tokenizer.encode_continuation("sum")]) == "thesum"
