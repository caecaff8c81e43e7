"""Token ids of what people's tokenizers and conversations hold, compared with Transformers."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import transformers_4
from helpers.data_cases import CONFIG, field_files
from transformers import AutoTokenizer

from jlora.data.read.conversations import messages_of, tools_of
from jlora.data.tokenize.tokenizer import Tokenizer


@pytest.fixture(params=["Transformers 4", "Transformers 5"])
def both(request, tmp_path) -> Callable[[dict[str, bytes]], tuple[Tokenizer, Any]]:
    """Returns a function: the tokenizer of files, as jlora and as Transformers reads them."""
    new = request.param == "Transformers 5"
    reader: Any = AutoTokenizer if new else transformers_4.AutoTokenizer

    def read(files: dict[str, bytes]) -> tuple[Tokenizer, Any]:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        return Tokenizer(files, CONFIG), reader.from_pretrained(tmp_path)

    return read


THOUGHT = '<think>\nwhy\n</think>\n\n<|python_tag|>{"f": "<think>"}'
CONVERSATIONS = [
    [("user", "a <think>b</think>"), ("assistant", THOUGHT)],
    [("system", "</think> x"), ("user", "a"), ("assistant", f"x {THOUGHT} é")],
    [("user", "a"), ("assistant", "<|finetune_right_pad_id|>"), ("user", "<think>")],
]


@pytest.mark.parametrize("said", CONVERSATIONS)
@pytest.mark.parametrize("name", ["llama31", "r1_distill"])
def test_ids_of_reasoning_and_tool_markers(both, name, said):
    ours, theirs = both(field_files(name))
    messages = [{"role": role, "content": text} for role, text in said]
    expected = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ours.encode_chat(messages) == expected


def token(content: str, **flags: bool) -> dict[str, object]:
    return {"content": content, **flags}


def with_eos(map_eos: str, config_eos: str, **settings: object) -> dict[str, bytes]:
    """Files in which the two places name another EOS."""
    files = field_files(
        "llama31", eos_token=config_eos, pad_token=config_eos, **settings
    )
    special = {"bos_token": "<|begin_of_text|>", "eos_token": map_eos}
    return files | {"special_tokens_map.json": json.dumps(special).encode()}


DECODER = {"475": token("<|eot_id|>", special=True)}
EOS_FILES = {
    "map decides": with_eos("<|eom_id|>", "<|eot_id|>"),
    "map decides, the other way": with_eos("<|eot_id|>", "<|eom_id|>"),
    "decoder": with_eos("<|eom_id|>", "<|eot_id|>", added_tokens_decoder=DECODER),
    "empty decoder": with_eos("<|eom_id|>", "<|eot_id|>", added_tokens_decoder={}),
    "only in config": field_files("llama31", eos_token="<|eom_id|>"),
}


@pytest.mark.parametrize("case", EOS_FILES)
def test_eos_is_that_of_transformers(both, case):
    ours, theirs = both(EOS_FILES[case])
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)


def added(settings: dict[str, object], **others: object) -> dict[str, bytes]:
    files = field_files("llama31", **settings)
    return files | {f"{n}.json": json.dumps(x).encode() for n, x in others.items()}


NEW = {
    "484": token("<tool>", special=False, normalized=False),
    "486": token("<b>", special=True, normalized=False),
    "485": token("<a>", special=False, normalized=True, lstrip=True),
    "482": token("<think>", special=True),  # with other flags than tokenizer.json
}
SPECIAL = {"additional_special_tokens": ["<x>", "<|python_tag|>"]}
ADDED = {
    "decoder": added({"added_tokens_decoder": NEW}),
    "decoder and lists": added(
        {"added_tokens_decoder": NEW, "additional_special_tokens": ["<y>", "<tool>"]},
        special_tokens_map=SPECIAL,
        added_tokens={"<z>": 490},
    ),
    "added_tokens.json": added({}, added_tokens={"<z>": 485, "<y>": 484, "no": 482}),
    "added_tokens.json, special": added(
        {"additional_special_tokens": ["<y>"]}, added_tokens={"<z>": 485, "<y>": 484}
    ),
    "special_tokens_map": added({}, special_tokens_map=SPECIAL),
    "a pad of their own": added({"pad_token": "<pad>", "unk_token": "<unk>"}),
    "a pad that is only a word": added({"pad_token": "a"}),
}
TEXTS = [
    "<tool> <a>b<b>c <y><z> <x> <think>a</think><pad>",
    "x<y> z<z><a> <tool><unk><|python_tag|> no",
]


@pytest.mark.parametrize("case", ADDED)
def test_tokens_that_tokenizer_json_lacks(both, case):
    ours, theirs = both(ADDED[case])
    for text in TEXTS:
        assert (
            ours.encode(text, add_bos=False)
            == theirs(text, add_special_tokens=False)["input_ids"]
        )
    pad = theirs.pad_token_id
    assert ours.pad_id == (pad if pad < 484 else None)  # else it has no embedding
    messages = [
        {"role": "user", "content": "<tool>"},
        {"role": "assistant", "content": TEXTS[1]},
    ]
    if case.startswith("decoder"):  # elsewhere it is special and stays text
        expected = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert ours.encode_chat(messages) == expected


def test_ids_of_tools_that_are_json_text(both):
    ours, theirs = both(field_files("llama31"))
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather"}}]},
        {"role": "tool", "content": "22"},
        {"role": "assistant", "content": "It is 22 degrees."},
    ]
    function = messages[1]["tool_calls"][0]["function"]
    function["arguments"] = {"city": "Paris"}
    expected = theirs.apply_chat_template(messages, [tool], return_dict=True)
    function["arguments"] = '{"city": "Paris"}'
    row = {"messages": json.dumps(messages), "tools": [json.dumps(tool)]}
    record = messages_of(row, "messages"), tools_of(row, "tools")
    assert ours.encode_chat(*record) == expected["input_ids"]
