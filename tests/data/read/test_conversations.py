import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data_cases import CONFIG, field_files, load, write_rows

from jlora.data.read.bad_rows import RowError
from jlora.data.read.conversations import (
    messages_of,
    sharegpt_messages,
    sharegpt_tools,
    take_weights,
    tools_of,
)
from jlora.data.tokenize.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
ARGUMENTS = {"city": "Paris"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
MESSAGES = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "22"},
    {"role": "assistant", "content": "It is 22 degrees."},
]


def ids(path, name: str = "llama31") -> list[int]:
    tokenizer = Tokenizer(field_files(name), CONFIG)
    (record,) = [load(path, tokenizer, vocab_size=484, seq_len=900).record(0)]
    return record[0].tolist()


@pytest.fixture
def plain(tmp_path) -> list[int]:
    row = {"messages": MESSAGES, "tools": [TOOL]}
    return ids(write_rows(tmp_path / "plain.jsonl", [row]))


def with_text_arguments() -> list[dict[str, object]]:
    function = {**CALL["function"], "arguments": json.dumps(ARGUMENTS)}
    call = {"type": "function", "function": function}
    return [MESSAGES[0], {**MESSAGES[1], "tool_calls": [call]}, *MESSAGES[2:]]


def with_nulls() -> list[dict[str, object]]:
    arguments = {"city": "Paris", "unit": None}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Weather in Paris?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        *MESSAGES[2:],
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps(MESSAGES), "tools": json.dumps([TOOL])},
        {"messages": [json.dumps(m) for m in MESSAGES], "tools": [json.dumps(TOOL)]},
        {"messages": with_text_arguments(), "tools": [TOOL]},
        {"messages": with_nulls(), "tools": [TOOL | {"strict": None}]},
        {
            "conversations": [
                {"from": "human", "value": "Weather in Paris?"},
                {
                    "from": "function_call",
                    "value": json.dumps({"name": "weather", "arguments": ARGUMENTS}),
                },
                {"from": "observation", "value": "22"},
                {"from": "gpt", "value": "It is 22 degrees."},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
    ],
)
def test_ids_equal_those_of_plain_messages_and_tools(tmp_path, plain, row):
    assert ids(write_rows(tmp_path / "data.jsonl", [row])) == plain


def json_column(values: Sequence[str | None]) -> pa.Array:
    return pa.ExtensionArray.from_storage(
        pa.json_(pa.string()), pa.array(values, pa.string())
    )


@pytest.mark.parametrize("form", ["text", "json", "list of json", "struct with json"])
def test_json_columns_of_parquet_files_are_data(tmp_path, plain, form):
    messages, tools = json.dumps(MESSAGES), json.dumps([TOOL])
    if form == "text":
        table = pa.table({"messages": [messages], "tools": [tools]})
    elif form == "json":
        table = pa.table(
            {"messages": json_column([messages]), "tools": json_column([tools])}
        )
    elif form == "list of json":
        ends = pa.array([0, 1], pa.int32())
        inner = pa.ListArray.from_arrays(ends, json_column([json.dumps(TOOL)]))
        table = pa.table({"messages": json_column([messages]), "tools": inner})
    else:
        calls = [json.dumps(m["tool_calls"]) if "tool_calls" in m else None
                 for m in MESSAGES]  # fmt: skip
        turns = pa.StructArray.from_arrays(
            [
                pa.array([m["role"] for m in MESSAGES]),
                pa.array([m.get("content") for m in MESSAGES]),
                pa.array([m.get("name") for m in MESSAGES]),
                json_column(calls),
            ],
            ["role", "content", "name", "tool_calls"],
        )
        rows = pa.ListArray.from_arrays(pa.array([0, 4], pa.int32()), turns)
        table = pa.table({"messages": rows, "tools": json_column([tools])})
    pq.write_table(table, tmp_path / "data.parquet")
    assert ids(tmp_path / "data.parquet") == plain


def test_a_null_inside_json_text_is_data():
    text = '[{"function": {"name": "f", "arguments": {"unit": null}}}]'
    (tool,) = tools_of({"tools": text}, "tools") or []
    assert tool["function"]["arguments"] == {"unit": None}


@pytest.mark.parametrize("tools", [None, "", " ", "[]", "null"])
def test_no_tools(tools):
    assert tools_of({"tools": tools}, "tools") is None
    assert sharegpt_tools({"tools": tools}, "tools") is None


def test_an_empty_list_of_tools_stays_one_as_in_transformers():
    assert tools_of({"tools": []}, "tools") == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "[0].value is a string; expected a tool call, or the JSON text"),
        ("[]", "empty list of tool calls"),
        ('{"name": 3}', "is no tool call"),
        ('"f"', "is no tool call"),
    ],
)
def test_bad_function_call(value, reason):
    row = {"conversations": [{"from": "function_call", "value": value}]}
    with pytest.raises(RowError) as error:
        sharegpt_messages(row, "conversations")
    assert reason in str(error.value)


def test_several_calls_of_one_turn():
    value = json.dumps([{"name": "f", "arguments": {"x": 1}}, {"name": "g"}])
    row = {"conversations": [{"from": "function_call", "value": value}]}
    (message,) = sharegpt_messages(row, "conversations")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": {"x": 1}},
        {"name": "g", "arguments": {}},
    ]


def test_parts_that_are_not_text_are_refused_by_name():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]
    row = {"messages": [{"role": "user", "content": parts}]}
    with pytest.raises(RowError, match=r"content\[1\] is of type 'image_url'"):
        messages_of(row, "messages")


@pytest.mark.parametrize(
    ("key", "value", "trained"),
    [
        *[("weight", 0, False), ("weight", 0.0, False), ("weight", 1, True)],
        *[("train", False, False), ("train", True, True), ("weight", None, True)],
        *[("training", False, False), ("training", True, True)],
    ],
)
def test_weights_are_taken_out_of_the_messages(key, value, trained):
    answer = {"role": "assistant", "content": "a"}
    messages, untrained = take_weights([answer, answer | {key: value}])
    assert messages == [answer, answer]
    assert untrained == (set() if trained else {1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("weight", 0.5), ("weight", True), ("weight", "0"), ("weight", 2)],
        *[("train", 0), ("train", "false"), ("training", 1.0), ("training", [])],
    ],
)
def test_other_weights_are_refused(key, value):
    with pytest.raises(RowError, match=f"message 0 has {key} "):
        take_weights([{"role": "assistant", "content": "a", key: value}])
