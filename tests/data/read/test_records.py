import pytest
from helpers.data_cases import (
    all_masks,
    all_tokens,
    chat,
    load,
    make_tokenizer,
    write_rows,
)

from jlora.errors import CorruptError, UsageError

GOOD = {"text": "the sum"}
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "yes"}
HUMAN, GPT = {"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}


def refusal(path, rows, **config) -> str:
    with pytest.raises(CorruptError) as caught:
        load(write_rows(path / "data.jsonl", rows), **config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (GOOD, "text"),
        ({"prompt": "the", "completion": " sum"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion"),
        (chat("the", "sum"), "messages"),
        (chat("the", "sum") | {"text": "ignored", "id": 3}, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}, GPT]}, "sharegpt"),
        ({"instruction": "add", "output": "five", "text": "ignored"}, "alpaca"),
    ],
)
def test_format_is_detected_from_the_first_record(tmp_path, row, format):
    data = load(write_rows(tmp_path / "data.jsonl", [row]))
    assert f"format {format}," in data.summary[0]


def test_named_format_overrides_detection(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [chat("a", "b") | GOOD])
    assert "format text," in load(path, format="text").summary[0]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_line_ends_byte_order_mark_and_blank_lines_are_accepted(tmp_path, line_end):
    path = tmp_path / "data.jsonl"
    lines = [b'\xef\xbb\xbf{"text": "a"}', b"", b'{"text": "b"}', b"  "]
    path.write_bytes(line_end.join(lines))
    assert load(path).num_records == 2


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ['{"text": "a\u2028b\u0085c"}'])
    assert load(path).num_records == 1


def test_nul_and_carriage_return_in_a_text_are_kept(tmp_path):
    tokenizer = make_tokenizer()
    path = write_rows(tmp_path / "data.jsonl", [{"text": "a\0b\r\n"}])
    ids = all_tokens(load(path, tokenizer))
    assert tokenizer.decode(ids) == "a\0b\r\n"


def test_broken_line_names_file_line_and_column(tmp_path):
    message = refusal(tmp_path, [GOOD, '{"text": "a" "b"}'])
    assert "data.jsonl" in message
    assert "line 2, column 14: not JSON" in message


def test_every_bad_line_is_listed_at_once(tmp_path):
    rows = [GOOD, "{", {"text": None}, {"texd": "a"}, GOOD, {"text": "\ud800"}]
    message = refusal(tmp_path, rows)
    assert "4 of 6 records" in message
    assert [f"line {i}" in message for i in range(1, 7)] == [0, 1, 1, 1, 0, 1]


def test_long_list_of_bad_lines_is_capped(tmp_path):
    message = refusal(tmp_path, [GOOD, *[{"text": 1}] * 20])
    assert message.count("line ") == 12
    assert "and 8 more" in message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"txt": "a"}, "no text; did you mean 'txt'?"),
        ({"text": None}, "text is null"),
        ({"text": 3}, "text is a number"),
        ({"text": ["a"]}, "text is a list"),
        ({"text": ""}, "text is empty"),
        ('["a"]', "expected an object, found a list"),
        ('"a"', "expected an object, found a string"),
        ('{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        (b'{"text": "\xff"}', "column 11: not UTF-8"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_bad_text_record_names_line_and_reason(tmp_path, row, reason):
    message = refusal(tmp_path, [GOOD, row])
    assert "line 2" in message
    assert reason in message


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages is null"),
        ("hello", "messages is a string"),
        ([], "messages is an empty list"),
        (["hello"], "messages[0] is a string"),
        ([{"role": "user"}], "messages[0] has no content"),
        ([{"content": "a"}], "messages[0] has no role"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content is null"),
        ([{"role": "user", "content": [{"text": "a"}]}], "content[0] is of type None"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1].content is empty"),
        ([{"role": "", "content": "a"}], "messages[0].role is empty"),
        ([USER, {"role": "assitant", "content": "a"}], "did you mean 'assistant'?"),
        ([{"role": "user", "content": "\ud800"}, ANSWER], "lone surrogate"),
    ],
)
def test_bad_conversation_names_line_and_reason(tmp_path, messages, reason):
    message = refusal(tmp_path, [chat("a", "b"), {"messages": messages}])
    assert "line 2" in message
    assert reason in message


def test_tools_that_are_no_list_are_refused(tmp_path):
    for tools, reason in [("x", "a string"), ("{}", "an object"), (3, "a number")]:
        rows = [chat("a", "b") | {"tools": tools}]
        assert f"tools is {reason}" in refusal(tmp_path, rows)


def test_first_record_decides_between_strings_and_messages(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": [USER], "completion": [ANSWER]},
    ]
    assert "line 2: prompt is a list; expected a string" in refusal(tmp_path, rows)


def test_unknown_columns_list_what_is_expected(tmp_path):
    message = refusal(tmp_path, [{"question": "a", "answer": "b"}])
    assert "answer, question" in message
    assert "messages or prompt + completion or conversations or" in message
    assert "{prompt: question, completion: answer}" in message


def test_overlong_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.data.read.text_rows.MAX_LINE_BYTES", 100)
    assert "line 2: longer than 100" in refusal(tmp_path, [GOOD, {"text": "a" * 100}])


def tokens_of(path, row, **config) -> list[int]:
    tokenizer = config.pop("tokenizer", None) or make_tokenizer()
    data = load(write_rows(path / "data.jsonl", [row]), tokenizer, **config)
    return all_tokens(data)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {"conversations": [HUMAN, GPT], "system": "be brief"},
            [("system", "be brief"), ("user", "hello"), ("assistant", "yes")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be brief"},
                    {"from": "user", "value": "add"},
                    {"from": "observation", "value": "5"},
                    {"from": "assistant", "value": "five"},
                ]
            },
            [
                ("system", "be brief"),
                ("user", "add"),
                ("tool", "5"),
                ("assistant", "five"),
            ],
        ),
        (
            {"instruction": "add", "input": "2 3", "output": "five", "id": 1},
            [("user", "add\n2 3"), ("assistant", "five")],
        ),
        (
            {"instruction": "add", "input": "", "output": "five", "system": None},
            [("user", "add"), ("assistant", "five")],
        ),
        (
            {
                "instruction": "and now?",
                "output": "six",
                "system": "be brief",
                "history": [["add", "five"]],
            },
            [
                *[("system", "be brief"), ("user", "add"), ("assistant", "five")],
                *[("user", "and now?"), ("assistant", "six")],
            ],
        ),
    ],
)
def test_sharegpt_and_alpaca_become_conversations(tmp_path, row, messages):
    same = {"messages": [{"role": role, "content": text} for role, text in messages]}
    assert tokens_of(tmp_path, row) == tokens_of(tmp_path, same)


@pytest.mark.parametrize(
    ("input", "expected"),
    [
        (
            "2 3",
            "Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nadd {x}\n\n### Input:\n2 3\n\n"
            "### Response:five",
        ),
        (
            "",
            "Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nadd {x}\n\n"
            "### Response:five",
        ),
    ],
)
def test_alpaca_without_a_template_uses_the_published_form(tmp_path, input, expected):
    tokenizer = make_tokenizer(chat_template=None)
    row = {"instruction": "add {x}", "input": input, "output": "five"}
    path = write_rows(tmp_path / "data.jsonl", [row])
    data = load(path, tokenizer)
    assert tokenizer.decode(all_tokens(data)) == expected
    supervised = [
        t for t, m in zip(all_tokens(data), all_masks(data), strict=True) if m
    ]
    assert tokenizer.decode(supervised) == "five"
    assert supervised[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": "a"}, "conversations is a string; expected a list"),
        ({"conversations": []}, "conversations is an empty list"),
        ({"conversations": ["a"]}, "conversations[0] is a string; expected an object"),
        ({"conversations": [{"value": "a"}]}, "conversations[0] has no from"),
        ({"conversations": [USER]}, "data.fields={messages: conversations}"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0] has no value"),
        (
            {"conversations": [HUMAN | {"value": 3}]},
            "conversations[0].value is a number; expected a string",
        ),
        (
            {"conversations": [{"from": "humann", "value": "a"}]},
            "conversations[0].from is 'humann'; did you mean 'human'?",
        ),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "value is empty"),
        ({"conversations": [HUMAN, GPT], "system": 3}, "system is a number"),
        ({"conversations": [HUMAN, GPT], "tools": "x"}, "tools is a string"),
    ],
)
def test_bad_sharegpt_row_names_line_and_reason(tmp_path, row, reason):
    message = refusal(tmp_path, [{"conversations": [HUMAN, GPT]}, row])
    assert "line 2" in message
    assert reason in message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "", "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": "a", "output": None}, "output is null"),
        ({"instruction": "a"}, "no output"),
        ({"instruction": "a", "output": "b", "input": 3}, "input is a number"),
        ({"instruction": "a", "output": "b", "history": "x"}, "history is a string"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] is no"),
    ],
)
def test_bad_alpaca_row_names_line_and_reason(tmp_path, row, reason):
    message = refusal(tmp_path, [{"instruction": "a", "output": "b"}, row])
    assert "line 2" in message
    assert reason in message


def test_alpaca_with_a_history_needs_a_template(tmp_path):
    row = {"instruction": "a", "output": "b", "history": [["c", "d"]]}
    path = write_rows(tmp_path / "data.jsonl", [row])
    with pytest.raises(CorruptError, match="history needs a chat template"):
        load(path, make_tokenizer(chat_template=None))


@pytest.mark.parametrize(
    ("row", "fields", "format"),
    [
        (
            {"question": "the", "answer": " sum"},
            {"prompt": "question", "completion": "answer"},
            "prompt_completion",
        ),
        ({"body": "the sum"}, {"text": "body"}, "text"),
        ({"conversations": [USER, ANSWER]}, {"messages": "conversations"}, "messages"),
        ({"chat": [HUMAN, GPT]}, {"conversations": "chat"}, "sharegpt"),
        ({"instruction": "a", "response": "b"}, {"output": "response"}, "alpaca"),
        # The named fields decide, not a format that comes earlier.
        (chat("a", "b") | {"body": "c"}, {"text": "body"}, "text"),
    ],
)
def test_columns_may_have_other_names(tmp_path, row, fields, format):
    data = load(write_rows(tmp_path / "data.jsonl", [row]), fields=fields)
    assert f"format {format}," in data.summary[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"promt": "q"}, "'promt' is no field of .*did you mean 'prompt'"),
        ({"prompt": "q", "text": "t"}, "no one format has all of"),
    ],
)
def test_fields_of_no_format_are_a_usage_error(tmp_path, fields, words):
    path = write_rows(tmp_path / "data.jsonl", [GOOD])
    with pytest.raises(UsageError, match=words):
        load(path, fields=fields)


def test_missing_column_is_named_as_in_the_data(tmp_path):
    fields = {"prompt": "question", "completion": "answer"}
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "anwser": "b"}]
    message = refusal(tmp_path, rows, fields=fields)
    assert "line 2: no answer; did you mean 'anwser'?" in message


def test_skipped_rows_are_counted_by_reason_and_named(tmp_path):
    rows = [GOOD, {"text": ""}, "{", {"text": 3}, {"text": ""}, GOOD]
    path = write_rows(tmp_path / "data.jsonl", rows)
    data = load(path, on_bad_row="skip", max_bad_rows=4)
    assert data.num_records == 2
    lines = "\n".join(data.summary)
    assert "left out 2 records: text is empty (line 2, 5)" in lines
    assert "left out 1 record: not JSON" in lines
    assert "left out 1 record: text is a number; expected a string (line 4)" in lines


def test_more_bad_rows_than_the_cap_are_refused(tmp_path):
    rows = [GOOD, {"text": ""}, {"text": ""}]
    path = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(CorruptError, match=r"more than data\.max_bad_rows=1 bad rows"):
        load(path, on_bad_row="skip", max_bad_rows=1)


def test_refusal_names_the_way_to_skip(tmp_path):
    assert "data.on_bad_row=skip" in refusal(tmp_path, [GOOD, {"text": ""}])


@pytest.mark.parametrize("rows", [["{", "["], [{"text": ""}, {"text": None}]])
def test_nothing_but_bad_rows_is_a_usage_error_if_they_may_be_skipped(tmp_path, rows):
    path = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(UsageError, match=r"nothing .*to train on") as error:
        load(path, on_bad_row="skip")
    assert "line 2" in str(error.value)
    assert "on_bad_row=skip" not in str(error.value)


def test_nothing_but_bad_rows_above_the_cap_is_corrupt(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ["{"] * 9)
    with pytest.raises(CorruptError, match=r"more than data\.max_bad_rows=8 .*9 of 9"):
        load(path, on_bad_row="skip", max_bad_rows=8)


@pytest.mark.parametrize("bad", [8191, 8192])
def test_a_file_that_begins_with_8192_bad_rows_is_given_up(tmp_path, bad):
    path = write_rows(tmp_path / "data.jsonl", ["{"] * bad + [GOOD])
    if bad == 8192:
        with pytest.raises(UsageError, match="8,192 of 8,192 records cannot be used"):
            load(path, on_bad_row="skip", max_bad_rows=10_000)
    else:
        data = load(path, on_bad_row="skip", max_bad_rows=10_000)
        assert data.num_records == 1
